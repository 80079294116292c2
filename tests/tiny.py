"""One tiny configuration per family, and models with seeded random weights that make routing and attention matter."""

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import hf_moe  # noqa: F401  registers the families
from hf_moe.models.configuration_deepseek_v2 import DeepseekV2Config
from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config
from hf_moe.models.configuration_kimi_k2 import KimiK2Config
from hf_moe.models.configuration_longcat_flash import LongcatFlashConfig
from hf_moe.models.configuration_longcat_flash_ngram import LongcatFlashNgramConfig

# No two sizes are equal, so that a swapped dimension fails.
SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 28,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}
LONGCAT = {
    "num_layers": 2,
    "ffn_hidden_size": 40,
    "expert_ffn_hidden_size": 16,
    "moe_topk": 5,
    "zero_expert_num": 4,
    "routed_scaling_factor": 3.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "num_nextn_predict_layers": 1,
}
# Keys of the other families that LongCat spells otherwise, or does not have.
_NOT_LONGCAT = (
    *("intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_experts_per_tok"),
    *("n_shared_experts", "first_k_dense_replace"),
)
FAMILIES = {
    "deepseek_v3": (
        DeepseekV3Config,
        {"n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1, "rope_theta": 10000.0, "rope_scaling": YARN},
    ),
    "deepseek_v2": (
        DeepseekV2Config,
        {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "rope_theta": 10000.0, "rope_scaling": YARN},
    ),
    "deepseek_v2_lite": (
        DeepseekV2Config,
        {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    ),
    "kimi_k2": (
        KimiK2Config,
        {"rms_norm_eps": 1e-5, "rope_theta": 50000.0, "rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0}},
    ),
    "longcat_flash": (LongcatFlashConfig, LONGCAT),
    "longcat_flash_ngram": (
        LongcatFlashNgramConfig,
        {**LONGCAT, "rope_scaling": YARN, "ngram_vocab_size_ratio": 3, "emb_neighbor_num": 4, "emb_split_num": 2},
    ),
}


def tiny_config(family: str = "deepseek_v3", **overrides) -> PreTrainedConfig:
    """The family's tiny configuration, with `overrides` on top."""
    config_class, fields = FAMILIES[family]
    sizes = {key: size for key, size in SIZES.items() if not (family.startswith("longcat") and key in _NOT_LONGCAT)}
    return config_class(**copy.deepcopy({**sizes, **fields, **overrides}))


def tiny_model(
    family: str = "deepseek_v3",
    seed: int = 0,
    auto_class: type = AutoModelForCausalLM,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    **overrides,
) -> PreTrainedModel:
    """A model in evaluation mode whose weights are random, of a scale that lets every part of it show in the output."""
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(config, attn_implementation=attn_implementation)
        randomize(model)
    return model.to(dtype).eval()


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Draws every parameter anew: matrices by fan-in, norms around 1, correction biases large enough to re-route."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape))
        elif "embed_tokens" in name:
            parameter.copy_(torch.randn(parameter.shape))
        else:
            parameter.copy_(torch.randn(parameter.shape) * 1.5 * parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape) - 0.4)


def random_ids(batch: int, seq: int, seed: int = 0, low: int = 3, high: int = SIZES["vocab_size"]) -> torch.Tensor:
    """(batch, seq) token ids without the special ones."""
    return torch.randint(low, high, (batch, seq), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor], pad: int = SIZES["pad_token_id"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as one left-padded batch: ids and mask, (len(rows), longest)."""
    longest = max(row.numel() for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - row.numel() :] = row
        mask[index, longest - row.numel() :] = 1
    return ids, mask
