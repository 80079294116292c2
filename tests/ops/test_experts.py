"""Every experts backend against a double loop over tokens and choices in float64: outputs and all gradients."""

import pytest
import torch
from testing import assert_close
from tiny import tiny_config
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe.models import op_moe
from hf_moe.models.layer_experts import Experts
from hf_moe.models.op_moe import BACKEND_NAME, choose_backend, experts_cpu

BACKENDS = ["eager", BACKEND_NAME, "grouped_mm", "batched_mm"]
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
EXPERTS, TOP_K = 8, 3


def make_experts(backend: str, dtype: torch.dtype = torch.float32, **overrides) -> Experts:
    config = tiny_config(n_routed_experts=EXPERTS, n_group=1, topk_group=1, num_experts_per_tok=TOP_K, **overrides)
    config._experts_implementation = backend
    experts = Experts(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return experts.to(dtype)


def route(case: str) -> torch.Tensor:
    """(T, K) expert ids without repetition inside a token."""
    tokens = {"one_token": 1, "all_experts": 30, "odd_tokens": 63, "empty_experts": 17, "all_on_one": 9}[case]
    if case == "all_on_one":  # one choice per token, everyone takes expert 5
        return torch.full((tokens, 1), 5)
    pool = torch.tensor([0, 2, 3, 6]) if case == "empty_experts" else torch.arange(EXPERTS)
    chosen = [pool[torch.randperm(len(pool))[:TOP_K]] for _ in range(tokens)]
    if case == "all_experts":
        chosen[:3] = torch.arange(9).remainder(EXPERTS).view(3, 3)
    return torch.stack(chosen)


def double_loop(hidden_states, topk_indices, topk_weights, gate_up_proj, down_proj) -> torch.Tensor:
    """The definition, one token and one choice at a time. Ids beyond the experts contribute nothing."""
    rows = []
    for token in range(topk_indices.shape[0]):
        row = torch.zeros_like(hidden_states[token])
        for choice in range(topk_indices.shape[1]):
            expert = int(topk_indices[token, choice])
            if expert >= gate_up_proj.shape[0]:
                continue
            gate, up = (gate_up_proj[expert] @ hidden_states[token]).chunk(2)
            inner = gate / (1 + torch.exp(-gate)) * up
            row = row + topk_weights[token, choice] * (down_proj[expert] @ inner)
        rows.append(row)
    return torch.stack(rows)


def run_with_gradients(function, inputs: dict, seed_grad: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    output = function(**leaves)
    output.backward(seed_grad.to(output.dtype))
    return {"output": output, **{f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}}


def call(experts, topk_indices):
    def function(hidden_states, topk_weights, gate_up_proj, down_proj):
        parameters = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
        return torch.func.functional_call(experts, parameters, (hidden_states, topk_indices, topk_weights))

    return function


def compare(experts, topk_indices, dtype, weights=None):
    tokens, choices = topk_indices.shape
    inputs = {
        "hidden_states": torch.randn(tokens, experts.hidden_dim).to(dtype),
        "topk_weights": torch.rand(tokens, choices) + 0.2 if weights is None else weights,
        "gate_up_proj": experts.gate_up_proj,
        "down_proj": experts.down_proj,
    }
    seed_grad = torch.randn(tokens, experts.hidden_dim)
    reference = run_with_gradients(
        lambda **leaves: double_loop(topk_indices=topk_indices, **leaves),
        {name: tensor.double() for name, tensor in inputs.items()},
        seed_grad,
    )
    result = run_with_gradients(call(experts, topk_indices), inputs, seed_grad)
    # The weight of a sentinel is a constant 0: what gradient a native backend leaves there goes nowhere.
    elsewhere = topk_indices >= EXPERTS
    if experts.config._experts_implementation != BACKEND_NAME:
        result["gradient of topk_weights"].masked_fill_(elsewhere, 0.0)
    fmt = str(dtype).removeprefix("torch.")
    for name, expected in reference.items():
        if dtype == torch.bfloat16 and experts.config._experts_implementation == BACKEND_NAME:
            assert_close(name, result[name], expected, "bfloat16_experts")
        else:
            is_gradient = dtype == torch.bfloat16 and name.startswith("gradient")
            assert_close(name, result[name], expected, "bfloat16_grad" if is_gradient else fmt)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["one_token", "all_experts", "odd_tokens", "empty_experts", "all_on_one"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients(backend, case, dtype):
    compare(make_experts(backend, dtype), route(case), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_experts_that_nobody_chose_leave_no_trace(tokens, dtype):
    experts = make_experts(BACKEND_NAME, dtype)
    topk_indices = torch.stack([torch.randperm(EXPERTS - 1)[:TOP_K] for _ in range(tokens)])
    call = (torch.randn(tokens, experts.hidden_dim).to(dtype), topk_indices, torch.rand(tokens, TOP_K))
    with torch.no_grad():
        expected = experts(*call)
        experts.gate_up_proj[-1], experts.down_proj[-1] = float("nan"), float("inf")
        assert torch.equal(experts(*call), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sentinels", [False, True], ids=["all_local", "some_elsewhere"])
@pytest.mark.parametrize("case", ["one_token", "all_experts", "odd_tokens", "empty_experts", "all_on_one"])
@pytest.mark.parametrize("backend", [*BACKENDS, "hf_moe_by_expert"])
def test_inference(backend, case, sentinels, dtype, poisoned, monkeypatch):
    """Without gradients a backend may take another path, for one token above all, and for stacks as small as these."""
    if backend == "hf_moe_by_expert":
        backend = BACKEND_NAME
        monkeypatch.setattr(op_moe, "_WHOLE_STACK_ELEMENTS", 0)
    experts, topk_indices = make_experts(backend, dtype), route(case)
    weights = torch.rand(topk_indices.shape) + 0.2
    if sentinels:
        experts._is_expert_parallel = True
        topk_indices[:, 0] = EXPERTS
        weights[:, 0] = 0.0
    hidden_states = torch.randn(len(topk_indices), experts.hidden_dim).to(dtype)
    with torch.no_grad():
        output = experts(hidden_states, topk_indices, weights)
    assert output.dtype == dtype
    expected = double_loop(
        hidden_states.double(),
        topk_indices,
        weights.double(),
        experts.gate_up_proj.double(),
        experts.down_proj.double(),
    )
    assert_close("output", output, expected, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    experts = make_experts(backend)
    hidden_states = torch.randn(0, experts.hidden_dim, requires_grad=True)
    output = experts(hidden_states, torch.zeros(0, TOP_K, dtype=torch.long), torch.zeros(0, TOP_K))
    assert output.shape == (0, experts.hidden_dim) and output.dtype == torch.float32
    if backend != "eager":  # the definition takes no part in a backward pass without rows
        output.sum().backward()
        assert hidden_states.grad.shape == (0, experts.hidden_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_expert_parallel_sentinels(backend, dtype, poisoned):
    """Ids of `num_experts` and above are experts of another rank: weight 0, no contribution, no gradient."""
    experts = make_experts(backend, dtype)
    experts._is_expert_parallel = True
    topk_indices = route("odd_tokens")
    topk_indices[torch.rand(63, TOP_K) < 0.4] = EXPERTS
    topk_indices[4] = EXPERTS  # a token without any local expert
    weights = (torch.rand(63, TOP_K) + 0.2).masked_fill(topk_indices >= EXPERTS, 0.0)
    compare(experts, topk_indices, dtype, weights)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
def test_no_local_expert_at_all(backend):
    """A rank may have no work in a step: zeros, and a backward pass that reaches its parameters with zeros."""
    experts = make_experts(backend)
    experts._is_expert_parallel = True
    hidden_states = torch.randn(5, experts.hidden_dim, requires_grad=True)
    output = experts(hidden_states, torch.full((5, TOP_K), EXPERTS), torch.zeros(5, TOP_K))
    assert torch.equal(output, torch.zeros_like(hidden_states))
    output.sum().backward()
    assert torch.equal(hidden_states.grad, torch.zeros_like(hidden_states))
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_cpu_form_leaves_its_arguments_alone():
    experts = make_experts(BACKEND_NAME)
    hidden_states, topk_indices = torch.randn(9, experts.hidden_dim), route("odd_tokens")[:9]
    weights = torch.rand(9, TOP_K)
    copies = [tensor.clone() for tensor in (hidden_states, topk_indices, weights)]
    experts_cpu(hidden_states, topk_indices, weights, experts.gate_up_proj, experts.down_proj, experts.act_fn)
    assert all(map(torch.equal, copies, (hidden_states, topk_indices, weights)))


@pytest.mark.parametrize("batched", [False, True])
def test_experts_are_computed_once_and_in_order(batched):
    experts = [*range(3, 60), 61, 63, *range(70, 75), 80, 81, *range(90, 140)]
    sizes = [1 + 7 * expert % 40 for expert in experts]
    pieces = list(op_moe._pieces_of_experts(experts, sizes, batched))
    assert [expert for piece, _ in pieces for expert in experts[piece]] == experts
    assert any(together for _, together in pieces) == batched
    for piece, together in pieces:
        some = experts[piece]
        assert len(some) <= op_moe._EXPERTS_AT_ONCE
        if together:
            assert some == list(range(some[0], some[-1] + 1)) and len(some) in op_moe._NEIGHBOURS
            assert max(sizes[piece]) <= 2 * op_moe._FEW_ROWS


def test_permuting_tokens_permutes_the_output():
    experts = make_experts(BACKEND_NAME)
    hidden_states, topk_indices, weights = torch.randn(63, experts.hidden_dim), route("odd_tokens"), torch.rand(63, 3)
    order = torch.randperm(63)
    with torch.no_grad():
        straight = experts(hidden_states, topk_indices, weights)
        permuted = experts(hidden_states[order], topk_indices[order], weights[order])
    assert_close("permuted output", permuted, straight[order], "float32")


def test_autocast_reaches_the_experts():
    """Under autocast the norm before the experts leaves float32 states, and the weights are bfloat16."""
    experts = make_experts(BACKEND_NAME, torch.bfloat16)
    topk_indices, weights = route("odd_tokens"), torch.rand(63, TOP_K)
    hidden_states = torch.randn(63, experts.hidden_dim)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        output = experts(hidden_states, topk_indices, weights)
    expected = double_loop(
        hidden_states.double(),
        topk_indices,
        weights.double(),
        experts.gate_up_proj.double(),
        experts.down_proj.double(),
    )
    assert_close("output", output, expected, "bfloat16")


@pytest.mark.parametrize(
    "device, dtype, rows, backend",
    [
        ("cpu", torch.bfloat16, 1, "cpu"),
        ("cpu", torch.float32, 100_000, "cpu"),
        ("meta", torch.bfloat16, 8, "batched_mm"),
        ("cuda", torch.bfloat16, 8, "grouped_mm"),
        ("cuda", torch.bfloat16, 100_000, "grouped_mm"),
        ("cuda", torch.float32, 8, "batched_mm"),
        ("cuda", torch.float32, 100_000, "grouped_mm"),
    ],
)
def test_choice_of_backend(device, dtype, rows, backend):
    assert choose_backend(torch.device(device), dtype, rows) == backend


def test_backend_is_registered_and_the_default():
    from tiny import tiny_model

    assert BACKEND_NAME in ALL_EXPERTS_FUNCTIONS.valid_keys()
    assert tiny_model().config._experts_implementation == BACKEND_NAME


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_a_choice_that_is_made_twice_counts_twice(tokens):
    """Zero experts of a model whose experts are shared out send their tokens along to some expert, at no weight."""
    weights = torch.rand(tokens, 3)
    weights[:, 2] = 0.0
    ids = torch.randint(0, 4, (tokens, 1)).expand(-1, 3).contiguous()
    rows, gate_up, down = torch.randn(tokens, 8), torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    once = experts_cpu(rows, ids[:, :1], weights.sum(1, keepdim=True), gate_up, down, torch.nn.functional.silu)
    assert_close("output", experts_cpu(rows, ids, weights, gate_up, down, torch.nn.functional.silu), once, "float32")


@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize("precision", ["autocast", "float64"])
def test_sums_over_choices_are_wide(tokens, precision, monkeypatch):
    """Rows of small integers are exact in any dtype, so that nothing is rounded but the sum of three of them."""
    monkeypatch.setattr(op_moe, "_WHOLE_STACK_ELEMENTS", 0)
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randint(0, 2, (4, 6, 5), generator=generator).float()
    down = torch.randint(0, 2, (4, 5, 3), generator=generator).float()
    hidden = torch.randint(0, 2, (tokens, 5), generator=generator).float()
    ids = torch.stack([torch.randperm(4, generator=generator)[:3] for _ in range(tokens)])
    weights = torch.rand(tokens, 3, generator=generator, dtype=torch.float64)
    inner = torch.einsum("eih,th->tei", gate_up, hidden)
    rows = torch.einsum("ehi,tei->teh", down, inner[..., :3].relu() * inner[..., 3:]).double()
    assert rows.max() <= 128
    tensors = (hidden, ids, weights.float(), gate_up, down)
    if precision == "float64":
        tensors = tuple(tensor.double() for tensor in tensors)
        tensors = (tensors[0], ids, weights, *tensors[3:])
    expected = torch.einsum("tk,tkh->th", tensors[2].double(), rows.gather(1, ids[..., None].expand(-1, -1, 5)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        output = experts_cpu(*tensors, torch.nn.functional.relu)
    assert_close("output", output, expected, "float32" if precision == "autocast" else "float64")
