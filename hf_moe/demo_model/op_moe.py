"""Expert computation on routed rows: the CPU form, and the choice of a backend per call.

Transformers' experts interface holds the backends by name; this file adds `"hf_moe"`, the default of our models, which
picks per call from device, dtype and token count. The readable definition is `Experts.forward` in `layer_experts`.

Shapes: T tokens, K choices per token, E experts, H hidden, I intermediate, N = T * K routed rows.
"""

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .op_linear import linear

BACKEND_NAME = "hf_moe"
# Up to this many routed rows, gathering their weight matrices beats a loop with a host sync (dtypes without a
# grouped kernel on the accelerator).
_BATCHED_ROWS = 32
# Up to this many tokens the CPU form saves calls rather than memory.
_FEW_TOKENS = 8


def experts_cpu(
    hidden_states: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    act_fn,
) -> torch.Tensor:
    """Routed experts on the CPU: each touched expert's weights are read once, none are copied.

    Args:
        hidden_states: (T, H).
        topk_indices: (T, K) int64; ids of E and above belong to another rank and contribute nothing.
        topk_weights: (T, K).
        gate_up_proj: (E, 2I, H), gate rows first.
        down_proj: (E, H, I).
        act_fn: activation of the gate half.

    Returns (T, H) in the dtype of `hidden_states`; the weighted sum over choices is taken in float32.
    """
    num_tokens, top_k = topk_indices.shape
    num_experts = gate_up_proj.shape[0]
    inputs = (hidden_states, topk_weights, gate_up_proj, down_proj)
    with_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if num_tokens <= _FEW_TOKENS and not with_grad:
        return _experts_few_tokens(hidden_states, topk_indices, topk_weights, gate_up_proj, down_proj, act_fn)
    if torch.is_grad_enabled() and (gate_up_proj.requires_grad or down_proj.requires_grad):
        # Indexing would give every touched expert a gradient of the size of the whole stack.
        gate_up, down = gate_up_proj.unbind(0), down_proj.unbind(0)
    else:
        gate_up, down = gate_up_proj, down_proj

    expert_ids = topk_indices.flatten()  # (N,)
    order = expert_ids.argsort(stable=True)  # rows of one expert become neighbours
    counts = torch.bincount(expert_ids, minlength=num_experts)[:num_experts].tolist()
    tokens, weights = order // top_k, topk_weights.flatten().index_select(0, order).float().unsqueeze(1)  # (N,), (N, 1)
    output = _zero_sums(hidden_states)
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        token = tokens[start : start + count]
        gate, up = linear(hidden_states.index_select(0, token), gate_up[expert]).chunk(2, dim=-1)  # (count, I) each
        rows = linear(act_fn(gate) * up, down[expert])  # (count, H)
        output.index_add_(0, token, (rows * weights[start : start + count]).to(output.dtype))
        start += count
    if start == 0:  # no row has its expert here: an empty product keeps the gradient path
        gate, up = F.linear(hidden_states[:0], gate_up[0]).chunk(2, dim=-1)
        output = output + F.linear(act_fn(gate) * up, down[0]).sum()
    return output.to(hidden_states.dtype)


def _experts_few_tokens(hidden_states, topk_indices, topk_weights, gate_up_proj, down_proj, act_fn) -> torch.Tensor:
    """`experts_cpu` for few tokens without gradients, where every call into PyTorch counts: sorted by plain Python,
    gathered and summed by one call each."""
    top_k = topk_indices.shape[1]
    # Place 0 to N - 1 of each routed row, by expert.
    places: dict[int, list[int]] = {}
    for place, expert in enumerate(topk_indices.flatten().tolist()):
        if expert < gate_up_proj.shape[0]:
            places.setdefault(expert, []).append(place)
    if not places:
        return torch.zeros_like(hidden_states)
    order = [place for rows in places.values() for place in rows]
    rows = hidden_states
    if hidden_states.shape[0] > 1:
        rows = hidden_states.index_select(0, torch.tensor([place // top_k for place in order]))
        pieces = rows.split([len(rows) for rows in places.values()])
    else:
        pieces = [hidden_states] * len(places)
    outputs = []
    for expert, piece in zip(places, pieces):
        gate, up = linear(piece, gate_up_proj[expert]).chunk(2, dim=-1)  # (count, I) each
        outputs.append(linear(act_fn(gate) * up, down_proj[expert]))
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    outputs = torch.cat(outputs).to(wide)  # (N, H), by expert
    # A (T, N) matrix of weights, whose zeros leave out what belongs to other tokens.
    weights = topk_weights.flatten().tolist()
    combine = [[0.0] * len(order) for _ in range(hidden_states.shape[0])]
    for column, place in enumerate(order):
        combine[place // top_k][column] = weights[place]
    combine = torch.tensor(combine, dtype=wide)
    return (combine @ outputs).to(hidden_states.dtype)


def _zero_sums(hidden_states: torch.Tensor) -> torch.Tensor:
    """Where the weighted outputs are summed: float32, or float64 for a float64 model."""
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    return hidden_states.new_zeros(hidden_states.shape, dtype=wide)


# Opaque to torch.compile: the loop depends on the routing. Inference only; training under compile takes another path.
@torch.library.custom_op("hf_moe::experts_cpu", mutates_args=())
def _experts_cpu_op(
    hidden_states: torch.Tensor,
    topk_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    hidden_act: str,
) -> torch.Tensor:
    return experts_cpu(hidden_states, topk_indices, topk_weights, gate_up_proj, down_proj, ACT2FN[hidden_act])


@_experts_cpu_op.register_fake
def _(hidden_states, topk_indices, topk_weights, gate_up_proj, down_proj, hidden_act):
    return torch.empty_like(hidden_states)


def choose_backend(device: torch.device, dtype: torch.dtype, num_rows: int, compiling_with_grad: bool = False) -> str:
    """Name of the backend for `num_rows` = T * K routed rows: `"cpu"`, `"grouped_mm"` or `"batched_mm"`.

    A plain function of device, dtype and row count. On accelerators the grouped kernel takes bfloat16 without a host
    sync; other dtypes gather weights while the rows are few. `compiling_with_grad`: the CPU form cannot be traced for
    training.
    """
    if device.type == "cpu" and not compiling_with_grad:
        return "cpu"
    if device.type == "meta" or (dtype != torch.bfloat16 and num_rows <= _BATCHED_ROWS):
        return "batched_mm"
    return "grouped_mm"


def experts_forward(
    experts: torch.nn.Module, hidden_states: torch.Tensor, topk_indices: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    """The `"hf_moe"` backend of the experts interface: gated experts in the concatenated layout.

    `experts` holds `gate_up_proj` (E, 2I, H), `down_proj` (E, H, I) and `act_fn`; the other arguments and the result
    are those of `experts_cpu`. Experts of another layout (transposed, biased, ungated) go to `grouped_mm`.
    """
    plain = experts.has_gate and not experts.has_bias and not experts.is_transposed
    compiling = torch.compiler.is_compiling()
    with_grad = torch.is_grad_enabled() and (hidden_states.requires_grad or experts.down_proj.requires_grad)
    backend = choose_backend(
        hidden_states.device, experts.down_proj.dtype, topk_indices.numel(), compiling and with_grad
    )
    if backend == "cpu" and not plain:
        backend = "grouped_mm"
    if backend != "cpu":
        return ALL_EXPERTS_FUNCTIONS[backend](experts, hidden_states, topk_indices, topk_weights)
    hidden_states = hidden_states.to(experts.down_proj.dtype)  # autocast leaves a float32 norm output here
    if compiling:
        return _experts_cpu_op(
            hidden_states,
            topk_indices,
            topk_weights,
            experts.gate_up_proj,
            experts.down_proj,
            experts.config.hidden_act,
        )
    return experts_cpu(
        hidden_states, topk_indices, topk_weights, experts.gate_up_proj, experts.down_proj, experts.act_fn
    )


ALL_EXPERTS_FUNCTIONS.register(BACKEND_NAME, experts_forward)
