"""Routed experts as operators that `torch.compile` takes whole, for inference and training, on kernels and on the CPU.

Eager code calls the `autograd.Function`s themselves: an operator of Python costs some 15 us a call more.

The rows that a backward pass needs are outputs of the operator, of sizes that do not depend on the routing. The layout
is not among them: it is built again, which takes less than keeping it.

Shapes: T tokens, K choices per token, E experts, H hidden, I intermediate, R rank.
"""

import torch

from .kernel_routing import build_layout
from .kernel_tiles import tile_rows
from .op_custom import opaque
from .op_expert_lora import ExpertLora
from .op_expert_options import ExpertOptions
from .op_experts_cpu import backward as backward_cpu
from .op_experts_cpu import experts_cpu_training, fix, num_rows, rows_by_expert
from .op_experts_cpu import forward as forward_cpu
from .op_experts_triton import backward as backward_triton
from .op_experts_triton import contiguous_inputs, experts_triton, make_plan
from .op_experts_triton import forward as forward_triton
from .triton_compat import on_device

# Places of the tensors with a gradient among the arguments of the operators.
_TRAINED = (0, 2, 3, 4, 7, 8, 9, 10)


def experts_traced(
    hidden, topk_indices, topk_weights, weights: tuple, lora: ExpertLora, options: ExpertOptions, impl: str, with_grad
) -> torch.Tensor:
    """`op_experts.experts` while a graph is traced; `impl` is `"triton"` or `"cpu"`."""
    kept = (lora.kept_hidden, lora.kept_inner)
    numbers = (float(lora.gate_up_scaling), float(lora.down_scaling), float(lora.dropout))
    arguments = (hidden, topk_indices, topk_weights, *weights, *lora.factors, *kept, *numbers)
    choices = (options.ue8m0, options.activation, options.limit, list(options.block_size), impl)
    if with_grad:
        return _training_op(*arguments, bool(options.quantize), *choices)[0]
    return _inference_op(*arguments, options.quantize, *choices)


@opaque("experts")
def _inference_op(
    hidden: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    gate_up_a: torch.Tensor | None,
    gate_up_b: torch.Tensor | None,
    down_a: torch.Tensor | None,
    down_b: torch.Tensor | None,
    kept_hidden: torch.Tensor | None,
    kept_inner: torch.Tensor | None,
    gate_up_scaling: float,
    down_scaling: float,
    dropout: float,
    quantize: bool | None,
    ue8m0: bool,
    activation: str,
    limit: float,
    block_size: list[int],
    impl: str,
) -> torch.Tensor:
    factors, kept = (gate_up_a, gate_up_b, down_a, down_b), (kept_hidden, kept_inner)
    lora = ExpertLora(*factors, gate_up_scaling, down_scaling, *kept, dropout)
    options = ExpertOptions(quantize, ue8m0, activation, limit, tuple(block_size))
    inputs = (hidden, topk_indices, topk_weights, (gate_up_proj, down_proj, gate_up_scale, down_scale), lora, options)
    if impl == "cpu":
        return experts_cpu_training(*inputs, with_grad=False)
    return experts_triton(*inputs)


@_inference_op.register_fake
def _(hidden, *arguments):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@opaque("experts_training")
def _training_op(
    hidden: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    gate_up_a: torch.Tensor | None,
    gate_up_b: torch.Tensor | None,
    down_a: torch.Tensor | None,
    down_b: torch.Tensor | None,
    kept_hidden: torch.Tensor | None,
    kept_inner: torch.Tensor | None,
    gate_up_scaling: float,
    down_scaling: float,
    dropout: float,
    quantize: bool,
    ue8m0: bool,
    activation: str,
    limit: float,
    block_size: list[int],
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output (T, H); gate and up of the sorted rows, (rows, 2I); low-rank rows of both products, (rows, R) or empty."""
    factors, kept = (gate_up_a, gate_up_b, down_a, down_b), (kept_hidden, kept_inner)
    lora = ExpertLora(*factors, gate_up_scaling, down_scaling, *kept, dropout)
    options = ExpertOptions(quantize, ue8m0, activation, limit, tuple(block_size))
    if impl == "cpu":
        fixed = fix(topk_indices, (gate_up_scale, down_scale), lora, options)
        inputs = (hidden, topk_weights, gate_up_proj, down_proj, *factors)
        output, (low, low_inner, *pieces) = forward_cpu(inputs, fixed, save=True)
        rows = num_rows(topk_indices, gate_up_proj.shape[0], hidden.dtype)
        pre = hidden.new_empty(rows, gate_up_proj.shape[1])
        place = 0
        for piece in pieces:
            pre[place : place + len(piece)] = piece
            place += len(piece)
    else:
        plan = make_plan(topk_indices, (gate_up_scale, down_scale), lora, options)
        inputs = contiguous_inputs(hidden, topk_weights, gate_up_proj, down_proj, lora)
        with on_device(hidden):
            output, (_, pre, low, low_inner) = forward_triton(inputs, plan, save=True)
    empty = [hidden.new_empty(0) if rows is None else rows for rows in (low, low_inner)]
    return output, pre, *empty


@_training_op.register_fake
def _(hidden, topk_indices, topk_weights, gate_up_proj, down_proj, gate_up_scale, down_scale, *others):
    gate_up_a, _, down_a, *_, impl = others
    on_cpu = impl == "cpu"
    rows = num_rows(topk_indices, gate_up_proj.shape[0], hidden.dtype) if on_cpu else topk_indices.numel()
    dtype = torch.promote_types(hidden.dtype, torch.float32) if on_cpu else hidden.dtype
    low = (
        hidden.new_empty(0) if a is None else hidden.new_empty(rows, a.shape[1], dtype=dtype)
        for a in (gate_up_a, down_a)
    )
    output = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return output, hidden.new_empty(rows, gate_up_proj.shape[1]), *low


@opaque("experts_backward")
def _backward_op(
    grad_output: torch.Tensor,
    pre: torch.Tensor,
    low: torch.Tensor,
    low_inner: torch.Tensor,
    hidden: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    gate_up_a: torch.Tensor | None,
    gate_up_b: torch.Tensor | None,
    down_a: torch.Tensor | None,
    down_b: torch.Tensor | None,
    kept_hidden: torch.Tensor | None,
    kept_inner: torch.Tensor | None,
    gate_up_scaling: float,
    down_scaling: float,
    dropout: float,
    needs: list[bool],
    activation: str,
    limit: float,
    block_size: list[int],
    impl: str,
) -> list[torch.Tensor]:
    """The gradients that there are `needs` for, of the eight tensors in the order of `_TRAINED`."""
    factors, kept = (gate_up_a, gate_up_b, down_a, down_b), (kept_hidden, kept_inner)
    lora = ExpertLora(*factors, gate_up_scaling, down_scaling, *kept, dropout)
    num_experts, dtype = gate_up_proj.shape[0], hidden.dtype
    low = None if gate_up_a is None else low
    low_inner = None if down_a is None else low_inner
    # How rows were quantised is of no concern to their gradients.
    options = ExpertOptions(activation=activation, limit=limit, block_size=tuple(block_size))
    if impl == "cpu":
        fixed = fix(topk_indices, (gate_up_scale, down_scale), lora, options)
        inputs = (hidden, topk_weights, gate_up_proj, down_proj, *factors)
        pieces = [pre[rows.at] for rows in rows_by_expert(topk_indices, num_experts, dtype)]
        grads = backward_cpu(grad_output, inputs, fixed, (low, low_inner, *pieces), needs)
    else:
        plan = make_plan(topk_indices, (gate_up_scale, down_scale), lora, options)
        inputs = contiguous_inputs(hidden, topk_weights, gate_up_proj, down_proj, lora)
        with on_device(hidden):
            layout = build_layout(plan.topk_indices, num_experts, tile_rows(topk_indices.numel(), num_experts, dtype))
        grads = backward_triton(grad_output, inputs, plan, (layout, pre, low, low_inner), needs)
    return [grad for grad, need in zip(grads, needs) if need]


@_backward_op.register_fake
def _(grad_output, pre, low, low_inner, *arguments):
    needs = arguments[-5]
    inputs = (arguments[place] for place in _TRAINED)
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor, need in zip(inputs, needs) if need
    ]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:13], *output[1:])
    ctx.numbers, ctx.choices = inputs[13:16], inputs[-4:]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, *_):
    *tensors, pre, low, low_inner = ctx.saved_tensors
    grads = [None] * 22
    if grad_output is not None:
        places = [place for place in _TRAINED if ctx.needs_input_grad[place]]
        needs = [place in places for place in _TRAINED]
        values = _backward_op(grad_output, pre, low, low_inner, *tensors, *ctx.numbers, needs, *ctx.choices)
        for place, value in zip(places, values):
            grads[place] = value
    return tuple(grads)


_training_op.register_autograd(_backward, setup_context=_setup_context)
