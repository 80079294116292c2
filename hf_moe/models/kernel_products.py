"""What Triton kernels of products with experts' and with FP8 weights share: tiles, operands, sums.

Weights may be float8_e4m3fn with one scale per 128 x 128 block. W8A16 widens them in registers, W8A8 multiplies FP8
rows with them; the scales are applied to the float32 sum over each block of 128 columns.

Shapes: E experts, N slots (sorted rows of `kernel_routing.Layout`), R rank of LoRA factors.
"""

from __future__ import annotations

import torch

from .kernel_tiles import FP8, FP8_BITS, PLAIN, SCALE_BLOCK
from .triton_compat import INTERPRETING, constant, converts_fp8, dot, e4m3_to_float, jit, tl

_FP8, _FP8_BITS = constant(FP8), constant(FP8_BITS)
_SCALE_BLOCK = constant(SCALE_BLOCK)


@jit
def load_scale(ptr, UE8M0: tl.constexpr):
    """A scale as float32; `UE8M0` are exponents in bytes."""
    value = tl.load(ptr)
    if UE8M0:
        bits = value.to(tl.uint32)
        # 2**(bits - 127): the smallest is subnormal, and 255 is NaN.
        mantissa = tl.where((bits == 0) | (bits == 255), 0x00400000, 0)
        value = ((bits << 23) | mantissa).to(tl.float32, bitcast=True)
    return value


@jit
def widen(weight, dtype: tl.constexpr, WEIGHT: tl.constexpr):
    """A tile of weights in the dtype of the activations. FP8 values are exact in it."""
    if WEIGHT == _FP8_BITS:
        wide = e4m3_to_float(weight, dtype)
    elif WEIGHT == _FP8 and dtype == tl.bfloat16:
        # Straight there, each value takes a slot of the unit for special functions: a quarter of the others' rate.
        wide = weight.to(tl.float32).to(dtype)
    else:
        wide = weight.to(dtype)
    return wide


@jit
def tile_of(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(m, n) of a linear tile index: columns of `GROUP_M` row tiles after one another."""
    group = index // (GROUP_M * tiles_n)
    first = group * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    within = index - group * GROUP_M * tiles_n
    return first + within % size, within // size


@jit
def expert_tile(
    index,
    tiles_m,
    tiles_n,
    tiles_ptr,
    offsets_ptr,
    max_tiles,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    HALVES: tl.constexpr,
):
    """(m, n) of a linear tile index, and with `HALVES` 1 if half of the row tile has room for the rows in it, else 0.

    The columns of up to `GROUP_M` row tiles of one expert after one another, expert by expert: what runs side by side
    has the same weights, which come from memory once. With GROUP_M 0, the same columns of all experts together."""
    half = 0
    if GROUP_M == 0:
        m = index % tiles_m
        n = index // tiles_m
    else:
        m = index // tiles_n
        expert = tl.load(tiles_ptr + m)
        first_row = tl.load(offsets_ptr + expert)
        rows = tl.load(offsets_ptr + expert + 1) - first_row
        before = (tl.load(tiles_ptr + max_tiles + m) - first_row) // BLOCK_M  # row tiles of the expert
        skipped = before // GROUP_M * GROUP_M
        first = m - before + skipped
        size = tl.minimum((rows + BLOCK_M - 1) // BLOCK_M - skipped, GROUP_M)
        place = index - first * tiles_n
        m = first + place % size
        n = place // size
        if HALVES:
            half = (rows - (skipped + place % size) * BLOCK_M <= BLOCK_M // 2).to(tl.int32)
    return m, n, half


@jit
def tile_slots(m, tiles_ptr, offsets_ptr, order_ptr, max_tiles, BLOCK_M: tl.constexpr):
    """Expert (int64), sorted rows, slots and validity of the rows of row tile `m`. Rows past the expert's last repeat
    it, so that loads need no mask."""
    expert = tl.load(tiles_ptr + m).to(tl.int64)
    last = tl.load(offsets_ptr + expert + 1) - 1
    rows = tl.load(tiles_ptr + max_tiles + m) + tl.arange(0, BLOCK_M)
    valid = rows <= last
    rows = tl.minimum(rows, last).to(tl.int64)
    slots = tl.load(order_ptr + rows).to(tl.int64)
    return expert, rows, slots, valid


@jit
def load_k(ptrs, k, limit: tl.constexpr, EVEN_K: tl.constexpr, axis: tl.constexpr):
    """A tile of an operand at inner offset `k`; zeros past `limit`."""
    if EVEN_K:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=tl.expand_dims(k < limit, axis), other=0.0)
    return tile


@jit
def load_weight(ptrs, k, limit: tl.constexpr, EVEN_K: tl.constexpr, columns, COLUMNS: tl.constexpr):
    """A (BLOCK_K, BLOCK_N) tile of a weight at inner offset `k`; zeros past `limit`, and past COLUMNS if that is not
    0. Where columns are neighbours in memory, they must not be repeated past the end: it would hide that from the
    compiler, which could no longer copy them in pieces."""
    if COLUMNS == 0:
        tile = load_k(ptrs, k, limit, EVEN_K, 1)
    elif EVEN_K:
        tile = tl.load(ptrs, mask=(columns < COLUMNS)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs, mask=(k < limit)[:, None] & (columns < COLUMNS)[None, :], other=0.0)
    return tile


@jit
def product(
    acc,  # (BLOCK_M, BLOCK_N) float32
    x_ptrs,  # (BLOCK_M, BLOCK_K)
    x_scale_ptrs,  # (BLOCK_M,) scales of the rows' first 128 values, for FP8 rows
    weight_ptrs,  # (BLOCK_K, BLOCK_N)
    scale_ptr,  # scale of the tile's first block, for FP8 weights
    second,  # (BLOCK_N,) columns that belong to a second block of columns
    DEPTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,  # of the weight along the inner dimension
    SCALE_STRIDE: tl.constexpr,  # of the scales along the inner dimension
    SECOND: tl.constexpr,  # from the scale of the first block of columns to that of the second; 0: there is none
    X_FP8: tl.constexpr,
    WEIGHT: tl.constexpr,
    UE8M0: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    columns=None,  # (BLOCK_N,) of the result
    COLUMNS: tl.constexpr = 0,  # how many there are, if those past the end must not be read
    piece=0,
    IS_PIECE: tl.constexpr = False,
):
    """`acc` + rows times weights over DEPTH, or over the first `piece` of it: whole steps. FP8 sums are scaled once per
    step, in float32."""
    EVEN_K: tl.constexpr = DEPTH % BLOCK_K == 0
    k = tl.arange(0, BLOCK_K)
    for start in range(0, piece if IS_PIECE else DEPTH, BLOCK_K):
        x = load_k(x_ptrs, start + k, DEPTH, EVEN_K, 0)
        weight = load_weight(weight_ptrs, start + k, DEPTH, EVEN_K, columns, COLUMNS)
        if WEIGHT:
            block = start // _SCALE_BLOCK
            scale = load_scale(scale_ptr + block * SCALE_STRIDE, UE8M0)
            if not X_FP8:
                weight = widen(weight, x.dtype, WEIGHT)
            elif WEIGHT == _FP8_BITS:  # the interpreter: values that FP8 holds
                x = e4m3_to_float(x, tl.float32)
                weight = e4m3_to_float(weight, tl.float32)
            part = dot(x, weight, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            if SECOND:
                second_scale = load_scale(scale_ptr + SECOND + block * SCALE_STRIDE, UE8M0)
                factor = tl.where(second, second_scale, scale)[None, :]
            else:
                factor = scale
            if X_FP8:
                acc += part * (tl.load(x_scale_ptrs + block)[:, None] * factor)
            else:
                acc += part * factor
        else:
            acc = dot(x, weight, acc)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * WEIGHT_STRIDE
    return acc


@jit
def product_pair(
    left,  # (BLOCK_M, HALF) float32
    right,  # (BLOCK_M, HALF) float32
    x_ptr,  # FP8 rows
    x_rows,  # (BLOCK_M,)
    x_scale_ptr,  # (rows, ceil(DEPTH / 128)) float32
    left_ptr,  # FP8 weight of the left half
    right_ptr,  # FP8 weight of the right half
    weight_rows,  # (HALF,) of either
    left_scale_ptr,
    right_scale_ptr,
    DEPTH: tl.constexpr,
    WEIGHT: tl.constexpr,
    UE8M0: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """FP8 rows times two blocks of columns. A tile of 256 columns reads its rows half as often as two of 128, and with
    its halves one after the other the sums that wait to be scaled just fit into the registers; so do places as int32
    offsets, where pointers would not: `x_ptr` holds less than 2**31 elements."""
    EVEN_K: tl.constexpr = DEPTH % BLOCK_K == 0
    GRID_K: tl.constexpr = (DEPTH + _SCALE_BLOCK - 1) // _SCALE_BLOCK
    k = tl.arange(0, BLOCK_K)
    x_rows = x_rows.to(tl.int32)
    x_places = x_rows[:, None] * DEPTH + k[None, :]
    x_scale_places = x_rows * GRID_K
    places = weight_rows[None, :] * DEPTH + k[:, None]
    for start in range(0, DEPTH, BLOCK_K):
        block = start // _SCALE_BLOCK
        x = load_k(x_ptr + start + x_places, start + k, DEPTH, EVEN_K, 0)
        left_weight = load_k(left_ptr + start + places, start + k, DEPTH, EVEN_K, 1)
        right_weight = load_k(right_ptr + start + places, start + k, DEPTH, EVEN_K, 1)
        if WEIGHT == _FP8_BITS:  # the interpreter: values that FP8 holds
            x = e4m3_to_float(x, tl.float32)
            left_weight = e4m3_to_float(left_weight, tl.float32)
            right_weight = e4m3_to_float(right_weight, tl.float32)
        x_scale = tl.load(x_scale_ptr + block + x_scale_places)
        part = dot(x, left_weight, tl.zeros((BLOCK_M, HALF), tl.float32))
        left += part * (x_scale * load_scale(left_scale_ptr + block, UE8M0))[:, None]
        part = dot(x, right_weight, tl.zeros((BLOCK_M, HALF), tl.float32))
        right += part * (x_scale * load_scale(right_scale_ptr + block, UE8M0))[:, None]
    return left, right


@jit
def lora_sum(acc, low_ptr, factor_ptrs, rows, R: tl.constexpr, BLOCK_R: tl.constexpr, STRIDE: tl.constexpr):
    """`acc` + low-rank rows (N, R) times factors, given as pointers to each column's value for rank 0."""
    r = tl.arange(0, BLOCK_R)
    low = tl.load(low_ptr + rows[:, None] * R + r[None, :], mask=r[None, :] < R, other=0.0)
    factor = tl.load(factor_ptrs[None, :] + r[:, None] * STRIDE, mask=r[:, None] < R, other=0.0)
    return dot(low, factor.to(low.dtype), acc)


@jit
def halves(tile, BLOCK_M: tl.constexpr, HALF: tl.constexpr):
    """(BLOCK_M, 2 * HALF) to its left and its right half."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, HALF)), (0, 2, 1)))


def weight_kind(weight: torch.Tensor) -> int:
    """How kernels read `weight` on its device."""
    if weight.dtype != torch.float8_e4m3fn:
        return PLAIN
    return FP8 if converts_fp8(weight.device) and not INTERPRETING else FP8_BITS


def as_bytes(tensor: torch.Tensor | None, kind: int = FP8_BITS) -> torch.Tensor | None:
    """FP8 weights and UE8M0 scales as the type that kernels are given."""
    if tensor is None:
        return None
    bits = tensor.dtype == torch.float8_e8m0fnu or (kind == FP8_BITS and tensor.dtype == torch.float8_e4m3fn)
    return tensor.view(torch.uint8) if bits else tensor


def weight_options(weight: torch.Tensor, scale: torch.Tensor | None) -> dict:
    return {"WEIGHT": weight_kind(weight), "UE8M0": scale is not None and scale.dtype == torch.float8_e8m0fnu}
