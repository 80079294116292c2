"""What a model card says about a family beyond its configuration: who made it, under which licence, where to read on.

Facts are those of the releases' own pages. The licence belongs to a release, not to an architecture: it is stated only
for a base model that is known here, or that the user names with its licence.
"""

from dataclasses import dataclass
from pathlib import Path

LICENCES = Path(__file__).parent / "licences"


@dataclass(frozen=True)
class Licence:
    """A licence in the Hub's terms.

    - `id`: of the Hub's list; `other` for those that are not in it, which `name` and `link` then tell.
    - `text`: file of `LICENCES` that has to go with copies of the weights.
    """

    id: str
    title: str
    text: str
    name: str | None = None
    link: str | None = None

    def read(self) -> bytes:
        """The licence's text."""
        return (LICENCES / self.text).read_bytes()


@dataclass(frozen=True)
class Family:
    """An architecture as its makers published it.

    - `example`: the shipped configuration and release that the card in `model_cards/` is rendered from.
    """

    slug: str
    title: str
    maker: str
    summary: str
    example: str
    release: str
    citation: str
    languages: tuple[str, ...] = ("en", "zh")


DEEPSEEK_V2_LICENCE = Licence(
    "other",
    "DeepSeek Licence Agreement 1.0",
    "deepseek.txt",
    "deepseek",
    "https://github.com/deepseek-ai/DeepSeek-V2/blob/main/LICENSE-MODEL",
)
DEEPSEEK_LICENCE = Licence(
    "other",
    "DeepSeek Licence Agreement 1.0",
    "deepseek.txt",
    "deepseek",
    "https://github.com/deepseek-ai/DeepSeek-V3/blob/main/LICENSE-MODEL",
)
DEEPSEEK_MIT = Licence("mit", "MIT Licence", "mit-deepseek.txt")
KIMI_LICENCE = Licence(
    "other",
    "Modified MIT Licence",
    "modified-mit-kimi.txt",
    "modified-mit",
    "https://github.com/MoonshotAI/Kimi-K2/blob/main/LICENSE",
)
STEP3_LICENCE = Licence("apache-2.0", "Apache Licence 2.0", "apache-2.0.txt")
LONGCAT_LICENCE = Licence("mit", "MIT Licence", "mit-longcat.txt")

# Owner and beginning of the name of a repository, lower case, to its licence; the first row that fits counts.
RELEASES: tuple[tuple[str, Licence], ...] = (
    ("deepseek-ai/deepseek-r1", DEEPSEEK_MIT),
    ("deepseek-ai/deepseek-v3-0324", DEEPSEEK_MIT),
    ("deepseek-ai/deepseek-v3.1", DEEPSEEK_MIT),
    ("deepseek-ai/deepseek-v3", DEEPSEEK_LICENCE),
    ("deepseek-ai/deepseek-v2", DEEPSEEK_V2_LICENCE),
    ("deepseek-ai/deepseek-coder-v2", DEEPSEEK_V2_LICENCE),
    ("moonshotai/kimi-k2", KIMI_LICENCE),
    ("stepfun-ai/step3", STEP3_LICENCE),
    ("meituan-longcat/longcat-", LONGCAT_LICENCE),
)

_DEEPSEEK_V2 = Family(
    "deepseek-v2",
    "DeepSeek-V2",
    "DeepSeek",
    "Mixture of experts with multi-head latent attention, whose cache holds one latent vector a token and layer.",
    "deepseek-v2",
    "deepseek-ai/DeepSeek-V2",
    """@misc{deepseekv2,
  title={DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model},
  author={DeepSeek-AI},
  year={2024},
  eprint={2405.04434},
  archivePrefix={arXiv},
  primaryClass={cs.CL}
}""",
)
_DEEPSEEK_V3 = Family(
    "deepseek-v3",
    "DeepSeek-V3",
    "DeepSeek",
    "Mixture of experts with multi-head latent attention, sigmoid routing that a bias balances without an auxiliary "
    "loss, and a layer for multi-token prediction.",
    "deepseek-v3",
    "deepseek-ai/DeepSeek-V3",
    """@misc{deepseekai2024deepseekv3technicalreport,
  title={DeepSeek-V3 Technical Report},
  author={DeepSeek-AI},
  year={2024},
  eprint={2412.19437},
  archivePrefix={arXiv},
  primaryClass={cs.CL},
  url={https://arxiv.org/abs/2412.19437}
}""",
)
_KIMI_K2 = Family(
    "kimi-k2",
    "Kimi-K2",
    "Moonshot AI",
    "The DeepSeek-V3 architecture with 384 routed experts, fewer heads and no expert groups.",
    "kimi-k2",
    "moonshotai/Kimi-K2-Instruct",
    """@misc{kimiteam2025kimik2openagentic,
  title={Kimi K2: Open Agentic Intelligence},
  author={Kimi Team},
  year={2025},
  eprint={2507.20534},
  archivePrefix={arXiv},
  primaryClass={cs.LG},
  url={https://arxiv.org/abs/2507.20534}
}""",
)
_STEP3 = Family(
    "step3",
    "Step3",
    "StepFun",
    "Mixture of experts with multi-matrix factorisation attention, in which all query heads share one key and value "
    "head, and a vision tower.",
    "step3",
    "stepfun-ai/step3",
    """@misc{step3system,
  title={Step-3 is Large yet Affordable: Model-system Co-design for Cost-effective Decoding},
  author={StepFun Team},
  year={2025},
  eprint={2507.19427},
  archivePrefix={arXiv},
  primaryClass={cs.LG},
  url={https://arxiv.org/abs/2507.19427}
}""",
)
_LONGCAT = Family(
    "longcat-flash",
    "LongCat-Flash",
    "Meituan",
    "Mixture of experts with zero-computation experts, two attention sublayers a layer and a shortcut around the "
    "experts.",
    "longcat-flash",
    "meituan-longcat/LongCat-Flash-Chat",
    """@misc{longcat2025flash,
  title={LongCat-Flash Technical Report},
  author={Meituan LongCat Team},
  year={2025},
  eprint={2509.01322},
  archivePrefix={arXiv},
  url={https://arxiv.org/abs/2509.01322}
}""",
)
# By model type. `DeepSeek-V2-Lite` and the n-gram LongCat are sizes and variants of the same architectures.
FAMILIES: dict[str, Family] = {
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": _KIMI_K2,
    "step3_vl": _STEP3,
    "step3_text": _STEP3,
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": _LONGCAT,
    "longcat": _LONGCAT,
    "longcat_next": _LONGCAT,
}


def plain_family(model_type: str) -> Family:
    """What a card says of a family that has no row: its name."""
    return Family(model_type.replace("_", "-"), f"`{model_type}`", "", "", "", "", "", languages=())


def licence_of(base_model: str | None) -> Licence | None:
    """The licence of a published release; `None` for one that is not in `RELEASES`."""
    name = (base_model or "").lower()
    return next((licence for beginning, licence in RELEASES if name.startswith(beginning)), None)
