"""Expert computation on routed rows: the CPU form, and the choice of a backend per call.

Transformers' experts interface holds the backends by name; this file adds `"hf_moe"`, the default of our models, which
picks per call from device, dtype and token count. The readable definition is `Experts.forward` in `layer_experts`.

Shapes: T tokens, K choices per token, E experts, H hidden, I intermediate, N = T * K routed rows.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .op_activation import ACTIVATIONS
from .op_custom import opaque
from .op_expert_lora import ExpertLora
from .op_expert_options import SCALE_BLOCKS
from .op_experts import (
    TRITON_BACKEND_NAME,
    experts_on_kernels,
    gate_of,
    why_not_kernels,
    why_not_ours,
)
from .op_experts import experts as trained_experts
from .op_fp8 import Fp8Format, fp8_linear
from .op_linear import linear, linear_each, without_autocast

BACKEND_NAME = "hf_moe"
# Up to this many routed rows, gathering their weight matrices beats a loop with a host sync (dtypes without a
# grouped kernel on the accelerator).
_BATCHED_ROWS = 32
# Up to so many rows an expert, and so many bytes of rows, those of all experts are held side by side.
_FEW_ROWS = 16
_MAX_ROW_BYTES = 64 << 20
# In bfloat16 so many neighbouring experts of few rows are one product: with 4 rows each and 1.5 MB of weights, 65 us an
# expert instead of 130. The sizes are few because oneDNN takes half a millisecond for every new one. With fewer rows an
# expert than these on the mean, they are faster one after another: by 14 % with one row, by 5 % with two.
_NEIGHBOURS = (32, 16, 8, 4)
_NEIGHBOUR_ROWS = 2.5
# So many experts share the calls between their products.
_EXPERTS_AT_ONCE = 32
# Elements of the rows that are summed at a time: they stay in the processor's cache.
_SUMMED = 1 << 19
# Small stacks are multiplied whole: measured with 8 experts of 64 x 192 in bfloat16, 76 instead of 173 us for 3 tokens,
# 121 instead of 800 us for 16. Elements of such a stack; and its products for all tokens.
_WHOLE_STACK_ELEMENTS, _WHOLE_STACK_PRODUCTS = 1 << 19, 1 << 24
# How many experts there may be for each choice of a token: the others are computed for nothing.
_WHOLE_STACK_EXPERTS = 2


@dataclass(frozen=True)
class Fp8Experts:
    """What FP8 experts have beside their stacks.

    Attributes:
        gate_up_scale: (E, 2 ceil(I / rows), ceil(H / cols)), the gate's first.
        down_scale: (E, ceil(H / rows), ceil(I / cols)).
        format: block size and kind of scales.
        quantize: whether activations are quantised before each product.
    """

    gate_up_scale: torch.Tensor
    down_scale: torch.Tensor
    format: Fp8Format
    quantize: bool = False


def experts_cpu(
    hidden_states: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    act_fn,
    fp8: "Fp8Experts | None" = None,
) -> torch.Tensor:
    """Routed experts on the CPU, for inference: each touched expert's weights are read once, none are copied; FP8 ones
    are decoded piece by piece. Activations that have parameters, which no form of `op_activation` is, are trained with
    it, too.

    Args:
        hidden_states: (T, H).
        topk_indices: (T, K) int64; ids of E and above belong to another rank and contribute nothing.
        topk_weights: (T, K).
        gate_up_proj: (E, 2I, H), gate rows first.
        down_proj: (E, H, I).
        act_fn: activation of the gate half.
        fp8: scales and format of FP8 weights; they are frozen.

    Returns (T, H) in the dtype of `hidden_states`; the weighted sum over choices is taken in float32.
    """
    num_tokens, top_k = topk_indices.shape
    num_experts = gate_up_proj.shape[0]
    inputs = (hidden_states, topk_weights, gate_up_proj, down_proj)
    with_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if fp8 is None and not with_grad and _takes_whole_stack(topk_indices, gate_up_proj, down_proj):
        return _experts_whole_stack(hidden_states, topk_indices, topk_weights, gate_up_proj, down_proj, act_fn)
    if num_tokens == 1 and not with_grad:
        return _experts_one_token(hidden_states, topk_indices, topk_weights, gate_up_proj, down_proj, act_fn, fp8)
    row_bytes = num_tokens * top_k * 4 * hidden_states.shape[1]
    if not with_grad and num_tokens * top_k <= _FEW_ROWS * num_experts and row_bytes <= _MAX_ROW_BYTES:
        return _experts_gathered(hidden_states, topk_indices, topk_weights, gate_up_proj, down_proj, act_fn, fp8)
    if torch.is_grad_enabled() and (gate_up_proj.requires_grad or down_proj.requires_grad):
        # Indexing would give every touched expert a gradient of the size of the whole stack.
        gate_up, down = gate_up_proj.unbind(0), down_proj.unbind(0)
    else:
        gate_up, down = gate_up_proj, down_proj

    expert_ids = topk_indices.flatten()  # (N,)
    order = expert_ids.argsort(stable=True)  # rows of one expert become neighbours
    counts = torch.bincount(expert_ids, minlength=num_experts)[:num_experts].tolist()
    output = _zero_sums(hidden_states)
    weights = topk_weights.flatten().index_select(0, order).to(output.dtype).unsqueeze(1)  # (N, 1)
    tokens = order // top_k  # (N,)
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        token = tokens[start : start + count]
        rows = _expert(hidden_states.index_select(0, token), gate_up, down, expert, act_fn, fp8)  # (count, H)
        output.index_add_(0, token, (rows * weights[start : start + count]).to(output.dtype))
        start += count
    if start == 0:  # no row has its expert here: an empty product keeps the gradient path
        output = output + _expert(hidden_states[:0], gate_up, down, 0, act_fn, fp8).sum()
    return output.to(hidden_states.dtype)


def _expert(rows, gate_up, down, expert: int, act_fn, fp8: "Fp8Experts | None") -> torch.Tensor:
    """One expert on (count, H) rows: (count, H), not yet weighted."""
    if fp8 is None:
        gate, up = linear(rows, gate_up[expert]).chunk(2, dim=-1)  # (count, I) each
        return linear(act_fn(gate) * up, down[expert])
    gate_up_scale, down_scale = fp8.gate_up_scale[expert], fp8.down_scale[expert]
    gate_up = fp8_linear(rows, gate_up[expert], gate_up_scale, fp8.format, parts=2, quantize=fp8.quantize)
    gate, up = gate_up.chunk(2, dim=-1)
    return fp8_linear(act_fn(gate) * up, down[expert], down_scale, fp8.format, quantize=fp8.quantize)


def _experts_one_token(
    hidden_states, topk_indices, topk_weights, gate_up_proj, down_proj, act_fn, fp8: "Fp8Experts | None"
) -> torch.Tensor:
    """`experts_cpu` for one token without gradients: nothing to sort, and as few calls as there can be."""
    ids = topk_indices[0].tolist()
    places = [place for place, expert in enumerate(ids) if expert < gate_up_proj.shape[0]]
    if not places:
        return torch.zeros_like(hidden_states)
    experts, sizes = [ids[place] for place in places], [1] * len(places)
    gate_up = _products(hidden_states.expand(len(places), -1), sizes, gate_up_proj, experts, fp8, 2)
    gate, up = gate_up.chunk(2, dim=-1)  # (n, I) each
    rows = _products(act_fn(gate) * up, sizes, down_proj, experts, fp8, 1)
    if len(places) < len(ids):
        topk_weights = topk_weights.index_select(1, torch.tensor(places, device=topk_weights.device))
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    with without_autocast(rows.device.type):
        return (topk_weights.to(wide) @ rows.to(wide)).to(hidden_states.dtype)


def _experts_gathered(
    hidden_states, topk_indices, topk_weights, gate_up_proj, down_proj, act_fn, fp8: "Fp8Experts | None"
) -> torch.Tensor:
    """`experts_cpu` without gradients for as many rows as may stand side by side: gathered, multiplied with few calls
    between the products, and summed."""
    top_k, num_experts = topk_indices.shape[1], gate_up_proj.shape[0]
    ids, order = topk_indices.flatten().sort(stable=True)  # the rows of one expert side by side
    counts = Counter(ids.tolist())  # as ordered as the ids
    experts = [expert for expert in counts if expert < num_experts]
    sizes = [counts[expert] for expert in experts]
    order = order[: sum(sizes)]
    hidden_rows = hidden_states.index_select(0, order // top_k)
    # A last row of zeros is what an expert of another rank contributes.
    rows = hidden_states.new_empty(len(order) + 1, hidden_states.shape[1])
    rows[-1] = 0.0
    many = len(order) >= _NEIGHBOUR_ROWS * len(experts)
    batched = fp8 is None and gate_up_proj.dtype == torch.bfloat16 and many
    start = 0
    for piece, neighbours in _pieces_of_experts(experts, sizes, batched):
        some, some_sizes = experts[piece], sizes[piece]
        stop = start + sum(some_sizes)
        if neighbours:
            stacks = (stack[some[0] : some[-1] + 1] for stack in (gate_up_proj, down_proj))
            rows[start:stop] = _neighbours(hidden_rows[start:stop], some_sizes, *stacks, act_fn)
        else:
            gate_up = _products(hidden_rows[start:stop], some_sizes, gate_up_proj, some, fp8, 2)
            gate, up = gate_up.chunk(2, dim=-1)
            rows[start:stop] = _products(act_fn(gate) * up, some_sizes, down_proj, some, fp8, 1)
        start = stop
    return _sum_rows(rows, order, topk_weights)


def _products(rows, sizes: list[int], stack, experts: list[int], fp8: "Fp8Experts | None", parts: int) -> torch.Tensor:
    """Each of some experts' matrices in `stack` times the next `sizes` of the rows, one after another."""
    if fp8 is None:
        return linear_each(rows, sizes, stack, experts)
    scale = fp8.gate_up_scale if parts == 2 else fp8.down_scale
    options = {"fp8": fp8.format, "parts": parts, "quantize": fp8.quantize}
    pairs = zip(rows.split(sizes), experts)
    return torch.cat([fp8_linear(own, stack[expert], scale[expert], **options) for own, expert in pairs])


def _sum_rows(rows: torch.Tensor, order: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum over the choices of each token: `rows` holds those in `order` of the T * K, and a last one for
    all others. (T, H)."""
    (num_tokens, top_k), width = topk_weights.shape, rows.shape[1]
    wide = torch.promote_types(rows.dtype, torch.float32)
    places = order.new_full((num_tokens * top_k,), len(order))
    places[order] = torch.arange(len(order), device=order.device)
    output, weights = rows.new_empty(num_tokens, width), topk_weights.to(wide).unsqueeze(1)
    step = max(1, _SUMMED // (top_k * width))
    for start in range(0, num_tokens, step):
        some = weights[start : start + step]  # (step, 1, K)
        chosen = rows.index_select(0, places[start * top_k :][: len(some) * top_k])
        with without_autocast(rows.device.type):
            output[start : start + step] = torch.bmm(some, chosen.to(wide).view(len(some), top_k, width)).squeeze(1)
    return output


def _pieces_of_experts(experts: list[int], sizes: list[int], batched: bool) -> Iterator[tuple[slice, bool]]:
    """What of the experts with rows is computed together, in order: a slice of them, and whether it is one product
    since they are neighbours; only where `batched`.

    One with more than twice `_FEW_ROWS` rows goes by itself: its neighbours would be padded to as many."""
    first = place = 0
    while place < len(experts):
        run = place
        while (
            batched
            and run < len(experts)
            and run - place < _NEIGHBOURS[0]
            and experts[run] - experts[place] == run - place
            and sizes[run] <= 2 * _FEW_ROWS
        ):
            run += 1
        size = next((size for size in _NEIGHBOURS if size <= run - place), 0)
        if place > first and (size or place - first == _EXPERTS_AT_ONCE):
            yield slice(first, place), False
            first = place
        if size:
            yield slice(place, place + size), True
            first = place + size
        place += size or 1
    if place > first:
        yield slice(first, place), False


def _neighbours(rows, sizes: list[int], gate_up, down, act_fn) -> torch.Tensor:
    """Experts `gate_up` (n, 2I, H) and `down` (n, H, I) on their (N, H) rows, of which each has the next `sizes`.

    One product for all: each has as many rows as the largest, of which the last are repeated."""
    most, sizes = max(sizes), torch.tensor(sizes).unsqueeze(1)  # (n, 1)
    column = torch.arange(most)
    own = column < sizes  # (n, most)
    places = sizes.cumsum(0) - sizes + column.minimum(sizes - 1)
    rows = rows.index_select(0, places.flatten()).unflatten(0, places.shape)  # (n, most, H)
    gate, up = torch.bmm(rows, gate_up.transpose(1, 2)).chunk(2, dim=-1)
    return torch.bmm(act_fn(gate) * up, down.transpose(1, 2))[own]


def _takes_whole_stack(topk_indices: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> bool:
    elements = gate_up_proj.numel() + down_proj.numel()
    small = elements <= _WHOLE_STACK_ELEMENTS and elements * topk_indices.shape[0] <= _WHOLE_STACK_PRODUCTS
    return small and gate_up_proj.shape[0] <= _WHOLE_STACK_EXPERTS * topk_indices.numel()


def _experts_whole_stack(hidden_states, topk_indices, topk_weights, gate_up_proj, down_proj, act_fn) -> torch.Tensor:
    """`experts_cpu` for small stacks, without gradients: every expert on every token, in two products."""
    num_tokens, num_experts = hidden_states.shape[0], gate_up_proj.shape[0]
    gate_up = linear(hidden_states, gate_up_proj.flatten(0, 1)).view(num_tokens, num_experts, 2, -1)
    gate, up = gate_up.unbind(2)  # (T, E, I) each
    rows = torch.bmm(down_proj, (act_fn(gate) * up).permute(1, 2, 0))  # (E, H, T)
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    # One column more, for the ids of other ranks.
    weights = topk_weights.new_zeros((num_tokens, num_experts + 1), dtype=wide)
    weights.scatter_add_(1, topk_indices.clamp(max=num_experts), topk_weights.to(wide))
    weights = weights[:, :num_experts].t().unsqueeze(1)  # (E, 1, T)
    # A weight of zero does not undo what is no number in an expert that was not chosen.
    rows = (rows.to(wide) * weights).masked_fill(weights == 0, 0.0).sum(0)  # (H, T)
    return rows.t().to(hidden_states.dtype).contiguous()


def _zero_sums(hidden_states: torch.Tensor) -> torch.Tensor:
    """Where the weighted outputs are summed: float32, or float64 for a float64 model."""
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    return hidden_states.new_zeros(hidden_states.shape, dtype=wide)


# Opaque to torch.compile: the loop depends on the routing. Inference only.
@opaque("experts_cpu")
def _experts_cpu_op(
    hidden_states: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    activation: str,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    block_size: list[int],
    quantize: bool,
    ue8m0: bool,
) -> torch.Tensor:
    fp8 = None
    if gate_up_scale is not None:
        fp8 = Fp8Experts(gate_up_scale, down_scale, Fp8Format(tuple(block_size), ue8m0), quantize)
    act_fn = ACTIVATIONS[activation].value
    return experts_cpu(hidden_states, topk_indices, topk_weights, gate_up_proj, down_proj, act_fn, fp8)


@_experts_cpu_op.register_fake
def _(hidden_states, *args):
    return torch.empty_like(hidden_states)


def choose_backend(device: torch.device, dtype: torch.dtype, num_rows: int) -> str:
    """Name of the backend for `num_rows` = T * K routed rows: `"cpu"`, `"grouped_mm"` or `"batched_mm"`.

    A plain function of device, dtype and row count. On accelerators the grouped kernel takes bfloat16 without a host
    sync; other dtypes gather weights while the rows are few.
    """
    if device.type == "cpu":
        return "cpu"
    if device.type == "meta" or (dtype != torch.bfloat16 and num_rows <= _BATCHED_ROWS):
        return "batched_mm"
    return "grouped_mm"


def experts_forward(
    experts: torch.nn.Module,
    hidden_states: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    lora: ExpertLora | None = None,
) -> torch.Tensor:
    """The `"hf_moe"` backend of the experts interface.

    `experts` holds `gate_up_proj` (E, 2I, H), `down_proj` (E, H, I) and `act_fn`; the other arguments and the result
    are those of `experts_cpu`. On CUDA they run on the kernels of `op_experts` if these can compute them; else, and for
    experts of another layout or gate (`why_not_ours`), in `grouped_mm` or `batched_mm`. `lora`, for our `Experts`
    only, goes along inside the products.
    """
    if hidden_states.is_cuda and why_not_kernels(experts, hidden_states.device) is None:
        return experts_on_kernels(experts, hidden_states, topk_indices, topk_weights, lora)
    inputs, gate = (hidden_states, topk_indices, topk_weights), gate_of(experts)
    if getattr(experts, "fp8", None) is not None or lora is not None:
        return _our_experts_forward(experts, *inputs, gate, lora)
    backend = choose_backend(hidden_states.device, experts.down_proj.dtype, topk_indices.numel())
    if backend == "cpu":
        if why_not_ours(experts, gate) is None and not _has_no_form(*gate):
            return _our_experts_forward(experts, *inputs, gate)
        backend = "grouped_mm"
    return ALL_EXPERTS_FUNCTIONS[backend](experts, *inputs)


def _has_no_form(form: str | None, limit: float) -> bool:
    """Whether nothing here computes a gate: activations that have no form are called one by one, in no graph and
    without limits."""
    return form is None and (limit != 0 or torch.compiler.is_compiling())


def _our_experts_forward(
    experts, hidden_states, topk_indices, topk_weights, gate: tuple, lora: ExpertLora | None = None
) -> torch.Tensor:
    """Experts of our layout in the forms for the CPU, of which those for FP8 and for LoRA run anywhere."""
    fp8, device = getattr(experts, "fp8", None), hidden_states.device.type
    if device == "meta":
        return torch.empty_like(hidden_states)
    form, limit = gate
    weights = (experts.gate_up_proj, experts.down_proj)
    in_one_form = lora is not None or limit or _takes_gradient(hidden_states, topk_weights, *weights)
    if torch.is_autocast_enabled(device) and (fp8 is not None or in_one_form):
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
    elif fp8 is None:
        hidden_states = hidden_states.to(experts.down_proj.dtype)  # autocast leaves a float32 norm output here
    scales = (None, None) if fp8 is None else (experts.gate_up_proj_scale_inv, experts.down_proj_scale_inv)
    quantize = fp8 is not None and experts.quantizes(hidden_states)
    inputs = (hidden_states, topk_indices, topk_weights, *weights)
    if form is None:
        if lora is not None:
            return experts.define(hidden_states, topk_indices, topk_weights, lora)
        if torch.compiler.is_compiling():
            raise ValueError(f"FP8 experts with the activation {experts.act_fn} cannot be part of a compiled graph")
    elif in_one_form:
        ue8m0, block_size = (False, SCALE_BLOCKS) if fp8 is None else (fp8.ue8m0, fp8.block_size)
        options = {"quantize": quantize, "ue8m0": ue8m0, "activation": form, "limit": limit}
        return trained_experts(*inputs, *scales, lora, **options, block_size=block_size, impl="cpu")
    if not torch.compiler.is_compiling():
        return experts_cpu(*inputs, experts.act_fn, None if fp8 is None else Fp8Experts(*scales, fp8, quantize))
    block_size, ue8m0 = ([], False) if fp8 is None else (list(fp8.block_size), fp8.ue8m0)
    return _experts_cpu_op(*inputs, form, *scales, block_size, quantize, ue8m0)


def _takes_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class LoraBackends:
    """Transformers' experts interface, of which every backend takes `lora` beside its arguments.

    `"eager"` and ours know it. A call with `lora` to any other, which multiplies plain weights only, is computed by
    `"hf_moe"` instead: the values are the same, and no weight is added up.
    """

    ours = (None, "eager", BACKEND_NAME, TRITON_BACKEND_NAME)

    def get_interface(self, name: str | None, default: Callable) -> Callable:
        backend = ALL_EXPERTS_FUNCTIONS.get_interface(name, default)

        def forward(experts, *args, lora: ExpertLora | None = None, **kwargs):
            lora = experts.local_lora if lora is None else lora
            if lora is None:
                return backend(experts, *args, **kwargs)
            return (backend if name in self.ours else experts_forward)(experts, *args, lora=lora, **kwargs)

        return forward


ALL_EXPERTS_FUNCTIONS.register(BACKEND_NAME, experts_forward)
