"""Routed experts on tensors: the definition in plain PyTorch, and the choice between the forms that compute it.

`experts` is the function to call. Weights may be frozen block FP8, and low-rank factors (LoRA) may go along: they are
applied to the rows of their expert inside the grouped products, so that no sum of weights is ever built.

Shapes: T tokens, K choices per token, E experts, H hidden, I intermediate, N = T * K slots, R rank.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .op_activation import ACTIVATIONS, FUSED, activation_form
from .op_expert_lora import ExpertLora
from .op_expert_options import SCALE_BLOCKS, ExpertOptions
from .op_experts_cpu import experts_cpu_training
from .op_experts_traced import experts_traced
from .op_experts_triton import experts_triton
from .op_quant import dequantize_rows, quantize_rows
from .triton_compat import cdiv, runs_kernels

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_BACKEND_NAME = "hf_moe_triton"
_NO_LORA = ExpertLora()


# --- the definition ---------------------------------------------------------------------------------------------------


def expert_weight(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    expert: int,
    parts: int = 1,
    block_size: tuple[int, int] = SCALE_BLOCKS,
) -> torch.Tensor:
    """One expert's matrix, FP8 expanded: (O, I) float32 then. `parts` matrices of O / parts rows are stacked in it,
    each with blocks of its own."""
    if scale is None:
        return weight[expert]
    pieces = []
    for rows, scales in zip(weight[expert].float().chunk(parts), scale[expert].float().chunk(parts)):
        wide = scales.repeat_interleave(block_size[0], 0)[: rows.shape[0]]
        pieces.append(rows * wide.repeat_interleave(block_size[1], 1)[:, : rows.shape[1]])
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
    activation: str = "silu",
    limit: float = 0.0,
    block_size: tuple[int, int] = SCALE_BLOCKS,
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
        matrix = expert_weight(gate_up_proj, gate_up_scale, expert, 2, block_size).to(wide)
        pre = F.linear(multiplied[token], matrix)  # (rows, 2I)
        if lora.gate_up_a is not None:
            low = F.linear(dropped[token], lora.gate_up_a[expert].to(wide))
            pre = pre + lora.gate_up_scaling * F.linear(low, lora.gate_up_b[expert].to(wide))
        gate, up = pre.chunk(2, dim=-1)
        if limit:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        inner = ACTIVATIONS[activation].value(gate) * up  # (rows, I)
        down = expert_weight(down_proj, down_scale, expert, 1, block_size).to(wide)
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


def _check(hidden, topk_indices, topk_weights, weights: tuple, lora: ExpertLora, options: ExpertOptions) -> None:
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
    if options.activation not in ACTIVATIONS:
        raise ValueError(f"experts have no activation {options.activation!r}: one of {', '.join(ACTIVATIONS)}")
    if options.quantize and (gate_up_scale is None or down_scale is None):
        raise ValueError("quantize=True needs FP8 weights: plain ones are multiplied with the tokens as they are")
    rows_by, columns_by = options.block_size
    for name, weight, scale, grid in (
        ("gate_up_proj", gate_up_proj, gate_up_scale, (num_experts, 2 * cdiv(inter, rows_by), cdiv(width, columns_by))),
        ("down_proj", down_proj, down_scale, (num_experts, cdiv(width, rows_by), cdiv(inter, columns_by))),
    ):
        if (weight.dtype == torch.float8_e4m3fn) != (scale is not None):
            raise ValueError(f"{name} is {weight.dtype} and its scale is {'missing' if scale is None else 'given'}")
        if scale is not None and tuple(scale.shape) != grid:
            raise ValueError(f"the scale of {name} has shape {tuple(scale.shape)}, expected {grid}")
    if lora is not _NO_LORA:
        _check_lora(lora, (topk_indices.numel(), *hidden.shape), (num_experts, rows, inter))


def _check_lora(lora: ExpertLora, rows_of: tuple[int, int, int], sizes: tuple[int, int, int]) -> None:
    (slots, tokens, width), (num_experts, rows, inter) = rows_of, sizes
    expected = {
        "gate_up_a": (num_experts, -1, width),
        "gate_up_b": (num_experts, rows, -1),
        "down_a": (num_experts, -1, inter),
        "down_b": (num_experts, width, -1),
        "kept_hidden": (tokens, width),
        "kept_inner": (slots, inter),
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
    activation: str = "silu",
    limit: float = 0.0,
    block_size: tuple[int, int] = SCALE_BLOCKS,
) -> torch.Tensor:
    """Sum over a token's choices of weight * down(activation(gate(x)) * up(x)), on kernels where there are any.

    Args:
        hidden_states: (T, H) bfloat16, float16 or float32.
        topk_indices: (T, K) integers; an id outside 0..E-1 is skipped at no cost.
        topk_weights: (T, K) floating point.
        gate_up_proj: (E, 2I, H), gate rows first: in the dtype of the tokens, or frozen float8_e4m3fn.
        down_proj: (E, H, I), likewise.
        gate_up_scale: (E, 2 * ceil(I / 128), ceil(H / 128)) float32 or float8_e8m0fnu, the gate's rows first; where
            `block_size` is another, in its rows and columns.
        down_scale: (E, ceil(H / 128), ceil(I / 128)), likewise.
        lora: low-rank factors that go along.
        quantize: multiply FP8 weights with tokens and inner rows that were quantised in groups of 128 (W8A8; gradients
            are those of the rows as they were). `None`: where that is faster, which is on devices that multiply FP8,
            with enough tokens to be bound by arithmetic, and without a backward pass.
        ue8m0: the scales of quantised rows are powers of two.
        impl: `"triton"`, `"cpu"` (one expert after another) or `"torch"` (the definition); by the device if not given.
        activation: of the gate, one of `op_activation.ACTIVATIONS`; kernels know those of `op_activation.FUSED`.
        limit: if not 0, the gate goes into the activation up to it, and its factor from minus to plus it.
        block_size: rows and columns of FP8 weights that share a scale; kernels know 128 x 128.

    Returns (T, H) in the dtype of the tokens, differentiable in tokens, routing weights, weights that are no FP8, and
    factors. On kernels, the same inputs give the same bits, and nothing waits for the device.

    Raises:
        ValueError: if shapes or dtypes do not belong together, or kernels are asked for what they do not know.
    """
    weights = (gate_up_proj, down_proj, gate_up_scale, down_scale)
    options = ExpertOptions(quantize, ue8m0, activation, float(limit), tuple(block_size))
    lora = lora or _NO_LORA
    _check(hidden_states, topk_indices, topk_weights, weights, lora, options)
    fused = activation in FUSED and (gate_up_scale is None or options.block_size == SCALE_BLOCKS)
    if impl is None and hidden_states.device.type == "cpu":
        impl = "cpu"
    impl = impl or ("triton" if fused and runs_kernels(hidden_states.device) else "torch")
    if impl == "triton" and not fused:
        raise ValueError(
            f"the kernels know the activations {', '.join(FUSED)} and FP8 blocks of 128 x 128, "
            f"not {activation} and {tuple(block_size)}"
        )
    if gate_up_scale is not None or down_scale is not None:  # frozen, whatever `model.requires_grad_(True)` has marked
        gate_up_proj, down_proj = (w.detach() if w.itemsize == 1 else w for w in (gate_up_proj, down_proj))
        weights = (gate_up_proj, down_proj, gate_up_scale, down_scale)
    tensors = (topk_weights, gate_up_proj, down_proj, *lora.factors)
    if hidden_states.shape[0] == 0:
        # Nothing to do, but everything takes part in the backward pass.
        trained = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        return sum((tensor[:0].sum().to(hidden_states.dtype) for tensor in trained), hidden_states.clone())
    if impl == "torch":
        return experts_torch(hidden_states, topk_indices, topk_weights, *weights, lora, *options)
    dtype = hidden_states.dtype
    if impl == "cpu" and hidden_states.shape[0] == 1:
        # Roundings of a single token meet in a few sums, such as one for a routing weight's gradient.
        hidden_states = hidden_states.to(torch.promote_types(dtype, torch.float32))
    inputs = (hidden_states, topk_indices, topk_weights, weights, lora)
    with_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden_states, *tensors)
    )
    if torch.compiler.is_compiling():
        return experts_traced(*inputs, options, impl, with_grad).to(dtype)
    if impl == "cpu":
        return experts_cpu_training(*inputs, options, with_grad).to(dtype)
    return experts_triton(*inputs, options)


# --- as a backend of Transformers' experts interface ------------------------------------------------------------------


# Classes of Transformers with a gate of their own that is known here: which of their attributes limits it, if one does.
_KNOWN_GATES = {
    "BeamExperts": None,  # the default one, with a word on its precision
    "DeepseekV4Experts": "limit",
    "Glm5NextTextExperts": "swiglu_limit",
    "HYV4Experts": "swiglu_limit",
}


def gate_of(module: torch.nn.Module) -> tuple[str | None, float] | None:
    """Activation, a form of `op_activation` if it is one, and limit of an experts module's gate; `None` for another."""
    kind, attribute = type(module), None
    if kind._apply_gate.__name__ != "_default_apply_gate":
        if not kind.__module__.startswith("transformers.models.") or kind.__name__ not in _KNOWN_GATES:
            return None
        attribute = _KNOWN_GATES[kind.__name__]
    limit = 0.0 if attribute is None else float(getattr(module, attribute))
    return activation_form(getattr(module, "act_fn", F.silu)), limit


def why_not_ours(module: torch.nn.Module, gate: tuple[str | None, float] | None) -> str | None:
    """What of an experts module's layout or gate keeps `experts` from computing it; `None` if nothing does.

    `module` is any class under Transformers' `use_experts_implementation`, such as those of Qwen3-MoE and Mixtral;
    `gate` is what `gate_of` says of it.
    """
    if module.is_transposed or module.has_bias or not module.has_gate or not getattr(module, "is_concatenated", True):
        return "the weights must be stacked as (E, 2I, H), gate rows first, and (E, H, I), without biases"
    if getattr(module, "has_post_expert_norm", False):
        return "experts with a norm of their own are not supported"
    if gate is None:
        return f"{type(module).__name__} combines gate and up in a way of its own"
    return None


def why_not_kernels(module: torch.nn.Module, device: torch.device) -> str | None:
    """What keeps the kernels from computing an experts module on `device`; `None` if nothing does."""
    if not runs_kernels(device):
        needed = "Triton, a C compiler and a CUDA device of compute capability 8.0 or more"
        return f"kernels need {needed}; the tokens are on {device}"
    gate = gate_of(module)
    reason = why_not_ours(module, gate)
    if reason is not None:
        return reason
    if gate[0] not in FUSED:
        return f"the activation must be one of {', '.join(FUSED)}, not {module.act_fn}"
    fp8 = getattr(module, "fp8", None)
    if fp8 is not None and tuple(fp8.block_size) != SCALE_BLOCKS:
        return f"FP8 blocks must be 128 x 128, not {tuple(fp8.block_size)}"
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
    options["activation"], options["limit"] = gate_of(module)
    return experts(*inputs, lora=lora, **options, impl="triton")


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


ALL_EXPERTS_FUNCTIONS.register(TRITON_BACKEND_NAME, triton_experts_forward)
