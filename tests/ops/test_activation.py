"""Forms of activations against the modules of Transformers and autograd."""

import pytest
import torch
from testing import assert_close
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hf_moe.models.op_activation import ACTIVATIONS, FUSED, activation_form

WITH_PARAMETERS = {"prelu", "xielu"}
POINTS = torch.linspace(-12, 12, 402, dtype=torch.float64)  # 0, where some have no derivative, is none of them


@pytest.mark.parametrize("name", sorted(set(ACT2FN) - WITH_PARAMETERS))
def test_values_and_derivatives(name):
    act_fn = ACT2FN[name]
    activation = ACTIVATIONS[activation_form(act_fn)]
    x, grad = POINTS.clone().requires_grad_(), torch.randn(402, dtype=torch.float64)
    expected = act_fn(x)
    expected.backward(grad)
    wide = torch.full((402, 2), float("nan"), dtype=torch.float64)
    activation.grad(grad, POINTS, wide[:, 0])
    fmt = "float32" if name == "gelu_fast" else "float64"  # whose constants have ten digits
    assert_close("value", activation.value(POINTS), expected, fmt)
    assert_close("gradient", wide[:, 0], x.grad, fmt)
    assert wide[:, 1].isnan().all()
    y = POINTS.clone().requires_grad_()  # the definition of experts is differentiated by autograd
    activation.value(y).backward(grad)
    assert_close("gradient by autograd", y.grad, x.grad, fmt)


def test_what_else_modules_hold():
    assert activation_form(F.silu) == "silu" and activation_form(F.gelu) == "gelu"
    assert activation_form(torch.nn.GELU()) == "gelu" and activation_form(torch.nn.GELU("tanh")) == "gelu_tanh"
    assert activation_form(torch.nn.LeakyReLU()) == "leaky_relu" and activation_form(torch.nn.LeakyReLU(0.2)) is None
    assert activation_form(torch.nn.PReLU()) is None and activation_form(lambda x: x) is None
    assert set(FUSED) <= set(ACTIVATIONS)
