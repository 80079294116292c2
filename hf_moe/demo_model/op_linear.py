"""Matrix product with a weight, with the CPU kernel that suits few rows.

Decoding multiplies every weight with one or a few rows, which should cost one read of the weight. The general products
of PyTorch's CPU libraries read it at half of the memory's speed or less; the forms below were measured on AVX-512 with
two cores, 1024 x 1024 weights from memory, against `torch.nn.functional.linear`: bfloat16 1 row 0.067 against 0.156 ms,
float32 4 rows 0.165 against 0.460 ms, 8 rows of 4096 x 2048 2.2 against 3.2 ms.
"""

import contextlib
import math

import torch
from torch.nn import functional as F

# Up to so many rows the special forms win.
_ONEDNN_OFF_ROWS = 2
_FEW_ROWS = 32
# Float32 weights of so few elements take less time than the calls of the special forms: one row, 64 x 64 from memory,
# 3 against 9 us with one thread; 256 x 256, 24 against 19 us.
_SMALL_FLOAT32 = 1 << 15
# Products so small, for each thread, that setting up oneDNN takes longer. What oneDNN is spared for takes as long as it
# has rows: 512 x 192 with one thread, 16 against 21 us for 1 row, but 30 against 18 us for 2 and 44 for 3.
_ONEDNN_OFF_PRODUCTS = 125_000
# PyTorch's own bfloat16 matrix-vector kernel runs where oneDNN is switched off. The switch is private to torch and
# global to the process; where it is missing, nothing changes but speed.
_set_onednn_enabled = getattr(torch._C, "_set_mkldnn_enabled", None)
_onednn_enabled = getattr(torch._C, "_get_mkldnn_enabled", None)


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`rows @ weight.T + bias` for (..., in) rows and an (out, in) weight, as `torch.nn.functional.linear`."""
    if torch.compiler.is_compiling() or not rows.is_cpu or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return F.linear(rows, weight, bias)  # first of all: a graph's sizes may be no numbers
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter)  # not a distributed or quantised tensor
    if not plain or rows.dtype != weight.dtype:
        return F.linear(rows, weight, bias)
    count = rows.shape[:-1].numel() if rows.shape[-1] == weight.shape[1] else 0  # another width: torch's error
    if not 0 < count <= _FEW_ROWS:
        return F.linear(rows, weight, bias)
    if rows.dtype == torch.float32:
        if weight.numel() <= _SMALL_FLOAT32:
            return F.linear(rows, weight, bias)
        output = _linear_float32(rows, weight, count)
        return output if bias is None else output + bias
    if rows.dtype == torch.bfloat16 and count <= _rows_without_onednn(weight.numel()) and _has_onednn():
        _set_onednn_enabled(False)
        try:
            return F.linear(rows, weight, bias)
        finally:
            _set_onednn_enabled(True)
    return F.linear(rows, weight, bias)


def without_autocast(device_type: str):
    """A context for what stays in its own, wider dtype under mixed precision, too: routes, sums over choices."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def unless_narrowed(tensor: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """A tensor as it was `moved`, but with its own dtype where that was float32 and a cast would round it."""
    narrowed = moved.is_floating_point() and moved.dtype.itemsize < 4 and tensor.dtype.itemsize >= 4
    return tensor.to(moved.device) if narrowed else moved


def linear_each(rows: torch.Tensor, sizes: list[int], stack: torch.Tensor, indices: list[int]) -> torch.Tensor:
    """Some matrices of a stack, each with rows of its own, as `linear` of each; without gradients.

    Args:
        rows: (N, in).
        sizes: how many of the rows each matrix takes, one after another.
        stack: (E, out, in).
        indices: places of the matrices in the stack.

    Returns (N, out).
    """
    plain = type(stack) in (torch.Tensor, torch.nn.Parameter) and not torch.is_autocast_enabled("cpu")
    special = rows.dtype == stack.dtype and rows.dtype in (torch.bfloat16, torch.float32)
    if not plain or rows.device.type != "cpu" or not special:
        outputs = [linear(piece, stack[index]) for piece, index in zip(rows.split(sizes), indices)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return (_each_float32 if rows.dtype == torch.float32 else _each_bfloat16)(rows, sizes, stack, indices)


def _each_float32(rows, sizes: list[int], stack, indices: list[int]) -> torch.Tensor:
    """`linear_each` by the products of `_linear_float32`, with few calls between those of one row."""
    out_features = stack.shape[1]
    parts = _parts(out_features)
    split = stack.unflatten(1, (parts, -1))  # (E, parts, out / parts, in)
    # (N, parts, in, 1), as transposed rows: columns of stride 1 take `bmm` three times as long.
    columns = rows.view(len(rows), 1, 1, -1).expand(-1, parts, -1, -1).transpose(2, 3)
    outputs, start = [], 0
    for size, index, piece in zip(sizes, indices, rows.split(sizes)):
        if size == 1:
            outputs.append(torch.bmm(split[index], columns[start]).view(1, out_features))
        else:
            outputs.append(linear(piece, stack[index]))
        start += size
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _each_bfloat16(rows, sizes: list[int], stack, indices: list[int]) -> torch.Tensor:
    """`linear_each` with one turn of oneDNN's switch for all products."""
    few, others = _rows_without_onednn(stack.shape[1] * stack.shape[2]), []
    output, matrices = rows.new_empty(rows.shape[0], stack.shape[1]), stack.transpose(1, 2)
    switched = _has_onednn()
    if switched:
        _set_onednn_enabled(False)
    try:
        if len(sizes) == len(rows):  # a row each: 512 x 1024 from memory 30, 1024 x 256 20 us; by `mm` 32 and 22
            for index, row, out in zip(indices, rows.unbind(), output.unbind()):
                torch.mv(stack[index], row, out=out)
            return output
        for size, index, piece, out in zip(sizes, indices, rows.split(sizes), output.split(sizes)):
            if size <= few:
                torch.mm(piece, matrices[index], out=out)
            else:
                others.append((index, piece, out))
    finally:
        if switched:
            _set_onednn_enabled(True)
    for index, piece, out in others:
        torch.mm(piece, matrices[index], out=out)
    return output


def _has_onednn() -> bool:
    """Whether oneDNN is on and can be switched off."""
    return _set_onednn_enabled is not None and _onednn_enabled()


def _rows_without_onednn(elements: int) -> int:
    """Up to how many bfloat16 rows and a matrix of so many elements are multiplied faster without oneDNN."""
    threads = torch.get_num_threads()
    return max(min(_ONEDNN_OFF_ROWS, threads), _ONEDNN_OFF_PRODUCTS * threads // max(elements, 1))


def _rows_of_left_weight() -> int:
    """Up to how many float32 rows are multiplied faster with the weight as the left operand."""
    return 2 if torch.get_num_threads() == 1 else 4


def _linear_float32(rows: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    """`rows @ weight.T` for few rows, by the form that suits their `count`."""
    out_features, in_features = weight.shape
    flat = rows.reshape(count, in_features)
    parts = _parts(out_features)
    if 1 < count <= _rows_of_left_weight():
        output = torch.mm(weight, flat.t()).t().contiguous()
    elif parts == 1 or (count > 1 and torch.get_num_threads() == 1):
        return F.linear(rows, weight)
    elif count == 1:
        # The matrix-vector product itself uses one thread.
        output = torch.bmm(weight.view(parts, -1, in_features), flat.t().expand(parts, -1, 1))
    else:
        output = torch.bmm(flat.expand(parts, -1, -1), weight.view(parts, -1, in_features).transpose(1, 2))
        output = output.transpose(0, 1).reshape(count, out_features)  # (parts, count, out / parts) before
    return output.view(*rows.shape[:-1], out_features)


def _parts(out_features: int) -> int:
    """How many equal parts of a weight make a batch that all threads work on."""
    threads = torch.get_num_threads()
    return math.gcd(out_features, max(2, 1 << (threads - 1).bit_length()))
