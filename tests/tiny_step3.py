"""Tiny Step3 configurations, and models with seeded random weights, beside those of `tiny`."""

import copy

import torch
from tiny import randomize
from transformers import PreTrainedModel

import hf_moe  # noqa: F401  registers the families
from hf_moe.models.configuration_step3_text import Step3TextConfig
from hf_moe.models.modeling_step3_text import Step3TextForCausalLM

# No two sizes are equal, so that a swapped dimension fails.
TEXT = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "head_dim": 16,
    "share_q_dim": 28,
    "moe_layers_enum": "1,2",
    "moe_num_experts": 8,
    "moe_top_k": 3,
    "moe_intermediate_size": 20,
    "share_expert_dim": 22,
    "max_position_embedding": 256,
    "max_seq_len": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def text_config(**overrides) -> Step3TextConfig:
    """The tiny text configuration, with `overrides` on top."""
    return Step3TextConfig(**copy.deepcopy({**TEXT, **overrides}))


def seeded(model_class: type, config, dtype: torch.dtype = torch.float32, seed: int = 0, **kwargs) -> PreTrainedModel:
    """A model in evaluation mode whose weights are random, of a scale that lets every part of it show in the output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config, **kwargs)
        randomize(model)
    return model.to(dtype).eval()


def text_model(attn_implementation: str | None = None, dtype: torch.dtype = torch.float32, **overrides):
    """The tiny text model with a head."""
    return seeded(Step3TextForCausalLM, text_config(**overrides), dtype, attn_implementation=attn_implementation)
