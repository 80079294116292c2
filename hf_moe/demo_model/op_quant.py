"""Quantisation and its inverse in plain PyTorch: block FP8 (DeepSeek-V3 and relatives), packed INT4 (Kimi-K2-Thinking).

These functions are the definition of the formats. They take and return whole matrices, on any device.
"""

import torch
from torch.nn import functional as F

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
ACTIVATION_GROUP = 128  # input channels that share a scale in quantised activations
_ACTIVATION_FLOOR = 1e-4  # of the largest magnitude in a group


def block_grid(shape: tuple[int, ...], block_size: tuple[int, int], parts: int = 1) -> tuple[int, ...]:
    """Shape of the scales of a block FP8 weight of `shape` (..., rows, cols).

    `parts`: matrices that are stacked along the rows, each with blocks of its own (2 for gate and up).
    """
    *leading, rows, cols = shape
    return (*leading, parts * -(-(rows // parts) // block_size[0]), -(-cols // block_size[1]))


def check_scales(
    weight: torch.Tensor, weight_scale_inv: torch.Tensor, block_size: tuple[int, int], parts: int = 1
) -> tuple[int, ...]:
    """The shape that the scales of a block FP8 weight have.

    Raises:
        ValueError: if they have another.
    """
    grid = block_grid(tuple(weight.shape), block_size, parts)
    if tuple(weight_scale_inv.shape) != grid:
        raise ValueError(
            f"scales of shape {tuple(weight_scale_inv.shape)} for a weight of shape {tuple(weight.shape)} in blocks "
            f"of {block_size[0]} x {block_size[1]}: expected {grid}"
        )
    return grid


def dequantize_block_fp8(
    weight: torch.Tensor,
    weight_scale_inv: torch.Tensor,
    block_size: tuple[int, int] = (128, 128),
    parts: int = 1,
    scratch: torch.Tensor | None = None,
) -> torch.Tensor:
    """`weight[a, b] * weight_scale_inv[a // rows, b // cols]` in float32; blocks at the edges are short.

    Args:
        weight: (..., O, I) float8_e4m3fn.
        weight_scale_inv: (..., ceil(O / rows), ceil(I / cols)) float32 or float8_e8m0fnu. Despite its name, the factor
            to multiply by.
        block_size: rows and columns of a block. A constant of the format: it must never be inferred from the two
            shapes (576 rows have 5 scales, 192 rows have 2).
        parts: matrices of O / parts rows, stacked, whose blocks are apart; the grid has the rows of each in turn.
        scratch: float32 memory on the CPU, at least one and a half elements for each of the weight's. Where it is of
            use the result lies at its front, until it is used again.

    Raises:
        ValueError: if the scales do not form the grid that the weight needs.
    """
    rows, cols = block_size
    grid = check_scales(weight, weight_scale_inv, block_size, parts)
    output, exact = decode_fp8(weight, scratch)
    scales = weight_scale_inv.float()
    if not exact:
        # A power of two that the decoding left out. A second product where the first could overflow.
        fits = scales.amax().item() < HALF_SCALE_LIMIT
        output, scales = (output, scales * HALF_BIAS) if fits else (output * HALF_BIAS, scales)
    scales = scales.unsqueeze(-1).expand(*grid, cols).flatten(-2)[..., : weight.shape[-1]]  # (..., grid rows, I)
    height = weight.shape[-2] // parts
    whole = height // rows * rows
    for part, part_scales in zip(output.chunk(parts, dim=-2), scales.chunk(parts, dim=-2)):
        if whole:
            blocks = part[..., :whole, :].unflatten(-2, (-1, rows))  # (..., whole blocks, rows, I)
            blocks.mul_(part_scales[..., : whole // rows, :].unsqueeze(-2))
        if whole < height:
            part[..., whole:, :].mul_(part_scales[..., whole // rows :, :])
    return output


# The seven low bits of an e4m3 number, moved to bits 7 to 13 of a float16 one, are its value times 2^-8: the exponent
# field is read with bias 15 in place of 7, for subnormal numbers too.
HALF_BIAS = 2.0**8
HALF_SCALE_LIMIT = 2.0**119  # scales below it can be multiplied with the bias first
_HALF_MASK = 0xBF80 - (1 << 16)  # sign and those bits, as int16


def fp8_as_halves(codes: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """e4m3 numbers that are not NaN, given as int8, to float16 numbers of their value times 2^-8.

    They lie in `bits`, int16 memory of the same shape.
    """
    # A product takes half the time of a shift.
    return bits.copy_(codes).mul_(1 << 7).bitwise_and_(_HALF_MASK).view(torch.float16)


def decode_fp8(weight: torch.Tensor, scratch: torch.Tensor | None = None) -> tuple[torch.Tensor, bool]:
    """e4m3 to float32: `(weight, True)`, or `(weight * 2^-8, False)` where that is faster.

    PyTorch converts element by element on the CPU; a million took 1600 us there and takes 100 us by their bits.
    """
    if weight.device.type != "cpu" or weight.dtype != FP8 or weight.numel() == 0 or torch.compiler.is_compiling():
        return weight.float(), True
    codes = weight.contiguous().view(torch.int8)
    if codes.amax().item() == 127 or codes.view(torch.uint8).amax().item() == 255:  # NaN has another place in float16
        return weight.float(), True
    if scratch is None:
        output, bits = torch.empty(codes.shape, dtype=torch.float32), torch.empty(codes.shape, dtype=torch.int16)
    else:
        count = codes.numel()
        output, bits = scratch[:count].view(codes.shape), scratch[count:].view(torch.int16)
        bits = bits[:count].view(codes.shape)
    return output.copy_(fp8_as_halves(codes, bits)), False


def quantize_block_fp8(
    weight: torch.Tensor, block_size: tuple[int, int] = (128, 128), ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """A floating point matrix (..., O, I) as block FP8: e4m3 values of its shape and float32 scales.

    A block's scale is its largest magnitude over 448 (1 for zeros), rounded up to a power of two with `ue8m0`.
    """
    rows, cols = block_size
    *leading, height, width = weight.shape
    grid = block_grid(tuple(weight.shape), block_size)
    padded = F.pad(weight.float(), (0, grid[-1] * cols - width, 0, grid[-2] * rows - height))
    blocks = padded.view(*leading, grid[-2], rows, grid[-1], cols)
    scales = fp8_scales(blocks.abs().amax((-3, -1)), ue8m0)
    values = (blocks / scales[..., :, None, :, None]).clamp(-FP8_MAX, FP8_MAX).view(padded.shape)
    return values[..., :height, :width].to(FP8).contiguous(), scales


def fp8_scales(magnitudes: torch.Tensor, ue8m0: bool) -> torch.Tensor:
    """Scales that bring values of these magnitudes into the range of e4m3; 1 for zero."""
    smallest = torch.finfo(torch.float32).tiny
    scales = torch.where(magnitudes == 0, 1.0, _over_fp8_max(magnitudes).clamp_min(smallest))
    return round_up_to_power_of_two(scales) if ue8m0 else scales


def _over_fp8_max(magnitudes: torch.Tensor) -> torch.Tensor:
    # By a tensor: for a number, PyTorch multiplies with its reciprocal on a GPU, which can be one bit off.
    return magnitudes / magnitudes.new_full((), FP8_MAX)


def round_up_to_power_of_two(values: torch.Tensor) -> torch.Tensor:
    """The least power of two that is no smaller, for positive normal float32 values; infinity and NaN stay."""
    mantissa, exponent = torch.frexp(values)  # mantissa in [0.5, 1)
    powers = torch.ldexp(torch.ones_like(values), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(values.isfinite(), powers, values)


def quantize_rows(
    rows: torch.Tensor, group: int = ACTIVATION_GROUP, ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations (..., K) as FP8, with a scale for every `group` channels of a row; the last group may be short.

    Returns e4m3 values (..., K) and float32 scales (..., ceil(K / group)): the largest magnitude of the group, at least
    1e-4, over 448, rounded up to a power of two with `ue8m0`.
    """
    width = rows.shape[-1]
    count = -(-width // group)
    groups = F.pad(rows.float(), (0, count * group - width)).unflatten(-1, (count, group))
    scales = _over_fp8_max(groups.abs().amax(-1).clamp_min(_ACTIVATION_FLOOR))
    if ue8m0:
        scales = round_up_to_power_of_two(scales)
    values = (groups / scales.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).flatten(-2)
    return values[..., :width].to(FP8), scales


def dequantize_rows(values: torch.Tensor, scales: torch.Tensor, group: int = ACTIVATION_GROUP) -> torch.Tensor:
    """The inverse of `quantize_rows`, in float32."""
    return values.float() * scales.float().repeat_interleave(group, dim=-1)[..., : values.shape[-1]]


def dequantize_packed_int4(
    weight_packed: torch.Tensor, weight_scale: torch.Tensor, weight_shape: tuple[int, int], group_size: int = 32
) -> torch.Tensor:
    """Unpacks symmetric 4-bit integers and applies their group scales, in float32.

    Args:
        weight_packed: (O, I / 8) int32; nibble n (bits 4n to 4n + 3, the lowest first) of word j is column 8 j + n,
            stored as q + 8 with q in -8..7.
        weight_scale: (O, I / group_size) floating point.
        weight_shape: (O, I).
        group_size: columns that share a scale.

    Raises:
        ValueError: if the three shapes do not belong together.
    """
    out_features, in_features = weight_shape
    packed = (out_features, -(-in_features // 8))
    scales = (out_features, -(-in_features // group_size))
    if tuple(weight_packed.shape) != packed or tuple(weight_scale.shape) != scales:
        raise ValueError(
            f"packed weight {tuple(weight_packed.shape)} and scales {tuple(weight_scale.shape)} for a weight of shape "
            f"{tuple(weight_shape)}: expected {packed} and {scales}"
        )
    pairs = weight_packed.contiguous().view(torch.uint8)  # (O, I / 2), the low nibble first
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-1)  # (O, I / 2, 2)
    quantized = nibbles.flatten(1)[:, :in_features].float() - 8
    return quantized * weight_scale.float().repeat_interleave(group_size, dim=1)[:, :in_features]
