"""The definition of the experts against a double loop in float64; the kernels, interpreted, against the definition."""

import pytest
import torch
from expert_cases import MATRIX, Shape, double_loop, make_case, route, run_with_gradients
from testing import assert_close, can_run_kernels
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe.models import op_experts, op_experts_triton
from hf_moe.models.kernel_routing import build_layout, most_tiles
from hf_moe.models.kernel_tiles import trying
from hf_moe.models.op_activation import FUSED
from hf_moe.models.op_expert_lora import ExpertLora
from hf_moe.models.op_experts import TRITON_BACKEND_NAME, expert_weight, experts, experts_torch
from hf_moe.models.op_quant import dequantize_rows, quantize_block_fp8, quantize_rows
from hf_moe.models.op_routing import build_layout_torch
from hf_moe.models.op_routing import route as choose
from hf_moe.models.triton_compat import INTERPRETING

interpreted = pytest.mark.skipif(not (INTERPRETING and can_run_kernels()), reason="needs Triton's interpreter")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The largest shapes take the interpreter minutes, as do many experts.
SMALL = [shape for shape in MATRIX if shape.tokens * shape.top_k <= (20 if shape.experts == 256 else 400)]
FEW = [Shape(1, 8, 2), Shape(33, 4, 2), Shape(150, 3, 2), Shape(17, 8, 2, "empty"), Shape(40, 8, 3, "skipped")]


def format_of(dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}_experts"


def compare(case, impl="triton", **options):
    """Output and gradients against those of the definition, which has the same inputs and rounds nothing."""
    expected = run_with_gradients(lambda *arguments: experts_torch(*arguments, **options), case.widened())
    actual = run_with_gradients(lambda *arguments: experts(*arguments, impl=impl, **options), case)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(name, actual[name], tensor, format_of(case.hidden_states.dtype))
    return actual


# --- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MATRIX, ids=str)
def test_definition_is_the_double_loop(shape):
    case = make_case(shape, 24, 12, torch.float64)
    assert_close("output", experts(*case.arguments(), impl="torch"), double_loop(case), "float64")


@pytest.mark.parametrize("weights", ["fp8", "fp8_ue8m0"])
def test_definition_reads_blocks_of_their_own_for_gate_and_up(weights):
    """With 200 rows each, gate and up have two rows of scales each, and the second ones cover 72 rows."""
    case = make_case(Shape(5, 3, 2), 264, 200, weights=weights)
    scale = case.gate_up_scale.float()
    assert scale.shape == (3, 4, 3)
    plain = case.gate_up_proj.double()
    for row in range(400):
        for column in range(264):
            plain[:, row, column] *= scale[:, (row // 200) * 2 + row % 200 // 128, column // 128]
    down = case.down_proj.double()
    for row in range(264):
        for column in range(200):
            down[:, row, column] *= case.down_scale.float()[:, row // 128, column // 128]
    output = experts_torch(*case.arguments())
    case.gate_up_proj, case.down_proj, case.gate_up_scale, case.down_scale = plain, down, None, None
    assert_close("output", output, double_loop(case), "float32")


def test_definition_with_lora_is_that_of_merged_weights():
    case = make_case(Shape(33, 4, 2), 24, 12, torch.float64, rank=3)
    output, lora = experts_torch(*case.arguments()), case.lora
    case.gate_up_proj = case.gate_up_proj + lora.gate_up_scaling * lora.gate_up_b @ lora.gate_up_a
    case.down_proj = case.down_proj + lora.down_scaling * lora.down_b @ lora.down_a
    assert_close("output", output, double_loop(case), "float64")


# --- on the CPU -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4], ids=["plain", "lora"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*FEW, Shape(500, 16, 6, "empty")], ids=str)
def test_cpu_form(shape, dtype, rank, poisoned):
    compare(make_case(shape, 72, 40, dtype, rank=rank), "cpu")


@pytest.mark.parametrize("lora_on", [("gate_up", "down"), ("gate_up",), ("down",)], ids="+".join)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("weights", ["plain", "fp8", "fp8_ue8m0"])
def test_cpu_form_with_lora(weights, dropout, lora_on, poisoned):
    case = make_case(Shape(60, 4, 2, "skipped"), 136, 72, torch.float32, weights, 5, dropout, lora_on)
    compare(case, "cpu")
    with torch.no_grad():
        assert_close("output", experts(*case.arguments()), experts_torch(*case.arguments()), "float32")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("weights", ["plain", "fp8"])
@pytest.mark.parametrize(
    "shape", [Shape(1, 8, 2), Shape(3, 4, 2), Shape(130, 2, 1, "empty"), Shape(400, 4, 2)], ids=str
)
def test_cpu_form_with_lora_in_bfloat16(shape, weights, dropout, poisoned):
    compare(make_case(shape, 264, 136, torch.bfloat16, weights, 16, dropout), "cpu")


# --- activations ------------------------------------------------------------------------------------------------------

GATES = [*({"activation": name} for name in FUSED[1:]), {"limit": 0.75}, {"activation": "gelu_tanh", "limit": 0.25}]


def test_definition_of_a_limited_gate():
    case = make_case(Shape(9, 4, 2), 24, 12, torch.float64)
    expected = torch.zeros_like(case.hidden_states)
    for token, ids in enumerate(case.topk_indices.tolist()):
        for choice, expert in enumerate(ids):
            gate, up = (case.gate_up_proj[expert] @ case.hidden_states[token]).chunk(2)
            gate, up = gate.minimum(torch.tensor(0.5)), up.maximum(torch.tensor(-0.5)).minimum(torch.tensor(0.5))
            inner = gate / 2 * (1 + torch.erf(gate / 2**0.5)) * up
            expected[token] += case.topk_weights[token, choice] * (case.down_proj[expert] @ inner)
    output = experts(*case.arguments(), activation="gelu", limit=0.5, impl="torch")
    assert_close("output", output, expected, "float64")


@pytest.mark.parametrize("impl", ["cpu", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("weights, rank", [("plain", 4), ("fp8", 0)], ids=["plain_lora", "fp8"])
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: "-".join(map(str, gate.values())))
def test_gates(gate, weights, rank, impl, poisoned):
    hidden, inter = (136, 72) if weights == "fp8" else (40, 24)
    compare(make_case(Shape(20, 4, 2, "skipped"), hidden, inter, torch.float32, weights, rank), impl, **gate)


@interpreted
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])  # the derivatives of others jump where a sum is rounded
def test_activations_in_bfloat16(activation):
    compare(make_case(Shape(60, 3, 2), 72, 40, torch.bfloat16, "plain", 16), activation=activation)


@pytest.mark.parametrize("impl", ["cpu", pytest.param("triton", marks=interpreted)])
def test_activations_far_from_zero_are_finite(impl):
    case = make_case(Shape(3, 2, 1), 24, 16)
    case.gate_up_proj *= 1e4
    for activation in FUSED:
        compare(case, impl, activation=activation)


@pytest.mark.parametrize("impl", ["cpu", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("activation", FUSED)
def test_what_is_no_number_goes_through_the_gate(activation, impl):
    case = make_case(Shape(3, 2, 1), 24, 16)
    case.hidden_states[1, 0] = float("nan")
    output = experts(*case.arguments(), activation=activation, impl=impl)
    assert output[1].isnan().all() and output[[0, 2]].isfinite().all()


def test_what_the_kernels_do_not_know_is_an_error():
    case = make_case(Shape(3, 2, 1), 24, 16)
    with pytest.raises(ValueError, match="no activation 'swiglu'"):
        experts(*case.arguments(), activation="swiglu")
    with pytest.raises(ValueError, match="the kernels know the activations silu, .* not mish"):
        experts(*case.arguments(), activation="mish", impl="triton")


# --- routing ----------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("block_m", [16, 128])
@pytest.mark.parametrize("shape", [s for s in MATRIX if 0 < s.tokens <= 1024 and s.experts <= 16], ids=str)
def test_layout(shape, block_m, poisoned):
    ids = route(shape)
    actual, expected = build_layout(ids, shape.experts, block_m), build_layout_torch(ids, shape.experts, block_m)
    count = int(expected.num_tiles)
    assert int(actual.num_tiles) == count <= most_tiles(ids.numel(), shape.experts, block_m)
    assert torch.equal(actual.offsets, expected.offsets)
    assert torch.equal(actual.order, expected.order)
    assert torch.equal(actual.tiles[:, :count], expected.tiles[:, :count])


ROUTERS = {
    "deepseek_v3": (256, {"top_k": 8, "num_group": 8, "topk_group": 4, "factor": 2.5}),
    "deepseek_v2": (160, {"top_k": 6, "num_group": 8, "topk_group": 3, "best_two": False, "sigmoid": False}),
    "kimi_k2": (384, {"top_k": 8, "factor": 2.827}),
    "step3": (48, {"top_k": 3, "sigmoid": False}),
    "longcat": (768, {"top_k": 12, "sigmoid": False, "normalise": False, "factor": 6.0}),
    "odd": (15, {"top_k": 2, "num_group": 5, "topk_group": 2}),
}


@interpreted
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("router", ROUTERS)
def test_choice_of_experts(router, bias):
    num_experts, options = ROUTERS[router]
    logits = torch.randn(9, num_experts, requires_grad=True)
    bias = torch.randn(num_experts) * 0.1 if bias else None
    results = {impl: choose(logits, bias, impl=impl, **options) for impl in ("torch", "triton")}
    assert torch.equal(results["triton"][1], results["torch"][1])
    assert_close("weights", results["triton"][0], results["torch"][0], "float32")
    seed = torch.randn(9, options["top_k"])
    grads = {impl: torch.autograd.grad(weights, logits, seed)[0] for impl, (weights, _) in results.items()}
    assert_close("gradient of logits", grads["triton"], grads["torch"], "float32")


@interpreted
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_choice_of_experts_takes_the_first_of_equals_and_no_nan(impl):
    logits = torch.zeros(1, 8)
    logits[0, 2] = float("nan")
    _, indices = choose(logits, top_k=7, impl=impl)
    assert 2 not in indices and len(set(indices[0].tolist())) == 7
    if impl == "triton":
        assert indices[0].tolist() == [0, 1, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("options", [{"num_group": 3}, {"num_group": 4, "topk_group": 5}, {"top_k": 9}, {"top_k": 0}])
def test_impossible_choices_are_errors(options):
    with pytest.raises(ValueError, match="8"):
        choose(torch.zeros(2, 8), **({"top_k": 2} | options))


# --- kernels ----------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_forward(shape, dtype, poisoned):
    if shape.experts == 256 and dtype != torch.bfloat16:
        pytest.skip("as in bfloat16, where it takes seconds")
    case = make_case(shape, 40, 24, dtype)
    with torch.no_grad():
        output = experts(*case.arguments(), impl="triton")
    assert output.dtype == dtype
    assert_close("output", output, experts(*case.arguments(), impl="torch"), format_of(dtype))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*FEW, Shape(40, 8, 1, "one")], ids=str)
def test_gradients(shape, dtype, poisoned):
    compare(make_case(shape, 72, 40, dtype))


@interpreted
@pytest.mark.parametrize("weights", ["fp8", "fp8_ue8m0"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [Shape(3, 4, 2), Shape(130, 2, 1, "empty")], ids=str)
def test_fp8_weights(shape, dtype, weights, poisoned):
    """Sizes that are no multiples of 128: several blocks, short ones at the edges, gate and up apart."""
    compare(make_case(shape, 264, 136, dtype, weights))


@interpreted
@pytest.mark.parametrize("ue8m0", [False, True], ids=["float32_scales", "ue8m0"])
@pytest.mark.parametrize("shape", [Shape(3, 4, 2), Shape(30, 3, 2, "skipped"), Shape(130, 2, 1, "empty")], ids=str)
def test_fp8_products_of_quantised_rows(shape, ue8m0, poisoned):
    """W8A8 against float32 products of the same quantised values."""
    case = make_case(shape, 264, 136, torch.float32, "fp8_ue8m0" if ue8m0 else "fp8", rank=4)
    options = {"quantize": True, "ue8m0": ue8m0}
    results = {
        impl: run_with_gradients(lambda *args, impl=impl: experts(*args, **options, impl=impl), case)
        for impl in ("torch", "triton")
    }
    for name, expected in results["torch"].items():
        assert_close(name, results["triton"][name], expected, "fp8_experts")


@interpreted
def test_the_tile_of_two_blocks(monkeypatch):
    """What compute capability 9.0 runs with many tokens: gate and up as two sums."""
    from hf_moe.models import kernel_experts

    monkeypatch.setattr(kernel_experts, "compute_capability", lambda device: (9, 0))
    case = make_case(Shape(150, 2, 1), 264, 136, torch.float32, "fp8", rank=4)
    layout = build_layout(case.topk_indices, 2, 128)
    rows, scale = quantize_rows(case.hidden_states)
    low = torch.randn(150, 4)
    weights = (case.gate_up_proj, case.gate_up_scale)
    options = {"out_dtype": torch.float32, "low": low, "lora_b": case.lora.gate_up_b, "pre_dtype": torch.float32}
    inner, pre = kernel_experts.gate_up(rows, *weights, layout, 1, x_scale=scale, **options)
    values = dequantize_rows(rows, scale)[layout.order]
    experts_of_rows = case.topk_indices.flatten()[layout.order]
    for expert in (0, 1):
        here = experts_of_rows == expert
        expected = values[here] @ expert_weight(*weights, expert, 2).T + low[here] @ case.lora.gate_up_b[expert].T
        assert_close("gate and up", pre[here], expected, "fp8_experts")
        gate, up = expected.chunk(2, -1)
        assert_close("inner rows", inner[here], torch.nn.functional.silu(gate) * up, "fp8_experts")


@interpreted
@pytest.mark.parametrize("columns", [128, 256])
def test_row_tiles_of_one_expert_that_are_full_and_half_full(columns, monkeypatch, poisoned):
    """Expert 1 has more row tiles than go side by side, and a last one of 2 rows; a tile of 256 columns is two sums."""
    from hf_moe.models import kernel_experts

    monkeypatch.setattr(kernel_experts, "_GROUP_M", 2)
    monkeypatch.setattr(kernel_experts, "_launch_options", kernel_experts._launch_options.__wrapped__)
    ids = torch.tensor([2] * 20 + [1] * 386 + [0] * 65)[torch.randperm(471)].unsqueeze(1)
    layout = build_layout(ids, 4, 128)
    quantised = [quantize_block_fp8(torch.randn(256, 200)) for _ in range(4)]
    weight, scale = (torch.stack(parts) for parts in zip(*quantised))
    rows, x_scale = quantize_rows(torch.randn(471, 200))
    with trying(rows=lambda tile: tile._replace(block_n=columns)):
        output = kernel_experts.multiply_rows(
            rows, weight, scale, layout, 1, out_dtype=torch.float32, x_scale=x_scale, to_slots=True
        )
    values = dequantize_rows(rows, x_scale)
    for expert in range(3):
        here = ids[layout.order].flatten() == expert
        expected = values[here] @ expert_weight(weight, scale, expert).T
        assert_close(f"expert {expert}", output[layout.order[here]], expected, "fp8_experts")


def test_quantised_rows_need_fp8_weights():
    with pytest.raises(ValueError, match="FP8 weights"):
        experts(*make_case(Shape(3, 2, 1), 40, 24).arguments(), quantize=True)


@interpreted
@pytest.mark.parametrize("lora_on", [("gate_up", "down"), ("gate_up",), ("down",)], ids="+".join)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("weights", ["plain", "fp8"])
def test_lora(weights, dropout, lora_on, poisoned):
    hidden, inter = (136, 72) if weights == "fp8" else (40, 24)
    compare(make_case(Shape(20, 4, 2, "skipped"), hidden, inter, torch.float32, weights, 5, dropout, lora_on))


@interpreted
def test_lora_in_bfloat16(poisoned):
    compare(make_case(Shape(60, 3, 2), 72, 40, torch.bfloat16, "plain", 16, 0.1))


@interpreted
@pytest.mark.parametrize("weights, quantize", [("plain", False), ("fp8", False), ("fp8", True)])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_same_inputs_give_the_same_bits(rank, weights, quantize):
    case = make_case(Shape(50, 4, 2), 136, 72, torch.bfloat16, weights, rank)
    first, second = (
        run_with_gradients(lambda *args: experts(*args, quantize=quantize, impl="triton"), case) for _ in range(2)
    )
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("impl", ["cpu", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("rank", [0, 4], ids=["plain", "lora"])
@pytest.mark.parametrize("shape", [Shape(0, 8, 2), Shape(5, 8, 2, "nobody")], ids=str)
def test_every_parameter_takes_part_without_work(shape, rank, impl):
    results = run_with_gradients(lambda *args: experts(*args, impl=impl), make_case(shape, 40, 24, rank=rank))
    assert not results.pop("output").any()
    for name, grad in results.items():
        assert grad is not None and not grad.any(), name


@interpreted
def test_frozen_weights_get_no_gradient():
    case = make_case(Shape(9, 4, 2), 40, 24)
    case.hidden_states.requires_grad_()
    output = experts(*case.arguments(), impl="triton")
    output.sum().backward()
    assert case.hidden_states.grad is not None and case.gate_up_proj.grad is None and case.down_proj.grad is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"down_proj": torch.zeros(4, 40, 23)}, "down_proj"),
        ({"topk_weights": torch.zeros(9, 3)}, "topk_weights"),
        ({"gate_up_scale": torch.ones(4, 2, 1)}, "gate_up_proj is torch.float32 and its scale is given"),
        ({"gate_up_proj": torch.zeros(4, 48, 40, dtype=torch.float8_e4m3fn)}, "its scale is missing"),
        ({"lora": ExpertLora(down_a=torch.zeros(4, 3, 24))}, "down_a and down_b"),
        ({"lora": ExpertLora(gate_up_a=torch.zeros(4, 3, 24), gate_up_b=torch.zeros(4, 48, 3))}, "gate_up_a"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    case = make_case(Shape(9, 4, 2), 40, 24)
    vars(case).update(change)
    with pytest.raises(ValueError, match=message):
        experts(*case.arguments())


def test_scales_of_the_wrong_grid_are_an_error():
    case = make_case(Shape(3, 2, 1), 136, 72, weights="fp8")
    case.gate_up_scale = case.gate_up_scale[:, :1]
    with pytest.raises(ValueError, match=r"scale of gate_up_proj has shape \(2, 1, 2\), expected \(2, 2, 2\)"):
        experts(*case.arguments())


# --- as a backend -----------------------------------------------------------------------------------------------------


def other_families():
    from transformers import MixtralConfig, Qwen3MoeConfig

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
    }
    yield pytest.param(Qwen3MoeConfig(**sizes, head_dim=16, num_experts=4, moe_intermediate_size=24), id="qwen3_moe")
    yield pytest.param(MixtralConfig(**sizes, num_local_experts=4), id="mixtral")


@interpreted
@pytest.mark.parametrize("config", other_families())
def test_other_families_can_name_the_backend(config):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(0, 64, (2, 7))
    outputs = {}
    for backend in ("eager", TRITON_BACKEND_NAME):
        model.set_experts_implementation(backend)
        with torch.no_grad():
            outputs[backend] = model(tokens).logits
    assert_close("logits", outputs[TRITON_BACKEND_NAME], outputs["eager"], "float32")


@interpreted
@pytest.mark.parametrize("change", ["transposed", "activation", "float64"])
def test_the_backend_says_what_it_cannot_compute(change):
    from tiny import tiny_config

    from hf_moe.models.layer_experts import Experts

    module = Experts(tiny_config(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2))
    module.config._experts_implementation = TRITON_BACKEND_NAME
    if change == "transposed":
        module.is_transposed = True
    elif change == "activation":
        module.act_fn = torch.nn.Tanh()
    else:
        module.double()
    hidden = torch.randn(3, module.hidden_dim, dtype=module.down_proj.dtype)
    message = {"transposed": "stacked as", "activation": "one of silu, gelu", "float64": "torch.float64"}[change]
    with pytest.raises(ValueError, match=f"{TRITON_BACKEND_NAME}.*{message}"):
        module(hidden, torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))


def test_the_backend_is_registered():
    assert TRITON_BACKEND_NAME in ALL_EXPERTS_FUNCTIONS.valid_keys()


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("weights", ["plain", "fp8"])
def test_many_tokens_are_taken_in_parts(weights, quantize, monkeypatch):
    """Without gradients: as all at once, with tensors of a part's size."""
    if not can_run_kernels():
        pytest.skip("needs a GPU or Triton's interpreter")
    if quantize and weights == "plain":
        pytest.skip("FP8 weights only")
    case = make_case(Shape(50, 8, 3, "skipped"), 136, 72, torch.float32, weights, 4)
    plain, sizes = op_experts_triton.forward, []
    monkeypatch.setattr(op_experts_triton, "forward", lambda x, *a, **k: sizes.append(len(x[0])) or plain(x, *a, **k))
    with torch.no_grad():
        whole = op_experts.experts(*case.arguments(), quantize=quantize, impl="triton")
        monkeypatch.setattr(op_experts_triton, "_MAX_ROW_ELEMENTS", 20 * 3 * 136)
        parts = op_experts.experts(*case.arguments(), quantize=quantize, impl="triton")
    assert sizes == [50, 17, 17, 16]
    assert_close("output", parts, whole, "float32_experts")
