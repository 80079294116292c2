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

from .op_activation import ACTIVATIONS
from .op_expert_options import ExpertOptions
from .op_fp8 import Fp8Format, decoded_pieces, wide_mm_backward
from .op_quant import FP8, dequantize_rows, quantize_rows


class Fixed(NamedTuple):
    """What of a call has no gradient."""

    topk_indices: torch.Tensor
    gate_up_scale: torch.Tensor | None
    down_scale: torch.Tensor | None
    alphas: tuple[float, float]  # factors of both low-rank products
    kept_hidden: torch.Tensor | None  # (T, H) bool
    kept_inner: torch.Tensor | None  # (N, I) bool
    options: ExpertOptions


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


class _Matrix(NamedTuple):
    """One expert's weight (O, I), multiplied in `dtype`. FP8 is decoded some rows at a time, into memory that is there:
    a whole matrix of real size comes as fresh pages from the system, and takes five times as long."""

    weight: torch.Tensor
    scale: torch.Tensor | None
    dtype: torch.dtype
    fp8: Fp8Format
    parts: int

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, I) rows of `dtype` times the transposed weight: (n, O)."""
        if self.scale is None:
            return rows @ self.weight.to(self.dtype).t()  # under autocast, weights may be wider than the tokens
        output = rows.new_empty(len(rows), len(self.weight))
        for piece, place in decoded_pieces(self.weight, self.scale, self.fp8, self.parts, self.dtype):
            output[:, place] = rows @ piece.t()
        return output

    def backward(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, O) rows of `dtype` times the weight: (n, I), of FP8 weights in float32 or wider."""
        if self.scale is None:
            return rows @ self.weight.to(self.dtype)
        return wide_mm_backward(rows, self.weight, self.scale, self.fp8, self.parts)


def _matrix(
    weight: torch.Tensor, scale: torch.Tensor | None, expert: int, dtype: torch.dtype, fixed: Fixed, parts: int
) -> _Matrix:
    scale = None if scale is None else scale[expert]
    return _Matrix(weight[expert], scale, dtype, Fp8Format(fixed.options.block_size), parts)


def _multiplied(rows: torch.Tensor, wide: torch.Tensor | None, operands: torch.dtype, fixed: Fixed) -> torch.Tensor:
    """What a weight is multiplied with: `rows` as they are or, as `wide` as sums, the values they are quantised to."""
    if not fixed.options.quantize:
        return rows.to(operands)
    return dequantize_rows(*quantize_rows(wide, ue8m0=fixed.options.ue8m0)).to(operands)


def _operands(count: int, dtype: torch.dtype, weight: torch.Tensor | None = None) -> torch.dtype:
    """The dtype in which `count` rows are multiplied with one another, or with FP8 weights.

    Sums are stored in the dtype of the product. For few rows it is that of sums: what is spared is one rounding, and
    takes no longer since weights are decoded to float32 anyway."""
    few = count <= _ROWS_STEP and (weight is None or weight.dtype == FP8)
    return torch.promote_types(dtype, torch.float32) if few else dtype


def _limited(gate: torch.Tensor, up: torch.Tensor, fixed: Fixed) -> tuple[torch.Tensor, torch.Tensor]:
    limit = fixed.options.limit
    return (gate.clamp(max=limit), up.clamp(-limit, limit)) if limit else (gate, up)


def _keep(rows: torch.Tensor, kept: torch.Tensor | None, at: torch.Tensor) -> torch.Tensor:
    """`rows` after dropout, without its factor: that is part of the scalings."""
    return rows if kept is None else rows * kept[at]


def _add_low(total: torch.Tensor, small: torch.Tensor, factor: torch.Tensor, kept=None, at=None) -> torch.Tensor:
    """`total + small @ factor`, of which dropout may have kept a part, in the memory of `total`."""
    if kept is None:
        return total.addmm_(small, factor)
    return total.add_(_keep(small @ factor, kept, at))


def _write_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, dtype: torch.dtype) -> None:
    """`out[...] = left @ right`, multiplied in `dtype`, which may be narrower than `out`."""
    left, right = left.to(dtype), right.to(dtype)
    if out.dtype == dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def forward(inputs: tuple, fixed: Fixed, save: bool) -> tuple[torch.Tensor, tuple]:
    """Output (T, H); with `save`, the low-rank rows (N, R) of both products, scaled and sorted, and gate and up (n, 2I)
    of every expert that has rows. `inputs`: tokens, routing weights, both stacks, and the four factors."""
    hidden, topk_weights, gate_up_proj, down_proj, gate_up_a, gate_up_b, down_a, down_b = inputs
    num_experts, dtype = gate_up_proj.shape[0], hidden.dtype
    wide = torch.promote_types(dtype, torch.float32)
    value = ACTIVATIONS[fixed.options.activation].value
    slots = num_rows(fixed.topk_indices, num_experts, dtype)
    low = hidden.new_empty(slots, gate_up_a.shape[1], dtype=wide) if save and gate_up_a is not None else None
    low_inner = hidden.new_empty(slots, down_a.shape[1], dtype=wide) if save and down_a is not None else None
    # One tensor an expert: a large one would come as fresh pages from the system in every step.
    pre = []
    output = hidden.new_zeros(hidden.shape, dtype=wide)
    topk_weights = topk_weights.to(wide)
    for rows_of_expert in rows_by_expert(fixed.topk_indices, num_experts, dtype):
        expert, at, places, tokens, count = rows_of_expert
        operands = wide if fixed.options.quantize else _operands(len(tokens), dtype, gate_up_proj)
        x = hidden.index_select(0, tokens)
        x_wide = x.to(wide) if operands == wide or gate_up_a is not None else None
        matrix = _matrix(gate_up_proj, fixed.gate_up_scale, expert, operands, fixed, 2)
        product = matrix.forward(_multiplied(x, x_wide, operands, fixed))  # (n, 2I)
        both = product.to(wide)
        if gate_up_a is not None:
            small = (_keep(x_wide, fixed.kept_hidden, tokens) @ gate_up_a[expert].to(wide).t()).mul_(fixed.alphas[0])
            both = both.addmm_(small, gate_up_b[expert].to(wide).t())
            if save:
                low[at] = small
        if save:
            pre.append(product if product.dtype == dtype and gate_up_a is None else both.to(dtype))
        del x, x_wide, product
        gate, up = _limited(*both.chunk(2, dim=-1), fixed)
        inner = value(gate).mul_(up)  # (n, I)
        del both, gate, up
        matrix = _matrix(down_proj, fixed.down_scale, expert, operands, fixed, 1)
        rows = matrix.forward(_multiplied(inner, inner, operands, fixed)).to(wide)  # (n, H)
        if down_a is not None:
            small = (_keep(inner, fixed.kept_inner, places) @ down_a[expert].to(wide).t()).mul_(fixed.alphas[1])
            rows = rows.addmm_(small, down_b[expert].to(wide).t())
            if save:
                low_inner[at] = small
        output.index_add_(0, tokens[:count], rows.mul_(rows_of_expert.weights(topk_weights))[:count])
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
    together = _Inputs(hidden, topk_weights.to(grads[0].dtype), gate_up_proj, down_proj, *factors, low, low_inner)
    for rows, both in zip(rows_by_expert(fixed.topk_indices, gate_up_proj.shape[0], hidden.dtype), pre):
        _backward_expert(rows, both, grad_output, together, fixed, grads)
    grads[:2] = [grad.to(tensor.dtype) for grad, tensor in zip(grads[:2], inputs)]
    return grads


class _Inputs(NamedTuple):
    """Tensors of a call, and the low-rank rows of its forward pass."""

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
    dtype, wide = inputs.hidden.dtype, grads[0].dtype
    narrow = _operands(len(slots), dtype)
    activation = ACTIVATIONS[fixed.options.activation]
    weight = rows.weights(inputs.topk_weights)  # (n, 1)
    gate, up = _limited(*pre.to(wide).chunk(2, dim=-1), fixed)
    activated = activation.value(gate)
    inner = activated * up  # (n, I)
    sums = grad_output.index_select(0, tokens)  # (n, H)
    # Rows that were quantised pass their gradient as if they had not been.
    operands = _operands(len(slots), dtype, inputs.down_proj)
    matrix = _matrix(inputs.down_proj, fixed.down_scale, expert, operands, fixed, 1)
    grad_inner = matrix.backward(sums.to(operands)).to(wide)
    if inputs.down_a is not None:
        small = (sums.to(wide) @ inputs.down_b[expert].to(wide)).mul_(fixed.alphas[1])  # (n, R)
        grad_inner = _add_low(grad_inner, small, inputs.down_a[expert].to(wide), fixed.kept_inner, slots)
        if grads[6] is not None:
            # With FP8 weights, whose decoded values are rounded, these two would be one rounding too many.
            exact = wide if inputs.down_proj.dtype == FP8 else narrow
            _write_product((small * weight).t(), _keep(inner, fixed.kept_inner, slots), grads[6][expert], exact)
        if grads[7] is not None:
            _write_product((inputs.low_inner[at] * weight).t(), sums, grads[7][expert].t(), narrow)
    # Each slot once: nothing to add to.
    grads[1].view(-1)[slots[:count]] = torch.linalg.vecdot(grad_inner, inner)[:count].to(grads[1].dtype)
    grad_inner = grad_inner.mul_(weight)
    if grads[3] is not None:
        _write_product((sums * weight).t(), inner, grads[3][expert], dtype)
    del sums, inner
    grad_pre = pre.new_empty(pre.shape, dtype=wide)
    half = gate.shape[1]
    torch.mul(grad_inner, activated, out=grad_pre[:, half:])
    del activated
    activation.grad(grad_inner.mul_(up), gate, grad_pre[:, :half])
    if fixed.options.limit:
        passes = torch.cat((pre[:, :half] <= fixed.options.limit, pre[:, half:].abs() <= fixed.options.limit), 1)
        grad_pre.mul_(passes)
    del grad_inner, gate, up
    _backward_gate_up(rows, grad_pre, inputs, fixed, grads)


def _backward_gate_up(rows: _Rows, grad_wide: torch.Tensor, inputs: _Inputs, fixed: Fixed, grads: list) -> None:
    expert, at, _, tokens, count = rows
    hidden, wide = inputs.hidden, grads[0].dtype
    dtype = hidden.dtype
    operands = _operands(len(tokens), dtype, inputs.gate_up_proj)
    narrow = _operands(len(tokens), dtype)
    grad_pre = grad_wide.to(narrow)  # (n, 2I)
    matrix = _matrix(inputs.gate_up_proj, fixed.gate_up_scale, expert, operands, fixed, 2)
    grad_x = matrix.backward(grad_pre.to(operands)).to(wide)  # (n, H)
    x = hidden.index_select(0, tokens) if grads[2] is not None or grads[4] is not None else None
    if grads[2] is not None:
        _write_product(grad_pre.t(), x, grads[2][expert], dtype)
    if inputs.gate_up_a is not None:
        small = (grad_wide @ inputs.gate_up_b[expert].to(wide)).mul_(fixed.alphas[0])  # (n, R)
        grad_x = _add_low(grad_x, small, inputs.gate_up_a[expert].to(wide), fixed.kept_hidden, tokens)
        if grads[4] is not None:
            _write_product(small.t(), _keep(x, fixed.kept_hidden, tokens), grads[4][expert], narrow)
        if grads[5] is not None:
            _write_product(inputs.low[at].t(), grad_pre, grads[5][expert].t(), narrow)
    grads[0].index_add_(0, tokens[:count], grad_x[:count])


def experts_cpu_training(
    hidden, topk_indices, topk_weights, weights: tuple, lora, options: ExpertOptions, with_grad: bool
) -> torch.Tensor:
    """`op_experts.experts`: `weights` are gate-up, down and their scales, `lora` an `ExpertLora`."""
    gate_up_proj, down_proj, *scales = weights
    fixed = fix(topk_indices, scales, lora, options)
    inputs = (hidden, topk_weights, gate_up_proj, down_proj)
    with torch.autocast(hidden.device.type, enabled=False):
        if with_grad:
            return _ExpertsCpu.apply(*inputs, fixed, *lora.factors)
        return forward((*inputs, *lora.factors), fixed, save=False)[0]


def fix(topk_indices, scales, lora, options: ExpertOptions) -> Fixed:
    """What `forward` and `backward` take beside their inputs."""
    kept = (lora.kept_hidden, lora.kept_inner)
    return Fixed(topk_indices, *scales, lora.alphas, *kept, options)
