"""Triton kernel that adds the rows of each token's choices, in their order, in float32.

Shapes: T tokens, K choices per token, E experts, H hidden.
"""

from __future__ import annotations

import torch

from .triton_compat import cdiv, jit, narrow, next_power_of_2, tl


@jit
def combine_kernel(
    rows_ptr,  # (T * K, H)
    ids_ptr,  # (T, K)
    kept_ptr,  # (T, H) bool: which sums count, or unused
    base_ptr,  # (T, H) float32: what they are added to, or unused
    out_ptr,  # (T, H)
    ADD: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for choice in tl.static_range(K):
        slot = token * K + choice
        expert = tl.load(ids_ptr + slot)
        limit = tl.where((expert >= 0) & (expert < E), H, 0)  # rows of other slots were never written
        acc += tl.load(rows_ptr + slot * H + h, mask=h < limit, other=0.0).to(tl.float32)
    places = token * H + h
    if ADD:
        kept = tl.load(kept_ptr + places, mask=h < H, other=0) != 0
        acc = tl.load(base_ptr + places, mask=h < H, other=0.0) + tl.where(kept, acc, 0.0)
    tl.store(out_ptr + places, narrow(acc, out_ptr.dtype.element_ty), mask=h < H)


def combine(
    rows: torch.Tensor,
    topk_indices: torch.Tensor,
    num_experts: int,
    dtype: torch.dtype,
    kept: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum (T, H) over the K rows of each token, in float32, without those of no expert. With `kept` (T, H) bool and
    `base` (T, H) float32: `base` plus the sums that are kept."""
    tokens, top_k = topk_indices.shape
    hidden = rows.shape[1]
    out = torch.empty(tokens, hidden, dtype=dtype, device=rows.device)
    block = min(1024, next_power_of_2(hidden))
    combine_kernel[(tokens, cdiv(hidden, block))](
        rows,
        topk_indices,
        None if kept is None else kept.contiguous().view(torch.uint8),
        base,
        out,
        ADD=base is not None,
        E=num_experts,
        K=top_k,
        H=hidden,
        BLOCK_H=block,
        num_warps=4,
    )
    return out
