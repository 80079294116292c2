"""Triton kernels of block FP8 for dense layers: quantise, dequantise, and the product with an FP8 weight.

`linear_kernel` serves decoding and prefill, forward and the gradient of the rows. W8A8 multiplies FP8 rows with FP8
weights, W8A16 widens the weights in registers; both scale the float32 sum of each block of 128 inner columns before it
is added. With few rows and few columns there would be fewer programs than multiprocessors, and the weights would come
slowly: the inner dimension is then split, and `split_sum_kernel` adds the parts in their order.

Shapes: M rows, O output features, I input features, G = ceil(I / 128) groups.
"""

from __future__ import annotations

import torch

from .kernel_products import as_bytes, load_scale, product, tile_of, weight_kind, weight_options, widen
from .kernel_tiles import FP8_BITS, SCALE_BLOCK, Tile, chosen, product_tile
from .triton_compat import (
    INTERPRETING,
    cdiv,
    compute_capability,
    constant,
    converts_fp8,
    jit,
    jit_for_any,
    narrow,
    num_processors,
    on_its_device,
    tl,
)

_SCALE_BLOCK = constant(SCALE_BLOCK)
_FP8_MAX = constant(448.0)
_FLOOR = constant(1e-4)  # of the largest magnitude in a group of activations


@jit
def power_of_two(scale):
    """The least power of two that is no smaller than a positive normal float32; infinity stays."""
    bits = scale.to(tl.uint32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.uint32)
    return (exponent << 23).to(tl.float32, bitcast=True)


@jit
def float_to_e4m3(value):
    """float32 within +-448, or NaN, to the bits of float8_e4m3fn, rounded to nearest even."""
    bits = value.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits &= 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # 960: eight steps for each exponent below 2**-6
    # Added to 2**14, a value rounds to a multiple of 2**-9, the step of subnormals.
    small = (bits.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) & 0xFF
    normal = tl.where(bits > 0x7F800000, 0x7F, normal)  # NaN
    return (sign | tl.where(bits < 0x3C800000, small, normal)).to(tl.uint8)  # 0x3C800000 is 2**-6


@jit
def store_fp8(ptrs, value, mask, BITS: tl.constexpr):
    within = tl.minimum(tl.maximum(value, -_FP8_MAX), _FP8_MAX)
    value = tl.where(value == value, within, value)  # a limit is a number, whatever was limited
    if BITS:
        tl.store(ptrs, float_to_e4m3(value), mask=mask)
    else:
        tl.store(ptrs, value.to(tl.float8e4nv), mask=mask)


@jit
def quantize_rows_kernel(
    x_ptr,  # (M, I)
    out_ptr,  # (M, I) float8_e4m3fn
    scale_ptr,  # (M, G) float32
    width,
    groups,
    UE8M0: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * _SCALE_BLOCK + tl.arange(0, _SCALE_BLOCK)[None, :]
    x = tl.load(x_ptr + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), axis=1), _FLOOR), _FP8_MAX)
    if UE8M0:
        scale = power_of_two(scale)
    scale = tl.where(tl.sum((x != x).to(tl.int32), axis=1) > 0, float("nan"), scale)
    tl.store(scale_ptr + row * groups + group, scale, mask=group < groups)
    store_fp8(out_ptr + row * width + column, tl.div_rn(x, scale[:, None]), column < width, BITS)


@jit
def quantize_blocks_kernel(
    weight_ptr,  # (O, I)
    out_ptr,  # (O, I) float8_e4m3fn
    scale_ptr,  # (ceil(O / 128), G) float32
    height,
    width,
    groups,
    UE8M0: tl.constexpr,
    BITS: tl.constexpr,
):
    block_row, block_column = tl.program_id(0), tl.program_id(1)
    row = block_row.to(tl.int64) * _SCALE_BLOCK + tl.arange(0, _SCALE_BLOCK)[:, None]
    column = block_column * _SCALE_BLOCK + tl.arange(0, _SCALE_BLOCK)[None, :]
    mask = (row < height) & (column < width)
    value = tl.load(weight_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.abs(value), axis=1), axis=0)
    scale = tl.maximum(tl.div_rn(largest, _FP8_MAX), 1.1754943508222875e-38)  # the least normal float32
    scale = tl.where(largest == 0.0, 1.0, scale)
    if UE8M0:
        scale = power_of_two(scale)
    scale = tl.where(tl.sum(tl.sum((value != value).to(tl.int32), axis=1), axis=0) > 0, float("nan"), scale)
    tl.store(scale_ptr + block_row * groups + block_column, scale)
    store_fp8(out_ptr + row * width + column, tl.div_rn(value, scale), mask, BITS)


@jit
def dequantize_kernel(
    weight_ptr,  # (O, I) float8_e4m3fn
    scale_ptr,  # (parts * ceil(O / parts / 128), G)
    out_ptr,  # (O, I)
    height,  # of one part
    width,
    groups,
    WEIGHT: tl.constexpr,
    UE8M0: tl.constexpr,
    ROWS: tl.constexpr,
):
    part, block = tl.program_id(2), tl.program_id(0)
    first = block * ROWS
    row = first + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * _SCALE_BLOCK + tl.arange(0, _SCALE_BLOCK)[None, :]
    mask = (row < height) & (column < width)
    place = (part.to(tl.int64) * height + row) * width + column
    grid_rows = (height + _SCALE_BLOCK - 1) // _SCALE_BLOCK
    scale = load_scale(scale_ptr + (part * grid_rows + first // _SCALE_BLOCK) * groups + tl.program_id(1), UE8M0)
    value = widen(tl.load(weight_ptr + place, mask=mask, other=0.0), tl.float32, WEIGHT)
    tl.store(out_ptr + place, narrow(value * scale, out_ptr.dtype.element_ty), mask=mask)


@jit_for_any("num_rows", "blocks")
def linear_kernel(
    x_ptr,  # (M, DEPTH)
    x_scale_ptr,  # (M, ceil(DEPTH / 128)) float32 for FP8 rows, or unused
    weight_ptr,  # (OUT, DEPTH), or (DEPTH, OUT) if TRANSPOSED
    scale_ptr,  # a scale for every 128 x 128 block of the weight
    bias_ptr,  # (OUT,), or unused
    out_ptr,  # (SPLITS, M, OUT)
    num_rows,
    blocks,  # of scales along the inner dimension, for each of the SPLITS programs of a tile
    DEPTH: tl.constexpr,
    OUT: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    X_FP8: tl.constexpr,
    WEIGHT: tl.constexpr,
    UE8M0: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    GRID_K: tl.constexpr = (DEPTH + _SCALE_BLOCK - 1) // _SCALE_BLOCK
    GRID_N: tl.constexpr = (OUT + _SCALE_BLOCK - 1) // _SCALE_BLOCK
    STRIDE_K: tl.constexpr = OUT if TRANSPOSED else 1
    STRIDE_N: tl.constexpr = 1 if TRANSPOSED else DEPTH
    SCALE_K: tl.constexpr = GRID_N if TRANSPOSED else 1
    SCALE_N: tl.constexpr = 1 if TRANSPOSED else GRID_K
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    split = tl.program_id(1)
    piece = blocks * _SCALE_BLOCK  # so written, the compiler sees what it is a multiple of
    start = split * piece if IS_SPLIT else 0
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = rows < num_rows
        rows = tl.minimum(rows, num_rows - 1).to(tl.int64)  # rows past the end repeat the last one
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = columns.to(tl.int64)
        if not TRANSPOSED and OUT % BLOCK_N:
            inside = tl.minimum(inside, OUT - 1)
        k = tl.arange(0, BLOCK_K)
        acc = product(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            x_ptr + rows[:, None] * DEPTH + start + k[None, :],
            x_scale_ptr + rows * GRID_K + start // _SCALE_BLOCK if X_FP8 else None,
            weight_ptr + (inside[None, :] * STRIDE_N + (start + k[:, None]).to(tl.int64) * STRIDE_K),
            scale_ptr + n * BLOCK_N // _SCALE_BLOCK * SCALE_N + start // _SCALE_BLOCK * SCALE_K,
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
            piece,
            IS_SPLIT,
        )
        if HAS_BIAS:
            acc += tl.load(bias_ptr + columns, mask=columns < OUT, other=0.0).to(tl.float32)[None, :]
        place = (split.to(tl.int64) * num_rows + rows[:, None]) * OUT + columns[None, :]
        mask = valid[:, None] & (columns[None, :] < OUT)
        tl.store(out_ptr + place, narrow(acc, out_ptr.dtype.element_ty), mask=mask)


@jit_for_any("elements")
def split_sum_kernel(
    parts_ptr,  # (SPLITS, elements) float32
    bias_ptr,  # (width,), or unused
    out_ptr,  # (elements,)
    elements,
    width,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < elements
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(parts_ptr + split * elements + place, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + place % width, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, narrow(acc, out_ptr.dtype.element_ty), mask=mask)


def _stores_bits(device: torch.device) -> bool:
    return INTERPRETING or not converts_fp8(device)


def _fp8_like(tensor: torch.Tensor, bits: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A new FP8 tensor, and what a kernel is given to fill it."""
    out = torch.empty_like(tensor, dtype=torch.float8_e4m3fn)
    return out, out.view(torch.uint8) if bits else out


@on_its_device
def quantize_rows(rows: torch.Tensor, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations (M, I) in groups of 128 channels: float8_e4m3fn (M, I) and float32 scales (M, ceil(I / 128)).

    The twin is `op_quant.quantize_rows`, with which it agrees bit for bit.
    """
    rows = rows.contiguous()
    count, width = rows.shape
    groups = cdiv(width, SCALE_BLOCK)
    bits = _stores_bits(rows.device)
    out, target = _fp8_like(rows, bits)
    scale = torch.empty(count, groups, dtype=torch.float32, device=rows.device)
    per_program = 8
    if count:
        quantize_rows_kernel[(count, cdiv(groups, per_program))](
            rows, target, scale, width, groups, UE8M0=ue8m0, BITS=bits, GROUPS=per_program, num_warps=4
        )
    return out, scale


@on_its_device
def quantize_block_fp8(weight: torch.Tensor, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (O, I) in blocks of 128 x 128: float8_e4m3fn and float32 scales.

    The twin is `op_quant.quantize_block_fp8`, with which it agrees bit for bit.
    """
    weight = weight.contiguous()
    height, width = weight.shape
    grid = (cdiv(height, SCALE_BLOCK), cdiv(width, SCALE_BLOCK))
    bits = _stores_bits(weight.device)
    out, target = _fp8_like(weight, bits)
    scale = torch.empty(grid, dtype=torch.float32, device=weight.device)
    if weight.numel():
        quantize_blocks_kernel[grid](weight, target, scale, height, width, grid[1], UE8M0=ue8m0, BITS=bits, num_warps=8)
    return out, scale


@on_its_device
def dequantize_block_fp8(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, parts: int = 1) -> torch.Tensor:
    """A block FP8 matrix (O, I), in blocks of 128 x 128, in `dtype`.

    The twin is `op_quant.dequantize_block_fp8`; each element is rounded once, from the float32 product.
    """
    weight, scale = weight.contiguous(), scale.contiguous()
    height, width = weight.shape[0] // parts, weight.shape[1]
    out = torch.empty_like(weight, dtype=dtype)
    if out.numel() == 0:
        return out
    rows, kind = 32, weight_kind(weight)
    dequantize_kernel[(cdiv(height, rows), cdiv(width, SCALE_BLOCK), parts)](
        as_bytes(weight, kind),
        as_bytes(scale),
        out,
        height,
        width,
        cdiv(width, SCALE_BLOCK),
        ROWS=rows,
        num_warps=4,
        **weight_options(weight, scale),
    )
    return out


def linear_tile(
    num_rows: int, dtype: torch.dtype, weight: int, capability: tuple[int, int], transposed: bool = False
) -> Tile:
    """The shipped tile for `num_rows` rows of `dtype`."""
    block_m = 16
    if num_rows > 16:
        # float32 products take registers for their operands, too.
        block_m = 32 if dtype == torch.float32 else 64 if num_rows <= 128 else 128
    tile = product_tile(block_m, dtype, weight, capability)
    if tile.block_n > SCALE_BLOCK:  # a step takes one scale of the weight
        tile = Tile(block_m, SCALE_BLOCK, SCALE_BLOCK, 8, 3, 2)
    if transposed and capability[0] == 8 and block_m == 128:  # widened by bits, against the grain: more registers
        return tile._replace(block_n=64)
    return tile


def split_count(depth: int, tiles: int, processors: int) -> int:
    """Pieces of the inner dimension so that a few programs come on each multiprocessor: of whole blocks of scales, and
    at least 512 long."""
    blocks = depth // SCALE_BLOCK
    if depth % SCALE_BLOCK or tiles >= 2 * processors:
        return 1
    fitting = [count for count in range(1, blocks // 4 + 1) if blocks % count == 0 and tiles * count <= 4 * processors]
    return max(fitting, default=1)


@on_its_device
def multiply(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    out_dtype: torch.dtype,
    x_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """`rows @ weight.T`, or `rows @ weight` with `transposed`, for a block FP8 weight in blocks of 128 x 128.

    Args:
        rows: (M, D) of bfloat16, float16 or float32, or FP8 rows with `x_scale` (M, ceil(D / 128)).
        weight: (OUT, D) float8_e4m3fn, or (D, OUT) with `transposed`.
        scale: a float32 or float8_e8m0fnu scale for each of its blocks.
        bias: (OUT,).

    Returns (M, OUT) in `out_dtype`.
    """
    rows, weight, scale = rows.contiguous(), weight.contiguous(), scale.contiguous()
    num_rows, depth = rows.shape
    width = weight.shape[1] if transposed else weight.shape[0]
    device, kind = rows.device, weight_kind(weight)
    out = torch.empty(num_rows, width, dtype=out_dtype, device=device)
    if out.numel() == 0:
        return out
    tile = chosen("linear", linear_tile(num_rows, rows.dtype, kind, compute_capability(device), transposed))
    tiles = cdiv(num_rows, tile.block_m) * cdiv(width, tile.block_n)
    processors = num_processors(device)
    splits = chosen("linear_splits", split_count(depth, tiles, processors))
    target = out if splits == 1 else torch.empty(splits, num_rows, width, dtype=torch.float32, device=device)
    programs = min(tiles, processors * tile.per_processor) if tile.per_processor and splits == 1 else tiles
    linear_kernel[(programs, splits)](
        as_bytes(rows, kind if x_scale is not None else FP8_BITS),
        x_scale,
        as_bytes(weight, kind),
        as_bytes(scale),
        bias if splits == 1 else None,
        target,
        num_rows,
        depth // SCALE_BLOCK // splits,
        DEPTH=depth,
        OUT=width,
        IS_SPLIT=splits > 1,
        TRANSPOSED=transposed,
        HAS_BIAS=bias is not None and splits == 1,
        X_FP8=x_scale is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=8,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **weight_options(weight, scale),
    )
    if splits > 1:
        block = 1024
        split_sum_kernel[(cdiv(out.numel(), block),)](
            target,
            bias,
            out,
            out.numel(),
            width,
            SPLITS=splits,
            HAS_BIAS=bias is not None,
            BLOCK=block,
            num_warps=4,
        )
    return out
