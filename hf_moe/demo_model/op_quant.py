"""Dequantisation in plain PyTorch: block FP8 (DeepSeek-V3 and relatives) and packed INT4 (Kimi-K2-Thinking).

These functions are the definition of both formats. They take and return whole matrices, on any device.
"""

import torch


def dequantize_block_fp8(
    weight: torch.Tensor, weight_scale_inv: torch.Tensor, block_size: tuple[int, int] = (128, 128)
) -> torch.Tensor:
    """`weight[a, b] * weight_scale_inv[a // rows, b // cols]` in float32; blocks at the edges are short.

    Args:
        weight: (O, I) float8_e4m3fn.
        weight_scale_inv: (ceil(O / rows), ceil(I / cols)) float32 or float8_e8m0fnu. Despite its name, the factor to
            multiply by.
        block_size: rows and columns of a block. A constant of the format: it must never be inferred from the two
            shapes (576 rows have 5 scales, 192 rows have 2).

    Raises:
        ValueError: if the scales do not form the grid that the weight needs.
    """
    rows, cols = block_size
    grid = tuple(-(-size // block) for size, block in zip(weight.shape, block_size))
    if tuple(weight_scale_inv.shape) != grid:
        raise ValueError(
            f"scales of shape {tuple(weight_scale_inv.shape)} for a weight of shape {tuple(weight.shape)} in blocks "
            f"of {rows} x {cols}: expected {grid}"
        )
    output = weight.float()
    scales = weight_scale_inv.float().repeat_interleave(cols, dim=1)[:, : weight.shape[1]]  # (grid rows, I)
    for block in range(grid[0]):
        output[block * rows : (block + 1) * rows].mul_(scales[block])
    return output


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
    shifts = torch.arange(0, 32, 4, device=weight_packed.device, dtype=torch.int32)
    nibbles = (weight_packed.unsqueeze(-1) >> shifts) & 15  # (O, I / 8, 8)
    quantized = nibbles.flatten(1)[:, :in_features].float() - 8
    return quantized * weight_scale.float().repeat_interleave(group_size, dim=1)[:, :in_features]
