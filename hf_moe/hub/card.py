"""Model cards, rendered from a configuration, the manifest of a conversion and what `hf-moe inspect` counts.

The text is `card.md` in this folder. A card ends with a line that holds its own checksum: as long as it fits, the card
is ours, and is written anew when the checkpoint changes; once somebody has edited it, it is theirs, and stays.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from yaml import YAMLError

from ..conversion.inference import RANK_FILE
from ..inspect import cost
from ..inspect.architecture import READERS, read_architecture
from ..inspect.count import count_parameters
from ..inspect.sources import Source, read_json, read_source, stored_precision
from ..units import bytes_text, count_text
from ..version import __version__
from .bundle import require_model_type
from .families import FAMILIES, Family, Licence, licence_of, plain_family
from .manifest import MANIFEST

TEMPLATE = Path(__file__).parent / "card.md"
CONTEXT = 32768  # tokens of the cache in the table of memory
PRECISIONS = {"bf16": "bfloat16", "fp8": "block FP8", "int4": "INT4 experts"}
# Model types that Transformers has itself. Of others, `AutoTokenizer` reads the configuration before it looks at the
# tokenizer, and fails on YaRN unless a class for it is registered or trusted.
NATIVE = ("deepseek_v2", "deepseek_v3", "longcat_flash")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
LICENCE_FILE = re.compile(r"(licen[cs]e|copying)([-._].*)?", re.IGNORECASE)
# What the Hub accepts as `license`, of those that weights have most often; others are `other` with a name.
HUB_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_MARK = "<!-- Written by hf-moe {version}; once edited, this card is yours and stays. sha256:{digest} -->\n"
_MARK_LINE = re.compile(r"<!-- Written by hf-moe [^;]*; .* sha256:([0-9a-f]{64}) -->\n\Z")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_MTP_LAYER = re.compile(r"\.mtp\.layers\.(\d+)\.")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class CardOptions:
    """What the user knows and the files do not say.

    - `base_model`: Hub id of the release that the weights come from; left out: as the manifest says.
    - `licence`: in the Hub's spelling (`mit`, `apache-2.0`, ...); left out: that of the base model.
    - `title`: heading; left out: the name of the repository or folder.
    """

    base_model: str | None = None
    licence: str | None = None
    title: str | None = None


@dataclass(frozen=True)
class Training:
    """The fine-tuning that made what a card is about.

    - `report`: the section on it, in Markdown.
    - `origin`: what was trained and on what, for a reader.
    - `datasets`: Hub ids.
    - `adapter`: the folder holds LoRA factors, and no model.
    """

    report: str
    origin: str
    datasets: tuple[str, ...] = ()
    adapter: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """What a card is about.

    - `name`: for the heading; `address`: what the snippets pass to `from_pretrained`.
    - `files`: names in the repository as it will be.
    - `tensors`: names of tensors; empty where the weights are not at hand.
    - `metadata`: what the README in the folder states, and under `ours` whether one of our cards does.
    """

    name: str
    address: str
    config: dict[str, Any]
    files: frozenset[str]
    manifest: dict[str, Any] | None = None
    tensors: frozenset[str] = frozenset()
    chat_template: bool = False
    code: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """Files of DeepSeek's inference code, one a rank, which Transformers does not load; 0 in the Hub's layout."""
        return sum(bool(RANK_FILE.fullmatch(name)) for name in self.files)


def read_checkpoint(folder: Path, address: str | None = None, code: bool = True) -> Checkpoint:
    """Reads the small files and the weights' headers of a folder. `code`: our modules are or will be there.

    Raises:
        FileNotFoundError, ValueError: for a folder without `config.json`, or a damaged file in it.
    """
    source = read_source(str(folder)) if folder.is_dir() else None
    if source is None:
        raise FileNotFoundError(f"{folder} is not a folder.")
    files = frozenset(path.name for path in folder.iterdir() if path.is_file())
    manifest = _read_object(folder / MANIFEST) if MANIFEST in files else None
    tokenizer = _read_object(folder / "tokenizer_config.json") if "tokenizer_config.json" in files else {}
    template = "chat_template.jinja" in files or bool(tokenizer.get("chat_template"))
    return Checkpoint(
        name=(address or folder.resolve().name).rpartition("/")[2],
        address=address or str(folder),
        config=source.config,
        files=files,
        manifest=manifest,
        tensors=_tensor_names(folder, files),
        chat_template=template,
        code=code,
        metadata=_readme_metadata(folder),
    )


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object.")
    return content


def _tensor_names(folder: Path, files: Iterable[str]) -> frozenset[str]:
    if "model.safetensors.index.json" in files:
        return frozenset(_read_object(folder / "model.safetensors.index.json").get("weight_map") or ())
    if "model.safetensors" not in files:
        return frozenset()
    try:
        with safe_open(folder / "model.safetensors", "pt") as opened:
            return frozenset(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{folder / 'model.safetensors'} is not a safetensors file: {error}") from error


def _readme_metadata(folder: Path) -> dict[str, Any]:
    """Licence and base model that the README of the folder states."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        stated = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, YAMLError):  # metadata that cannot be read: the README says nothing then
        return {}
    keys = ("base_model", "license", "license_name", "license_link")
    return {"ours": bool(_MARK_LINE.search(text)), **{key: stated[key] for key in keys if stated.get(key)}}


# --- whose card is it -------------------------------------------------------------------------------------------------


def signed(text: str) -> str:
    """The card with the line that tells whether it was edited since."""
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return text + _MARK.format(version=__version__, digest=digest)


def is_ours(text: str) -> bool:
    """Whether a card was written by `hf-moe` and not edited since."""
    text = text.replace("\r\n", "\n")
    mark = _MARK_LINE.search(text)
    return bool(mark) and hashlib.sha256(text[: mark.start()].encode("utf-8")).hexdigest() == mark[1]


# --- rendering --------------------------------------------------------------------------------------------------------


def render_card(checkpoint: Checkpoint, options: CardOptions = CardOptions(), training: Training | None = None) -> str:
    """The card as text, with its metadata, signed. That of a training is not: no file but it holds the report.

    Raises:
        ValueError: for a model that is not ours, or a licence that the Hub's metadata cannot hold.
    """
    model_type = require_model_type(checkpoint.config, checkpoint.name)
    family = FAMILIES.get(model_type) or plain_family(model_type)
    base = base_model_of(checkpoint, options)
    licence, metadata = _licence(checkpoint, options, family, base)
    adapter = training is not None and training.adapter
    data = ModelCardData(
        language=list(family.languages) if licence_of(base) else None,
        library_name="peft" if adapter else None if checkpoint.ranks else "transformers",
        datasets=list(training.datasets) or None if training else None,
        pipeline_tag="image-text-to-text" if model_type == "step3_vl" else "text-generation",
        base_model=base,
        base_model_relation=_relation(checkpoint, training) if base else None,
        tags=_tags(checkpoint, model_type) + (["hf-moe"] if training else []) + (["lora"] if adapter else []),
        **metadata,
    )
    parameters, memory, cache = _sizes(checkpoint, model_type)
    conversion, steps, checksums = ("", [], []) if training else _conversion(checkpoint)
    text = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=options.title or checkpoint.name,
        introduction=training.origin if training else _introduction(checkpoint, options, family, base),
        summary=family.summary,
        needs="With `hf-moe[train]` installed:" if adapter else _needs(checkpoint),
        snippets=[_adapter(checkpoint)] if adapter else snippets(checkpoint, model_type, base),
        parameters=parameters,
        memory=memory,
        cache=cache,
        context=CONTEXT,
        training=training.report if training else "",
        conversion=conversion,
        steps=steps,
        checksums=checksums,
        check=f"`hf-moe verify` on a downloaded copy compares its files with `{MANIFEST}`." if steps else "",
        licence=licence,
        citation=family.citation,
    ).content
    text = re.sub(r"\n{3,}", "\n\n", text.strip()) + "\n\n"
    return text.rstrip("\n") + "\n" if training else signed(text)


def base_model_of(checkpoint: Checkpoint, options: CardOptions) -> str | None:
    """The release that the weights come from: as told, by the manifest, or as an older README says."""
    if options.base_model:
        if not _HUB_NAME.fullmatch(options.base_model):
            raise ValueError(f"--base-model {options.base_model!r} is not of the form owner/name.")
        return options.base_model
    recorded = _recorded_base(checkpoint)
    if recorded:
        return recorded
    stated = checkpoint.metadata.get("base_model")
    stated = stated[0] if isinstance(stated, list) and stated else stated
    return stated if isinstance(stated, str) and _HUB_NAME.fullmatch(stated) else None


def _recorded_base(checkpoint: Checkpoint) -> str | None:
    """The repository that the first conversion from the Hub read."""
    names = (_source_name(step).partition("@")[0] for step in _steps(checkpoint.manifest))
    return next((name for name in names if _HUB_NAME.fullmatch(name)), None)


def _is_descendant(checkpoint: Checkpoint, options: CardOptions) -> bool:
    """Whether the base is only what somebody's README names: the weights are then those of a model made from it."""
    return not (options.base_model or _recorded_base(checkpoint) or checkpoint.metadata.get("ours"))


def _titles(checkpoint: Checkpoint) -> str:
    """What the conversions did."""
    return "\n".join(str(step.get("title", "")) for step in _steps(checkpoint.manifest)).lower()


def _steps(manifest: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The conversions that made the files, the first one first."""
    steps = (manifest or {}).get("steps")
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _source_name(step: Mapping[str, Any]) -> str:
    source = step.get("source")
    name = source.get("name") if isinstance(source, dict) else source
    return name if isinstance(name, str) else ""


def _relation(checkpoint: Checkpoint, training: Training | None) -> str | None:
    """How the files come from the base, where a conversion says so; the Hub finds a word of its own elsewhere."""
    if training is not None:
        return "adapter" if training.adapter else "finetune"
    titles = _titles(checkpoint)
    if "lora" in titles or "merge" in titles:
        return "finetune"
    quantised = "to block fp8" in titles and stored_precision(checkpoint.config) == "fp8"
    return "quantized" if quantised else None


def _tags(checkpoint: Checkpoint, model_type: str) -> list[str]:
    tags = [model_type, "mixture-of-experts"]
    if has_mtp(checkpoint):
        tags.append("multi-token-prediction")
    precision = stored_precision(checkpoint.config)
    if precision in ("fp8", "int4"):
        tags.append(precision)
    if checkpoint.code and not checkpoint.ranks:
        tags.append("custom_code")
    return tags


def has_mtp(checkpoint: Checkpoint) -> bool:
    """Whether there are layers for multi-token prediction."""
    return mtp_depths(checkpoint) > 0


def mtp_depths(checkpoint: Checkpoint) -> int:
    """Layers for multi-token prediction: by the tensors, or by the configuration without tensors."""
    config = checkpoint.config
    if checkpoint.ranks:
        return 0
    if not checkpoint.tensors:
        return config.get("num_nextn_predict_layers") or 0
    own = {int(match[1]) for match in map(_MTP_LAYER.search, checkpoint.tensors) if match}  # LongCat's
    layers = {int(match[1]) for match in map(_LAYER.match, checkpoint.tensors) if match}
    count = config.get("num_hidden_layers")
    return len(own) or (len({layer for layer in layers if layer >= count}) if isinstance(count, int) else 0)


def known_licence(checkpoint: Checkpoint, options: CardOptions) -> Licence | None:
    """The licence of the release that the weights are of, unless somebody says another."""
    if options.licence:
        return None
    if isinstance(checkpoint.metadata.get("license"), str) and _is_descendant(checkpoint, options):
        return None  # whoever made the model from the base has said under which licence
    return licence_of(base_model_of(checkpoint, options))


def _licence(
    checkpoint: Checkpoint, options: CardOptions, family: Family, base: str | None
) -> tuple[str, dict[str, str]]:
    """The section of the licence, and its metadata."""
    texts = sorted(name for name in checkpoint.files if LICENCE_FILE.fullmatch(name))
    see = f" See [`{texts[0]}`]({texts[0]})." if texts else ""
    stated = checkpoint.metadata.get("license")
    known = known_licence(checkpoint, options)
    if options.licence:
        if not HUB_LICENCE.fullmatch(options.licence):
            raise ValueError(f"--license {options.licence!r} is not in the Hub's spelling, such as mit or apache-2.0.")
        own = {"license_name": "see-file", "license_link": texts[0]} if options.licence == "other" and texts else {}
        return f"`{options.licence}`.{see}", {"license": options.licence, **own}
    if known:
        title = f"[{known.title}]({known.link})" if known.link else known.title
        owner = family.maker or base.partition("/")[0]
        return f"{title}, as {owner} released [{base}](https://huggingface.co/{base}).{see}", metadata_of(known)
    if isinstance(stated, str):
        metadata = {key: str(checkpoint.metadata[key]) for key in checkpoint.metadata if key.startswith("license")}
        return f"`{checkpoint.metadata.get('license_name', stated)}`.{see}", metadata
    if texts:
        return f"As the file says.{see}", {"license": "other", "license_name": "see-file", "license_link": texts[0]}
    return "Not stated here. The licence of the model that the weights come from applies.", {}


def metadata_of(licence: Licence) -> dict[str, str]:
    """The Hub's metadata of a licence."""
    fields = {"license": licence.id, "license_name": licence.name, "license_link": licence.link}
    return {key: value for key, value in fields.items() if value}


def _introduction(checkpoint: Checkpoint, options: CardOptions, family: Family, base: str | None) -> str:
    architecture = f"{family.title} architecture" + (f" by {family.maker}" if family.maker else "")
    titles = _titles(checkpoint)
    link = f"[{base}](https://huggingface.co/{base})"
    what = f"Weights of {link}," if base else "A model"
    if base and _is_descendant(checkpoint, options):
        what = f"A model made from {link}, as its README says,"
    if "lora" in titles or "merge" in titles:
        what = f"{link} with a LoRA adapter merged into it," if base else "A model with a LoRA adapter merged into it,"
    text = f"{what} in the {architecture}."
    if re.search(r"^slice\b", titles, re.MULTILINE):
        text += " Only some of its layers or experts are left, for trying code out: what it writes makes no sense."
    return text


def _needs(checkpoint: Checkpoint) -> str:
    if checkpoint.ranks:
        return (
            f"The files are for DeepSeek's own `inference/generate.py` on {checkpoint.ranks} "
            f"{'process' if checkpoint.ranks == 1 else 'processes'}, with `inference_config.json` as its `--config`. "
            "`hf-moe convert FOLDER TARGET --to hub` makes a checkpoint of them that Transformers loads."
        )
    if not checkpoint.code:
        return "With `hf_moe` installed and `import hf_moe` before the first line:"
    return (
        "With torch 2.11 and Transformers 5.17 or later; the code of the model is in this repository. With `hf_moe` "
        "installed, `import hf_moe` takes the place of `trust_remote_code=True`."
    )


# --- snippets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snippet:
    title: str
    code: str


def snippets(checkpoint: Checkpoint, model_type: str, base: str | None) -> list[Snippet]:
    """Programs that run as they stand, one after the other in the same process."""
    if checkpoint.ranks:
        return []
    remote = ", trust_remote_code=True" if checkpoint.code else ""
    if model_type == "step3_vl" and checkpoint.files & {"processor_config.json", "preprocessor_config.json"}:
        return [_picture(checkpoint, remote)]
    tokenized = bool(checkpoint.files & set(TOKENIZER_FILES))
    names = "AutoModelForCausalLM" + (", AutoTokenizer" if tokenized or base else "")
    lines = [] if tokenized or base else ["import torch"]
    lines += [
        f"from transformers import {names}",
        "",
        f'name = "{checkpoint.address}"',
        f'model = AutoModelForCausalLM.from_pretrained(name{remote}, dtype="auto", device_map="auto")',
    ]
    if tokenized or base:
        where = "name" if tokenized else f'"{base}"'
        plain = tokenized and "tokenizer.json" in checkpoint.files and model_type in NATIVE
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({where}{'' if plain else remote})")
        lines += _prompt(checkpoint.chat_template or not tokenized)
        show = "tokenizer.decode(output[0])"
    else:
        lines.append("# There is no tokenizer here: any ids.")
        lines.append('inputs = {"input_ids": torch.tensor([[1, 2, 3]], device=model.device)}')
        show = "output[0].tolist()"
    lines += ["output = model.generate(**inputs, max_new_tokens=64)", f"print({show})"]
    result = [Snippet("Text:", "\n".join(lines))]
    if has_mtp(checkpoint):
        code = f"output = model.generate(**inputs, max_new_tokens=64, use_mtp=True)\nprint({show})"
        result.append(Snippet("The same with the layers for multi-token prediction as drafter:", code))
    return result


def _prompt(chat: bool) -> list[str]:
    if not chat:
        return ['inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)']
    return [
        'messages = [{"role": "user", "content": "What is the capital of France?"}]',
        "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)",
        'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)',
    ]


def _adapter(checkpoint: Checkpoint) -> Snippet:
    code = f"""import hf_moe
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{checkpoint.address}")"""
    return Snippet("The base model with the adapter:", code)


def _picture(checkpoint: Checkpoint, remote: str) -> Snippet:
    code = f"""from transformers import AutoModelForImageTextToText, AutoProcessor

name = "{checkpoint.address}"
model = AutoModelForImageTextToText.from_pretrained(name{remote}, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(name{remote})
picture = {{"type": "image", "url": "photo.jpg"}}
messages = [{{"role": "user", "content": [picture, {{"type": "text", "text": "What is this?"}}]}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
)
inputs = inputs.to(model.device, dtype=model.dtype)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0]))"""
    return Snippet("Pictures and text, with Pillow installed:", code)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _sizes(checkpoint: Checkpoint, model_type: str) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]], str]:
    """Rows of parameters, rows of memory, and the cache's bytes a token; nothing for what has no formulas."""
    if model_type not in READERS:
        return [], [], ""
    config = {**checkpoint.config, "model_type": model_type}
    if (config.get("num_nextn_predict_layers") or 0) != mtp_depths(checkpoint):  # files may hold more, or none
        config["num_nextn_predict_layers"] = mtp_depths(checkpoint)
    architecture = read_architecture(config, checkpoint.name)
    parts, _ = count_parameters(Source(checkpoint.name, "card", config), architecture)
    rows = [("main model", cost.total_params(parts)), ("active per token", cost.active_params(parts))]
    rows += [(title, parts[part].total) for title, part in (("MTP layers", "mtp"), ("vision tower", "vision"))]
    stored = stored_precision(config) if checkpoint.files else ""  # an adapter holds no model
    cache = cost.kv_cache_bytes(architecture, CONTEXT, 1, "bf16")
    memory = []
    for precision, title in PRECISIONS.items():
        weights = cost.checkpoint_bytes(architecture, precision)
        title = f"**{title}, as here**" if precision == stored else title
        memory.append((title, bytes_text(weights), bytes_text(weights + cache)))
    per_token = bytes_text(cost.kv_cache_bytes(architecture, 1, 1, "bf16"))
    return [(name, f"{count_text(value)} ({value:,})") for name, value in rows if value], memory, per_token


def _conversion(checkpoint: Checkpoint) -> tuple[str, list[dict[str, str]], list[dict[str, Any]]]:
    """The sentence on how the files came about, the rows of the steps, and tables of checksums."""
    steps = _steps(checkpoint.manifest)
    if not steps:
        return "There is no record of a conversion with these files.", [], []
    rows, checksums = [], []
    for number, step in enumerate(steps, 1):
        chosen = step.get("options") if isinstance(step.get("options"), dict) else {}
        options = ", ".join(f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in sorted(chosen.items()))
        versions = f"hf_moe {step.get('hf_moe', '?')}, torch {step.get('torch', '?')}"
        cells = {"step": step.get("title", ""), "options": options, "source": _origin(step), "versions": versions}
        rows.append({name: str(value).replace("|", "\\|") for name, value in cells.items()})
        source = step.get("source") if isinstance(step.get("source"), dict) else {}
        files = _file_rows(source.get("files"))
        if files:
            checksums.append(
                {"title": f"SHA-256 of the weight files that step {number} read ({len(files)})", "files": files}
            )
    # The card is among the files of the record where it was carried: its own checksum cannot stand in it.
    listed = checkpoint.manifest.get("files")
    listed = listed if isinstance(listed, dict) else {}
    weights = {name: entry for name, entry in listed.items() if name.endswith(".safetensors")}
    files = _file_rows(weights)
    if files:
        checksums.insert(0, {"title": f"SHA-256 of the weight files here ({len(files)})", "files": files})
    return f"Converted by hf_moe; `{MANIFEST}` has the whole record.", rows, checksums


def _origin(step: Mapping[str, Any]) -> str:
    origin = _source_name(step)
    name, _, commit = origin.partition("@")
    if not _HUB_NAME.fullmatch(name):
        return f"local folder `{origin}`"
    link = f"[{name}](https://huggingface.co/{name}{f'/tree/{commit}' if commit else ''})"
    return f"{link}, commit `{commit}`" if commit else link


def _file_rows(listed: Any) -> list[dict[str, str]]:
    """Name, size and checksum from a list of objects, or an object of objects by name."""
    if isinstance(listed, dict):
        listed = [{"name": name, **(entry if isinstance(entry, dict) else {})} for name, entry in listed.items()]
    rows = []
    for entry in listed or ():
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            continue
        size = entry.get("size", entry.get("bytes"))
        checksum = f"`{entry['sha256']}`" if entry.get("sha256") else ""
        if not checksum and entry.get("header_sha256"):
            checksum = f"`{entry['header_sha256']}` (of the header)"
        rows.append({"name": entry["name"], "size": f"{size:,}" if isinstance(size, int) else "", "sha256": checksum})
    return rows


# --- the cards in model_cards/ ----------------------------------------------------------------------------------------


def family_card(family: Family) -> str:
    """The card of a family's release as its makers published it."""
    config = read_source(family.example).config
    files = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    if config.get("model_type") == "step3_vl":
        files.add("preprocessor_config.json")
    name = family.release.rpartition("/")[2]
    checkpoint = Checkpoint(name, f"your-name/{name}", config, frozenset(files), chat_template=True)
    return render_card(checkpoint, CardOptions(base_model=family.release))
