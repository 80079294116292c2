"""Ahead-of-time cases of dense layers: FP8 at DeepSeek-V3's sizes."""

import torch

from hf_moe.models import kernel_fp8

FP8 = torch.float8_e4m3fn
# Output and input features: kv_a_proj_with_mqa, and sizes that are no multiples of anything.
SIZES = [(576, 7168), (1000, 200)]
ROWS = (1, 64, 4096)  # of each number of rows per tile


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def fp8_quantisers(capability: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        if capability >= 89:
            kernel_fp8.quantize_rows(empty(64, 7168, dtype=dtype))
            kernel_fp8.quantize_rows(empty(64, 7168, dtype=dtype), ue8m0=True)
        kernel_fp8.quantize_block_fp8(empty(576, 7168, dtype=dtype))
        kernel_fp8.dequantize_block_fp8(empty(576, 7168, dtype=FP8), empty(5, 56, dtype=torch.float32), dtype)


def fp8_linear(capability: int) -> None:
    for out_features, in_features in SIZES:
        weight = empty(out_features, in_features, dtype=FP8)
        grid = (-(-out_features // 128), -(-in_features // 128))
        for rows in ROWS:
            for scale_dtype in (
                (torch.float32, torch.float8_e8m0fnu) if (out_features, rows) == (576, 1) else (torch.float32,)
            ):
                scale = empty(*grid, dtype=scale_dtype)
                x = empty(rows, in_features)
                kernel_fp8.multiply(x, weight, scale, out_dtype=torch.bfloat16)
                if capability >= 89:
                    x, x_scale = empty(rows, in_features, dtype=FP8), empty(rows, grid[1], dtype=torch.float32)
                    kernel_fp8.multiply(x, weight, scale, out_dtype=torch.bfloat16, x_scale=x_scale)
        for dtype in (torch.bfloat16, torch.float32):
            grad = empty(4096, out_features, dtype=dtype)
            kernel_fp8.multiply(grad, weight, empty(*grid, dtype=torch.float32), out_dtype=dtype, transposed=True)


CASES = {"fp8_quantisers": fp8_quantisers, "fp8_linear": fp8_linear}
