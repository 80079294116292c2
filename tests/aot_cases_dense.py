"""Ahead-of-time cases of dense layers, FP8 and latent attention, at DeepSeek-V3's sizes."""

import torch

from hf_moe.models import kernel_fp8, kernel_mla, kernel_prefill

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


def mla_decode(capability: int) -> None:
    for heads, queries, masked in ((128, 1, False), (128, 1, True), (128, 2, True), (16, 1, True), (32, 1, False)):
        latent, key_rope = empty(2, 32768, 512), empty(2, 32768, 64)
        mask = empty(2, queries, 32768, dtype=torch.bool) if masked else None
        rows = empty(2, queries, heads, 512), empty(2, queries, heads, 64)
        kernel_mla.mla_decode(*rows, latent, key_rope, mask, 0.1)
    # A short context is not split; few rows with a mask of their own for each query.
    for heads, queries, context, masked in ((128, 1, 40, False), (128, 1, 40, True), (128, 2, 40, True)):
        mask = empty(2, queries, context, dtype=torch.bool) if masked else None
        rows = empty(2, queries, heads, 512), empty(2, queries, heads, 64)
        kernel_mla.mla_decode(*rows, empty(2, context, 512), empty(2, context, 64), mask, 0.1)
    for context in (40, 8192):
        mask = empty(2, 4, context, dtype=torch.bool)
        rows = empty(2, 4, 4, 512), empty(2, 4, 4, 64)
        kernel_mla.mla_decode(*rows, empty(2, context, 512), empty(2, context, 64), mask, 0.1)


def mla_prefill(capability: int) -> None:
    for queries, masked in ((4096, False), (4096, True), (64, True)):
        projected, rotated = empty(2, queries, 128, 192), empty(2, queries, 32, 64)
        expanded, key_rope = empty(2, 8192, 32 * 256), empty(2, 32768, 64)[:, :8192]
        real = empty(2, 32768, dtype=torch.bool)[:, :8192] if masked else None
        piece = projected[:, :, :32, :128], rotated, expanded, key_rope, real, 5, 0.1
        kernel_prefill.mla_prefill(*piece, empty(2, queries, 128, 128)[:, :, :32])
        sums = empty(2, queries, 32, 128, dtype=torch.float32), empty(2, queries, 32, dtype=torch.float32)
        for first in (True, False):
            kernel_prefill.mla_prefill(*piece, *sums, first)


CASES = {
    "fp8_quantisers": fp8_quantisers,
    "fp8_linear": fp8_linear,
    "mla_decode": mla_decode,
    "mla_prefill": mla_prefill,
}
