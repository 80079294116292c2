"""What only a GPU can show of FP8 linear layers and of the attention kernel. Run by `benchmarks/gpu/run_all.py`."""

import pytest
import torch
from testing import GOLDENS, assert_close, load_golden, watch_quantised_products
from transformers import AutoModelForCausalLM

import hf_moe  # noqa: F401
from hf_moe.models import kernel_fp8, layer_mla, op_prefill, op_quant
from hf_moe.models.kernel_mla import mla_decode
from hf_moe.models.op_fp8 import Fp8Format, fp8_linear
from hf_moe.models.triton_compat import converts_fp8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CASE = "v3_fp8"


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda").to(dtype)


def load(dtype=torch.float32, **kwargs):
    return AutoModelForCausalLM.from_pretrained(GOLDENS / CASE, dtype=dtype, device_map="cuda", **kwargs).eval()


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 300, 4096])
@pytest.mark.parametrize("sizes", [(576, 7168), (1536, 7168), (7168, 18432), (1000, 200)], ids=str)
def test_products_at_real_sizes(sizes, rows, poisoned):
    out_features, in_features = sizes
    weight, scale = kernel_fp8.quantize_block_fp8(random(out_features, in_features))
    wide, x, grad = op_quant.dequantize_block_fp8(weight, scale), random(rows, in_features), random(rows, out_features)
    torch.backends.cuda.matmul.allow_tf32 = False
    output = kernel_fp8.multiply(x, weight, scale, out_dtype=x.dtype)
    assert_close("w8a16", output, x.float() @ wide.T, "bfloat16_kernel")
    gradient = kernel_fp8.multiply(grad, weight, scale, out_dtype=x.dtype, transposed=True)
    assert_close("gradient", gradient, grad.float() @ wide, "bfloat16_kernel")
    if converts_fp8(x.device):
        values, x_scale = kernel_fp8.quantize_rows(x)
        output = kernel_fp8.multiply(values, weight, scale, out_dtype=x.dtype, x_scale=x_scale)
        assert_close("w8a8", output, op_quant.dequantize_rows(values, x_scale) @ wide.T, "fp8")


def test_linear_and_its_gradient_through_autograd():
    weight, scale = kernel_fp8.quantize_block_fp8(random(576, 1024))
    rows = random(33, 1024).requires_grad_()
    output = fp8_linear(rows, weight, scale, Fp8Format())
    grad = random(*output.shape)
    output.backward(grad)
    wide = op_quant.dequantize_block_fp8(weight, scale)
    assert_close("output", output, rows.float() @ wide.T, "bfloat16")
    assert_close("gradient", rows.grad, grad.float() @ wide, "bfloat16")


@torch.no_grad()
def test_golden_with_and_without_quantised_activations(monkeypatch):
    expected, model = load_golden(CASE)[0], load()
    ids = expected["input_ids"].cuda()
    model.config.mla_mode = "expanded"
    model.set_fp8_activations(False)
    assert (model(ids).logits.cpu() - expected["logits"]).abs().max() < 1e-4
    model.set_fp8_activations(True)
    seen = watch_quantised_products(monkeypatch)
    assert model(ids).logits.isfinite().all()
    assert set(seen) == {"linear", "experts"} if converts_fp8(ids.device) else not seen


def test_memory_is_that_of_the_files():
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = load(torch.bfloat16)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    stored = (GOLDENS / CASE / "model.safetensors").stat().st_size
    assert held < 1.15 * stored and torch.cuda.memory_allocated() - before < 1.3 * stored


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("context", [1, 63, 4097, 32768])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_attention_at_real_sizes(context, queries, masked, poisoned):
    if queries > context:
        pytest.skip("more queries than context")
    tensors = (
        random(2, queries, 128, 512) * 0.2,
        random(2, queries, 128, 64) * 0.2,
        random(2, context, 512),
        random(2, context, 64),
    )
    mask = None
    if masked:
        mask = torch.ones(queries, context, dtype=torch.bool, device="cuda").tril(context - queries).repeat(2, 1, 1)
        mask[1, :, : context // 3] = False
    output = mla_decode(*tensors, mask, 0.1)
    query, query_rope, latent, key_rope = (tensor.double() for tensor in tensors)
    wide_mask = None if mask is None else mask.unsqueeze(1)
    wanted, _ = layer_mla.absorbed_attention(
        query, query_rope, latent.unsqueeze(1), key_rope.unsqueeze(1), wide_mask, 0.1
    )
    assert_close("attended", output, wanted, "bfloat16_kernel")
    assert torch.equal(output, mla_decode(*tensors, mask, 0.1)), "the same inputs gave other bits"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "context"), [(4096, 4096), (300, 20000), (1, 9000)])
@torch.no_grad()
def test_prompts_at_real_sizes(queries, context, masked, monkeypatch, poisoned):
    """DeepSeek-V3's heads, 16 of them, against float32 products; the memory is that of a piece."""
    query, query_rope = random(2, queries, 16, 128), random(2, queries, 16, 64)
    key_rope, latent, weight = random(2, context, 64), random(2, context, 512), random(16 * 256, 512) * 512**-0.5
    real = None
    if masked:
        real = torch.ones(2, context, dtype=torch.bool, device="cuda")
        real[1, : context - queries // 2] = False
    mask = op_prefill.CausalMask(context - queries, real)

    def expand(first, count, start, stop):
        return latent[:, start:stop] @ weight[first * 256 : (first + count) * 256].t()

    arguments = query, query_rope, key_rope, expand, mask, 192**-0.5, 128
    output = op_prefill.latent_prefill(*arguments)
    monkeypatch.setattr(op_prefill, "_PIECE_ELEMENTS", (1 << 21, 1 << 24))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pieces = op_prefill.latent_prefill(*arguments)
    assert torch.cuda.max_memory_allocated() - before < 3 * output.nbytes + (64 << 20)
    assert torch.equal(pieces, op_prefill.latent_prefill(*arguments)), "the same inputs gave other bits"
    monkeypatch.setattr(op_prefill, "prefill_on_kernels", lambda query: False)
    query, query_rope, key_rope, latent, weight = (
        tensor.float() for tensor in (query, query_rope, key_rope, latent, weight)
    )
    wanted = op_prefill.latent_prefill(query, query_rope, key_rope, *arguments[3:])
    assert_close("attended", output, wanted, "bfloat16_kernel")
    assert_close("in pieces", pieces, wanted, "bfloat16_kernel")


@torch.no_grad()
def test_decode_step_is_captured_in_a_graph():
    """FP8 linears and the attention kernel read nothing back."""
    weight, scale = kernel_fp8.quantize_block_fp8(random(576, 7168))
    x, tensors = (
        random(4, 7168),
        (random(2, 1, 128, 512), random(2, 1, 128, 64), random(2, 999, 512), random(2, 999, 64)),
    )

    def step():
        return fp8_linear(x, weight, scale, Fp8Format(), quantize=converts_fp8(x.device)), mla_decode(
            *tensors, None, 0.1
        )

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for one, other in zip(captured, step()):
        assert torch.equal(one, other)


@torch.no_grad()
def test_cached_steps_use_the_kernel(monkeypatch):
    calls = []
    original = layer_mla.latent_decode
    monkeypatch.setattr(layer_mla, "latent_decode", lambda *a: calls.append(1) or original(*a))
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "v3_basic", dtype=torch.bfloat16, device_map="cuda").eval()
    ids = load_golden("v3_basic")[0]["input_ids"].cuda()
    model.config.mla_mode = "absorbed"
    for layer in model.model.layers:  # one rounding may give a token another expert, and that other logits
        layer.mlp = getattr(layer.mlp, "shared_experts", layer.mlp)
    full = model(ids).logits
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    step = model(ids[:, -1:], past_key_values=cache).logits
    assert len(calls) == 3 * model.config.num_hidden_layers
    assert_close("logits", step[:, 0], full[:, -1], "bfloat16_grad")
