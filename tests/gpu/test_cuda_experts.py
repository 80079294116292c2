"""The experts' kernels on a GPU against the definition: the matrix of shapes, gradients, FP8, LoRA, CUDA graphs."""

import pytest
import torch
from expert_cases import MATRIX, Shape, make_case, route, run_with_gradients
from testing import assert_close
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config
from hf_moe.models.kernel_routing import build_layout
from hf_moe.models.layer_experts import Experts
from hf_moe.models.op_experts import TRITON_BACKEND_NAME, experts, experts_torch
from hf_moe.models.op_routing import build_layout_torch
from hf_moe.models.op_routing import route as choose
from hf_moe.models.triton_compat import converts_fp8, runs_kernels

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(torch.cuda.is_available() and not runs_kernels(CUDA), reason="needs Triton"),
]
fp8_device = pytest.mark.skipif(
    torch.cuda.is_available() and not converts_fp8(CUDA), reason="needs compute capability 8.9"
)
MANY = [Shape(1, 8, 2), Shape(63, 16, 6), Shape(1000, 16, 8, "skipped"), Shape(2048, 8, 6)]


def format_of(dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}_experts"


def compare(case, fmt=None, **options):
    case = case.to("cuda")
    expected = run_with_gradients(lambda *args: experts(*args, **options, impl="torch"), case.widened())
    actual = run_with_gradients(lambda *args: experts(*args, **options, impl="triton"), case)
    for name, tensor in expected.items():
        form = fmt or format_of(case.hidden_states.dtype)
        assert_close(name, actual[name].cpu(), tensor.cpu(), form)
    return actual


@pytest.mark.parametrize("shape", MATRIX, ids=str)
def test_forward_matrix_in_bfloat16(shape, poisoned):
    case = make_case(shape, 512, 256, torch.bfloat16).to("cuda")
    with torch.no_grad():
        output = experts(*case.arguments(), impl="triton")
        assert_close("output", output, experts_torch(*case.arguments()), "bfloat16_experts")


@pytest.mark.parametrize("weights", ["fp8", "fp8_ue8m0"])
@pytest.mark.parametrize("shape", MATRIX, ids=str)
def test_forward_matrix_in_fp8(shape, weights, poisoned):
    case = make_case(shape, 520, 264, torch.bfloat16, weights).to("cuda")
    with torch.no_grad():
        output = experts(*case.arguments(), impl="triton")
        assert_close("output", output, experts_torch(*case.arguments()), "fp8_experts")


@fp8_device
@pytest.mark.parametrize("size", [(512, 256), (520, 264)], ids=str)
@pytest.mark.parametrize("shape", MANY, ids=str)
def test_quantised_rows(shape, size, poisoned):
    """bfloat16 inner rows differ in their last bit, and may then round to the neighbouring FP8 value."""
    case = make_case(shape, *size, torch.bfloat16, "fp8").to("cuda")
    with torch.no_grad():
        output = experts(*case.arguments(), quantize=True, impl="triton")
        expected = experts_torch(*case.arguments(), quantize=True)
    assert_close("output", output, expected, "fp8_experts")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", MANY, ids=str)
def test_forward_in_other_dtypes(shape, dtype, poisoned):
    case = make_case(shape, 512, 256, dtype).to("cuda")
    with torch.no_grad():
        output = experts(*case.arguments(), impl="triton")
        assert_close("output", output, experts_torch(*case.arguments()), format_of(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", MANY, ids=str)
def test_gradients(shape, dtype, poisoned):
    compare(make_case(shape, 256, 136, dtype))


@pytest.mark.parametrize("shape", MANY[:3], ids=str)
def test_gradients_through_fp8(shape, poisoned):
    compare(make_case(shape, 264, 136, torch.bfloat16, "fp8"))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("weights", ["plain", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora(dtype, weights, dropout, poisoned):
    compare(make_case(Shape(700, 8, 2, "skipped"), 264, 136, dtype, weights, 16, dropout))


@pytest.mark.parametrize(
    "weights, rank, quantize",
    [("plain", 0, False), ("plain", 16, False), ("fp8", 16, False), pytest.param("fp8", 0, True, marks=fp8_device)],
)
def test_the_same_inputs_give_the_same_bits(weights, rank, quantize):
    case = make_case(Shape(2048, 16, 8), 1024, 512, torch.bfloat16, weights, rank).to("cuda")
    run = lambda *args: experts(*args, quantize=quantize, impl="triton")  # noqa: E731
    results = [run_with_gradients(run, case) for _ in range(5)]
    for name, tensor in results[0].items():
        assert all(torch.equal(tensor, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("shape", [Shape(1, 256, 8), Shape(8192, 256, 1), Shape(1000, 16, 8, "skipped")], ids=str)
def test_layout(shape):
    ids = route(shape).cuda()
    for block_m in (16, 64, 128):
        actual, expected = build_layout(ids, shape.experts, block_m), build_layout_torch(ids, shape.experts, block_m)
        count = int(expected.num_tiles)
        assert int(actual.num_tiles) == count
        assert torch.equal(actual.offsets, expected.offsets) and torch.equal(actual.order, expected.order)
        assert torch.equal(actual.tiles[:, :count], expected.tiles[:, :count])


@pytest.mark.parametrize("num_group, topk_group", [(1, 1), (8, 4)])
def test_choice_of_experts(num_group, topk_group):
    logits, bias = torch.randn(4096, 256, device="cuda"), torch.randn(256, device="cuda") * 0.1
    options = {"top_k": 8, "num_group": num_group, "topk_group": topk_group}
    weights, indices = choose(logits, bias, impl="triton", **options)
    expected, expected_indices = choose(logits, bias, impl="torch", **options)
    same = (indices == expected_indices).all(-1)  # sigmoids one bit apart may change places
    assert same.float().mean() > 0.999
    assert_close("weights", weights[same], expected[same], "float32")


def small_experts(backend: str) -> Experts:
    config = DeepseekV3Config(
        hidden_size=512, moe_intermediate_size=256, n_routed_experts=16, num_experts_per_tok=4, n_group=1, topk_group=1
    )
    config._experts_implementation = backend
    module = Experts(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.05)
    return module.to("cuda", torch.bfloat16)


def inputs(tokens: int):
    hidden = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    return hidden, torch.rand(tokens, 16, device="cuda").argsort(-1)[:, :4], torch.rand(tokens, 4, device="cuda")


@pytest.mark.parametrize("backend", ["hf_moe", TRITON_BACKEND_NAME])
@pytest.mark.parametrize("tokens", [1, 64, 3000])
def test_backend_waits_for_nothing_and_captures(backend, tokens):
    module, arguments = small_experts(backend), inputs(tokens)
    with torch.no_grad():
        expected = module(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            module(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module(*arguments)
        # Another routing in the same graph: nothing of the first one is baked in.
        arguments[1].copy_(inputs(tokens)[1])
        graph.replay()
        assert torch.equal(captured, module(*arguments))
        arguments[1].fill_(3)
        graph.replay()
        assert torch.equal(captured, module(*arguments))
    assert expected.isfinite().all()


def test_default_backend_is_the_kernels():
    module, arguments = small_experts("hf_moe"), inputs(33)
    with torch.no_grad():
        assert torch.equal(module(*arguments), ALL_EXPERTS_FUNCTIONS[TRITON_BACKEND_NAME](module, *arguments))


def test_compiled():
    module, arguments = small_experts(TRITON_BACKEND_NAME), inputs(5)
    with torch.no_grad():
        assert torch.equal(torch.compile(module, fullgraph=True)(*arguments), module(*arguments))


@pytest.mark.parametrize("weights, rank", [("plain", 0), ("fp8", 16)])
def test_compiled_training(weights, rank):
    case = make_case(Shape(70, 8, 2, "skipped"), 264, 136, torch.bfloat16, weights, rank).to("cuda")
    expected = run_with_gradients(lambda *arguments: experts(*arguments, impl="triton"), case)
    compiled = torch.compile(lambda *arguments: experts(*arguments, impl="triton"), fullgraph=True)
    for name, value in run_with_gradients(compiled, case).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_deepseek_sizes(tokens):
    """A few experts of DeepSeek-V3: every inner loop at its real length."""
    shape, generator = Shape(tokens, 8, 4), torch.Generator("cuda").manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)

    arguments = (
        random(tokens, 7168),
        route(shape).cuda(),
        torch.rand(tokens, 4, device="cuda"),
        random(8, 4096, 7168) * 7168**-0.5,
        random(8, 7168, 2048) * 2048**-0.5,
    )
    with torch.no_grad():
        assert_close("output", experts(*arguments, impl="triton"), experts_torch(*arguments), "bfloat16_experts")
