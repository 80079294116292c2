"""FP8 training: the three products against loops over groups and blocks, and models that train in it."""

import json

import pytest
import torch
from testing import assert_close, can_run_kernels
from tiny import random_ids, tiny_model
from tiny_step3 import text_model
from transformers import AutoModelForCausalLM

from hf_moe.demo import DEMO_MODEL
from hf_moe.training import FinetuneArguments, finetune, fp8_training
from hf_moe.training.fp8_training import (
    Fp8TrainingLinear,
    disable_fp8_training,
    enable_fp8_training,
    fp8_training_linear,
)

FP8, LARGEST = torch.float8_e4m3fn, 448.0


def _rounded(piece: torch.Tensor, ue8m0: bool) -> torch.Tensor:
    """One group or block after a trip through e4m3 with a scale of its own, by the book."""
    scale = piece.abs().max().float() / LARGEST
    if scale == 0:
        return piece.float()
    if ue8m0:
        scale = 2.0 ** torch.ceil(torch.log2(scale))
    return (piece.float() / scale).to(FP8).float() * scale


def _by_groups(rows: torch.Tensor, ue8m0: bool) -> torch.Tensor:
    """Groups of 1 x 128."""
    return torch.stack([torch.cat([_rounded(group, ue8m0) for group in row.split(128)]) for row in rows])


def _by_blocks(weight: torch.Tensor, parts: int, ue8m0: bool) -> torch.Tensor:
    """Blocks of 128 x 128, of each stacked matrix."""
    halves = []
    for part in weight.chunk(parts):
        bands = [torch.cat([_rounded(b, ue8m0) for b in band.split(128, 1)], 1) for band in part.split(128)]
        halves.append(torch.cat(bands))
    return torch.cat(halves)


@pytest.mark.parametrize("ue8m0", [False, True], ids=["float scales", "powers of two"])
@pytest.mark.parametrize("shape", [(150, 200, 300, 1), (5, 130, 140, 2), (1, 64, 100, 1)], ids=str)
def test_products_against_loops(shape, ue8m0):
    tokens, inputs, outputs, parts = shape
    rows = torch.randn(tokens, inputs, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(outputs, inputs) * 0.1)
    grad = torch.randn(tokens, outputs) * 1e-6  # below the least scale of activations
    output = fp8_training_linear(rows, weight, parts=parts, ue8m0=ue8m0)
    output.backward(grad)
    x, w = _by_groups(rows.detach(), ue8m0), _by_blocks(weight.detach(), parts, ue8m0)
    assert_close("output", output, x.double() @ w.double().t(), "float32")
    g = torch.cat([_by_groups(part, ue8m0) for part in grad.chunk(parts, 1)], 1)
    assert_close("grad of rows", rows.grad, g.double() @ w.double(), "float32")
    by_token = _by_groups(grad.t(), ue8m0).double() @ _by_groups(x.t(), ue8m0).double().t()
    assert_close("grad of weight", weight.grad, by_token, "float32")
    exact = rows.detach() @ weight.detach().t()
    assert 1e-4 < (output - exact).norm() / exact.norm() < 0.06  # rounded, and not by more than FP8 does


@pytest.mark.skipif(not can_run_kernels(), reason="kernels need Triton, and its interpreter a NumPy that it knows")
def test_kernels_agree_with_the_definition(monkeypatch):
    results = []
    for kernels in (False, True):
        if kernels:
            monkeypatch.setattr(fp8_training, "_on_kernels", lambda tensor: True)
        torch.manual_seed(1)
        rows = torch.randn(20, 200, requires_grad=True)
        weight = torch.nn.Parameter(torch.randn(260, 200))
        output = fp8_training_linear(rows, weight, parts=2)
        output.backward(torch.randn(20, 260) * 1e-6)
        results.append((output, rows.grad, weight.grad))
    for name, ours, expected in zip(("output", "rows", "weight"), results[1], results[0]):
        assert_close(name, ours, expected, "fp8" if name != "weight" else "float32")


def test_bias_autocast_and_leading_dimensions():
    weight, bias = torch.nn.Parameter(torch.randn(9, 20)), torch.nn.Parameter(torch.randn(9))
    rows = torch.randn(2, 3, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fp8_training_linear(rows.bfloat16(), weight, bias)
    assert output.shape == (2, 3, 9) and output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert_close("bias", bias.grad, torch.full((9,), 6.0), "exact")
    assert weight.grad.dtype == torch.float32


MODELS = {
    "deepseek_v3": lambda: tiny_model("deepseek_v3"),
    "longcat_flash": lambda: tiny_model("longcat_flash"),
    "step3": text_model,
}


@pytest.mark.parametrize("family", MODELS)
def test_models_train(family):
    model, plain = MODELS[family]().train(), MODELS[family]().train()
    names = enable_fp8_training(model, simulate=True)
    assert any(name.endswith("experts") for name in names) and any("self_attn" in name for name in names)
    assert not any(part in name for name in names for part in ("lm_head", "eh_proj", "gate.", "classifier", "embed"))
    assert model.state_dict().keys() == plain.state_dict().keys()
    ids = random_ids(2, 13)
    losses = [m(input_ids=ids, labels=ids).loss for m in (model, plain)]
    assert 0 < abs(losses[0].item() - losses[1].item()) < 0.3
    for loss in losses:
        loss.backward()
    gradients = [torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (model, plain)]
    # Rounding sends some tokens of these random models to other experts; the products are compared above.
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(8):
        optimizer.step()
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    assert loss.item() < losses[0].item() - 0.5
    disable_fp8_training(model)
    plain.load_state_dict(model.state_dict())
    assert_close("loss", model(input_ids=ids, labels=ids).loss, plain(input_ids=ids, labels=ids).loss, "exact")


def test_experts_equal_their_products_one_by_one():
    model = tiny_model("deepseek_v3")
    enable_fp8_training(model, simulate=True)
    experts = model.model.layers[1].mlp.experts
    rows, ids, weights = torch.randn(7, 48), torch.randint(0, 8, (7, 3)), torch.rand(7, 3)
    ids[0] = torch.tensor([8, 8, 8])  # of another rank
    expected = torch.zeros(7, 48)
    for token in range(7):
        for expert, weight in zip(ids[token].tolist(), weights[token]):
            if expert < 8:
                pre = fp8_training_linear(rows[token : token + 1], experts.gate_up_proj[expert], parts=2)
                gate, up = pre.chunk(2, -1)
                down = fp8_training_linear(torch.nn.functional.silu(gate) * up, experts.down_proj[expert])
                expected[token] += weight * down[0]
    assert_close("experts", experts(rows, ids, weights), expected, "float32")
    nothing = experts(rows, torch.full_like(ids, 8), weights)  # no row has its expert here
    nothing.sum().backward()
    assert nothing.abs().max() == 0 and experts.gate_up_proj.grad.abs().max() == 0


def test_clear_errors():
    with pytest.raises(ValueError, match="compute capability 8.9"):
        enable_fp8_training(tiny_model("deepseek_v3"))
    with pytest.raises(ValueError, match="no linear layers"):
        enable_fp8_training(torch.nn.Linear(2, 2), simulate=True)


def test_as_an_option(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"Item {n} has {n * n} parts."}) + "\n" for n in range(8)))
    options = dict(
        model_name_or_path=str(DEMO_MODEL), dataset_name=str(data), output_dir=str(tmp_path / "out"), max_steps=2,
        per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    with pytest.raises(ValueError, match="--fp8 simulate"):
        finetune(FinetuneArguments(fp8="yes", **options))
    with pytest.raises(ValueError, match="full fine-tuning"):
        finetune(FinetuneArguments(fp8="yes", use_peft=True, **options))
    model = finetune(FinetuneArguments(fp8="simulate", **options)).model
    assert not any(type(module) is Fp8TrainingLinear for module in model.modules())
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 40).unsqueeze(0)
    assert_close("logits", weights(input_ids=ids).logits, model.eval()(input_ids=ids).logits, "float32")
