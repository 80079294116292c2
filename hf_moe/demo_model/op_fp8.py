"""Products with block FP8 weights, decoded piece by piece, or by Triton kernels on GPUs.

`fp8_linear` never holds a whole decoded matrix: it decodes some rows of the weight, multiplies, and goes on; the
kernels decode in registers. The gradient to the activations does the same; the weight is frozen. Activations can be
quantised too, in groups of 128 channels, which is what FP8 tensor cores multiply.

Shapes: O output features, I input features, M rows.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .kernel_fp8 import dequantize_block_fp8 as dequantize_kernel
from .kernel_fp8 import multiply
from .kernel_fp8 import quantize_rows as quantize_rows_kernel
from .op_custom import opaque
from .op_linear import linear
from .op_quant import (
    HALF_BIAS,
    block_grid,
    check_scales,
    decode_fp8,
    dequantize_block_fp8,
    dequantize_rows,
    quantize_rows,
)
from .triton_compat import converts_fp8, runs_kernels

_PIECE = 1 << 19  # elements that are decoded at a time: they stay in the processor's cache
# Up to so many rows on the CPU, scaling and rounding the decoded weight takes longer than products in float32 with rows
# that were scaled for each block of the weight's rows: 2048 x 1024 and 1 row 0.53 instead of 0.71 ms.
_FEW_ROWS = 4
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Fp8Format:
    """What an FP8 module knows of its weights.

    Attributes:
        block_size: rows and columns that share a scale.
        ue8m0: scales of activations are powers of two, too.
        dynamic: the checkpoint means activations to be quantised on the fly.
    """

    block_size: tuple[int, int] = (128, 128)
    ue8m0: bool = False
    dynamic: bool = True


def quantizes_activations(choice: bool | None, device: torch.device, fp8: Fp8Format) -> bool:
    """Whether a product quantises its activations: as `choice` says, or (`None`) where the hardware multiplies FP8."""
    if choice is not None or device.type != "cuda" or not fp8.dynamic:
        return bool(choice)
    return runs_kernels(device) and converts_fp8(device) and fp8.block_size == (128, 128)


def _uses_kernels(tensor: torch.Tensor, dtype: torch.dtype, fp8: Fp8Format) -> bool:
    """Whether the Triton kernels serve this device, dtype and block size."""
    return tensor.is_cuda and runs_kernels(tensor.device) and dtype in _KERNEL_DTYPES and fp8.block_size == (128, 128)


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor, fp8: Fp8Format, dtype: torch.dtype, parts: int = 1
) -> torch.Tensor:
    """The whole decoded weight (..., O, I) in `dtype`."""
    if weight.dim() == 2 and _uses_kernels(weight, dtype, fp8) and not torch.compiler.is_compiling():
        return dequantize_kernel(weight, scale, dtype, parts)
    if weight.dim() != 2 or weight.device.type != "cpu" or dtype == torch.float32 or torch.compiler.is_compiling():
        return dequantize_block_fp8(weight, scale, fp8.block_size, parts).to(dtype)
    output = weight.new_empty(weight.shape, dtype=dtype)
    for piece, place in decoded_pieces(weight, scale, fp8, parts, torch.float32):
        output[place] = piece
    return output


def fp8_linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    fp8: Fp8Format,
    bias: torch.Tensor | None = None,
    parts: int = 1,
    quantize: bool = False,
) -> torch.Tensor:
    """`rows @ dequantized(weight).T + bias` in the dtype of `rows`; gradients go to `rows` and `bias` only.

    Args:
        rows: (..., I) floating point.
        weight: (O, I) float8_e4m3fn.
        scale: (parts * ceil(O / parts / block rows), ceil(I / block columns)).
        fp8: the format of the weight.
        bias: (O,).
        parts: matrices that are stacked in `weight`, each with blocks of its own.
        quantize: multiply activations that were quantised in groups of 128; their gradient is that of the rows.

    Returns (..., O).
    """
    device = rows.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        rows = rows.to(torch.get_autocast_dtype(device))
    flat = rows.reshape(-1, rows.shape[-1])
    if torch.compiler.is_compiling():
        output = _fp8_mm_op(flat, weight, scale, list(fp8.block_size), parts, quantize, fp8.ue8m0)
    elif torch.is_grad_enabled() and rows.requires_grad:
        output = _Fp8MM.apply(flat, weight, scale, fp8, parts, quantize)
    else:
        output = fp8_mm(flat, weight, scale, fp8, parts, quantize)
    output = output.view(*rows.shape[:-1], weight.shape[0])
    return output if bias is None else output + bias.to(output.dtype)


def fp8_mm(rows, weight, scale, fp8: Fp8Format, parts: int = 1, quantize: bool = False) -> torch.Tensor:
    """`fp8_linear` for (M, I) rows, without bias and gradient."""
    dtype = rows.dtype
    if parts == 1 and _uses_kernels(rows, dtype, fp8):
        inputs, x_scale = quantize_rows_kernel(rows, fp8.ue8m0) if quantize else (rows, None)
        return multiply(inputs, weight, scale, out_dtype=dtype, x_scale=x_scale)
    if quantize:
        wide = torch.promote_types(dtype, torch.float32)
        rows = dequantize_rows(*quantize_rows(rows, ue8m0=fp8.ue8m0)).to(wide)
    if rows.device.type == "cpu" and 0 < rows.shape[0] <= _FEW_ROWS:
        return _few_rows_mm(rows, weight, scale, fp8, parts).to(dtype)
    outputs = [linear(rows, piece) for piece, _ in decoded_pieces(weight, scale, fp8, parts, rows.dtype)]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)).to(dtype)


def _few_rows_mm(rows, weight, scale, fp8: Fp8Format, parts: int) -> torch.Tensor:
    """(M, I) rows times the weight, (M, O), in float32 or wider.

    For each row of blocks the scales are multiplied into the rows: there are fewer of these than rows in a block."""
    check_scales(weight, scale, fp8.block_size, parts)
    columns = rows.to(torch.promote_types(rows.dtype, torch.float32)).t()  # (I, M)
    width, block_rows = weight.shape[1], fp8.block_size[0]
    output = columns.new_empty(weight.shape[0], rows.shape[0])
    for place, blocks in _row_pieces(weight, fp8, parts):
        values, exact = decode_fp8(weight[place], _scratch(weight[place]))
        scales = scale[blocks].to(columns.dtype)
        scaled = scales.repeat_interleave(fp8.block_size[1], dim=1)[:, :width].unsqueeze(2) * columns  # (blocks, I, M)
        values, products = values.to(columns.dtype), output[place]
        whole = len(values) // block_rows
        edge = whole * block_rows
        if whole:
            stacked = values[:edge].view(whole, block_rows, width)
            products[:edge] = torch.bmm(stacked, scaled[:whole]).flatten(0, 1)
        if edge < len(values):
            products[edge:] = torch.mm(values[edge:], scaled[whole])
        if not exact:
            products *= HALF_BIAS
    return output.t().contiguous()


def fp8_mm_backward(grad, weight, scale, fp8: Fp8Format, parts: int = 1) -> torch.Tensor:
    """`grad @ dequantized(weight)`: (M, O) to (M, I), summed in float32."""
    if parts == 1 and _uses_kernels(grad, grad.dtype, fp8):
        return multiply(grad, weight, scale, out_dtype=grad.dtype, transposed=True)
    return wide_mm_backward(grad, weight, scale, fp8, parts).to(grad.dtype)


def wide_mm_backward(grad, weight, scale, fp8: Fp8Format, parts: int = 1) -> torch.Tensor:
    """`fp8_mm_backward` without kernels, before it is rounded: float32, or float64 of float64."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    output = grad.new_zeros(grad.shape[0], weight.shape[1], dtype=wide)
    for piece, rows in decoded_pieces(weight, scale, fp8, parts, grad.dtype):
        output += torch.mm(grad[:, rows], piece)
    return output


def decoded_pieces(
    weight: torch.Tensor, scale: torch.Tensor, fp8: Fp8Format, parts: int, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, slice]]:
    """Decoded rows of the weight, block by block, each with its place among the output features. A piece is good until
    the next one is asked for."""
    for rows, blocks in _row_pieces(weight, fp8, parts):
        piece, memory = weight[rows], _scratch(weight[rows])
        decoded = dequantize_block_fp8(piece, scale[blocks], fp8.block_size, scratch=memory)
        if memory is not None and dtype.itemsize == 2:  # behind it, where decoding no longer needs the memory
            behind = memory[piece.numel() :].view(dtype)[: piece.numel()].view(piece.shape)
            yield behind.copy_(decoded), rows
        else:
            yield decoded.to(dtype), rows


def _row_pieces(weight, fp8: Fp8Format, parts: int) -> Iterator[tuple[slice, slice]]:
    """Whole rows of blocks of the weight, as many as are decoded together: their places among its rows, and among
    those of the scales."""
    block_rows = fp8.block_size[0]
    height = weight.shape[0] // parts
    blocks = max(1, _PIECE // (block_rows * weight.shape[1]))
    grid_rows = block_grid((height, 1), fp8.block_size)[0]
    for part in range(parts):
        for block in range(0, grid_rows, blocks):
            start, stop = block * block_rows, min((block + blocks) * block_rows, height)
            rows = slice(part * height + start, part * height + stop)
            yield rows, slice(part * grid_rows + block, part * grid_rows + min(block + blocks, grid_rows))


_memory = threading.local()


def _scratch(piece: torch.Tensor) -> torch.Tensor | None:
    """Memory to decode a piece on the CPU, the same one at each call of a thread: decoding into pages that come fresh
    from the system takes ten times as long."""
    if piece.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    needed = piece.numel() + -(-piece.numel() // 2)
    if getattr(_memory, "scratch", None) is None or len(_memory.scratch) < needed:
        with torch.inference_mode(False):  # else it could not be written outside of that mode
            _memory.scratch = torch.empty(needed, dtype=torch.float32, device="cpu")
    return _memory.scratch


class _Fp8MM(torch.autograd.Function):
    """`fp8_mm` with the gradient to the rows; keeps no decoded weight."""

    @staticmethod
    def forward(ctx, rows, weight, scale, fp8: Fp8Format, parts: int, quantize: bool):
        ctx.save_for_backward(weight, scale)
        ctx.fp8, ctx.parts = fp8, parts
        return fp8_mm(rows, weight, scale, fp8, parts, quantize)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        return fp8_mm_backward(grad, weight, scale, ctx.fp8, ctx.parts), None, None, None, None, None


# Opaque to torch.compile, which would unroll the pieces and keep the decoded ones.
@opaque("fp8_mm")
def _fp8_mm_op(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    block_size: list[int],
    parts: int,
    quantize: bool,
    ue8m0: bool,
) -> torch.Tensor:
    return fp8_mm(rows, weight, scale, Fp8Format(tuple(block_size), ue8m0), parts, quantize)


@_fp8_mm_op.register_fake
def _(rows, weight, scale, block_size, parts, quantize, ue8m0):
    return rows.new_empty(rows.shape[0], weight.shape[0])


@opaque("fp8_mm_backward")
def _fp8_mm_backward_op(
    grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block_size: list[int], parts: int
) -> torch.Tensor:
    return fp8_mm_backward(grad, weight, scale, Fp8Format(tuple(block_size)), parts)


@_fp8_mm_backward_op.register_fake
def _(grad, weight, scale, block_size, parts):
    return grad.new_empty(grad.shape[0], weight.shape[1])


def _setup_context(ctx, inputs, output):
    _, weight, scale, ctx.block_size, ctx.parts, _, _ = inputs
    ctx.save_for_backward(weight, scale)


def _backward(ctx, grad):
    weight, scale = ctx.saved_tensors
    return _fp8_mm_backward_op(grad, weight, scale, ctx.block_size, ctx.parts), *(None,) * 6


_fp8_mm_op.register_autograd(_backward, setup_context=_setup_context)
