"""What only a GPU can show: the goldens in every backend on the device. Run by `benchmarks/gpu/run_all.py`."""

import pytest
import torch
from testing import GOLDENS, assert_close, load_golden
from transformers import AutoModelForCausalLM

import hf_moe  # noqa: F401
from hf_moe.models.layer_mla import absorbed_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


LONGCAT = ["longcat_flash", "longcat_fp8", "longcat_lite_ngram"]


@pytest.fixture(params=["v3_basic", "v2_group_limited", "kimi_k2", "v3_fp8", "kimi_k2_int4"])
def case(request):
    return request.param


@pytest.mark.parametrize("backend", ["hf_moe", "eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("mla_mode", ["expanded", "absorbed"])
@torch.no_grad()
def test_golden_logits(case, backend, mla_mode):
    folder, expected = GOLDENS / case, load_golden(case)[0]
    # Transformers' backends multiply plain weights.
    options = {"dequantize": True} if backend in ("grouped_mm", "batched_mm") else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cuda", **options)
    model.set_fp8_activations(False)  # the golden has exact weights and activations
    model.set_experts_implementation(backend)
    model.config.mla_mode = mla_mode
    logits = model(expected["input_ids"].cuda()).logits.cpu()
    assert (logits - expected["logits"]).abs().max() < 1e-4


def test_absorbed_attention_in_bfloat16():
    """A decode step at DeepSeek-V3's widths against the same products in float64."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    inputs = random(2, 1, 128, 512) * 0.1, random(2, 1, 128, 64) * 0.1, random(2, 1, 4097, 512), random(2, 1, 4097, 64)
    mask = torch.rand(2, 1, 1, 4097, generator=generator, device="cuda") > 0.3
    attended, _ = absorbed_attention(*inputs, mask, 0.1)
    reference, _ = absorbed_attention(*(tensor.double() for tensor in inputs), mask, 0.1)
    assert_close("attended", attended, reference, "bfloat16")


@torch.no_grad()
def test_default_backend_does_not_wait_for_the_device():
    """A decode step in bfloat16 captures into a CUDA graph: nothing in it reads a value back."""
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "v3_basic", dtype=torch.bfloat16, device_map="cuda")
    moe = model.model.layers[1].mlp
    hidden_states = torch.randn(2, 1, model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            moe(hidden_states)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moe(hidden_states)
    graph.replay()
    torch.testing.assert_close(captured, moe(hidden_states))


@pytest.mark.parametrize("overlap", [False, True], ids=["one_stream", "two_streams"])
@pytest.mark.parametrize("case", LONGCAT)
@torch.no_grad()
def test_longcat_golden(case, overlap):
    """Logits and greedy text, with the experts on a second stream and without."""
    folder, expected = GOLDENS / case, load_golden(case)[0]
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cuda", dequantize=True, overlap_experts=overlap
    )
    ids, mask = expected["input_ids"].cuda(), expected["attention_mask"].cuda()
    for _ in range(20):  # a race shows now and then
        logits = model(ids, attention_mask=mask).logits.cpu()
        real = expected["attention_mask"].bool()
        assert (logits - expected["logits"])[real].abs().max() < 1e-4
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 3
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False).cpu()
    assert torch.equal(generated[:, ids.shape[1] :], expected["generated_ids"])


def test_longcat_gradients_are_the_same_on_two_streams():
    expected = load_golden("longcat_flash")[0]
    ids, results = expected["input_ids"].cuda(), []
    for overlap in (False, True):
        model = AutoModelForCausalLM.from_pretrained(
            GOLDENS / "longcat_flash", dtype=torch.float32, device_map="cuda", overlap_experts=overlap
        )
        for _ in range(10):
            model.zero_grad()
            model.train()(ids, labels=ids).loss.backward()
        results.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        )
    for name, gradient in results[0].items():
        assert_close(name, results[1][name], gradient, "float32")


@pytest.mark.parametrize("place", ["cpu", "disk"])
@torch.no_grad()
def test_longcat_ngram_tables_stay_off_the_device(place):
    folder, expected = GOLDENS / "longcat_lite_ngram", load_golden("longcat_lite_ngram")[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cuda", ngram_tables=place)
    assert all(table.weight.device.type == "cpu" for table in model.model.ngram_embeddings.embedders)
    logits = model(expected["input_ids"].cuda(), attention_mask=expected["attention_mask"].cuda()).logits.cpu()
    assert (logits - expected["logits"])[expected["attention_mask"].bool()].abs().max() < 1e-4


def test_out_of_range_token_is_an_error_before_the_device_faults():
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "v3_basic", device_map="cuda")
    with pytest.raises(IndexError, match="token ids"):
        model(torch.tensor([[0, model.config.vocab_size]], device="cuda"))
