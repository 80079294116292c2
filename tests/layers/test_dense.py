"""RMSNorm and the gated MLP against their formulas in float64."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from testing import assert_close

from hf_moe.models import layer_dense
from hf_moe.models.layer_dense import GatedMLP, RMSNorm


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["unit", "tiny"])
def test_rms_norm(eps, scale):
    norm = RMSNorm(24, eps=eps)
    torch.nn.init.normal_(norm.weight)
    states = torch.randn(3, 5, 24) * scale
    exact = states.double()
    expected = exact / (exact.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight.double()
    assert_close("normed", norm(states), expected, "float32")


def test_rms_norm_rounds_before_the_weight():
    """In bfloat16 the normed state is rounded, then multiplied: bit for bit the upstream order."""
    norm = RMSNorm(24).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    states = torch.randn(7, 24).bfloat16()
    wide = states.float()
    expected = norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert norm(states).dtype == torch.bfloat16
    assert_close("normed", norm(states), expected, "bfloat16")


def test_gated_mlp():
    mlp = GatedMLP(12, 20, "silu")
    states = torch.randn(4, 12)
    gate, up = states.double() @ mlp.gate_proj.weight.double().t(), states.double() @ mlp.up_proj.weight.double().t()
    expected = (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.double().t()
    assert_close("output", mlp(states), expected, "float32")


@pytest.mark.parametrize("autocast", [False, True])
def test_long_prompts_pass_the_mlp_in_parts(autocast, monkeypatch):
    mlp = GatedMLP(12, 20, "silu")
    states, sizes = torch.randn(2, 25, 12), []
    mlp.up_proj.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[:-1]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole = mlp(states)
        monkeypatch.setattr(layer_dense, "_INNER_ELEMENTS_CPU", 16 * 20)
        monkeypatch.setattr(layer_dense, "_MIN_TOKENS", 1)
        parts = mlp(states)
    assert [tuple(size) for size in sizes] == [(2, 25), (16,), (16,), (16,), (2,)]
    assert parts.dtype == whole.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert_close("output", parts, whole, "bfloat16" if autocast else "float32")
    sizes.clear()
    mlp(states).sum().backward()  # keeps all inner rows anyway
    assert len(sizes) == 1 and all(parameter.grad is not None for parameter in mlp.parameters())


def test_offloaded_weights_are_fetched_once(monkeypatch):
    """Parts of a long prompt would bring them to the device again and again."""
    monkeypatch.setattr(layer_dense, "_MIN_TOKENS", 4)
    monkeypatch.setattr(layer_dense, "_INNER_ELEMENTS_CPU", 16 * 20)
    mlp, states, calls = GatedMLP(24, 20, "silu"), torch.randn(2, 40, 24), []
    mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        mlp(states)
        assert len(calls) == 5
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            add_hook_to_module(linear, AlignDevicesHook("cpu", offload=True))
        calls.clear()
        mlp(states)
    assert len(calls) == 1
