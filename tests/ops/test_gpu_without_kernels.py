"""GPUs that the kernels do not know, older ones or of other makers: plain PyTorch computes there, on the device."""

import pytest
import torch
from expert_cases import Shape, make_case, run_with_gradients
from testing import GOLDENS, assert_close, can_run_kernels, load_golden
from transformers import AutoModelForCausalLM

import hf_moe  # noqa: F401  registers the families
from hf_moe.models import op_experts, op_fp8, op_mla, op_moe, op_prefill, op_routing
from hf_moe.models.op_experts import experts
from hf_moe.models.triton_compat import INTERPRETING

pytestmark = pytest.mark.skipif(not (INTERPRETING and can_run_kernels()), reason="needs Triton's interpreter")


@pytest.fixture
def cuda(monkeypatch):
    from pretend_cuda import pretend_cuda

    with pretend_cuda((7, 5)) as pretence:
        for module in (op_experts, op_fp8, op_mla, op_prefill, op_routing):
            monkeypatch.setattr(module, "runs_kernels", lambda device: False)
        yield pretence
        assert not pretence.launches
        monkeypatch.undo()


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_fp8_experts(cuda, dtype, tokens):
    """Some ids belong to no expert; the rows are few, more, and too many to stand side by side."""
    case = make_case(Shape(tokens, 4, 2, "skipped"), 136, 72, dtype, "fp8")
    case.topk_indices.clamp_(min=0)
    here = list(case.arguments()[:-1])
    fp8 = op_moe.Fp8Experts(*here[5:], op_fp8.Fp8Format())
    there = [tensor.to("cuda") for tensor in here]
    fp8_there = op_moe.Fp8Experts(*there[5:], op_fp8.Fp8Format())
    act_fn = torch.nn.functional.silu
    output = op_moe.experts_cpu(*there[:5], act_fn, fp8_there)
    assert output.is_cuda
    assert_close("output", output.cpu(), op_moe.experts_cpu(*here[:5], act_fn, fp8), str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("weights, rank", [("plain", 3), ("fp8", 0), ("fp8", 3)])
def test_gradients_of_experts(cuda, weights, rank):
    case = make_case(Shape(9, 4, 2, "skipped"), 136, 72, torch.float32, weights, rank)
    expected = run_with_gradients(lambda *arguments: experts(*arguments, impl="cpu"), case)
    actual = run_with_gradients(lambda *arguments: experts(*arguments, impl="cpu"), case.to("cuda"))
    for name, value in expected.items():
        assert actual[name].is_cuda
        assert_close(name, actual[name].cpu(), value, "float32")


@pytest.mark.parametrize("folder", ["v3_fp8", "longcat_fp8"])
@torch.no_grad()
def test_fp8_models(cuda, folder):
    """A prompt, and a step on its cache."""
    expected = load_golden(folder)[0]
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / folder, dtype=torch.float32).eval().to("cuda")
    ids = expected["input_ids"][:1].to("cuda")
    prompt = model(ids[:, :-1], use_cache=True)
    step = model(ids[:, -1:], past_key_values=prompt.past_key_values)
    logits = torch.cat((prompt.logits, step.logits), dim=1).cpu()
    assert (logits - expected["logits"][:1]).abs().max() < 1e-4
