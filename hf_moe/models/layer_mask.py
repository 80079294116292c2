"""Masks of long prompts, which as matrices would take more memory than anything else."""

import torch
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from .op_prefill import LONG_CONTEXT, CausalMask, causal_mask


def check_mask(attention_mask) -> None:
    """Raises `ValueError` for a 4D mask of integers, which attention would add to its scores."""
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4:
        if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
            raise ValueError(
                f"`attention_mask` of shape {tuple(attention_mask.shape)} is {attention_mask.dtype}: a 4D mask is "
                "boolean, True where a query attends, or floating point and added to the scores."
            )


def may_be_packed(
    position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, past_key_values: Cache | None
) -> bool:
    """Whether positions that restart mark packed sequences: the caller's, without a mask, and nothing is cached yet.

    Transformers takes them for such only without a cache, which a call makes that says nothing about it; flash
    attention does either way.
    """
    if position_ids is None or attention_mask is not None:
        return False
    return past_key_values is None or not (past_key_values.is_compileable or past_key_values.get_seq_length())


def long_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
) -> CausalMask | None:
    """The mask of a long context as padding and positions, which takes no matrix.

    `None` where it is short, where gradients or tracing need the usual forms, and for masks of other shapes. So it is
    without mask and cache, too: then positions may mark packed sequences (`may_be_packed`).

    Args:
        config: of the model.
        inputs_embeds: (B, S, hidden).
        attention_mask: (B, T) of ones and zeros, or `None`.
        past_key_values: the cache that the queries continue.
    """
    seq = inputs_embeds.shape[1]
    if config._attn_implementation != "sdpa" or not getattr(config, "is_causal", True):
        return None
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if attention_mask is None and past_key_values is None:
        return None
    if attention_mask is not None and not (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2):
        return None
    slots, offset = (seq, 0) if past_key_values is None else past_key_values.get_mask_sizes(seq, 0)
    if offset or slots < LONG_CONTEXT:
        return None
    past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    if past + seq < LONG_CONTEXT or past + seq > slots:
        return None
    if attention_mask is not None:
        attention_mask = attention_mask.to(inputs_embeds.device)
    return causal_mask(attention_mask, past, seq)
