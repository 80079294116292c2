"""Routed experts on the CPU for training: frozen or trained weights, block FP8 or plain, with or without LoRA.

One expert after another, each on the rows that chose it, so that no more than one expanded expert exists at a time.
Beside the inputs, only gate and up of each slot and the low-rank rows are kept for the backward pass, which computes
what else it needs again from these.

Shapes: T tokens, K choices per token, E experts, H hidden, I intermediate, N = T * K slots, R rank, n an expert's rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .op_quant import dequantize_block_fp8


class Fixed(NamedTuple):
    """What of a call has no gradient."""

    topk_indices: torch.Tensor
    gate_up_scale: torch.Tensor | None
    down_scale: torch.Tensor | None
    gate_up_scaling: float
    down_scaling: float
    kept_hidden: torch.Tensor | None  # (T, H) bool
    kept_inner: torch.Tensor | None  # (N, I) bool
    kept_factor: float


# oneDNN, which multiplies bfloat16 and float16, compiles a kernel for every number of rows that it meets. In steps of
# this many there are few.
_ROWS_STEP = 16


class _Rows(NamedTuple):
    """The rows of one expert, and behind them some to be ignored: copies of the first one, without weight."""

    expert: int
    at: slice  # of the sorted rows
    slots: torch.Tensor  # (n,)
    tokens: torch.Tensor  # (n,)
    count: int  # of its rows alone

    def weights(self, topk_weights: torch.Tensor) -> torch.Tensor:
        """Routing weights (n, 1)."""
        weights = topk_weights.flatten().index_select(0, self.slots)
        if self.count < len(weights):
            weights[self.count :] = 0.0
        return weights.unsqueeze(1)


def rows_by_expert(topk_indices: torch.Tensor, num_experts: int, dtype: torch.dtype) -> Iterator[_Rows]:
    """Experts that have rows, in order."""
    step = _ROWS_STEP if topk_indices.device.type == "cpu" and dtype.itemsize == 2 else 1
    top_k, ids = topk_indices.shape[1], topk_indices.flatten()
    ids = ids.where((ids >= 0) & (ids < num_experts), num_experts)
    order = ids.argsort(stable=True)
    start = place = 0
    for expert, count in enumerate(torch.bincount(ids, minlength=num_experts)[:num_experts].tolist()):
        if count:
            slots, size = order[start : start + count], -(-count // step) * step
            if size > count:
                slots = torch.cat((slots, slots[:1].expand(size - count)))
            yield _Rows(expert, slice(place, place + size), slots, slots // top_k, count)
            start, place = start + count, place + size


def num_rows(topk_indices: torch.Tensor, num_experts: int, dtype: torch.dtype) -> int:
    """A bound of the sorted rows."""
    return topk_indices.numel() + (num_experts * (_ROWS_STEP - 1) if dtype.itemsize == 2 else 0)


def _matrix(weight: torch.Tensor, scale: torch.Tensor | None, expert: int, dtype: torch.dtype, parts: int):
    if scale is None:
        return weight[expert].to(dtype)  # under autocast, weights may be wider than the tokens
    return dequantize_block_fp8(weight[expert], scale[expert], parts=parts).to(dtype)


def _keep(rows: torch.Tensor, kept: torch.Tensor | None, at: torch.Tensor, factor: float) -> torch.Tensor:
    """`rows` after dropout."""
    return rows if kept is None else rows * kept[at] * factor


def _product(rows: torch.Tensor, matrix: torch.Tensor, low: torch.Tensor | None, b: torch.Tensor | None):
    """`rows @ matrix + low @ b`; the wide product is added to the narrow one, which costs no pass of its own."""
    return rows @ matrix if low is None else torch.mm(low, b).addmm_(rows, matrix)


def _write_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """`out[...] = left @ right`, in the dtype of `out` where it is wider."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def forward(inputs: tuple, fixed: Fixed, save: bool) -> tuple[torch.Tensor, tuple]:
    """Output (T, H); with `save`, the low-rank rows (N, R) of both products, scaled and sorted, and gate and up (n, 2I)
    of every expert that has rows. `inputs`: tokens, routing weights, both stacks, and the four factors."""
    hidden, topk_weights, gate_up_proj, down_proj, *factors = inputs
    num_experts, dtype = gate_up_proj.shape[0], hidden.dtype
    gate_up_a, gate_up_b, down_a, down_b = (factor if factor is None else factor.to(dtype) for factor in factors)
    slots = num_rows(fixed.topk_indices, num_experts, dtype)
    low = hidden.new_empty(slots, gate_up_a.shape[1]) if save and gate_up_a is not None else None
    low_inner = hidden.new_empty(slots, down_a.shape[1]) if save and down_a is not None else None
    # One tensor an expert: a large one would come as fresh pages from the system in every step.
    pre = []
    output = hidden.new_zeros(hidden.shape, dtype=torch.promote_types(dtype, torch.float32))
    topk_weights = topk_weights.to(output.dtype)
    for rows_of_expert in rows_by_expert(fixed.topk_indices, num_experts, dtype):
        expert, at, places, tokens, count = rows_of_expert
        x = hidden.index_select(0, tokens)
        small = b = None
        if gate_up_a is not None:
            small = _keep(x, fixed.kept_hidden, tokens, fixed.kept_factor) @ gate_up_a[expert].t()
            small, b = small.mul_(fixed.gate_up_scaling), gate_up_b[expert].t()
            if save:
                low[at] = small
        both = _product(x, _matrix(gate_up_proj, fixed.gate_up_scale, expert, dtype, 2).t(), small, b)
        if save:
            pre.append(both)
        del x
        gate, up = both.chunk(2, dim=-1)
        inner = F.silu(gate).mul_(up)  # (n, I)
        del both, gate, up
        small = b = None
        if down_a is not None:
            small = _keep(inner, fixed.kept_inner, places, fixed.kept_factor) @ down_a[expert].t()
            small, b = small.mul_(fixed.down_scaling), down_b[expert].t()
            if save:
                low_inner[at] = small
        rows = _product(inner, _matrix(down_proj, fixed.down_scale, expert, dtype, 1).t(), small, b)  # (n, H)
        weight = rows_of_expert.weights(topk_weights)
        rows = rows.mul_(weight) if rows.dtype == output.dtype else rows * weight
        output.index_add_(0, tokens[:count], rows[:count])
    return output.to(dtype), (low, low_inner, *pre)


class _ExpertsCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, topk_weights, gate_up_proj, down_proj, fixed, *factors):
        inputs = (hidden, topk_weights, gate_up_proj, down_proj, *factors)
        output, saved = forward(inputs, fixed, save=True)
        ctx.save_for_backward(*inputs, *saved)
        ctx.fixed = fixed
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        grads = backward(grad_output, saved[:8], ctx.fixed, saved[8:], (*needs[:4], *needs[5:]))
        return *grads[:4], None, *grads[4:]


def backward(grad_output: torch.Tensor, inputs: tuple, fixed: Fixed, saved: tuple, needs: tuple[bool, ...]) -> list:
    """Gradients (or `None`) of the eight `inputs` of `forward`, from what it `saved`, as far as there are `needs`;
    those of tokens and routing weights in any case."""
    hidden, topk_weights, gate_up_proj, down_proj, *factors = inputs
    low, low_inner, *pre = saved
    # Experts without rows keep their zeros. Factors of a wider dtype get their gradients in it.
    grads = [
        tensor.new_zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32))
        if index < 2
        else torch.zeros_like(tensor)
        if need
        else None
        for index, (tensor, need) in enumerate(zip(inputs, needs))
    ]
    cast = (factor if factor is None else factor.to(hidden.dtype) for factor in factors)
    together = _Inputs(hidden, topk_weights, gate_up_proj, down_proj, *cast, low, low_inner)
    for rows, both in zip(rows_by_expert(fixed.topk_indices, gate_up_proj.shape[0], hidden.dtype), pre):
        _backward_expert(rows, both, grad_output, together, fixed, grads)
    grads[:2] = [grad.to(tensor.dtype) for grad, tensor in zip(grads[:2], inputs)]
    return grads


class _Inputs(NamedTuple):
    """Tensors of a call, factors in the dtype of the tokens, and the low-rank rows of its forward pass."""

    hidden: torch.Tensor
    topk_weights: torch.Tensor
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_up_a: torch.Tensor | None
    gate_up_b: torch.Tensor | None
    down_a: torch.Tensor | None
    down_b: torch.Tensor | None
    low: torch.Tensor | None
    low_inner: torch.Tensor | None


def _backward_expert(rows: _Rows, pre, grad_output: torch.Tensor, inputs: _Inputs, fixed: Fixed, grads: list) -> None:
    """Adds one expert's part to `grads`: of tokens, routing weights, both weights and the four factors."""
    expert, at, slots, tokens, count = rows
    dtype, down_a, down_b = inputs.hidden.dtype, inputs.down_a, inputs.down_b
    weight = rows.weights(inputs.topk_weights)  # (n, 1)
    gate, up = pre.chunk(2, dim=-1)
    sums = grad_output.index_select(0, tokens)  # (n, H)
    activated = F.silu(gate)
    inner = activated * up  # (n, I)
    matrix = _matrix(inputs.down_proj, fixed.down_scale, expert, dtype, 1)
    if down_a is None:
        grad_inner = sums @ matrix
    else:
        small = (sums @ down_b[expert]).mul_(fixed.down_scaling)  # (n, R)
        if fixed.kept_inner is None:
            grad_inner, kept = _product(sums, matrix, small, down_a[expert]), inner
        else:
            kept = _keep(inner, fixed.kept_inner, slots, fixed.kept_factor)
            grad_inner = _keep(small @ down_a[expert], fixed.kept_inner, slots, fixed.kept_factor)
            grad_inner = grad_inner.addmm_(sums, matrix)
        if grads[6] is not None:
            _write_product((small * weight).to(dtype).t(), kept, grads[6][expert])
        if grads[7] is not None:
            _write_product((inputs.low_inner[at] * weight).to(dtype).t(), sums, grads[7][expert].t())
        del kept
    del matrix
    # Each slot once: nothing to add to.
    dots = torch.linalg.vecdot(grad_inner.to(grads[1].dtype), inner.to(grads[1].dtype))
    grads[1].view(-1)[slots[:count]] = dots[:count]
    grad_inner = grad_inner.mul_(weight) if weight.dtype == dtype else (grad_inner * weight).to(dtype)
    if grads[3] is not None:
        torch.mm((sums * weight).to(dtype).t(), inner, out=grads[3][expert])
    del sums, inner
    grad_pre = torch.empty_like(pre)
    half = gate.shape[1]
    torch.mul(grad_inner, activated, out=grad_pre[:, half:])
    del activated
    torch.ops.aten.silu_backward.grad_input(grad_inner.mul_(up), gate, grad_input=grad_pre[:, :half])
    del grad_inner
    _backward_gate_up(rows, grad_pre, inputs, fixed, grads)


def _backward_gate_up(rows: _Rows, grad_pre: torch.Tensor, inputs: _Inputs, fixed: Fixed, grads: list) -> None:
    expert, at, _, tokens, count = rows
    hidden, gate_up_a, gate_up_b = inputs.hidden, inputs.gate_up_a, inputs.gate_up_b
    matrix = _matrix(inputs.gate_up_proj, fixed.gate_up_scale, expert, hidden.dtype, 2)
    x = hidden.index_select(0, tokens) if grads[2] is not None or grads[4] is not None else None
    if grads[2] is not None:
        torch.mm(grad_pre.t(), x, out=grads[2][expert])
    if gate_up_a is None:
        grad_x = grad_pre @ matrix  # (n, H)
    else:
        small = (grad_pre @ gate_up_b[expert]).mul_(fixed.gate_up_scaling)  # (n, R)
        if fixed.kept_hidden is None:
            grad_x = _product(grad_pre, matrix, small, gate_up_a[expert])
        else:
            grad_x = _keep(small @ gate_up_a[expert], fixed.kept_hidden, tokens, fixed.kept_factor)
            grad_x = grad_x.addmm_(grad_pre, matrix)
        if grads[4] is not None:
            _write_product(small.t(), _keep(x, fixed.kept_hidden, tokens, fixed.kept_factor), grads[4][expert])
        if grads[5] is not None:
            _write_product(inputs.low[at].t(), grad_pre, grads[5][expert].t())
    grads[0].index_add_(0, tokens[:count], grad_x[:count].to(grads[0].dtype))


def experts_cpu_training(hidden, topk_indices, topk_weights, weights: tuple, lora, with_grad: bool) -> torch.Tensor:
    """`op_experts.experts` without quantised rows: `weights` are gate-up, down and their scales, `lora` an
    `ExpertLora`. Plain factors are in the dtype of the tokens."""
    gate_up_proj, down_proj, gate_up_scale, down_scale = weights
    fixed = fix(topk_indices, gate_up_scale, down_scale, lora)
    inputs = (hidden, topk_weights, gate_up_proj, down_proj)
    with torch.autocast(hidden.device.type, enabled=False):
        if with_grad:
            return _ExpertsCpu.apply(*inputs, fixed, *lora.factors)
        return forward((*inputs, *lora.factors), fixed, save=False)[0]


def fix(topk_indices, gate_up_scale, down_scale, lora) -> Fixed:
    """What `forward` and `backward` take beside their inputs."""
    scalings = (lora.gate_up_scaling, lora.down_scaling)
    kept = (lora.kept_hidden, lora.kept_inner, lora.kept_factor)
    return Fixed(topk_indices, gate_up_scale, down_scale, *scalings, *kept)
