"""The gate's activation inside the experts' kernels: its value, and with it its derivative.

`ACTIVATION` is one of `op_activation.FUSED`, whose entries in `op_activation.ACTIVATIONS` are the definition.
"""

from __future__ import annotations

from .triton_compat import jit, tl


@jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@jit
def gelu_cdf(x):
    """The standard normal distribution's, up to `x`."""
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476))


@jit
def limit_gate(gate, up, LIMIT: tl.constexpr):
    """Gate up to LIMIT and up between -LIMIT and LIMIT; what is no number stays so."""
    gate = tl.where(gate > LIMIT, LIMIT, gate)
    up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return gate, up


@jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of float32 values."""
    if ACTIVATION == "gelu":
        value = x * gelu_cdf(x)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        value = x / (1 + tl.exp(-x * (1.5957691216057308 + 0.07135481627159521 * x * x)))
    elif ACTIVATION == "relu":
        value = tl.where(x < 0, 0.0, x)  # what is no number stays so
    elif ACTIVATION == "relu2":
        root = tl.where(x < 0, 0.0, x)
        value = root * root
    else:
        tl.static_assert(ACTIVATION == "silu")
        value = x / (1 + tl.exp(-x))
    return value


@jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """The activation of float32 values, and its derivative there."""
    if ACTIVATION == "gelu":
        share = gelu_cdf(x)
        value = x * share
        slope = share + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACTIVATION == "gelu_tanh":
        share = sigmoid(x * (1.5957691216057308 + 0.07135481627159521 * x * x))
        value = x * share
        slope = share + value * (1 - share) * (1.5957691216057308 + 0.21406444881478564 * x * x)
    elif ACTIVATION == "relu":
        value = tl.where(x < 0, 0.0, x)
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        root = tl.where(x < 0, 0.0, x)
        value = root * root
        slope = 2 * root
    else:
        tl.static_assert(ACTIVATION == "silu")
        share = sigmoid(x)
        value = x * share
        slope = share * (1 + x * (1 - share))
    return value, slope
