"""Matrix product with a weight, with the CPU kernel that suits few rows.

Decoding multiplies every weight with one or a few rows, which should cost one read of the weight. The general products
of PyTorch's CPU libraries read it at half of the memory's speed or less; the forms below were measured on AVX-512 with
two cores, 1024 x 1024 weights from memory, against `torch.nn.functional.linear`: bfloat16 1 row 0.067 against 0.156 ms,
float32 4 rows 0.165 against 0.460 ms.
"""

import torch
from torch.nn import functional as F

# Up to so many rows the special forms win.
_ONEDNN_OFF_ROWS = 2
_TRANSPOSED_ROWS = 12
# Products so small, for each thread, that setting up oneDNN takes longer. What oneDNN is spared for takes as long as it
# has rows: 512 x 192 with one thread, 16 against 21 us for 1 row, but 30 against 18 us for 2 and 44 for 3.
_ONEDNN_OFF_PRODUCTS = 125_000
# PyTorch's own bfloat16 matrix-vector kernel runs where oneDNN is switched off. The switch is private to torch and
# global to the process; where it is missing, nothing changes but speed.
_set_onednn_enabled = getattr(torch._C, "_set_mkldnn_enabled", None)
_onednn_enabled = getattr(torch._C, "_get_mkldnn_enabled", None)


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`rows @ weight.T + bias` for (..., in) rows and an (out, in) weight, as `torch.nn.functional.linear`."""
    count = rows.numel() // weight.shape[1]
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter)  # not a distributed or quantised tensor
    special = plain and rows.device.type == "cpu" and 0 < count <= _TRANSPOSED_ROWS and rows.dtype == weight.dtype
    if not special or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return F.linear(rows, weight, bias)
    if rows.dtype == torch.float32:
        return _linear_transposed(rows, weight, bias, count)
    if rows.dtype == torch.bfloat16 and count <= _rows_without_onednn(weight.numel()) and _has_onednn():
        _set_onednn_enabled(False)
        try:
            return F.linear(rows, weight, bias)
        finally:
            _set_onednn_enabled(True)
    return F.linear(rows, weight, bias)


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
    if not plain or rows.device.type != "cpu" or not rows.dtype == stack.dtype == torch.bfloat16:
        outputs = [linear(piece, stack[index]) for piece, index in zip(rows.split(sizes), indices)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    output, matrices = rows.new_empty(rows.shape[0], stack.shape[1]), stack.transpose(1, 2)
    few, others = _rows_without_onednn(stack.shape[1] * stack.shape[2]), []
    switched = _has_onednn()
    if switched:
        _set_onednn_enabled(False)
    try:  # one turn of the switch for all
        for size, index, piece, out in zip(sizes, indices, *(each.split_with_sizes(sizes) for each in (rows, output))):
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


def _linear_transposed(rows, weight, bias, count: int) -> torch.Tensor:
    """The weight as the left operand: (out, in) x (in, count)."""
    columns = rows.reshape(count, -1).t()
    out_features = weight.shape[0]
    if count == 1 and out_features % 2 == 0:
        # Two halves as a batch: the matrix-vector product itself uses one thread.
        halves = torch.bmm(weight.view(2, out_features // 2, -1), columns.expand(2, -1, 1))
        output = halves.view(1, out_features)
    else:
        output = torch.mm(weight, columns).t().contiguous()
    output = output.view(*rows.shape[:-1], out_features)
    return output if bias is None else output + bias
