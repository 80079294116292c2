"""Triton kernels of the experts' forward products.

Two grouped products over the sorted rows of `kernel_routing.Layout`:

* `gate_up_kernel` gathers the tokens of its rows while it loads them, multiplies them with the gate and the up matrix
  of their expert, and applies the activation and the gate before it stores.
* `rows_kernel`, as the down product, multiplies with the down matrix and the routing weight, and stores each row in the
  place of its slot, so that the K rows of a token are neighbours. It also serves the low-rank products of LoRA and the
  gradient of the tokens.

`kernel_combine` then adds the K rows of each token in their order. No two programs write to one place and nothing is
added atomically: the same inputs give the same bits. The rows in between cost T * K * H elements written and read,
against 3 * I * H read per touched expert.

One kernel serves both ends of the range. While tokens are few, a product costs the reading of the weights: tiles of 16
rows, one program per tile, so many bytes in flight. With many tokens it costs the arithmetic: tiles of up to 128 rows,
as many programs as the device has multiprocessors, each walking over tiles in an order that keeps the operands of
neighbours in the cache.

Weights may be float8_e4m3fn with one scale per 128 x 128 block (W8A16): they are widened in registers, and the scale is
applied to the float32 sum over each block of 128 columns. Gate and up are two operands, each with blocks from its own
first row on: scales are (E, 2 * ceil(I / 128), ceil(H / 128)) and (E, ceil(H / 128), ceil(I / 128)).

Shapes: T tokens, K choices per token, E experts, H hidden, I intermediate, N = T * K slots, R rank of LoRA factors.
"""

from __future__ import annotations

import functools

import torch

from .kernel_activation import activate, limit_gate
from .kernel_products import (
    _SCALE_BLOCK,
    as_bytes,
    expert_tile,
    halves,
    lora_sum,
    product,
    product_pair,
    tile_slots,
    weight_kind,
    weight_options,
)
from .kernel_routing import Layout
from .kernel_tiles import PLAIN, SCALE_BLOCK, Tile, chosen, product_tile
from .triton_compat import (
    cdiv,
    compute_capability,
    jit,
    jit_for_any,
    narrow,
    next_power_of_2,
    num_processors,
    tl,
)

# Row tiles of an expert whose columns are taken together. As many programs as an H100 has multiprocessors then read
# least: 16 row tiles of 128 and 8 column tiles of 256.
_GROUP_M = 16


@jit
def finish_gate_up(
    gate,
    up,
    first_column,
    place,  # row tile, tiles_ptr, offsets_ptr, order_ptr, max_tiles
    outs,  # out_ptr, pre_ptr
    I: tl.constexpr,  # noqa: E741
    SAVE_PRE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    IN_PIECES: tl.constexpr,
):
    """What `gate_up_kernel` does with two tiles of sums; in pieces, they wait to be stored in fewer registers."""
    if IN_PIECES:
        PIECE: tl.constexpr = WIDTH // 2
        gate, gate_right = halves(gate, BLOCK_M, PIECE)
        up, up_right = halves(up, BLOCK_M, PIECE)
        store_gate_up(gate, up, first_column, place, outs, I, SAVE_PRE, ACTIVATION, LIMIT, BLOCK_M, PIECE)
        store_gate_up(
            gate_right, up_right, first_column + PIECE, place, outs, I, SAVE_PRE, ACTIVATION, LIMIT, BLOCK_M, PIECE
        )
    else:
        store_gate_up(gate, up, first_column, place, outs, I, SAVE_PRE, ACTIVATION, LIMIT, BLOCK_M, WIDTH)


@jit
def store_gate_up(
    gate,
    up,
    first_column,
    place,
    outs,
    I: tl.constexpr,  # noqa: E741
    SAVE_PRE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    m, tiles_ptr, offsets_ptr, order_ptr, max_tiles = place
    out_ptr, pre_ptr = outs
    columns = first_column + tl.arange(0, WIDTH)
    # Read again: kept in registers across the product they would crowd out sums.
    _, rows, _, valid = tile_slots(m, tiles_ptr, offsets_ptr, order_ptr, max_tiles, BLOCK_M)
    mask = valid[:, None] & (columns[None, :] < I)
    if SAVE_PRE:
        pre_ptrs = pre_ptr + rows[:, None] * (2 * I) + columns[None, :]
        tl.store(pre_ptrs, narrow(gate, pre_ptr.dtype.element_ty), mask=mask)
        tl.store(pre_ptrs + I, narrow(up, pre_ptr.dtype.element_ty), mask=mask)
    if LIMIT > 0:
        gate, up = limit_gate(gate, up, LIMIT)
    out = activate(gate, ACTIVATION) * up
    tl.store(out_ptr + rows[:, None] * I + columns[None, :], narrow(out, out_ptr.dtype.element_ty), mask=mask)


@jit
def gate_up_tile(
    m,
    n,
    x,  # x_ptr, x_scale_ptr
    weights,  # weight_ptr, scale_ptr
    lora,  # low_ptr, lora_ptr
    outs,  # out_ptr, pre_ptr
    tiles_ptr,
    offsets_ptr,
    order_ptr,
    max_tiles,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    R: tl.constexpr,
    X_FP8: tl.constexpr,
    WEIGHT: tl.constexpr,
    UE8M0: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """What `gate_up_kernel` computes of row tile `m` and the `n`-th columns of gate and up."""
    HALF: tl.constexpr = BLOCK_N // 2
    PAIR: tl.constexpr = X_FP8 and BLOCK_N == 2 * _SCALE_BLOCK
    # What does more than to store SiLU's products does it in pieces where a tile's sums leave it few registers.
    MORE: tl.constexpr = SAVE_PRE or ACTIVATION != "silu" or LIMIT > 0
    IN_PIECES: tl.constexpr = PAIR or (BLOCK_N == 2 * _SCALE_BLOCK and MORE)
    GRID_K: tl.constexpr = (H + _SCALE_BLOCK - 1) // _SCALE_BLOCK
    GRID_N: tl.constexpr = (I + _SCALE_BLOCK - 1) // _SCALE_BLOCK
    x_ptr, x_scale_ptr = x
    weight_ptr, scale_ptr = weights
    low_ptr, lora_ptr = lora
    expert, rows, slots, _ = tile_slots(m, tiles_ptr, offsets_ptr, order_ptr, max_tiles, BLOCK_M)
    tokens = slots // K
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tokens[:, None] * H + k[None, :]
    weight_ptrs = weight_ptr + expert * (2 * I * H) + k[:, None]
    x_scale_ptrs = x_scale_ptr + tokens * GRID_K if X_FP8 else None
    scale_ptrs = scale_ptr + (expert * (2 * GRID_N) + n * HALF // _SCALE_BLOCK) * GRID_K if WEIGHT else None
    if PAIR:
        gate_rows = tl.minimum(n * HALF + tl.arange(0, HALF), I - 1)  # the last tile repeats the last row
        gate, up = product_pair(
            tl.zeros((BLOCK_M, HALF), tl.float32),
            tl.zeros((BLOCK_M, HALF), tl.float32),
            x_ptr,
            tokens,
            x_scale_ptr,
            weight_ptr + expert * (2 * I * H),
            weight_ptr + expert * (2 * I * H) + I * H,
            gate_rows,
            scale_ptrs,
            scale_ptrs + GRID_N * GRID_K,
            H,
            WEIGHT,
            UE8M0,
            BLOCK_M,
            HALF,
            BLOCK_K,
        )
        if R:
            factor_ptrs = lora_ptr + expert * (2 * I * R) + gate_rows * R
            gate = lora_sum(gate, low_ptr, factor_ptrs, rows, R, BLOCK_R, 1)
            up = lora_sum(up, low_ptr, factor_ptrs + I * R, rows, R, BLOCK_R, 1)
    else:
        both = tl.arange(0, BLOCK_N)
        is_up = both >= HALF
        weight_rows = tl.minimum(n * HALF + both % HALF, I - 1) + tl.where(is_up, I, 0)
        acc = product(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            x_ptrs,
            x_scale_ptrs,
            weight_ptrs + weight_rows[None, :] * H,
            scale_ptrs,
            is_up,
            H,
            1,
            1,
            GRID_N * GRID_K,
            X_FP8,
            WEIGHT,
            UE8M0,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        if R:
            factor_ptrs = lora_ptr + expert * (2 * I * R) + weight_rows * R
            acc = lora_sum(acc, low_ptr, factor_ptrs, rows, R, BLOCK_R, 1)
        gate, up = halves(acc, BLOCK_M, HALF)
    place = (m, tiles_ptr, offsets_ptr, order_ptr, max_tiles)
    finish_gate_up(gate, up, n * HALF, place, outs, I, SAVE_PRE, ACTIVATION, LIMIT, BLOCK_M, HALF, IN_PIECES)


@jit_for_any("max_tiles")
def gate_up_kernel(
    x_ptr,  # (T, H)
    x_scale_ptr,  # (T, ceil(H / 128)) float32 for FP8 rows, or unused
    weight_ptr,  # (E, 2I, H)
    scale_ptr,  # (E, 2 * ceil(I / 128), ceil(H / 128)), or unused
    low_ptr,  # (N, R) sorted rows times LoRA's A, or unused
    lora_ptr,  # (E, 2I, R) LoRA's B, or unused
    out_ptr,  # (N, I) sorted rows of activation(gate) * up
    pre_ptr,  # (N, 2I) sorted rows of gate and up, or unused
    order_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    max_tiles,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    R: tl.constexpr,  # 0 without LoRA
    X_FP8: tl.constexpr,
    WEIGHT: tl.constexpr,
    UE8M0: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # one half is gate, the other the same columns of up
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    HALVES: tl.constexpr,  # 1: row tiles that are at most half full are computed as tiles of half the size
):
    tiles_m = tl.load(num_tiles_ptr)
    tiles_n: tl.constexpr = (2 * I + BLOCK_N - 1) // BLOCK_N
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n, half = expert_tile(tile, tiles_m, tiles_n, tiles_ptr, offsets_ptr, max_tiles, BLOCK_M, GROUP_M, HALVES)
        for is_half in tl.static_range(1 + HALVES):
            if half == is_half:
                gate_up_tile(
                    m,
                    n,
                    (x_ptr, x_scale_ptr),
                    (weight_ptr, scale_ptr),
                    (low_ptr, lora_ptr),
                    (out_ptr, pre_ptr),
                    tiles_ptr,
                    offsets_ptr,
                    order_ptr,
                    max_tiles,
                    K,
                    H,
                    I,
                    R,
                    X_FP8,
                    WEIGHT,
                    UE8M0,
                    SAVE_PRE,
                    ACTIVATION,
                    LIMIT,
                    BLOCK_M // (1 + is_half),
                    BLOCK_N,
                    BLOCK_K,
                    BLOCK_R,
                )


@jit
def finish_rows(
    acc,
    columns,
    place,  # row tile, tiles_ptr, offsets_ptr, order_ptr, max_tiles
    out,  # low_ptr, lora_ptr, factors_ptr, alpha, out_ptr
    OUT: tl.constexpr,
    R: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TO_SLOTS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """What `rows_kernel` does with a tile of sums: the low-rank part, the factor of each row, the store."""
    m, tiles_ptr, offsets_ptr, order_ptr, max_tiles = place
    low_ptr, lora_ptr, factors_ptr, alpha, out_ptr = out
    # Read again: kept in registers across the product they would crowd out sums.
    expert, rows, slots, valid = tile_slots(m, tiles_ptr, offsets_ptr, order_ptr, max_tiles, BLOCK_M)
    inside = tl.minimum(columns, OUT - 1)
    if R and TRANSPOSED:
        acc = lora_sum(acc, low_ptr, lora_ptr + expert * (OUT * R) + inside, rows, R, BLOCK_R, OUT)
    elif R:
        acc = lora_sum(acc, low_ptr, lora_ptr + expert * (OUT * R) + inside * R, rows, R, BLOCK_R, 1)
    factor = tl.full((BLOCK_M,), alpha, tl.float32)
    if HAS_FACTORS:
        factor *= tl.load(factors_ptr + slots).to(tl.float32)
    acc *= factor[:, None]
    out_rows = slots if TO_SLOTS else rows
    mask = valid[:, None] & (columns[None, :] < OUT)
    tl.store(out_ptr + out_rows[:, None] * OUT + columns[None, :], narrow(acc, out_ptr.dtype.element_ty), mask=mask)


@jit
def rows_tile(
    m,
    n,
    x,  # x_ptr, x_scale_ptr
    weights,  # weight_ptr, scale_ptr
    out,  # low_ptr, lora_ptr, factors_ptr, alpha, out_ptr
    tiles_ptr,
    offsets_ptr,
    order_ptr,
    max_tiles,
    K: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TO_SLOTS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    X_FP8: tl.constexpr,
    WEIGHT: tl.constexpr,
    UE8M0: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """What `rows_kernel` computes of row tile `m` and the `n`-th columns."""
    DEPTH: tl.constexpr = IN // PARTS
    GRID_K: tl.constexpr = (DEPTH + _SCALE_BLOCK - 1) // _SCALE_BLOCK  # of one part
    GRID_N: tl.constexpr = (OUT + _SCALE_BLOCK - 1) // _SCALE_BLOCK
    STRIDE_K: tl.constexpr = OUT if TRANSPOSED else 1
    SCALE_K: tl.constexpr = GRID_N if TRANSPOSED else 1
    SCALE_N: tl.constexpr = 1 if TRANSPOSED else PARTS * GRID_K
    x_ptr, x_scale_ptr = x
    weight_ptr, scale_ptr = weights
    expert, rows, slots, _ = tile_slots(m, tiles_ptr, offsets_ptr, order_ptr, max_tiles, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    x_rows = slots // K if GATHER else rows
    x_ptrs = x_ptr + x_rows[:, None] * IN + k[None, :]
    x_scale_ptrs = x_scale_ptr + x_rows * GRID_K if X_FP8 else None
    weight_ptrs = weight_ptr + expert * (OUT * IN) + k[:, None] * STRIDE_K
    scale_ptrs = scale_ptr + expert * (PARTS * GRID_K * GRID_N) if WEIGHT else None
    scale_ptrs = scale_ptrs + n * BLOCK_N // _SCALE_BLOCK * SCALE_N if WEIGHT else None
    place = (m, tiles_ptr, offsets_ptr, order_ptr, max_tiles)
    if X_FP8 and BLOCK_N == 2 * _SCALE_BLOCK:  # with 8 warps it spills: not shipped
        tl.static_assert(OUT % BLOCK_N == 0)
        HALF: tl.constexpr = BLOCK_N // 2
        columns = n * BLOCK_N + tl.arange(0, HALF)
        left, right = product_pair(
            tl.zeros((BLOCK_M, HALF), tl.float32),
            tl.zeros((BLOCK_M, HALF), tl.float32),
            x_ptr,
            x_rows,
            x_scale_ptr,
            weight_ptr + expert * (OUT * IN),
            weight_ptr + expert * (OUT * IN) + HALF * IN,
            tl.minimum(columns, OUT - 1),
            scale_ptrs,
            scale_ptrs + SCALE_N,
            IN,
            WEIGHT,
            UE8M0,
            BLOCK_M,
            HALF,
            BLOCK_K,
        )
        finish_rows(left, columns, place, out, OUT, R, TRANSPOSED, TO_SLOTS, HAS_FACTORS, BLOCK_M, BLOCK_R)
        finish_rows(right, columns + HALF, place, out, OUT, R, TRANSPOSED, TO_SLOTS, HAS_FACTORS, BLOCK_M, BLOCK_R)
    else:
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        if TRANSPOSED:
            weight_ptrs += columns[None, :]
        else:
            weight_ptrs += tl.minimum(columns, OUT - 1)[None, :] * IN  # the last tile repeats the last row
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for part in tl.static_range(PARTS):
            acc = product(
                acc,
                x_ptrs + part * DEPTH,
                x_scale_ptrs,
                weight_ptrs + part * DEPTH * STRIDE_K,
                scale_ptrs + part * GRID_K * SCALE_K if WEIGHT else None,
                columns,
                DEPTH,
                STRIDE_K,
                SCALE_K,
                0,
                X_FP8,
                WEIGHT,
                UE8M0,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                columns,
                OUT if TRANSPOSED and OUT % BLOCK_N else 0,
            )
        finish_rows(acc, columns, place, out, OUT, R, TRANSPOSED, TO_SLOTS, HAS_FACTORS, BLOCK_M, BLOCK_R)


@jit_for_any("max_tiles")
def rows_kernel(
    x_ptr,  # (T, IN) rows of tokens if GATHER, else (N, IN) sorted rows
    x_scale_ptr,  # (rows of x, ceil(IN / 128)) float32 for FP8 rows, or unused
    weight_ptr,  # (E, OUT, IN), or (E, IN, OUT) if TRANSPOSED
    scale_ptr,  # (E, ceil(OUT / 128), ceil(IN / 128)), or with the last two exchanged; or unused
    low_ptr,  # (N, R) low-rank sorted rows, or unused
    lora_ptr,  # (E, OUT, R), or (E, R, OUT) if TRANSPOSED; or unused
    factors_ptr,  # (N,) factor of each slot's row, or unused
    out_ptr,  # (N, OUT) rows in the order of the slots if TO_SLOTS, else sorted rows
    order_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    max_tiles,
    alpha,  # factor of every row
    K: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    R: tl.constexpr,  # 0 without LoRA
    PARTS: tl.constexpr,  # pieces of the inner dimension whose blocks of scales are apart
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TO_SLOTS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    X_FP8: tl.constexpr,
    WEIGHT: tl.constexpr,
    UE8M0: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    HALVES: tl.constexpr,  # as for `gate_up_kernel`
):
    tiles_m = tl.load(num_tiles_ptr)
    tiles_n: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n, half = expert_tile(tile, tiles_m, tiles_n, tiles_ptr, offsets_ptr, max_tiles, BLOCK_M, GROUP_M, HALVES)
        for is_half in tl.static_range(1 + HALVES):
            if half == is_half:
                rows_tile(
                    m,
                    n,
                    (x_ptr, x_scale_ptr),
                    (weight_ptr, scale_ptr),
                    (low_ptr, lora_ptr, factors_ptr, alpha, out_ptr),
                    tiles_ptr,
                    offsets_ptr,
                    order_ptr,
                    max_tiles,
                    K,
                    IN,
                    OUT,
                    R,
                    PARTS,
                    GATHER,
                    TRANSPOSED,
                    TO_SLOTS,
                    HAS_FACTORS,
                    X_FP8,
                    WEIGHT,
                    UE8M0,
                    BLOCK_M // (1 + is_half),
                    BLOCK_N,
                    BLOCK_K,
                    BLOCK_R,
                )


@functools.lru_cache(maxsize=1024)  # all layers ask the same
def _launch_options(tile: Tile, row_tiles: int, columns: int, processors: int) -> tuple[tuple[int], dict]:
    grid = row_tiles * cdiv(columns, tile.block_n)
    if tile.per_processor:
        grid = min(grid, processors * tile.per_processor)
    options = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    # While tiles are small, row tiles that read the same weights are neighbours without more ado.
    options.update(GROUP_M=_GROUP_M if tile.per_processor else 0, num_warps=tile.warps, num_stages=tile.stages)
    # float32, little memory, or few columns: else the assembler spills to fit more programs than there are
    if tile.block_k == 32 or tile.block_n < 64:
        options["maxnreg"] = 255
    return (grid,), options


def launch_options(tile: Tile, layout: Layout, columns: int, device: torch.device) -> tuple[tuple[int], dict]:
    """Grid and keyword arguments of a product of `columns` columns in all."""
    return _launch_options(tile, layout.max_tiles, columns, num_processors(device))


def takes_halves(tile: Tile, depth: int) -> int:
    """1 if row tiles that are at most half full are computed as such: where the rows of half of one are enough for a
    group of warps to multiply, there is an order of tiles that says how full they are, and more than a step to save."""
    return int(tile.block_m == 128 and tile.per_processor > 0 and depth > tile.block_k)


def lora_options(rank: int) -> dict:
    """Rank and its padded size: a product has an inner dimension of 16 at least."""
    return {"R": rank, "BLOCK_R": max(16, next_power_of_2(rank))}


def gate_up(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    layout: Layout,
    top_k: int,
    *,
    out_dtype: torch.dtype,
    pre_dtype: torch.dtype | None = None,
    x_scale: torch.Tensor | None = None,
    low: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    activation: str = "silu",
    limit: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sorted rows (N, I) of activation(gate) * up, and (N, 2I) of gate and up if `pre_dtype` is given."""
    (tokens, hidden), inter, device = hidden_states.shape, weight.shape[1] // 2, hidden_states.device
    kind = weight_kind(weight)
    capability = compute_capability(device)
    tile = product_tile(layout.block_m, hidden_states.dtype, kind, capability)
    fits = activation == "silu" and not limit and hidden_states.numel() < 1 << 31
    if x_scale is not None and tile.block_m == 128 and capability[0] == 9 and fits:
        tile = tile._replace(block_n=2 * SCALE_BLOCK, stages=4)  # see `product_pair`
    tile = chosen("gate_up", tile)
    out = torch.empty(tokens * top_k, inter, dtype=out_dtype, device=device)
    pre = None if pre_dtype is None else torch.empty(tokens * top_k, 2 * inter, dtype=pre_dtype, device=device)
    grid, options = launch_options(tile, layout, 2 * inter, device)
    gate_up_kernel[grid](
        as_bytes(hidden_states, kind),
        x_scale,
        as_bytes(weight, kind),
        as_bytes(scale),
        low,
        lora_b,
        out,
        pre,
        *layout[:4],
        layout.max_tiles,
        K=top_k,
        H=hidden,
        I=inter,
        X_FP8=x_scale is not None,
        SAVE_PRE=pre is not None,
        ACTIVATION=activation,
        LIMIT=float(limit),
        HALVES=takes_halves(tile, hidden),
        **weight_options(weight, scale),
        **lora_options(0 if low is None else low.shape[1]),
        **options,
    )
    return out, pre


def multiply_rows(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    layout: Layout,
    top_k: int,
    *,
    out_dtype: torch.dtype,
    gather: bool = False,
    transposed: bool = False,
    to_slots: bool = False,
    parts: int = 1,
    factors: torch.Tensor | None = None,
    alpha: float = 1.0,
    x_scale: torch.Tensor | None = None,
    low: torch.Tensor | None = None,
    lora: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row times the weight of its expert: (N, OUT).

    Args:
        rows: (N, IN) sorted rows, or (T, IN) rows of tokens with `gather`.
        weight: (E, OUT, IN), or (E, IN, OUT) with `transposed`.
        scale: of an FP8 weight.
        to_slots: results in the order of the slots, instead of sorted; those of no expert are not written.
        parts: 2 if the inner dimension is that of a stacked gate and up, whose blocks of scales are apart.
        factors: (N,) float of each slot.
        alpha: factor of all.
        low, lora: (N, R) sorted low-rank rows and their (E, OUT, R), or (E, R, OUT) with `transposed`.
    """
    inner, out_features = weight.shape[1:] if transposed else weight.shape[:0:-1]
    device, kind = rows.device, weight_kind(weight)
    tile = product_tile(layout.block_m, rows.dtype, kind, compute_capability(device))
    if out_features <= 64:
        tile = tile._replace(block_n=max(16, next_power_of_2(out_features)), block_k=min(tile.block_k, 64))
        tile = tile._replace(warps=4 if tile.block_m <= 64 else tile.warps)
    tile = chosen("rows", tile)
    if kind == PLAIN or inner % (parts * SCALE_BLOCK) == 0:
        parts = 1  # one piece, or its blocks follow one another
    out = torch.empty(layout.order.numel(), out_features, dtype=out_dtype, device=device)
    grid, options = launch_options(tile, layout, out_features, device)
    rows_kernel[grid](
        as_bytes(rows, kind),
        x_scale,
        as_bytes(weight, kind),
        as_bytes(scale),
        low,
        lora,
        factors,
        out,
        *layout[:4],
        layout.max_tiles,
        float(alpha),
        K=top_k,
        IN=inner,
        OUT=out_features,
        PARTS=parts,
        GATHER=gather,
        TRANSPOSED=transposed,
        TO_SLOTS=to_slots,
        HAS_FACTORS=factors is not None,
        X_FP8=x_scale is not None,
        HALVES=takes_halves(tile, inner),
        **weight_options(weight, scale),
        **lora_options(0 if low is None else low.shape[1]),
        **options,
    )
    return out
