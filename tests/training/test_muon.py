"""Muon against PyTorch's own for single matrices, AdamW against PyTorch's, and what is a matrix in our models."""

import copy

import pytest
import torch
from testing import assert_close
from tiny import random_ids, tiny_model
from tiny_step3 import text_model

from hf_moe.training import muon as muon_module
from hf_moe.training.muon import Muon, muon_groups, newton_schulz


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 16, 48), (5, 33, 7)])
def test_newton_schulz_brings_singular_values_to_one(shape):
    values = torch.linalg.svdvals(newton_schulz(torch.randn(shape)))
    assert values.min() > 0.5 and values.max() < 1.3
    zeros = newton_schulz(torch.zeros(shape))
    assert torch.equal(zeros, torch.zeros(shape))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_single_matrix_equals_torch(shape, nesterov, monkeypatch):
    start, gradients = torch.randn(shape), torch.randn(4, *shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    reference = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    optimizer = Muon([ours], **settings)
    # PyTorch's runs its iteration in bfloat16; take the same products, and look at everything around them.
    iterate = lambda matrices, steps: newton_schulz(matrices, steps, torch.bfloat16)  # noqa: E731
    monkeypatch.setattr(muon_module, "newton_schulz", iterate)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
        assert_close("weight", ours, theirs, "bfloat16")
    assert (ours - start).abs().max() > 0.05


def test_stack_equals_its_matrices_one_by_one(monkeypatch):
    monkeypatch.setattr(muon_module, "_CHUNK_ELEMENTS", 2 * 12 * 10)  # two experts at a time
    start, gradient = torch.randn(5, 12, 10), torch.randn(5, 12, 10)
    fused = torch.nn.Parameter(start.clone())
    fused.grad = gradient.clone()
    Muon([{"params": [fused], "parts": 2}], lr=0.1).step()
    for expert in range(5):
        for half in (slice(0, 6), slice(6, 12)):
            single = torch.nn.Parameter(start[expert, half].clone())
            single.grad = gradient[expert, half].clone()
            Muon([single], lr=0.1).step()
            assert_close(f"expert {expert}", fused[expert, half], single, "float32")


def test_the_rest_equals_adamw():
    ours = [torch.nn.Parameter(torch.randn(7)), torch.nn.Parameter(torch.randn(11, 3))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.01, "weight_decay": 0.2, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = Muon([{"params": ours, "use_muon": False}], **settings)
    reference = torch.optim.AdamW(theirs, **settings)
    for _ in range(5):
        for left, right in zip(ours, theirs):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        optimizer.step()
        reference.step()
    for left, right in zip(ours, theirs):
        assert_close("parameter", left, right, "float32")


MODELS = {
    "deepseek_v3": lambda: tiny_model("deepseek_v3"),
    "deepseek_v2_lite": lambda: tiny_model("deepseek_v2_lite"),
    "longcat_flash_ngram": lambda: tiny_model("longcat_flash_ngram"),
    "step3": text_model,
}


@pytest.mark.parametrize("family", MODELS)
def test_groups_of_every_family(family):
    model = MODELS[family]()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = muon_groups(model)
    listed = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(names.values())  # each once
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            vector = parameter.dim() == 1
            embedding = "embed_tokens" in name or "embedders" in name
            table = embedding or name == "lm_head.weight"
            assert group["use_muon"] == (not vector and not table), name
            assert group.get("parts", 1) == (2 if name.endswith("gate_up_proj") else 1), name
            assert group["weight_decay"] == (0.0 if vector or embedding else 0.1), name
    routers = [name for name in listed if "gate.weight" in name or "classifier.weight" in name]
    assert routers and any(name.endswith("experts.down_proj") for name in listed)


def test_trains_and_resumes_exactly():
    ids = random_ids(2, 13)

    def run(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    model = tiny_model("deepseek_v3").train()
    optimizer = Muon(muon_groups(model), lr=0.01)
    before = model(input_ids=ids, labels=ids).loss.item()
    run(model, optimizer, 3)
    resumed = tiny_model("deepseek_v3").train()
    resumed.load_state_dict(model.state_dict())
    again = Muon(muon_groups(resumed), lr=0.01)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(model, optimizer, 3)
    run(resumed, again, 3)
    assert model(input_ids=ids, labels=ids).loss.item() < before - 0.5
    for (name, left), right in zip(model.named_parameters(), resumed.parameters()):
        assert torch.equal(left, right), name


def test_wrong_arguments():
    matrix = torch.nn.Parameter(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="2 parts"):
        Muon([{"params": [matrix], "parts": 2}])
    with pytest.raises(ValueError, match="not shape"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(4))], "use_muon": True}])
    with pytest.raises(ValueError, match="momentum"):
        Muon([matrix], momentum=1.0)
    with pytest.raises(ValueError, match="lr"):
        Muon([matrix], lr=-1.0)
    model = tiny_model("deepseek_v3").requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing is trained"):
        muon_groups(model)
