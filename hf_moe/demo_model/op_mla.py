"""Absorbed attention against a latent cache: whole by a kernel on GPUs, and its two products for everything else.

PyTorch's batched bfloat16 product copies its operands on the CPU, here the whole cache, and the plain one leaves
bandwidth unused when the rows are few. A long cache is therefore taken as a batch of `_SPLITS` pieces: measured with 16
rows, 16,384 x 512 latents and 2 cores, 1.0 against 1.25 ms for the scores and 1.3 against 1.6 ms for the sums.

Shapes: B batch, M rows (queries x heads), T context, r latent width.
"""

import torch
from torch import nn

from .kernel_mla import mla_decode
from .op_custom import opaque
from .triton_compat import runs_kernels

_SPLITS = 4
_SPLIT_MIN_CONTEXT = 2048
_SPLIT_MAX_ROWS = 64


def decodes_on_kernels(query: torch.Tensor, latent: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether `latent_decode` can take these: 16-bit tensors on a GPU, without gradient, and no or a boolean mask."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or latent.dtype != query.dtype:
        return False
    with_grad = torch.is_grad_enabled() and (query.requires_grad or latent.requires_grad)
    one_for_all_heads = mask is None or (mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1)
    return one_for_all_heads and not with_grad and runs_kernels(query.device)


def latent_decode(
    query: torch.Tensor,
    query_rope: torch.Tensor,
    latent: torch.Tensor,
    key_rope: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attended latents (B, S, h, r) of queries (B, S, h, r) and (B, S, h, p), by the kernel.

    Args:
        latent: (B, 1, T, r).
        key_rope: (B, 1, T, p).
        mask: boolean (B or 1, 1, S or 1, T) or `None`.
    """
    arguments = query, query_rope, latent.squeeze(1), key_rope.squeeze(1), None if mask is None else mask.squeeze(1)
    return (_mla_decode_op if torch.compiler.is_compiling() else mla_decode)(*arguments, scaling)


@opaque("mla_decode")
def _mla_decode_op(
    query: torch.Tensor,
    query_rope: torch.Tensor,
    latent: torch.Tensor,
    key_rope: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    return mla_decode(query, query_rope, latent, key_rope, mask, scaling)


@_mla_decode_op.register_fake
def _(query, query_rope, latent, key_rope, mask, scaling):
    return query.new_empty(query.shape)


def latent_scores(queries: torch.Tensor, latent: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
    """`queries @ latent.T`, plus `add`: (B, M, r) and (B, T, r) to (B, M, T). May use the memory of `add`."""
    if queries.device.type != "cpu":
        keys = latent.transpose(1, 2)
        return torch.bmm(queries, keys) if add is None else torch.baddbmm(add, queries, keys)
    return _per_sequence(_scores_cpu, queries, latent, *([] if add is None else [add]))


def latent_sums(weights: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """`weights @ latent`: (B, M, T) and (B, T, r) to (B, M, r)."""
    if weights.device.type != "cpu":
        return torch.bmm(weights, latent)
    return _per_sequence(_sums_cpu, weights, latent)


def weigh_and_sum(
    scores: torch.Tensor, attention_mask: torch.Tensor | None, values: torch.Tensor, dropout: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What follows the scores (B, S, h, T) where all heads attend to the same values (B, T, d).

    `attention_mask` is boolean (True attends) or additive, and broadcasts to (B, h, S, T); `None` attends to all. The
    softmax is in float32, or in float64 for float64 scores. Returns (B, S, h, d) and the weights (B, h, S, T).
    """
    batch, seq, heads, _ = scores.shape
    dtype = scores.dtype
    if attention_mask is not None:
        mask = attention_mask.transpose(1, 2)  # (B or 1, S, h or 1, T)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(dtype).min)
        else:
            scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)  # (B, S, h, T)
    if dropout:
        weights = nn.functional.dropout(weights, p=dropout)
    weights = weights.transpose(1, 2)  # what is returned is what is used, so that it has a gradient
    attended = latent_sums(weights.transpose(1, 2).flatten(1, 2), values).view(batch, seq, heads, -1)
    return attended, weights


def _per_sequence(product, *operands: torch.Tensor) -> torch.Tensor:
    outputs = [product(*entries) for entries in zip(*(operand.unbind(0) for operand in operands))]
    return outputs[0].unsqueeze(0) if len(outputs) == 1 else torch.stack(outputs)


def _split(rows: torch.Tensor, latent: torch.Tensor) -> int:
    """How many tokens of `latent` to take as a batch of pieces: a multiple of `_SPLITS`, or 0."""
    worthwhile = latent.shape[0] >= _SPLIT_MIN_CONTEXT and rows.shape[0] <= _SPLIT_MAX_ROWS
    if not worthwhile or not latent.is_contiguous() or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return 0
    return latent.shape[0] // _SPLITS * _SPLITS


def _scores_cpu(queries: torch.Tensor, latent: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
    length = _split(queries, latent)
    if not length:
        return torch.mm(queries, latent.t()) if add is None else torch.addmm(add, queries, latent.t())
    pieces = latent[:length].view(_SPLITS, -1, latent.shape[1])  # (pieces, T / pieces, r)
    scores = torch.bmm(queries.expand(_SPLITS, -1, -1), pieces.transpose(1, 2))  # (pieces, M, T / pieces)
    rest = torch.mm(queries, latent[length:].t())
    if add is None:
        return torch.cat([*scores.unbind(0), rest], dim=1)
    add[:, :length].unflatten(1, (_SPLITS, -1)).transpose(0, 1).add_(scores)
    add[:, length:].add_(rest)
    return add


def _sums_cpu(weights: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    length = _split(weights, latent)
    if not length:
        return torch.mm(weights, latent)
    pieces = latent[:length].view(_SPLITS, -1, latent.shape[1])
    split_weights = weights[:, :length].unflatten(1, (_SPLITS, -1)).transpose(0, 1)  # (pieces, M, T / pieces)
    sums = torch.bmm(split_weights, pieces).float().sum(0)
    return (sums + torch.mm(weights[:, length:], latent[length:])).to(weights.dtype)
