"""Tiny Step3 configurations, and models with seeded random weights, beside those of `tiny`."""

import copy

import torch
from tiny import randomize
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import hf_moe  # noqa: F401  registers the families
from hf_moe.models.configuration_step3_text import Step3TextConfig
from hf_moe.models.configuration_step3_vl import Step3VLConfig
from hf_moe.models.modeling_step3_text import Step3TextForCausalLM
from hf_moe.models.modeling_step3_vl import Step3VLForConditionalGeneration
from hf_moe.models.processing_step3_vl import Step3VLProcessor

# No two sizes are equal, so that a swapped dimension fails.
PIXELS = ("pixel_values", "patch_pixel_values", "num_patches", "patch_newline_mask")  # what pictures become
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


# --- vision -----------------------------------------------------------------------------------------------------------

SPECIAL = [
    "<|BOT|>",
    "<|EOT|>",
    "<im_patch>",
    "<im_start>",
    "<im_end>",
    "<patch_start>",
    "<patch_end>",
    "<patch_newline>",
    "<think>",
    "</think>",
]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "output_hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 4,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, and Step3's special tokens behind them."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<s>": 0, "</s>": 1, "<pad>": 2} | {chr(32 + index): 3 + index for index in range(95)} | {"\n": 98}
    base = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    base.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    base.decoder = decoders.Fuse()
    base.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=base, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def vl_config(text: dict | None = None, vision: dict | None = None, **overrides) -> Step3VLConfig:
    """The tiny configuration with vision: views of 48 pixels with 9 features, crops of 32 with 4."""
    text_fields = {**TEXT, "vocab_size": 120, "max_position_embedding": 4096, **(text or {})}
    return Step3VLConfig(
        text_config=copy.deepcopy(text_fields),
        vision_config={**VISION, **(vision or {})},
        **{"image_token_id": 99 + SPECIAL.index("<im_patch>"), "understand_projector_stride": 2, **overrides},
    )


def vl_model(attn_implementation: str | None = None, dtype: torch.dtype = torch.float32, **overrides):
    """The tiny model with vision and a head."""
    config = vl_config(**overrides)
    return seeded(Step3VLForConditionalGeneration, config, dtype, attn_implementation=attn_implementation)


def processor() -> Step3VLProcessor:
    """The processor of the tiny model."""
    return Step3VLProcessor.from_config(vl_config(), tokenizer())
