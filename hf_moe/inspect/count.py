"""Parameters counted on the model itself, on the meta device: what our classes have, to the last element."""

import copy
import re

import torch

from ..register import FAMILIES, load_class, model_type_of
from .architecture import Architecture
from .cost import PARTS, Part, active_of, parameters
from .sources import Source

AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForCausalLM")
# First match wins. MTP layers are told by their index beforehand.
_PATTERNS = (
    ("mtp", r"(^|\.)mtp\."),
    ("vision", r"(^|\.)(vision_|vit_)"),
    ("head", r"(^|\.)lm_head\."),
    ("embedding", r"(^|\.)(embed_tokens|ngram_embeddings|oe_embed)"),
    ("attention", r"\.self_attn\."),
    ("router", r"\.(gate|router)\.(weight|classifier)"),
    ("routed", r"\.experts\.|\.moe\.(gate|up|gate_up|down)_proj"),
    ("shared", r"\.(shared_experts?|share_expert)\."),
    ("dense", r"\.(mlp|mlps)\."),
    ("norm", r"norm"),
)


def count_parameters(source: Source, architecture: Architecture) -> tuple[dict[str, Part], str]:
    """Elements by part, and where the numbers come from: a model on the meta device, or formulas where we have none."""
    model_type = architecture.model_type
    if model_type not in FAMILIES:
        return parameters(architecture), "formula"
    totals = count_on_meta(source)
    return {
        part: Part(totals[part], active_of(architecture, part, totals[part])) for part in PARTS
    }, "meta-device model"


def count_on_meta(source: Source) -> dict[str, int]:
    """Elements of the parameters of our class for this configuration, by part; the sum is `model.num_parameters()`."""
    model = build_on_meta(source)
    text = model.config.get_text_config()
    layers = getattr(text, "num_layers", None) or text.num_hidden_layers
    totals = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        totals[_part(name, layers)] += parameter.numel()
    return totals


def build_on_meta(source: Source) -> torch.nn.Module:
    """The model without any memory for its weights."""
    values = copy.deepcopy(source.config)
    values.pop("quantization_config", None)  # the shapes are those of the model in full precision
    values["model_type"] = model_type_of(values)
    config_class = load_class(FAMILIES[values["model_type"]])
    classes = config_class.remote_code_map
    reference = next(classes[name] for name in AUTO_CLASSES if name in classes)
    with torch.device("meta"):
        return load_class(reference)(config_class.from_dict(values))


def _part(name: str, layers: int) -> str:
    index = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if index and int(index[1]) >= layers and "vision" not in name:
        return "mtp"
    for part, pattern in _PATTERNS:
        if re.search(pattern, name):
            return part
    raise ValueError(f"{name} belongs to no part that `hf-moe inspect` knows.")
