"""What the releases of each family quantise and what they keep, by the names of their tensors."""

import re
from dataclasses import dataclass
from typing import Any

from ..models.weights_safetensors import CheckpointError

_DEEPSEEK = (
    r"model\.layers\.\d+\.self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.weight",
    r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight",
    r"model\.layers\.\d+\.mlp\.(experts\.\d+|shared_experts)\.(gate|up|down)_proj\.weight",
)
_STEP3 = (
    r"model\.layers\.\d+\.self_attn\.(q_proj|wq|k_proj|v_proj|o_proj)\.weight",
    # `moe` holds stacks of all experts: (experts, out, in), with scales of as many dimensions.
    r"model\.layers\.\d+\.(mlp|moe|share_expert)\.(gate|up|down)_proj\.weight",
)
_LONGCAT = (
    r"model\.layers\.\d+\.self_attn\.[01]\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.weight",
    r"model\.layers\.\d+\.mlps\.[01]\.(gate|up|down)_proj\.weight",
    r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight",
    # Unlike DeepSeek's, the MTP layer's `eh_proj` is quantised too.
    r"model\.mtp\.layers\.\d+\.self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.weight",
    r"model\.mtp\.layers\.\d+\.(eh_proj|transformer_layer\.mlp\.(gate|up|down)_proj)\.weight",
)


@dataclass(frozen=True)
class Family:
    """Model types whose checkpoints have the same tensors.

    Attributes:
        model_types, architectures: by which `config.json` names them. Releases of LongCat lack `model_type`.
        quantized: patterns of the names of weights that FP8 releases hold in FP8; all others stay as they are.
        float32: patterns of the names of tensors that every release holds in float32: what routing is decided from.
    """

    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    quantized: tuple[str, ...]
    float32: tuple[str, ...] = ()

    def is_quantized(self, name: str) -> bool:
        """Whether FP8 releases hold this weight in FP8."""
        return any(re.fullmatch(pattern, name) for pattern in self.quantized)

    def is_float32(self, name: str) -> bool:
        """Whether releases hold this tensor in float32."""
        return any(re.fullmatch(pattern, name) for pattern in self.float32)


FAMILIES = (
    # DeepSeek-V2 was never released in FP8; its tensors have the names of V3's and are treated as they are.
    Family(
        ("deepseek_v3", "kimi_k2", "deepseek_v2"),
        ("DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM", "KimiK2ForCausalLM"),
        _DEEPSEEK,
        (r"model\.layers\.\d+\.mlp\.gate\.e_score_correction_bias",),
    ),
    Family(
        ("step3_vl", "step3_text"),
        ("Step3VLForConditionalGeneration", "Step3TextForCausalLM", "Step3VLForCausalLM"),
        _STEP3,
    ),
    Family(
        ("longcat_flash", "longcat_flash_ngram", "longcat", "longcat_next"),
        ("LongcatFlashForCausalLM", "LongcatFlashNgramForCausalLM", "LongcatCausalLM", "LongcatNextForCausalLM"),
        _LONGCAT,
        (r"model\.layers\.\d+\.mlp\.router\.(classifier\.weight|e_score_correction_bias)",),
    ),
)


def model_name(config: dict[str, Any]) -> str:
    """The model type, or where it is missing the one that the architecture belongs to."""
    named = config.get("model_type")
    family = None if named else find_family(config)
    return named or (family.model_types[0] if family else str(config.get("architectures")))


def find_family(config: dict[str, Any]) -> Family | None:
    """The family of a configuration, by its model type or else its architecture; `None` for others."""
    architectures = config.get("architectures") or []
    for family in FAMILIES:
        if config.get("model_type") in family.model_types:
            return family
    if not config.get("model_type"):
        for family in FAMILIES:
            if any(name in family.architectures for name in architectures):
                return family
    return None


def require_family(config: dict[str, Any]) -> Family:
    """The family of a configuration.

    Raises:
        CheckpointError: for a model of another family.
    """
    family = find_family(config)
    if family is None:
        known = ", ".join(model_type for family in FAMILIES for model_type in family.model_types)
        raise CheckpointError(
            f"config.json: names the model {config.get('model_type') or config.get('architectures')!r}. Which of its "
            f"tensors to quantise is known for {known} only."
        )
    return family


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
