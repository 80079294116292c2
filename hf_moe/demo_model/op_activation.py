"""Activations of the gate in gated experts, by form: value and derivative on tensors.

A form is a name of this file. Several names of Transformers' `ACT2FN` are one form: they round in other places only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers.activations import ACT2CLS

aten = torch.ops.aten
# The forms that the kernels compute.
FUSED = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


class Activation(NamedTuple):
    """`value(x)` is a new tensor; `grad(grad, x, out)` writes `grad` times the derivative at `x` to `out`."""

    value: Callable[[torch.Tensor], torch.Tensor]
    grad: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _scaled(slope: Callable[[torch.Tensor], torch.Tensor]):
    """`Activation.grad` from a derivative."""
    return lambda grad, x, out: torch.mul(grad, slope(x), out=out)


def _quick_gelu_slope(x: torch.Tensor) -> torch.Tensor:
    sigmoid = torch.sigmoid(1.702 * x)
    return sigmoid * (1.0 + 1.702 * x * (1.0 - sigmoid))


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda x: F.gelu(x, approximate=approximate),
        lambda grad, x, out: aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=out),
    )


_LAPLACE_MEAN, _LAPLACE_WIDTH = 0.707107, 0.282095 * math.sqrt(2.0)
ACTIVATIONS = {
    "silu": Activation(F.silu, lambda grad, x, out: aten.silu_backward.grad_input(grad, x, grad_input=out)),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu": Activation(F.relu, _scaled(lambda x: (x > 0).to(x.dtype))),
    "relu2": Activation(lambda x: F.relu(x).square(), _scaled(lambda x: 2.0 * F.relu(x))),
    "gelu_10": Activation(
        lambda x: F.gelu(x).clamp(-10.0, 10.0),
        lambda grad, x, out: aten.gelu_backward.grad_input(grad * (F.gelu(x) <= 10.0), x, grad_input=out),
    ),
    "hardswish": Activation(F.hardswish, lambda grad, x, out: out.copy_(aten.hardswish_backward(grad, x))),
    "laplace": Activation(
        lambda x: 0.5 * (1.0 + torch.erf((x - _LAPLACE_MEAN) / _LAPLACE_WIDTH)),
        _scaled(lambda x: torch.exp(-(((x - _LAPLACE_MEAN) / _LAPLACE_WIDTH) ** 2)) / (_LAPLACE_WIDTH * math.pi**0.5)),
    ),
    "leaky_relu": Activation(F.leaky_relu, _scaled(lambda x: torch.where(x > 0, torch.ones_like(x), 0.01))),
    "linear": Activation(torch.clone, lambda grad, x, out: out.copy_(grad)),
    "mish": Activation(F.mish, lambda grad, x, out: out.copy_(aten.mish_backward(grad, x))),
    "quick_gelu": Activation(lambda x: x * torch.sigmoid(1.702 * x), _scaled(_quick_gelu_slope)),
    "relu6": Activation(F.relu6, _scaled(lambda x: ((x > 0) & (x < 6)).to(x.dtype))),
    "sigmoid": Activation(torch.sigmoid, _scaled(lambda x: torch.sigmoid(x) * torch.sigmoid(-x))),
    "sqrtsoftplus": Activation(
        lambda x: F.softplus(x).sqrt(), _scaled(lambda x: torch.sigmoid(x) / (2.0 * F.softplus(x).sqrt()))
    ),
    "tanh": Activation(torch.tanh, _scaled(lambda x: 1.0 - torch.tanh(x).square())),
}
_ALIASES = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}


def _forms_of_classes() -> dict[type, str]:
    forms = {}
    for name in (*ACTIVATIONS, *_ALIASES):
        entry = ACT2CLS.get(name)
        if entry is not None:
            forms[entry[0] if isinstance(entry, tuple) else entry] = _ALIASES.get(name, name)
    return forms


_FORMS = _forms_of_classes()
_FUNCTIONS = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}


def activation_form(act_fn) -> str | None:
    """The form of a module's activation; `None` for what has parameters of its own or is unknown."""
    if isinstance(act_fn, torch.nn.GELU):
        return "gelu" if act_fn.approximate == "none" else "gelu_tanh"
    if isinstance(act_fn, torch.nn.LeakyReLU) and act_fn.negative_slope != 0.01:
        return None
    if not isinstance(act_fn, torch.nn.Module):
        return _FUNCTIONS.get(act_fn)
    return _FORMS.get(type(act_fn))
