"""Everything around the kernels as on a GPU: devices, launches, waiting, capture. On a CPU that says it is one."""

import pytest
import torch
from expert_cases import Shape, make_case, run_with_gradients
from testing import assert_close, can_run_kernels
from tiny import left_padded, random_ids, tiny_model

from hf_moe.models import kernel_fp8, op_prefill, op_quant
from hf_moe.models.layer_experts import Experts
from hf_moe.models.op_experts import experts, experts_torch
from hf_moe.models.op_fp8 import Fp8Format, fp8_linear
from hf_moe.models.op_mla import latent_decode
from hf_moe.models.op_prefill import CausalMask
from hf_moe.models.op_quant import quantize_block_fp8
from hf_moe.models.op_routing import route
from hf_moe.models.triton_compat import INTERPRETING
from hf_moe.models.weights_checkpoint import extend_device_map

pytestmark = pytest.mark.skipif(not (INTERPRETING and can_run_kernels()), reason="needs Triton's interpreter")


@pytest.fixture
def cuda():
    from pretend_cuda import pretend_cuda

    with pretend_cuda() as pretence:
        yield pretence


def test_the_pretence_finds_what_a_gpu_would(cuda):
    here, there = torch.randn(3), torch.randn(3, device="cuda")
    assert there.is_cuda and there.device == torch.device("cuda", 0) == (there * 2).device and not here.is_cuda
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    assert not there.cpu().is_cuda and cuda.waits
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="waits"):
        there.sum().item()
    with pytest.raises(RuntimeError, match="waits"):
        there[there > 0]


@pytest.mark.parametrize("quantize", [False, True, None])
@pytest.mark.parametrize("weights", ["plain", "fp8"])
def test_experts_on_the_second_gpu(cuda, weights, quantize):
    """With the first one current, as in a model that is spread over both."""
    if quantize and weights == "plain":
        pytest.skip("FP8 weights only")
    case = make_case(Shape(9, 4, 2, "skipped"), 136, 72, torch.float32, weights, 3, 0.3).to("cuda:1")
    seed = torch.ones(9, 136, device="cuda:1")
    leaves = case.hidden_states.requires_grad_(), case.topk_weights.requires_grad_(), case.lora.down_a.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    output = experts(*case.arguments(), quantize=quantize)
    output.backward(seed)
    assert output.device == torch.device("cuda", 1) and all(leaf.grad.device == output.device for leaf in leaves)
    assert {"gate_up_kernel", "inner_grad_kernel", "outer_kernel"} <= set(cuda.launches)


def test_routing_on_the_second_gpu(cuda):
    logits, bias = torch.randn(5, 16, device="cuda:1", requires_grad=True), torch.zeros(16, device="cuda:1")
    seed = torch.ones(5, 2, device="cuda:1")
    torch.cuda.set_sync_debug_mode("error")
    weights, indices = route(logits, bias, top_k=2, num_group=4, topk_group=2)
    weights.backward(seed)
    assert cuda.launches == ["topk_kernel"] and logits.grad.device == indices.device == torch.device("cuda", 1)


@pytest.mark.parametrize("quantize", [False, True])
def test_fp8_linear_on_the_second_gpu(cuda, quantize):
    weight, scale = (tensor.to("cuda:1") for tensor in quantize_block_fp8(torch.randn(72, 136)))
    rows, bias = torch.randn(2, 3, 136, device="cuda:1", requires_grad=True), torch.randn(72, device="cuda:1")
    seed = torch.ones(2, 3, 72, device="cuda:1")
    torch.cuda.set_sync_debug_mode("error")
    fp8_linear(rows, weight, scale, Fp8Format(), bias, quantize=quantize).backward(seed)
    assert rows.grad.device == torch.device("cuda", 1) and cuda.launches.count("linear_kernel") == 2


@pytest.mark.parametrize("ue8m0", [False, True])
def test_quantised_values_have_the_same_bits_everywhere(cuda, ue8m0):
    """A GPU divides by a number with its reciprocal, which can be one bit off."""
    weight, rows = torch.randn(300, 200), torch.randn(7, 200)
    for quantize, kernel, matrix in (
        (op_quant.quantize_block_fp8, kernel_fp8.quantize_block_fp8, weight),
        (op_quant.quantize_rows, kernel_fp8.quantize_rows, rows),
    ):
        values, scales = quantize(matrix, ue8m0=ue8m0)
        for function in (quantize, kernel):
            there = function(matrix.to("cuda"), ue8m0=ue8m0)
            assert torch.equal(there[1].cpu(), scales)
            assert torch.equal(there[0].view(torch.uint8).cpu(), values.view(torch.uint8))


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left padded"])
@torch.no_grad()
def test_steps_of_a_whole_model_wait_for_nothing(cuda, padded):
    """A decode step with MLA and experts on kernels. Transformers looks once at a mask, whether it hides anything."""
    model = tiny_model(mla_mode="absorbed", attn_implementation="sdpa").to("cuda", torch.bfloat16)
    ids, mask = left_padded([random_ids(1, 9)[0], random_ids(1, 12)[0]])
    ids, mask = ids.to("cuda"), mask.to("cuda")
    masks = (mask[:, :11], mask) if padded else (None, None)
    outputs = model(ids[:, :11], attention_mask=masks[0], use_cache=True)
    cuda.launches.clear(), cuda.waits.clear()
    step = model(ids[:, 11:], attention_mask=masks[1], past_key_values=outputs.past_key_values)
    assert step.logits.is_cuda and {"topk_kernel", "rows_kernel", "mla_decode_kernel"} <= set(cuda.launches)
    assert len(cuda.waits) <= padded, cuda.waits


@torch.no_grad()
def test_attention_on_the_second_gpu(cuda):
    query, query_rope = torch.randn(1, 2, 3, 24, device="cuda:1"), torch.randn(1, 2, 3, 4, device="cuda:1")
    latent, key_rope = torch.randn(1, 1, 200, 24, device="cuda:1"), torch.randn(1, 1, 200, 4, device="cuda:1")
    mask = torch.ones(1, 1, 2, 200, dtype=torch.bool, device="cuda:1").tril(198)
    torch.cuda.set_sync_debug_mode("error")
    assert latent_decode(query, query_rope, latent, key_rope, mask, 0.2).device == torch.device("cuda", 1)


@torch.no_grad()
def test_prompts_on_the_second_gpu(cuda, monkeypatch):
    """In pieces, with nothing to wait for."""
    monkeypatch.setattr(op_prefill, "_PIECE_ELEMENTS", (1, 1))
    query, query_rope = (torch.randn(2, 40, 3, width, device="cuda:1").bfloat16() for width in (24, 8))
    key_rope, expanded = (torch.randn(2, 300, width, device="cuda:1").bfloat16() for width in (8, 3 * 44))
    real = torch.ones(2, 300, dtype=torch.bool, device="cuda:1")
    torch.cuda.set_sync_debug_mode("error")

    def expand(first, count, start, stop):
        return expanded[:, start:stop, first * 44 : (first + count) * 44]

    output = op_prefill.latent_prefill(query, query_rope, key_rope, expand, CausalMask(260, real), 0.2, 20)
    assert output.device == torch.device("cuda", 1) and cuda.launches == ["mla_prefill_kernel"] * 6
    monkeypatch.setattr(op_prefill, "prefill_on_kernels", lambda query: False)
    plain = op_prefill.latent_prefill(query, query_rope, key_rope, expand, CausalMask(260, real), 0.2, 20)
    torch.cuda.set_sync_debug_mode("default")
    assert_close("attended", output.cpu(), plain.cpu(), "bfloat16")


def small_experts() -> Experts:
    module = Experts(tiny_model().config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module


def test_capture_into_a_graph(cuda):
    module = small_experts().to("cuda")
    tokens = torch.randn(4, module.hidden_dim, device="cuda")
    ids, weights = torch.zeros(4, 3, dtype=torch.long, device="cuda"), torch.ones(4, 3, device="cuda")
    with torch.no_grad(), torch.cuda.graph(torch.cuda.CUDAGraph()):
        module(tokens, ids, weights)
    assert "gate_up_kernel" in cuda.launches


def test_autocast_multiplies_float32_weights_as_it_does_those_of_linear_layers(cuda):
    """Their gradients stay in float32."""
    module = small_experts().to("cuda")
    tokens = torch.randn(5, module.hidden_dim, device="cuda")
    ids, weights = torch.tensor([[0, 1, 2]] * 5).to("cuda"), torch.rand(5, 3, device="cuda")
    expected = module(tokens, ids, weights)
    with torch.autocast("cuda", torch.bfloat16):
        output = module(tokens, ids, weights)
    assert output.dtype == torch.bfloat16
    assert_close("output", output.cpu(), expected.cpu(), "bfloat16")
    output.float().sum().backward()
    assert module.down_proj.grad.dtype == torch.float32 and module.down_proj.grad.is_cuda


def test_quantised_rows_of_bfloat16_tokens():
    """What is quantised must not be rounded to bfloat16 before: that alone would cost 1 %."""
    case = make_case(Shape(20, 2, 2), 264, 136, torch.bfloat16, "fp8")
    with torch.no_grad():
        output = experts(*case.arguments(), quantize=True, impl="triton")
        assert_close("output", output, experts_torch(*case.arguments(), quantize=True), "bfloat16_experts")


def test_gradients_are_those_without_the_pretence():
    case = make_case(Shape(9, 4, 2), 40, 24, torch.float32)
    expected = run_with_gradients(lambda *args: experts(*args, impl="triton"), case)
    from pretend_cuda import pretend_cuda

    with pretend_cuda():
        actual = {name: value.cpu() for name, value in run_with_gradients(experts, case.to("cuda")).items()}
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash"])
def test_training_on_two_devices_of_a_map(cuda, family):
    """Layers on two GPUs, MTP layers behind the last one: hooks move what a layer is called with."""
    from accelerate import dispatch_model

    config = {"attn_implementation": "eager"}
    ids = random_ids(2, 9)
    whole = tiny_model(family, **config).train()
    loss = whole(input_ids=ids, labels=ids).loss
    loss.backward()
    model = tiny_model(family, **config).train()
    places = {name: "cuda:0" for name, _ in model.model.named_children() if name not in ("layers", "mtp", "norm")}
    places = {f"model.{name}": place for name, place in places.items()} | {"model.norm": "cuda:1", "lm_head": "cuda:1"}
    places |= {f"model.layers.{index}": f"cuda:{min(index, 1)}" for index in range(len(model.model.layers))}
    extend_device_map(model, places)
    model = dispatch_model(model, places, skip_keys=model._skip_keys_device_placement, force_hooks=True)
    output = model(input_ids=ids.to("cuda:0"), labels=ids.to("cuda:0"))
    output.loss.backward()
    assert_close("loss", output.loss.cpu(), loss, "float32")
    for name, parameter in model.named_parameters():
        expected = whole.get_parameter(name).grad
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None:
            assert parameter.grad.device == parameter.device
            assert_close(name, parameter.grad.cpu(), expected, "float32_grad")


def test_graphs_of_the_pretence_do_again_what_was_captured(cuda):
    case = make_case(Shape(5, 4, 2), 40, 24, torch.float32).to("cuda")
    cuda.replays, graph, other = True, torch.cuda.CUDAGraph(), (case.topk_indices + 1) % 4
    with torch.no_grad():
        first = experts(*case.arguments(), impl="triton")
        with torch.cuda.graph(graph):
            captured = experts(*case.arguments(), impl="triton") + 1
        assert torch.equal(captured, first + 1)
        case.topk_indices.copy_(other)
        assert torch.equal(captured, first + 1)
        graph.replay()
        assert torch.equal(captured, experts(*case.arguments(), impl="triton") + 1)
        assert not torch.equal(captured, first + 1)


@pytest.mark.parametrize("weights, quantize", [("plain", False), ("fp8", False), ("fp8", True)])
@torch.no_grad()
def test_a_graph_of_a_layer_serves_any_routing(cuda, weights, quantize):
    """Router and experts as captured, with tokens that choose other experts, all the same, and with logits of NaN."""
    cuda.replays, graph = True, torch.cuda.CUDAGraph()
    case = make_case(Shape(9, 16, 2), 136, 72, torch.float32, weights).to("cuda")
    logits, bias = torch.randn(9, 16).to("cuda"), torch.zeros(16, device="cuda")
    stacks = case.arguments()[3:]

    def layer():
        scores, indices = route(logits, bias, top_k=2, num_group=4, topk_group=2)
        return experts(case.hidden_states, indices, scores, *stacks, quantize=quantize), indices

    results = [layer()]
    torch.cuda.set_sync_debug_mode("error")
    with torch.cuda.graph(graph):
        captured = layer()
    torch.cuda.set_sync_debug_mode("default")
    alike = torch.arange(16.0).expand(9, -1)
    for other in (torch.randn(9, 16), alike, torch.full((9, 16), torch.nan)):
        logits.copy_(other.to("cuda"))
        graph.replay()
        results.append(layer())
        assert all(torch.equal(one.nan_to_num(7.0), new.nan_to_num(7.0)) for one, new in zip(captured, results[-1]))
        assert not torch.equal(captured[1], results[-2][1])
    assert results[2][1].cpu().tolist() == [[15, 14]] * 9
    assert [bool(output.isnan().any()) for output, _ in results] == [False, False, False, True]


def test_attention_of_the_pretence_has_its_gradient_where_it_is(cuda):
    """On a CPU it is taken apart, into operations of which some make tensors and do not say where."""
    tensors = [torch.randn(1, 2, 6, 8) for _ in range(3)]
    mask, gradients = torch.ones(6, 6, dtype=torch.bool).tril(), []
    for device in ("cpu", "cuda"):
        leaves = [tensor.to(device).detach().requires_grad_() for tensor in tensors]
        output = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=mask.to(device))
        (output.square().sum()).backward()
        assert all(leaf.grad.is_cuda == (device == "cuda") for leaf in leaves)
        gradients.append([leaf.grad.cpu() for leaf in leaves])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))
