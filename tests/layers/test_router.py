"""Routers against a loop over single tokens in Python."""

import math

import pytest
import torch
from testing import assert_close
from tiny import tiny_config, tiny_model

from hf_moe.models.layer_router import TopkRouter
from hf_moe.models.op_routing import route

V3 = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5}
V2 = {
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
}
CASES = [
    pytest.param({**V3, "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}, id="v3"),
    pytest.param(
        {**V3, "n_routed_experts": 15, "n_group": 5, "topk_group": 2, "num_experts_per_tok": 6},
        id="v3_takes_whole_groups",
    ),
    pytest.param(
        {**V3, "n_routed_experts": 4, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2}, id="v3_groups_of_one"
    ),
    pytest.param({**V3, "n_routed_experts": 12, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 5}, id="kimi_k2"),
    pytest.param(
        {**V3, "n_routed_experts": 12, "n_group": None, "topk_group": None, "num_experts_per_tok": 1},
        id="v3_one_choice",
    ),
    pytest.param(
        {
            **V3,
            "norm_topk_prob": False,
            "n_routed_experts": 16,
            "n_group": 4,
            "topk_group": 4,
            "num_experts_per_tok": 4,
        },
        id="v3_not_normalised",
    ),
    pytest.param({**V2, "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}, id="v2"),
    pytest.param(
        {**V2, "norm_topk_prob": True, "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
        id="v2_normalised",
    ),
    pytest.param(
        {**V2, "norm_topk_prob": True, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 1},
        id="v2_normalised_one_choice",
    ),
    pytest.param(
        {
            **V2,
            "topk_method": "greedy",
            "n_routed_experts": 16,
            "n_group": 4,
            "topk_group": 1,
            "num_experts_per_tok": 6,
        },
        id="v2_greedy_ignores_groups",
    ),
]


def make_router(fields: dict, bias_shift: float = 0.0) -> TopkRouter:
    router = TopkRouter(tiny_config(**fields)).eval()
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape) * 0.4)
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.copy_(torch.randn(router.num_experts) * 0.3 + bias_shift)
    return router


def largest(values: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda i: -values[i])[:count])


def route_one_token(logits: list[float], bias: list[float], fields: dict) -> dict[int, float]:
    """`{expert: weight}` of a single token, by the published rules, in Python floats."""
    if fields["scoring_func"] == "softmax":
        total = sum(math.exp(value) for value in logits)
        scores = [math.exp(value) / total for value in logits]
    else:
        scores = [1 / (1 + math.exp(-value)) for value in logits]
    biased = [score + shift for score, shift in zip(scores, bias)]
    groups, kept = fields["n_group"] or 1, fields["topk_group"] or 1
    allowed = list(range(len(logits)))
    if fields["topk_method"] != "greedy":
        size = len(logits) // groups
        members = [list(range(group * size, (group + 1) * size)) for group in range(groups)]
        best = 2 if fields["topk_method"] == "noaux_tc" else 1
        strength = [sum(sorted((biased[e] for e in group), reverse=True)[:best]) for group in members]
        allowed = [expert for group in largest(strength, kept) for expert in members[group]]
    chosen = [allowed[i] for i in largest([biased[expert] for expert in allowed], fields["num_experts_per_tok"])]
    weights = [scores[expert] for expert in chosen]
    scale = fields["routed_scaling_factor"]
    if fields["norm_topk_prob"] and (len(chosen) > 1 or fields["scoring_func"] == "sigmoid"):
        weights = [weight / (sum(weights) + 1e-20) for weight in weights]
        if fields["scoring_func"] == "softmax":
            scale = 1.0
    return {expert: weight * scale for expert, weight in zip(chosen, weights)}


def check(router: TopkRouter, fields: dict, tokens: int = 63) -> None:
    hidden_states = torch.randn(3, tokens // 3, router.hidden_size)
    logits, weights, indices = router(hidden_states)
    assert logits.shape == (tokens, router.num_experts) and logits.dtype == torch.float32
    assert weights.shape == indices.shape == (tokens, router.top_k) and weights.dtype == torch.float32
    expected_logits = hidden_states.flatten(0, 1).double() @ router.weight.double().t()
    assert_close("router logits", logits, expected_logits, "float32")
    bias = router.e_score_correction_bias
    bias = [0.0] * router.num_experts if bias is None else bias.tolist()
    for token in range(tokens):
        expected = route_one_token(expected_logits[token].tolist(), bias, fields)
        got = dict(zip(indices[token].tolist(), weights[token].tolist()))
        assert got.keys() == expected.keys(), f"token {token} chose {sorted(got)} instead of {sorted(expected)}"
        for expert, weight in expected.items():
            assert got[expert] == pytest.approx(weight, rel=1e-5), f"token {token}, expert {expert}"
    counts = [0] * router.num_experts
    for expert in indices.flatten().tolist():
        counts[expert] += 1
    assert router.tokens_per_expert.tolist() == counts and sum(counts) == tokens * router.top_k


@pytest.mark.parametrize("fields", CASES)
def test_against_a_loop(fields):
    check(make_router(fields), fields)


@pytest.mark.parametrize("fields", CASES[:2])
def test_negative_biased_scores_never_reach_a_masked_group(fields):
    """All biased scores are negative: a mask of 0 instead of -inf would pick experts of the dropped groups."""
    router = make_router(fields, bias_shift=-3.0)
    assert router.e_score_correction_bias.max() < -1
    check(router, fields)


def test_bias_picks_but_never_weighs():
    fields = {**V3, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    router = make_router(fields)
    hidden_states = torch.randn(9, router.hidden_size)
    router.e_score_correction_bias.copy_(torch.tensor([9.0, 0, 0, 0, 0, 9.0, 0, 0]))
    logits, weights, indices = router(hidden_states)
    assert torch.equal(indices.sort(-1).values, torch.tensor([[0, 5]]).expand(9, 2))
    scores = logits.sigmoid().gather(-1, indices)
    assert_close("weights", weights, 2.5 * scores / scores.sum(-1, keepdim=True), "float32")
    router.e_score_correction_bias.add_(4.0)  # the same for all: nothing changes
    assert torch.equal(router(hidden_states)[1], weights)


def test_more_choices_than_the_groups_that_stay_hold():
    """The sizes of Transformers' own DeepSeek-V3 tester: masked experts fill up, weighed by their own scores."""
    fields = {**V3, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 8}
    router = make_router(fields)
    hidden = torch.randn(9, router.weight.shape[1])
    logits, weights, indices = router(hidden)
    assert indices.sort(-1).values.tolist() == [list(range(8))] * 9
    scores = logits.sigmoid()
    assert_close("weights", weights, (scores / scores.sum(-1, keepdim=True) * 2.5).gather(-1, indices), "float32")
    with pytest.raises(ValueError, match="there are 8 experts"):
        route(logits, None, top_k=9)


def test_gradients_flow_through_scores_not_through_choice():
    fields = {**V3, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3}
    router = make_router(fields)
    hidden_states = torch.randn(7, router.hidden_size, requires_grad=True)
    _, weights, indices = router(hidden_states)
    seed_grad = torch.randn(weights.shape)
    weights.backward(seed_grad)
    states = hidden_states.detach().double().requires_grad_()
    matrix = router.weight.detach().double().requires_grad_()
    scores = (states @ matrix.t()).sigmoid().gather(-1, indices)
    (2.5 * scores / scores.sum(-1, keepdim=True)).backward(seed_grad.double())
    assert_close("gradient of the states", hidden_states.grad, states.grad, "float32")
    assert_close("gradient of the router", router.weight.grad, matrix.grad, "float32")
    assert not router.e_score_correction_bias.requires_grad


def test_float32_whatever_the_dtype_of_the_model():
    """A bfloat16 model routes in float32: same logits as the upcast weights, and the bias keeps its digits."""
    model = tiny_model(dtype=torch.bfloat16)
    router = model.model.layers[1].mlp.gate
    assert router.weight.dtype == torch.bfloat16
    hidden_states = torch.randn(9, router.hidden_size).bfloat16()
    logits, weights, _ = router(hidden_states)
    assert logits.dtype == weights.dtype == torch.float32
    assert_close("router logits", logits, hidden_states.double() @ router.weight.double().t(), "float32")


@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash"])
@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)])
def test_casts_leave_the_correction_bias(cast, family):
    """As `from_pretrained` with a dtype: a rounded bias picks other experts."""
    model = tiny_model(family)
    name = next(name for name, _ in model.named_buffers() if name.endswith("e_score_correction_bias"))
    exact = model.get_buffer(name).clone()
    model = cast(model)
    assert model.lm_head.weight.itemsize == 2
    assert model.get_buffer(name).dtype == torch.float32 and torch.equal(model.get_buffer(name), exact)
    wide = model.double().get_buffer(name)
    assert wide.dtype == torch.float64 and torch.equal(wide.float(), exact)


def test_no_statistics_before_the_first_pass():
    assert make_router(CASES[0].values[0]).tokens_per_expert is None


def test_statistics_are_of_the_last_pass():
    router = make_router(CASES[0].values[0])
    router(torch.randn(50, router.hidden_size))
    router(torch.randn(2, router.hidden_size))
    assert router.tokens_per_expert.sum() == 2 * router.top_k
    router(torch.randn(0, router.hidden_size))
    assert router.tokens_per_expert.sum() == 0


def test_statistics_of_a_long_prompt_take_two_bytes_a_choice():
    router = make_router(CASES[0].values[0]).eval()
    mask = torch.arange(5000) % 3 > 0
    _, _, indices = router(torch.randn(5000, router.hidden_size), mask)
    kept = [
        tensor for tensor in vars(router).values() if isinstance(tensor, torch.Tensor) and tensor.shape == indices.shape
    ]
    assert [tensor.dtype for tensor in kept] == [torch.int16]
    assert router.tokens_per_expert.tolist() == [(indices[mask] == e).sum() for e in range(router.num_experts)]
