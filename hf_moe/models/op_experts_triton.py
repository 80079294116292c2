"""Routed experts on Triton kernels: the forward pass, and gradients as an `autograd.Function`.

Shapes: T tokens, K choices per token, E experts, H hidden, I intermediate, N = T * K slots, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .kernel_combine import combine
from .kernel_experts import gate_up, multiply_rows
from .kernel_experts_backward import inner_grad, sum_outer
from .kernel_fp8 import quantize_rows as quantize_on_kernel
from .kernel_routing import Layout, build_layout
from .kernel_tiles import tile_rows
from .op_expert_lora import ExpertLora
from .op_expert_options import ExpertOptions
from .triton_compat import cdiv, converts_fp8, on_device

# Rows of slots are summed in float32; above so many bytes they wait for it in the dtype of the model.
_MAX_WIDE_BYTES = 64 << 20
# Elements of the rows of slots that a pass without gradients holds: 18,724 tokens at DeepSeek-V3's sizes. More tokens
# are taken in parts, each large enough to be bound by arithmetic.
_MAX_ROW_ELEMENTS = 1 << 30
# The tensors with a gradient, in the order of all functions here.
GRADIENTS = ("hidden", "weights", "gate_up", "down", "gate_up_a", "gate_up_b", "down_a", "down_b")


@dataclass(frozen=True)
class Plan:
    """What of a call is no tensor with a gradient."""

    topk_indices: torch.Tensor
    gate_up_scale: torch.Tensor | None
    down_scale: torch.Tensor | None
    lora: ExpertLora
    options: ExpertOptions = ExpertOptions()


def _rows_dtype(dtype: torch.dtype, num_slots: int, hidden: int) -> torch.dtype:
    return torch.float32 if num_slots * hidden * 4 <= _MAX_WIDE_BYTES else dtype


def _drop_sorted(inner: torch.Tensor, lora: ExpertLora, order: torch.Tensor) -> torch.Tensor:
    """What dropout leaves of sorted inner rows, without its factor; rows of no expert stay whatever memory held."""
    return inner if lora.kept_inner is None else torch.where(lora.kept_inner[order], inner, 0)


def _drop_hidden(hidden: torch.Tensor, lora: ExpertLora) -> torch.Tensor:
    """What dropout leaves of the tokens, without its factor."""
    return hidden if lora.kept_hidden is None else torch.where(lora.kept_hidden, hidden, 0)


def _in_dtype(factors, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Factors as kernels take them. Those of a wider dtype (adapters in float32 on a bfloat16 model) are multiplied in
    the dtype of the tokens, and their gradients written in their own."""
    return [factor if factor is None else factor.to(dtype) for factor in factors]


def forward(inputs: tuple, plan: Plan, save: bool) -> tuple[torch.Tensor, tuple]:
    """Output (T, H), and, for `backward` if `save`, the layout, gate and up, and the low-rank rows of both products.

    `inputs` are contiguous: tokens (T, H), routing weights (T, K), both stacks, and the four factors.
    """
    hidden, topk_weights, gate_up_proj, down_proj, *factors = inputs
    lora, dtype = plan.lora, hidden.dtype
    factors = _in_dtype(factors, dtype)
    (tokens, top_k), num_experts = plan.topk_indices.shape, gate_up_proj.shape[0]
    layout = build_layout(plan.topk_indices, num_experts, tile_rows(tokens * top_k, num_experts, dtype))
    gate_up_a, gate_up_b, down_a, down_b = factors
    low = low_inner = None
    gate_up_alpha, down_alpha = lora.alphas
    if gate_up_a is not None:
        options = {"gather": True, "alpha": gate_up_alpha, "out_dtype": dtype}
        low = multiply_rows(_drop_hidden(hidden, lora), gate_up_a, None, layout, top_k, **options)  # (N, R)
    rows, x_scale = quantize_on_kernel(hidden, plan.options.ue8m0) if plan.options.quantize else (hidden, None)
    inner, pre = gate_up(
        rows,
        gate_up_proj,
        plan.gate_up_scale,
        layout,
        top_k,
        # Half as many bits would round rows to another FP8 value often enough to cost 1 % of the result.
        out_dtype=torch.float32 if plan.options.quantize else dtype,
        pre_dtype=dtype if save else None,
        x_scale=x_scale,
        low=low,
        lora_b=gate_up_b,
        activation=plan.options.activation,
        limit=plan.options.limit,
    )
    if down_a is not None:
        rows = _drop_sorted(inner, lora, layout.order).to(dtype)
        low_inner = multiply_rows(rows, down_a, None, layout, top_k, alpha=down_alpha, out_dtype=dtype)
        del rows
    rows_dtype = _rows_dtype(dtype, tokens * top_k, hidden.shape[1])
    # Rows of no expert are quantised as memory holds them, and read by nobody.
    inner, x_scale = quantize_on_kernel(inner, plan.options.ue8m0) if plan.options.quantize else (inner, None)
    options = {"to_slots": True, "factors": topk_weights, "out_dtype": rows_dtype, "low": low_inner, "lora": down_b}
    rows = multiply_rows(inner, down_proj, plan.down_scale, layout, top_k, x_scale=x_scale, **options)
    output = combine(rows, plan.topk_indices, num_experts, dtype)
    return output, (layout, pre, low, low_inner)


def _forward_in_parts(inputs: tuple, plan: Plan) -> torch.Tensor:
    """`forward` for the output alone, of so many tokens at a time as `_MAX_ROW_ELEMENTS` allows."""
    hidden, topk_weights, *weights = inputs
    (tokens, top_k), lora = plan.topk_indices.shape, plan.lora
    parts = cdiv(tokens, max(1, _MAX_ROW_ELEMENTS // max(1, top_k * hidden.shape[1])))
    if parts <= 1 or lora.kept_hidden is not None or lora.kept_inner is not None:
        return forward(inputs, plan, save=False)[0]
    output, size = torch.empty_like(hidden), cdiv(tokens, parts)
    for start in range(0, tokens, size):
        some = slice(start, start + size)
        own = replace(plan, topk_indices=plan.topk_indices[some])
        output[some] = forward((hidden[some], topk_weights[some], *weights), own, save=False)[0]
    return output


class _Experts(torch.autograd.Function):
    """Kept for the backward pass beside the inputs: gate and up (N, 2I), the low-rank rows, and the layout."""

    @staticmethod
    def forward(ctx, hidden, topk_weights, gate_up_proj, down_proj, plan, *factors):
        inputs = (hidden, topk_weights, gate_up_proj, down_proj, *factors)
        output, (layout, *rows) = forward(inputs, plan, save=True)
        ctx.save_for_backward(*inputs, *rows, *layout[:4])
        ctx.plan, ctx.block_m = plan, layout.block_m
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        layout = Layout(*saved[11:], ctx.block_m)
        grads = backward(grad_output, saved[:8], ctx.plan, (layout, *saved[8:11]), (*needs[:4], *needs[5:]))
        return *grads[:4], None, *grads[4:]


def backward(grad_output: torch.Tensor, inputs: tuple, plan: Plan, saved: tuple, needs: tuple[bool, ...]) -> list:
    """Gradients (or `None`) of the eight `inputs` of `forward`, from what it `saved`, as far as there are `needs`."""
    with on_device(grad_output):
        return _backward(grad_output.contiguous(), inputs, plan, saved, needs)


def _backward(grad_output: torch.Tensor, inputs: tuple, plan: Plan, saved: tuple, needs: tuple[bool, ...]) -> list:
    hidden, topk_weights, gate_up_proj, down_proj, *factors = inputs
    layout, pre, low, low_inner = saved
    lora, dtype = plan.lora, hidden.dtype
    gate_up_a, gate_up_b, down_a, down_b = _in_dtype(factors, dtype)
    wide = [factor if factor is None else factor.dtype for factor in factors]  # of the gradients
    needs_hidden, _, needs_gate_up, needs_down, *needs_factors = needs
    ids, num_experts, top_k = plan.topk_indices, gate_up_proj.shape[0], plan.topk_indices.shape[1]
    gate_up_alpha, down_alpha = lora.alphas
    low_grad = low_pre = None
    grads = dict.fromkeys(GRADIENTS)

    if down_a is not None:
        options = {"gather": True, "transposed": True, "alpha": down_alpha, "out_dtype": dtype}
        low_grad = multiply_rows(grad_output, down_b, None, layout, top_k, **options)  # (N, R), not yet weighted
    grad_pre, inner, grad_weights = inner_grad(
        grad_output,
        down_proj,
        plan.down_scale,
        layout,
        top_k,
        pre,
        topk_weights,
        save_inner=needs_down or needs_factors[2],
        low=low_grad,
        lora_a=down_a,
        kept=lora.kept_inner if down_a is not None else None,
        activation=plan.options.activation,
        limit=plan.options.limit,
    )
    grad_weights = grad_weights.view_as(topk_weights).masked_fill((ids < 0) | (ids >= num_experts), 0.0)
    if needs_down:
        grads["down"] = sum_outer(grad_output, inner, layout, top_k, gather_left=True, out_dtype=down_proj.dtype)
    if needs_factors[2]:
        dropped = _drop_sorted(inner, lora, layout.order)
        grads["down_a"] = sum_outer(low_grad, dropped, layout, top_k, out_dtype=wide[2])
        del dropped
    if needs_factors[3]:
        options = {"gather_left": True, "factors": topk_weights, "out_dtype": wide[3]}
        grads["down_b"] = sum_outer(grad_output, low_inner, layout, top_k, **options)
    del inner

    if gate_up_a is not None:
        options = {"transposed": True, "alpha": gate_up_alpha, "out_dtype": dtype}
        low_pre = multiply_rows(grad_pre, gate_up_b, None, layout, top_k, **options)  # (N, R)
    if needs_gate_up:
        grads["gate_up"] = sum_outer(grad_pre, hidden, layout, top_k, gather_right=True, out_dtype=gate_up_proj.dtype)
    if needs_factors[0]:
        dropped = _drop_hidden(hidden, lora)
        grads["gate_up_a"] = sum_outer(low_pre, dropped, layout, top_k, gather_right=True, out_dtype=wide[0])
        del dropped
    if needs_factors[1]:
        grads["gate_up_b"] = sum_outer(grad_pre, low, layout, top_k, out_dtype=wide[1])
    if needs_hidden:
        grads["hidden"] = _grad_hidden(grad_pre, low_pre, gate_up_proj, gate_up_a, plan, layout, hidden)
    grads["weights"] = grad_weights.to(topk_weights.dtype)
    return [grads[name] for name in GRADIENTS]


def _grad_hidden(grad_pre, low_pre, gate_up_proj, gate_up_a, plan: Plan, layout: Layout, hidden) -> torch.Tensor:
    ids, lora, num_experts = plan.topk_indices, plan.lora, gate_up_proj.shape[0]
    top_k = ids.shape[1]
    masked = lora.kept_hidden is not None and low_pre is not None
    options = {"transposed": True, "to_slots": True}
    options["out_dtype"] = _rows_dtype(hidden.dtype, ids.numel(), hidden.shape[1])
    fused = {} if low_pre is None or masked else {"low": low_pre, "lora": gate_up_a}
    rows = multiply_rows(grad_pre, gate_up_proj, plan.gate_up_scale, layout, top_k, parts=2, **fused, **options)
    grad = combine(rows, ids, num_experts, torch.float32 if masked else hidden.dtype)
    if masked:
        del rows
        rows = multiply_rows(low_pre, gate_up_a, None, layout, top_k, **options)
        grad = combine(rows, ids, num_experts, hidden.dtype, kept=lora.kept_hidden, base=grad)
    return grad


def make_plan(topk_indices, scales: tuple, lora: ExpertLora, options: ExpertOptions) -> Plan:
    scales = [None if scale is None else scale.contiguous() for scale in scales]
    return Plan(topk_indices.contiguous(), *scales, lora, options)


def contiguous_inputs(hidden, topk_weights, gate_up_proj, down_proj, lora: ExpertLora) -> tuple:
    """The inputs of `forward`."""
    inputs = (hidden, topk_weights, gate_up_proj, down_proj, *lora.factors)
    return tuple(None if tensor is None else tensor.contiguous() for tensor in inputs)


def experts_triton(
    hidden, topk_indices, topk_weights, weights: tuple, lora: ExpertLora, options: ExpertOptions
) -> torch.Tensor:
    """`op_experts.experts`: `weights` are gate-up, down and their scales."""
    gate_up_proj, down_proj, *scales = weights
    inputs = contiguous_inputs(hidden, topk_weights, gate_up_proj, down_proj, lora)
    with_grad = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    if options.quantize is None:
        many = tile_rows(topk_indices.numel(), gate_up_proj.shape[0], hidden.dtype) == 128
        quantize = many and not with_grad and scales[0] is not None and converts_fp8(hidden.device)
        options = options._replace(quantize=quantize)
    plan = make_plan(topk_indices, scales, lora, options)
    with on_device(hidden):
        if with_grad:
            return _Experts.apply(*inputs[:4], plan, *inputs[4:])
        return _forward_in_parts(inputs, plan)
