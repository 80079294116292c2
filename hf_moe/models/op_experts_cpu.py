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


class _Fixed(NamedTuple):
    """What of a call has no gradient."""

    topk_indices: torch.Tensor
    gate_up_scale: torch.Tensor | None
    down_scale: torch.Tensor | None
    gate_up_scaling: float
    down_scaling: float
    kept_hidden: torch.Tensor | None  # (T, H) bool
    kept_inner: torch.Tensor | None  # (N, I) bool
    kept_factor: float


class _Rows(NamedTuple):
    """The rows of one expert."""

    expert: int
    at: slice  # of the sorted rows
    slots: torch.Tensor  # (n,)
    tokens: torch.Tensor  # (n,)


def _rows_by_expert(topk_indices: torch.Tensor, num_experts: int) -> Iterator[_Rows]:
    """Experts that have rows, in order."""
    top_k, ids = topk_indices.shape[1], topk_indices.flatten()
    ids = ids.where((ids >= 0) & (ids < num_experts), num_experts)
    order = ids.argsort(stable=True)
    start = 0
    for expert, count in enumerate(torch.bincount(ids, minlength=num_experts)[:num_experts].tolist()):
        if count:
            slots = order[start : start + count]
            yield _Rows(expert, slice(start, start + count), slots, slots // top_k)
            start += count


def _matrix(weight: torch.Tensor, scale: torch.Tensor | None, expert: int, dtype: torch.dtype, parts: int):
    if scale is None:
        return weight[expert].to(dtype)  # under autocast, weights may be wider than the tokens
    return dequantize_block_fp8(weight[expert], scale[expert], parts=parts).to(dtype)


def _keep(rows: torch.Tensor, kept: torch.Tensor | None, at: torch.Tensor, factor: float) -> torch.Tensor:
    """`rows` after dropout."""
    return rows if kept is None else rows * kept[at] * factor


def _forward(hidden, topk_weights, gate_up_proj, down_proj, factors, fixed: _Fixed, save: bool):
    """Output (T, H); with `save`, gate and up (N, 2I) and the low-rank rows (N, R) of both products, sorted."""
    gate_up_a, gate_up_b, down_a, down_b = factors
    num_experts, width, dtype = gate_up_proj.shape[0], gate_up_proj.shape[1], hidden.dtype
    slots = fixed.topk_indices.numel()
    pre = hidden.new_empty(slots, width) if save else None
    low = hidden.new_empty(slots, gate_up_a.shape[1]) if save and gate_up_a is not None else None
    low_inner = hidden.new_empty(slots, down_a.shape[1]) if save and down_a is not None else None
    output = hidden.new_zeros(hidden.shape, dtype=torch.promote_types(dtype, torch.float32))
    weights = topk_weights.flatten().to(output.dtype).unsqueeze(1)
    for expert, at, places, tokens in _rows_by_expert(fixed.topk_indices, num_experts):
        x = hidden.index_select(0, tokens)
        matrix = _matrix(gate_up_proj, fixed.gate_up_scale, expert, dtype, 2)
        # Written to where it stays, if it stays.
        both = torch.mm(x, matrix.t(), out=pre[at]) if save else torch.mm(x, matrix.t())
        if gate_up_a is not None:
            rows = _keep(x, fixed.kept_hidden, tokens, fixed.kept_factor) @ gate_up_a[expert].t()
            both.addmm_(rows, gate_up_b[expert].t(), alpha=fixed.gate_up_scaling)
            if save:
                low[at] = rows
        del x, matrix
        gate, up = both.chunk(2, dim=-1)
        inner = F.silu(gate).mul_(up)  # (n, I)
        rows = inner @ _matrix(down_proj, fixed.down_scale, expert, dtype, 1).t()  # (n, H)
        if down_a is not None:
            small = _keep(inner, fixed.kept_inner, places, fixed.kept_factor) @ down_a[expert].t()
            rows.addmm_(small, down_b[expert].t(), alpha=fixed.down_scaling)
            if save:
                low_inner[at] = small
        weight = weights.index_select(0, places)
        rows = rows.mul_(weight) if rows.dtype == output.dtype else rows * weight
        output.index_add_(0, tokens, rows)
    return output.to(dtype), (pre, low, low_inner)


class _ExpertsCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, topk_weights, gate_up_proj, down_proj, fixed, *factors):
        output, saved = _forward(hidden, topk_weights, gate_up_proj, down_proj, factors, fixed, save=True)
        ctx.save_for_backward(hidden, topk_weights, gate_up_proj, down_proj, *saved, *factors)
        ctx.fixed = fixed
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        inputs = ctx.saved_tensors
        needed = (*ctx.needs_input_grad[:4], *ctx.needs_input_grad[5:])
        tensors = (*inputs[:4], *inputs[7:])
        # Experts without rows keep their zeros.
        grads = [
            tensor.new_zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32))
            if index < 2
            else torch.zeros_like(tensor)
            if need
            else None
            for index, (tensor, need) in enumerate(zip(tensors, needed))
        ]
        for rows in _rows_by_expert(ctx.fixed.topk_indices, inputs[2].shape[0]):
            _backward_expert(rows, grad_output, inputs, ctx.fixed, grads)
        grads[:2] = [grad.to(tensor.dtype) for grad, tensor in zip(grads[:2], tensors)]
        return *grads[:4], None, *grads[4:]


def _backward_expert(rows: _Rows, grad_output: torch.Tensor, inputs: tuple, fixed: _Fixed, grads: list) -> None:
    """Adds one expert's part to `grads`: of tokens, routing weights, both weights and the four factors."""
    hidden, topk_weights, gate_up_proj, down_proj, pre, low, low_inner, gate_up_a, gate_up_b, down_a, down_b = inputs
    expert, at, slots, tokens = rows
    dtype = hidden.dtype
    weight = topk_weights.flatten().index_select(0, slots).unsqueeze(1)  # (n, 1)
    gate, up = pre[at].chunk(2, dim=-1)
    sums = grad_output.index_select(0, tokens)  # (n, H)
    activated = F.silu(gate)
    inner = activated * up  # (n, I)
    grad_inner = sums @ _matrix(down_proj, fixed.down_scale, expert, dtype, 1)
    if down_a is not None:
        small = (sums @ down_b[expert]).mul_(fixed.down_scaling)  # (n, R)
        if fixed.kept_inner is None:
            grad_inner.addmm_(small, down_a[expert])
            kept = inner
        else:
            kept = _keep(inner, fixed.kept_inner, slots, fixed.kept_factor)
            grad_inner += _keep(small @ down_a[expert], fixed.kept_inner, slots, fixed.kept_factor)
        if grads[6] is not None:
            torch.mm((small * weight.to(dtype)).t(), kept, out=grads[6][expert])
        if grads[7] is not None:
            rows_of_b = (low_inner[at] * (weight * fixed.down_scaling)).to(dtype)
            torch.mm(sums.t(), rows_of_b, out=grads[7][expert])
        del kept
    # Each slot once: nothing to add to.
    grads[1].view(-1)[slots] = torch.linalg.vecdot(grad_inner.to(grads[1].dtype), inner.to(grads[1].dtype))
    grad_inner = grad_inner.mul_(weight) if weight.dtype == dtype else (grad_inner * weight).to(dtype)
    if grads[3] is not None:
        torch.mm((sums * weight).to(dtype).t(), inner, out=grads[3][expert])
    del sums, inner
    grad_pre = torch.empty_like(pre[at])
    half = gate.shape[1]
    torch.mul(grad_inner, activated, out=grad_pre[:, half:])
    del activated
    torch.ops.aten.silu_backward.grad_input(grad_inner.mul_(up), gate, grad_input=grad_pre[:, :half])
    del grad_inner
    _backward_gate_up(rows, grad_pre, inputs, fixed, grads)


def _backward_gate_up(rows: _Rows, grad_pre: torch.Tensor, inputs: tuple, fixed: _Fixed, grads: list) -> None:
    hidden, _, gate_up_proj, _, _, low, _, gate_up_a, gate_up_b, *_ = inputs
    expert, at, _, tokens = rows
    grad_x = grad_pre @ _matrix(gate_up_proj, fixed.gate_up_scale, expert, hidden.dtype, 2)  # (n, H)
    x = hidden.index_select(0, tokens) if grads[2] is not None or grads[4] is not None else None
    if grads[2] is not None:
        torch.mm(grad_pre.t(), x, out=grads[2][expert])
    if gate_up_a is not None:
        small = (grad_pre @ gate_up_b[expert]).mul_(fixed.gate_up_scaling)  # (n, R)
        if fixed.kept_hidden is None:
            grad_x.addmm_(small, gate_up_a[expert])
        else:
            grad_x += _keep(small @ gate_up_a[expert], fixed.kept_hidden, tokens, fixed.kept_factor)
        if grads[4] is not None:
            dropped = _keep(x, fixed.kept_hidden, tokens, fixed.kept_factor)
            torch.mm(small.t(), dropped, out=grads[4][expert])
        if grads[5] is not None:
            torch.mm(grad_pre.t(), low[at], out=grads[5][expert]).mul_(fixed.gate_up_scaling)
    grads[0].index_add_(0, tokens, grad_x.to(grads[0].dtype))


def experts_cpu_training(hidden, topk_indices, topk_weights, weights: tuple, lora, with_grad: bool) -> torch.Tensor:
    """`op_experts.experts` without quantised rows: `weights` are gate-up, down and their scales, `lora` an
    `ExpertLora`. Plain factors are in the dtype of the tokens."""
    gate_up_proj, down_proj, gate_up_scale, down_scale = weights
    scalings = (lora.gate_up_scaling, lora.down_scaling)
    fixed = _Fixed(
        topk_indices, gate_up_scale, down_scale, *scalings, lora.kept_hidden, lora.kept_inner, lora.kept_factor
    )
    inputs = (hidden, topk_weights, gate_up_proj, down_proj)
    with torch.autocast(hidden.device.type, enabled=False):
        if with_grad:
            return _ExpertsCpu.apply(*inputs, fixed, *lora.factors)
        return _forward(*inputs, lora.factors, fixed, save=False)[0]
