"""What the releases of a family quantise and what they keep, and the configurations of both forms."""

import re
from typing import Any

from ..models.configuration_base import UpstreamConfig
from ..models.weights_safetensors import CheckpointError
from ..register import FAMILIES, load_class, model_type_of


def find_family(config: dict[str, Any]) -> type[UpstreamConfig] | None:
    """The configuration class of a `config.json`, which has the patterns of its tensors; `None` for other models."""
    model_type = model_type_of(config)
    return None if model_type is None else load_class(FAMILIES[model_type])


def require_family(config: dict[str, Any]) -> type[UpstreamConfig]:
    """`find_family` of one that says which weights to quantise.

    Raises:
        CheckpointError: for a model of another family.
    """
    family = find_family(config)
    if family is None or not family.fp8_weights:
        known = ", ".join(model_type for model_type, name in FAMILIES.items() if load_class(name).fp8_weights)
        raise CheckpointError(
            f"config.json: names the model {config.get('model_type') or config.get('architectures')!r}. Which of its "
            f"tensors to quantise is known for {known} only."
        )
    return family


def model_name(config: dict[str, Any]) -> str:
    """The model type, or where it is missing the one that the architecture belongs to."""
    return config.get("model_type") or model_type_of(config) or str(config.get("architectures"))


def is_quantized(family: type[UpstreamConfig], name: str) -> bool:
    """Whether FP8 releases hold this weight in FP8."""
    return any(re.fullmatch(pattern, name) for pattern in family.fp8_weights)


def is_float32(family: type[UpstreamConfig], name: str) -> bool:
    """Whether releases hold this tensor in float32."""
    return any(re.fullmatch(pattern, name) for pattern in family.float32_tensors)


def is_exempt(config: dict[str, Any], name: str) -> bool:
    """Whether the configuration keeps this weight from being quantised.

    LongCat's `disable_quant_module` names groups of modules: `self_attn`, `mlps`.
    """
    entries = config.get("disable_quant_module") or []
    return any(f".{entry}." in f".{name}." for entry in entries)


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config`, which models with a text part may keep in the part's configuration."""
    inner = config.get("text_config")
    found = config.get("quantization_config") or (inner.get("quantization_config") if isinstance(inner, dict) else None)
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"config.json: `quantization_config` is {found!r}, not an object.")
    return found


def bfloat16_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a bfloat16 checkpoint: without `quantization_config`, all else and its order kept."""
    result = {}
    for key, value in config.items():
        if key == "quantization_config":
            continue
        if key == "text_config" and isinstance(value, dict):
            value = bfloat16_config(value)
        elif key in ("torch_dtype", "dtype") and isinstance(value, str):
            value = "bfloat16"
        result[key] = value
    return result


def fp8_config(config: dict[str, Any], block_size: tuple[int, int], ue8m0: bool) -> dict[str, Any]:
    """The configuration of a block FP8 checkpoint, `quantization_config` spelled as the releases spell it.

    `torch_dtype` stays that of the tensors that are not quantised.
    """
    fields = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        **({"scale_fmt": "ue8m0"} if ue8m0 else {}),
        "weight_block_size": list(block_size),
    }
    plain = bfloat16_config(config)
    if "quantization_config" not in config:
        return {**plain, "quantization_config": fields}
    return {key: fields if key == "quantization_config" else plain[key] for key in config}
