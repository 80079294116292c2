"""Routed experts on tensors: the definition in plain PyTorch, and the same on Triton kernels with its gradients.

`experts` is the function to call. Weights may be frozen block FP8, and low-rank factors (LoRA) may go along: they are
applied to the rows of their expert inside the grouped products, so that no sum of weights is ever built.

Shapes: T tokens, K choices per token, E experts, H hidden, I intermediate, N = T * K slots, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .kernel_combine import combine
from .kernel_experts import gate_up, multiply_rows
from .kernel_experts_backward import inner_grad, sum_outer
from .kernel_fp8 import quantize_rows as quantize_on_kernel
from .kernel_routing import Layout, build_layout
from .kernel_tiles import SCALE_BLOCK, tile_rows
from .op_experts_cpu import experts_cpu_training
from .op_quant import dequantize_rows, quantize_rows
from .triton_compat import converts_fp8, on_device, runs_kernels

# Rows of slots are summed in float32; above so many bytes they wait for it in the dtype of the model.
_MAX_WIDE_BYTES = 64 << 20
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_BACKEND_NAME = "hf_moe_triton"


@dataclass(frozen=True)
class ExpertLora:
    """Low-rank factors of each expert; a pair is `None` where its weight has none.

    Attributes:
        gate_up_a: (E, R, H).
        gate_up_b: (E, 2I, R).
        down_a: (E, R, I).
        down_b: (E, H, R).
        gate_up_scaling, down_scaling: factor of each product, such as alpha / R.
        kept_hidden: (T, H) bool, what dropout keeps of the tokens on their way into `gate_up_a`.
        kept_inner: (T * K, I) bool in the order of the slots, the same for `down_a`.
        dropout: probability with which the masks were drawn; kept values are divided by 1 - `dropout`.
    """

    gate_up_a: torch.Tensor | None = None
    gate_up_b: torch.Tensor | None = None
    down_a: torch.Tensor | None = None
    down_b: torch.Tensor | None = None
    gate_up_scaling: float = 1.0
    down_scaling: float = 1.0
    kept_hidden: torch.Tensor | None = None
    kept_inner: torch.Tensor | None = None
    dropout: float = 0.0

    @property
    def factors(self) -> tuple[torch.Tensor | None, ...]:
        return self.gate_up_a, self.gate_up_b, self.down_a, self.down_b

    @property
    def kept_factor(self) -> float:
        return 1.0 / (1.0 - self.dropout) if self.dropout < 1.0 else 0.0

    @property
    def alphas(self) -> tuple[float, float]:
        """Factor of both low-rank products, with that of dropout: applied to sums, it costs no rounding of its own."""
        masks = (self.kept_hidden, self.kept_inner)
        scalings = (self.gate_up_scaling, self.down_scaling)
        return tuple(s if kept is None else s * self.kept_factor for s, kept in zip(scalings, masks))

    def add(self, product: torch.Tensor, rows: torch.Tensor, name: str, expert: int, at: torch.Tensor) -> torch.Tensor:
        """`product`, of one expert's `rows` with its weight, and the low-rank part; `name` is `"gate_up"` or `"down"`,
        `at` the places of the rows among tokens or slots."""
        a, b = getattr(self, f"{name}_a"), getattr(self, f"{name}_b")
        if a is None:
            return product
        kept = self.kept_hidden if name == "gate_up" else self.kept_inner
        if kept is not None:
            rows = rows * kept[at] * self.kept_factor
        low = F.linear(F.linear(rows.to(a.dtype), a[expert]), b[expert])
        return product + (getattr(self, f"{name}_scaling") * low).to(product.dtype)


def draw_dropout(
    hidden_states: torch.Tensor, top_k: int, intermediate: int, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (T, H) and (T * K, I) of an `ExpertLora` with this dropout, from the generator of the device."""
    tokens, hidden = hidden_states.shape
    shapes = (tokens, hidden), (tokens * top_k, intermediate)
    return tuple(torch.rand(shape, device=hidden_states.device) >= dropout for shape in shapes)


# --- the definition ---------------------------------------------------------------------------------------------------


def expert_weight(weight: torch.Tensor, scale: torch.Tensor | None, expert: int, parts: int = 1) -> torch.Tensor:
    """One expert's matrix, FP8 expanded: (O, I) float32 then. `parts` matrices of O / parts rows are stacked in it,
    each with 128 x 128 blocks of its own."""
    if scale is None:
        return weight[expert]
    pieces = []
    for rows, scales in zip(weight[expert].float().chunk(parts), scale[expert].float().chunk(parts)):
        wide = scales.repeat_interleave(SCALE_BLOCK, 0)[: rows.shape[0]]
        pieces.append(rows * wide.repeat_interleave(SCALE_BLOCK, 1)[:, : rows.shape[1]])
    return torch.cat(pieces)


def _as_quantized(rows: torch.Tensor, ue8m0: bool) -> torch.Tensor:
    """The values that quantised rows stand for; the gradient passes as if they were the rows."""
    values = dequantize_rows(*quantize_rows(rows.detach(), ue8m0=ue8m0)).to(rows.dtype)
    return rows + (values - rows).detach()


def experts_torch(
    hidden_states: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
    lora: ExpertLora | None = None,
    quantize: bool | None = None,
    ue8m0: bool = False,
) -> torch.Tensor:
    """The definition of `experts`, in float32 (float64 for float64 tokens) from the inputs as they are; gradients by
    autograd. Waits for the device. `quantize=None` does not quantise."""
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    lora = lora or ExpertLora()
    hidden = hidden_states.to(wide)
    dropped = hidden if lora.kept_hidden is None else hidden * lora.kept_hidden * lora.kept_factor
    multiplied = _as_quantized(hidden, ue8m0) if quantize else hidden
    output = torch.zeros_like(hidden)
    top_k = topk_indices.shape[1]
    for expert in range(gate_up_proj.shape[0]):
        token, choice = torch.where(topk_indices == expert)
        if token.numel() == 0:
            continue
        pre = F.linear(multiplied[token], expert_weight(gate_up_proj, gate_up_scale, expert, 2).to(wide))  # (rows, 2I)
        if lora.gate_up_a is not None:
            low = F.linear(dropped[token], lora.gate_up_a[expert].to(wide))
            pre = pre + lora.gate_up_scaling * F.linear(low, lora.gate_up_b[expert].to(wide))
        gate, up = pre.chunk(2, dim=-1)
        inner = F.silu(gate) * up  # (rows, I)
        down = expert_weight(down_proj, down_scale, expert).to(wide)
        rows, quantized = F.linear(inner, down), F.linear(_as_quantized(inner, ue8m0), down) if quantize else None
        if lora.down_a is not None:
            if lora.kept_inner is not None:
                inner = inner * lora.kept_inner[token * top_k + choice] * lora.kept_factor
            low = lora.down_scaling * F.linear(
                F.linear(inner, lora.down_a[expert].to(wide)), lora.down_b[expert].to(wide)
            )
            rows, quantized = rows + low, quantized + low if quantize else None
        weight = topk_weights[token, choice].to(wide).unsqueeze(-1)
        rows = rows * weight  # (rows, H)
        if quantize:  # in value; the gradients, also that of the weight, are those of the rows as they were
            rows = rows + (quantized * weight - rows).detach()
        output = output.index_add(0, token, rows)
    return output.to(hidden_states.dtype)


# --- on kernels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What of a call is no tensor with a gradient."""

    topk_indices: torch.Tensor
    gate_up_scale: torch.Tensor | None
    down_scale: torch.Tensor | None
    lora: ExpertLora
    quantize: bool = False
    ue8m0: bool = False


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


def _forward(hidden, topk_weights, gate_up_proj, down_proj, factors, plan: _Plan, save: bool):
    """Output (T, H), and what a backward pass needs if `save`."""
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
    rows, x_scale = quantize_on_kernel(hidden, plan.ue8m0) if plan.quantize else (hidden, None)
    inner, pre = gate_up(
        rows,
        gate_up_proj,
        plan.gate_up_scale,
        layout,
        top_k,
        # Half as many bits would round rows to another FP8 value often enough to cost 1 % of the result.
        out_dtype=torch.float32 if plan.quantize else dtype,
        pre_dtype=dtype if save else None,
        x_scale=x_scale,
        low=low,
        lora_b=gate_up_b,
    )
    if down_a is not None:
        rows = _drop_sorted(inner, lora, layout.order).to(dtype)
        low_inner = multiply_rows(rows, down_a, None, layout, top_k, alpha=down_alpha, out_dtype=dtype)
        del rows
    rows_dtype = _rows_dtype(dtype, tokens * top_k, hidden.shape[1])
    # Rows of no expert are quantised as memory holds them, and read by nobody.
    inner, x_scale = quantize_on_kernel(inner, plan.ue8m0) if plan.quantize else (inner, None)
    options = {"to_slots": True, "factors": topk_weights, "out_dtype": rows_dtype, "low": low_inner, "lora": down_b}
    rows = multiply_rows(inner, down_proj, plan.down_scale, layout, top_k, x_scale=x_scale, **options)
    output = combine(rows, plan.topk_indices, num_experts, dtype)
    return output, (layout, pre, low, low_inner)


class _Experts(torch.autograd.Function):
    """Experts on kernels. Kept for the backward pass beside the inputs: gate and up (N, 2I), the low-rank rows, and
    the layout."""

    @staticmethod
    def forward(ctx, hidden, topk_weights, gate_up_proj, down_proj, plan, *factors):
        output, (layout, pre, low, low_inner) = _forward(
            hidden, topk_weights, gate_up_proj, down_proj, factors, plan, save=True
        )
        ctx.save_for_backward(hidden, topk_weights, gate_up_proj, down_proj, pre, low, low_inner, *layout[:4], *factors)
        ctx.plan, ctx.block_m = plan, layout.block_m
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        with on_device(grad_output):
            return _backward(ctx, grad_output.contiguous())


def _backward(ctx, grad_output: torch.Tensor) -> tuple:
    """Gradients in the order of the arguments of `_Experts.forward`."""
    hidden, topk_weights, gate_up_proj, down_proj, pre, low, low_inner, *rest = ctx.saved_tensors
    plan, lora, dtype = ctx.plan, ctx.plan.lora, hidden.dtype
    layout, (gate_up_a, gate_up_b, down_a, down_b) = Layout(*rest[:4], ctx.block_m), _in_dtype(rest[4:], dtype)
    wide = [factor if factor is None else factor.dtype for factor in rest[4:]]  # of the gradients
    needs_hidden, _, needs_gate_up, needs_down, _, *needs_factors = ctx.needs_input_grad
    ids, num_experts, top_k = plan.topk_indices, gate_up_proj.shape[0], plan.topk_indices.shape[1]
    gate_up_alpha, down_alpha = lora.alphas
    low_grad = low_pre = None
    grads = dict.fromkeys(("hidden", "gate_up", "down", "gate_up_a", "gate_up_b", "down_a", "down_b"))

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
    factors = (grads[name] for name in ("gate_up_a", "gate_up_b", "down_a", "down_b"))
    return grads["hidden"], grad_weights.to(topk_weights.dtype), grads["gate_up"], grads["down"], None, *factors


def _grad_hidden(grad_pre, low_pre, gate_up_proj, gate_up_a, plan: _Plan, layout: Layout, hidden) -> torch.Tensor:
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


def _check(hidden, topk_indices, topk_weights, weights: tuple, lora: ExpertLora, quantize: bool | None) -> None:
    gate_up_proj, down_proj, gate_up_scale, down_scale = weights
    tokens, width = hidden.shape
    num_experts, rows, columns = gate_up_proj.shape
    inter = down_proj.shape[2]
    if columns != width or down_proj.shape != (num_experts, width, rows // 2) or rows % 2:
        raise ValueError(
            f"experts of gate_up_proj {tuple(gate_up_proj.shape)} and down_proj {tuple(down_proj.shape)} on tokens of "
            f"shape {tuple(hidden.shape)}: expected (E, 2I, {width}) and (E, {width}, I)"
        )
    if topk_indices.shape != topk_weights.shape or topk_indices.shape[0] != tokens:
        raise ValueError(
            f"topk_indices {tuple(topk_indices.shape)} and topk_weights {tuple(topk_weights.shape)} for {tokens} tokens"
        )
    if quantize and (gate_up_scale is None or down_scale is None):
        raise ValueError("quantize=True needs FP8 weights: plain ones are multiplied with the tokens as they are")
    blocks = [-(-size // SCALE_BLOCK) for size in (inter, width)]
    for name, weight, scale, grid in (
        ("gate_up_proj", gate_up_proj, gate_up_scale, (num_experts, 2 * blocks[0], blocks[1])),
        ("down_proj", down_proj, down_scale, (num_experts, blocks[1], blocks[0])),
    ):
        if (weight.dtype == torch.float8_e4m3fn) != (scale is not None):
            raise ValueError(f"{name} is {weight.dtype} and its scale is {'missing' if scale is None else 'given'}")
        if scale is not None and tuple(scale.shape) != grid:
            raise ValueError(f"the scale of {name} has shape {tuple(scale.shape)}, expected {grid}")
    expected = {
        "gate_up_a": (num_experts, -1, width),
        "gate_up_b": (num_experts, rows, -1),
        "down_a": (num_experts, -1, inter),
        "down_b": (num_experts, width, -1),
        "kept_hidden": (tokens, width),
        "kept_inner": (topk_indices.numel(), inter),
    }
    for name, shape in expected.items():
        tensor = getattr(lora, name)
        if tensor is not None and any(size not in (-1, actual) for size, actual in zip(shape, tensor.shape)):
            raise ValueError(f"LoRA's {name} has shape {tuple(tensor.shape)}, expected {shape} (-1: the rank)")
    for name in ("gate_up", "down"):
        if (getattr(lora, f"{name}_a") is None) != (getattr(lora, f"{name}_b") is None):
            raise ValueError(f"LoRA's {name}_a and {name}_b must be given together")


def experts(
    hidden_states: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
    lora: ExpertLora | None = None,
    quantize: bool | None = False,
    ue8m0: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """Sum over a token's choices of weight * down(silu(gate(x)) * up(x)), on kernels where there are any.

    Args:
        hidden_states: (T, H) bfloat16, float16 or float32.
        topk_indices: (T, K) integers; an id outside 0..E-1 is skipped at no cost.
        topk_weights: (T, K) floating point.
        gate_up_proj: (E, 2I, H), gate rows first: in the dtype of the tokens, or frozen float8_e4m3fn.
        down_proj: (E, H, I), likewise.
        gate_up_scale: (E, 2 * ceil(I / 128), ceil(H / 128)) float32 or float8_e8m0fnu, the gate's rows first.
        down_scale: (E, ceil(H / 128), ceil(I / 128)), likewise.
        lora: low-rank factors that go along.
        quantize: multiply FP8 weights with tokens and inner rows that were quantised in groups of 128 (W8A8; gradients
            are those of the rows as they were). `None`: where that is faster, which is on devices that multiply FP8,
            with enough tokens to be bound by arithmetic, and without a backward pass.
        ue8m0: the scales of quantised rows are powers of two.
        impl: `"triton"`, `"cpu"` (one expert after another) or `"torch"` (the definition); by the device if not given.

    Returns (T, H) in the dtype of the tokens, differentiable in tokens, routing weights, weights that are no FP8, and
    factors. On kernels, the same inputs give the same bits, and nothing waits for the device.

    Raises:
        ValueError: if shapes or dtypes do not belong together.
    """
    weights = (gate_up_proj, down_proj, gate_up_scale, down_scale)
    _check(hidden_states, topk_indices, topk_weights, weights, lora or ExpertLora(), quantize)
    if impl is None and hidden_states.device.type == "cpu":
        impl = "torch" if quantize else "cpu"
    impl = impl or ("triton" if runs_kernels(hidden_states.device) else "torch")
    tensors = (topk_weights, gate_up_proj, down_proj, *(lora.factors if lora else ()))
    if hidden_states.shape[0] == 0:
        # Nothing to do, but everything takes part in the backward pass.
        trained = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        return sum((tensor[:0].sum().to(hidden_states.dtype) for tensor in trained), hidden_states.clone())
    if impl == "torch":
        return experts_torch(hidden_states, topk_indices, topk_weights, *weights, lora, quantize, ue8m0)
    lora = lora or ExpertLora()
    if impl == "cpu":
        with_grad = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (hidden_states, *tensors)
        )
        return experts_cpu_training(hidden_states, topk_indices, topk_weights, weights, lora, with_grad)
    inputs = [tensor.contiguous() for tensor in (hidden_states, topk_weights, gate_up_proj, down_proj)]
    factors = [factor if factor is None else factor.contiguous() for factor in lora.factors]
    with_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (*inputs, *factors)
    )
    if quantize is None:
        many = tile_rows(topk_indices.numel(), gate_up_proj.shape[0], hidden_states.dtype) == 128
        quantize = many and not with_grad and gate_up_scale is not None and converts_fp8(hidden_states.device)
    scales = (_contiguous(gate_up_scale), _contiguous(down_scale))
    plan = _Plan(topk_indices.contiguous(), *scales, lora, quantize, ue8m0)
    with on_device(hidden_states):
        if with_grad:
            return _Experts.apply(*inputs, plan, *factors)
        return _forward(*inputs, factors, plan, save=False)[0]


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


# --- as a backend of Transformers' experts interface ------------------------------------------------------------------


def is_silu(act_fn) -> bool:
    """Whether an activation is the one that `experts` computes."""
    return isinstance(act_fn, torch.nn.SiLU | SiLUActivation)


def why_not_kernels(module: torch.nn.Module, device: torch.device) -> str | None:
    """What keeps the kernels from computing an experts module on `device`; `None` if nothing does.

    `module` is any class under Transformers' `use_experts_implementation`, such as those of Qwen3-MoE and Mixtral.
    """
    if not runs_kernels(device):
        return f"kernels need Triton and a CUDA device of compute capability 8.0 or more; the tokens are on {device}"
    if module.is_transposed or module.has_bias or not module.has_gate or not getattr(module, "is_concatenated", True):
        return "the weights must be stacked as (E, 2I, H), gate rows first, and (E, H, I), without biases"
    if getattr(module, "has_post_expert_norm", False):
        return "experts with a norm of their own are not supported"
    if type(module)._apply_gate.__name__ != "_default_apply_gate":
        return f"{type(module).__name__} combines gate and up in a way of its own"
    if not is_silu(module.act_fn):
        return f"the activation must be silu, not {module.act_fn}"
    fp8 = getattr(module, "fp8", None)
    if fp8 is not None and tuple(fp8.block_size) != (SCALE_BLOCK, SCALE_BLOCK):
        return f"FP8 blocks must be {SCALE_BLOCK} x {SCALE_BLOCK}, not {tuple(fp8.block_size)}"
    weights = (module.gate_up_proj, module.down_proj)
    allowed = (torch.float8_e4m3fn,) if fp8 is not None else KERNEL_DTYPES
    if any(weight.dtype not in allowed or not weight.is_contiguous() for weight in weights):
        return f"weights of dtype {weights[0].dtype}, or not contiguous"
    return None


def experts_on_kernels(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    lora: ExpertLora | None = None,
) -> torch.Tensor:
    """`experts` with the weights of an experts module for which `why_not_kernels` says nothing."""
    device, dtype = hidden_states.device.type, module.down_proj.dtype
    fp8 = getattr(module, "fp8", None)
    if fp8 is None:
        hidden_states = hidden_states.to(dtype)  # autocast leaves a float32 norm output here
    elif torch.is_autocast_enabled(device):
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
    quantize = False if fp8 is None or not fp8.dynamic else module.quantize_activations
    weights = (module.gate_up_proj, module.down_proj)
    if fp8 is None and dtype == torch.float32 and torch.is_autocast_enabled(device):
        # As autocast does with linear layers: float32 is kept for the optimiser, and not multiplied.
        hidden_states, *weights = (t.to(torch.get_autocast_dtype(device)) for t in (hidden_states, *weights))
    scales = (getattr(module, f"{name}_scale_inv", None) for name in ("gate_up_proj", "down_proj"))
    inputs = (hidden_states, topk_indices, topk_weights, *weights, *scales)
    options = {"quantize": quantize, "ue8m0": fp8 is not None and fp8.ue8m0}
    if lora is not None or not torch.compiler.is_compiling():
        run = _experts_uncompiled if torch.compiler.is_compiling() else experts
        return run(*inputs, lora=lora, **options, impl="triton")
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _experts_uncompiled(*inputs, **options, impl="triton")
    return _experts_op(*inputs, **options)


def triton_experts_forward(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    lora: ExpertLora | None = None,
) -> torch.Tensor:
    """The `"hf_moe_triton"` backend: the kernels, or an error that says what keeps them from it."""
    reason = why_not_kernels(module, hidden_states.device)
    if reason is not None:
        raise ValueError(f"the experts backend {TRITON_BACKEND_NAME!r} cannot be used: {reason}")
    return experts_on_kernels(module, hidden_states, topk_indices, topk_weights, lora)


# Opaque to torch.compile. Training under it breaks the graph here.
@torch.library.custom_op("hf_moe::experts_triton", mutates_args=())
def _experts_op(
    hidden_states: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    quantize: bool | None,
    ue8m0: bool,
) -> torch.Tensor:
    weights = (gate_up_proj, down_proj, gate_up_scale, down_scale)
    options = {"quantize": quantize, "ue8m0": ue8m0}
    return experts(hidden_states, topk_indices, topk_weights, *weights, **options, impl="triton")


@_experts_op.register_fake
def _(hidden_states, *args, **kwargs):
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


_experts_uncompiled = torch.compiler.disable(experts)

ALL_EXPERTS_FUNCTIONS.register(TRITON_BACKEND_NAME, triton_experts_forward)
