"""Triton kernels of the experts' backward pass; gradients to tokens come from `kernel_experts.rows_kernel`.

With y = sum over slots of w * D (a(g) * u), where a is the activation and g and u are the gate and up products of the
slot's token:

* `inner_grad_kernel` multiplies the gathered gradient of the token with D transposed, and from that (BLOCK_M, BLOCK_N)
  tile, gate and up makes, before anything is stored: the gradients of gate and up, the tile's share of the gradient of
  the routing weight (its dot product with a(g) * u), and, if a weight gradient needs it, the weighted inner row.
* `outer_kernel` sums outer products of an expert's rows: gradients of its weights and of its LoRA factors.

Weights may be FP8, which is widened in registers as in the forward products: a frozen stack is never expanded.
Nothing is added atomically; the shares of a routing weight's gradient are summed in the order of the columns.

Shapes: T tokens, K choices per token, E experts, H hidden, I intermediate, N = T * K slots, R rank of LoRA factors.
"""

from __future__ import annotations

import torch

from .kernel_activation import activate_with_slope, limit_gate
from .kernel_experts import launch_options, lora_options
from .kernel_products import (
    _SCALE_BLOCK,
    as_bytes,
    expert_tile,
    halves,
    lora_sum,
    product,
    tile_slots,
    weight_kind,
    weight_options,
)
from .kernel_routing import Layout
from .kernel_tiles import chosen, product_tile
from .triton_compat import cdiv, compute_capability, dot, jit, jit_for_any, narrow, next_power_of_2, tl


@jit
def gate_grad(
    grad,  # (BLOCK_M, WIDTH) of the inner rows, not yet weighted
    first_column,
    rows,
    slots,
    valid,
    places,  # pre_ptr, factors_ptr, grad_pre_ptr, inner_ptr
    I: tl.constexpr,  # noqa: E741
    SAVE_INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Stores the gradients of gate and up for some columns; returns their share of the routing weights' gradient."""
    pre_ptr, factors_ptr, grad_pre_ptr, inner_ptr = places
    columns = first_column + tl.arange(0, WIDTH)
    mask = valid[:, None] & (columns[None, :] < I)
    pre_offsets = rows[:, None] * (2 * I) + columns[None, :]
    gate = tl.load(pre_ptr + pre_offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pre_ptr + pre_offsets + I, mask=mask, other=0.0).to(tl.float32)
    if LIMIT > 0:
        gate_passes, up_passes = gate <= LIMIT, tl.abs(up) <= LIMIT
        gate, up = limit_gate(gate, up, LIMIT)
    value, slope = activate_with_slope(gate, ACTIVATION)
    inner = value * up
    share = tl.sum(tl.where(mask, grad * inner, 0.0), 1)
    factors = tl.load(factors_ptr + slots).to(tl.float32)[:, None]
    grad *= factors
    grad_gate, grad_up = grad * up * slope, grad * value
    if LIMIT > 0:
        grad_gate, grad_up = tl.where(gate_passes, grad_gate, 0.0), tl.where(up_passes, grad_up, 0.0)
    tl.store(grad_pre_ptr + pre_offsets, narrow(grad_gate, grad_pre_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_pre_ptr + pre_offsets + I, narrow(grad_up, grad_pre_ptr.dtype.element_ty), mask=mask)
    if SAVE_INNER:
        inner_ptrs = inner_ptr + rows[:, None] * I + columns[None, :]
        tl.store(inner_ptrs, narrow(inner * factors, inner_ptr.dtype.element_ty), mask=mask)
    return share


@jit_for_any("max_tiles")
def inner_grad_kernel(
    grad_ptr,  # (T, H)
    weight_ptr,  # (E, H, I)
    scale_ptr,  # (E, ceil(H / 128), ceil(I / 128)), or unused
    low_ptr,  # (N, R) sorted rows of the gradient times LoRA's B, or unused
    lora_ptr,  # (E, R, I) LoRA's A, or unused
    kept_ptr,  # (N, I) bool in the order of the slots: what dropout kept of the inner rows, or unused
    pre_ptr,  # (N, 2I) sorted rows of gate and up
    factors_ptr,  # (N,) routing weight of each slot
    grad_pre_ptr,  # (N, 2I) sorted rows
    inner_ptr,  # (N, I) sorted rows of w * activation(gate) * up, or unused
    shares_ptr,  # (N, tiles along I) float32, in the order of the slots
    order_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    max_tiles,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    R: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    SAVE_INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    WEIGHT: tl.constexpr,
    UE8M0: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    GRID_N: tl.constexpr = (I + _SCALE_BLOCK - 1) // _SCALE_BLOCK
    GRID_K: tl.constexpr = (H + _SCALE_BLOCK - 1) // _SCALE_BLOCK
    tiles_m = tl.load(num_tiles_ptr)
    tiles_n: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n, _ = expert_tile(tile, tiles_m, tiles_n, tiles_ptr, offsets_ptr, max_tiles, BLOCK_M, GROUP_M, 0)
        expert, rows, slots, valid = tile_slots(m, tiles_ptr, offsets_ptr, order_ptr, max_tiles, BLOCK_M)
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        grad = product(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            grad_ptr + (slots // K)[:, None] * H + k[None, :],
            None,
            weight_ptr + expert * (H * I) + k[:, None] * I + columns[None, :],
            scale_ptr + expert * (GRID_K * GRID_N) + n * BLOCK_N // _SCALE_BLOCK if WEIGHT else None,
            columns,
            H,
            I,
            GRID_N,
            0,
            False,
            WEIGHT,
            UE8M0,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            columns,
            0 if I % BLOCK_N == 0 else I,
        )  # of the inner row, not yet weighted
        if R:
            factor_ptrs = lora_ptr + expert * (I * R) + tl.minimum(columns, I - 1)
            if HAS_KEPT:
                mask = valid[:, None] & (columns[None, :] < I)
                low = lora_sum(tl.zeros_like(grad), low_ptr, factor_ptrs, rows, R, BLOCK_R, I)
                kept = tl.load(kept_ptr + slots[:, None] * I + columns[None, :], mask=mask, other=0)
                grad += tl.where(kept != 0, low, 0.0)
            else:
                grad = lora_sum(grad, low_ptr, factor_ptrs, rows, R, BLOCK_R, I)
        # In pieces: all that an element needs would not fit into the registers for a whole tile.
        expert, rows, slots, valid = tile_slots(m, tiles_ptr, offsets_ptr, order_ptr, max_tiles, BLOCK_M)
        places = (pre_ptr, factors_ptr, grad_pre_ptr, inner_ptr)
        HALF: tl.constexpr = BLOCK_N // 2
        QUARTER: tl.constexpr = BLOCK_N // 4
        left, right = halves(grad, BLOCK_M, HALF)
        first = n * BLOCK_N
        share = tl.zeros((BLOCK_M,), tl.float32)
        one, two = halves(left, BLOCK_M, QUARTER)
        share += gate_grad(one, first, rows, slots, valid, places, I, SAVE_INNER, ACTIVATION, LIMIT, QUARTER)
        share += gate_grad(two, first + QUARTER, rows, slots, valid, places, I, SAVE_INNER, ACTIVATION, LIMIT, QUARTER)
        one, two = halves(right, BLOCK_M, QUARTER)
        share += gate_grad(one, first + HALF, rows, slots, valid, places, I, SAVE_INNER, ACTIVATION, LIMIT, QUARTER)
        share += gate_grad(
            two, first + HALF + QUARTER, rows, slots, valid, places, I, SAVE_INNER, ACTIVATION, LIMIT, QUARTER
        )
        tl.store(shares_ptr + slots * tiles_n + n, share, mask=valid)


@jit
def outer_kernel(
    left_ptr,  # (N, LEFT) sorted rows, or (T, LEFT) if GATHER_LEFT
    right_ptr,  # (N, RIGHT) sorted rows, or (T, RIGHT) if GATHER_RIGHT
    factors_ptr,  # (N,) factor of each slot's product, or unused
    out_ptr,  # (E, LEFT, RIGHT)
    order_ptr,
    offsets_ptr,
    K: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # of LEFT
    BLOCK_N: tl.constexpr,  # of RIGHT
    BLOCK_K: tl.constexpr,  # rows at a time
):
    tiles_n: tl.constexpr = (RIGHT + BLOCK_N - 1) // BLOCK_N
    expert = tl.program_id(1).to(tl.int64)
    left = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    right = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    left_in, right_in = left < LEFT, right < RIGHT
    first = tl.load(offsets_ptr + expert)
    last = tl.load(offsets_ptr + expert + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        rows = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        valid = rows < last
        slots = tl.load(order_ptr + rows, mask=valid, other=0).to(tl.int64)
        left_rows = slots // K if GATHER_LEFT else rows
        right_rows = slots // K if GATHER_RIGHT else rows
        # Rows past the expert's last may be unwritten memory: zeros in both operands.
        a = tl.load(
            left_ptr + left_rows[None, :] * LEFT + left[:, None], mask=left_in[:, None] & valid[None, :], other=0.0
        )  # (BLOCK_M, BLOCK_K)
        b = tl.load(
            right_ptr + right_rows[:, None] * RIGHT + right[None, :],
            mask=valid[:, None] & right_in[None, :],
            other=0.0,
        )  # (BLOCK_K, BLOCK_N)
        if HAS_FACTORS:
            factors = tl.load(factors_ptr + slots, mask=valid, other=0.0).to(tl.float32)
            b = narrow(b.to(tl.float32) * factors[:, None], b.dtype)
        acc = dot(a, b, acc)
    out_ptrs = out_ptr + expert * (LEFT * RIGHT) + left[:, None] * RIGHT + right[None, :]
    tl.store(out_ptrs, narrow(acc, out_ptr.dtype.element_ty), mask=left_in[:, None] & right_in[None, :])


def inner_grad(
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    layout: Layout,
    top_k: int,
    pre: torch.Tensor,
    factors: torch.Tensor,
    *,
    save_inner: bool = False,
    low: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    activation: str = "silu",
    limit: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Gradients that start from that of the tokens' sums.

    Args:
        grad_output: (T, H).
        weight, scale: the down matrices (E, H, I).
        pre: (N, 2I) sorted rows of gate and up.
        factors: (N,) routing weights.
        low, lora_a: (N, R) sorted low-rank gradient rows and LoRA's A (E, R, I).
        kept: (N, I) bool by slot, what dropout kept of LoRA's input; `low` has its factor.

    Returns the gradient of `pre` (N, 2I); with `save_inner`, the weighted inner rows (N, I); and the gradient of the
    routing weights (N,) float32, of which entries of no expert are not written.
    """
    (_, hidden), inter, device = grad_output.shape, weight.shape[2], grad_output.device
    slots = layout.order.numel()
    kind = weight_kind(weight)
    tile = product_tile(layout.block_m, grad_output.dtype, kind, compute_capability(device))
    if tile.block_n > 128:  # what follows the product needs the registers
        tile = tile._replace(block_n=128)
    generation = compute_capability(device)[0]
    if tile.block_m == 64 and (generation >= 10 or (generation == 8 and low is not None)):
        tile = tile._replace(block_n=64)
    if generation == 10 and low is not None and (activation != "silu" or limit):  # Triton 3.6 spills otherwise
        tile = tile._replace(block_n=64)
    tile = chosen("inner_grad", tile)
    grad_pre = torch.empty_like(pre)
    inner = pre.new_empty(slots, inter) if save_inner else None
    shares = torch.empty(slots, cdiv(inter, tile.block_n), dtype=torch.float32, device=device)
    grid, options = launch_options(tile, layout, inter, device)
    inner_grad_kernel[grid](
        grad_output,
        as_bytes(weight, kind),
        as_bytes(scale),
        low,
        lora_a,
        kept if kept is None else kept.contiguous().view(torch.uint8),
        pre,
        factors,
        grad_pre,
        inner,
        shares,
        *layout[:4],
        layout.max_tiles,
        K=top_k,
        H=hidden,
        I=inter,
        HAS_KEPT=kept is not None,
        SAVE_INNER=save_inner,
        ACTIVATION=activation,
        LIMIT=float(limit),
        **weight_options(weight, scale),
        **lora_options(0 if low is None else low.shape[1]),
        **options,
    )
    return grad_pre, inner, shares.sum(1)


def outer_tile(left: int, right: int, dtype: torch.dtype) -> dict:
    """The shipped tile of `outer_kernel`: 128 x 128, or less where a side is a LoRA rank."""
    most = 64 if dtype == torch.float32 else 128
    block_m, block_n = (min(most, max(16, next_power_of_2(size))) for size in (left, right))
    depth = 32 if dtype == torch.float32 else 64
    warps = 8 if block_m * block_n >= most * most else 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": depth, "num_warps": warps, "num_stages": 3}


def sum_outer(
    left: torch.Tensor,
    right: torch.Tensor,
    layout: Layout,
    top_k: int,
    *,
    out_dtype: torch.dtype,
    gather_left: bool = False,
    gather_right: bool = False,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per expert, the sum over its rows of left row times right row: (E, LEFT, RIGHT); zeros without rows.

    `left`, `right`: (N, LEFT) and (N, RIGHT) sorted rows, or rows of tokens where gathered; `factors`: (N,) by slot.
    """
    num_experts = layout.offsets.numel() - 1
    left_size, right_size = left.shape[1], right.shape[1]
    out = torch.empty(num_experts, left_size, right_size, dtype=out_dtype, device=left.device)
    options = chosen("outer", outer_tile(left_size, right_size, left.dtype))
    grid = (cdiv(left_size, options["BLOCK_M"]) * cdiv(right_size, options["BLOCK_N"]), num_experts)
    outer_kernel[grid](
        left,
        right,
        factors,
        out,
        layout.order,
        layout.offsets,
        K=top_k,
        LEFT=left_size,
        RIGHT=right_size,
        GATHER_LEFT=gather_left,
        GATHER_RIGHT=gather_right,
        HAS_FACTORS=factors is not None,
        **options,
    )
    return out
