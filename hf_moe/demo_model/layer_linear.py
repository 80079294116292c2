"""The linear layer of all our models: the one place that decides how a weight is multiplied."""

import torch
from torch import nn

from .layer_fp8 import Fp8Module
from .op_fp8 import dequantize, fp8_linear
from .op_linear import linear


class Linear(Fp8Module, nn.Linear):
    """`nn.Linear` whose weight may be block FP8, through the products of `op_linear` and `op_fp8`."""

    fp8_parts = {"weight": 1}

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self.register_scales()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.fp8 is None:
            return linear(hidden_states, self.weight, self.bias)
        quantize = self.quantizes(hidden_states)
        return fp8_linear(hidden_states, self.weight, self.weight_scale_inv, self.fp8, self.bias, quantize=quantize)

    def outputs(self, hidden_states: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Output features `start` to `stop` alone; with FP8 weights, `start` begins a row of blocks."""
        bias = None if self.bias is None else self.bias[start:stop]
        if self.fp8 is None:
            return linear(hidden_states, self.weight[start:stop], bias)
        rows = self.fp8.block_size[0]
        scale = self.weight_scale_inv[start // rows : -(-stop // rows)]
        quantize = self.quantizes(hidden_states)
        return fp8_linear(hidden_states, self.weight[start:stop], scale, self.fp8, bias, quantize=quantize)

    def plain_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The (out, in) weight as it is, or decoded to `dtype` where it is FP8."""
        if self.fp8 is None:
            return self.weight
        return dequantize(self.weight, self.weight_scale_inv, self.fp8, dtype)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.fp8 is None else f", fp8={self.fp8.block_size}")


def use_plain_linears(model: nn.Module) -> None:
    """Turns every `Linear` without FP8 weights, heads excepted, into the `nn.Linear` that it is.

    Some libraries, bitsandbytes among them, replace modules of exactly that class, and pass over those derived from it.
    """
    for module in model.modules():
        if type(module) is Linear and module.fp8 is None:
            del module.weight_scale_inv
            module.__class__ = nn.Linear
