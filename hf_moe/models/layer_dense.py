"""RMSNorm and the gated MLP, shared by every family."""

import math

import torch
from torch import nn
from transformers.activations import ACT2FN

from .layer_linear import Linear

# Elements of each of the three inner tensors that an MLP holds at a time without gradients, on the CPU and elsewhere: a
# prompt of 16,384 tokens has 300 million of each in the dense layers of DeepSeek-V3. On the CPU it is faster besides,
# since they stay in the cache: 8,192 tokens of 512 x 2,048 in bfloat16 with one thread, 142 instead of 206 ms.
_INNER_ELEMENTS_CPU, _INNER_ELEMENTS = 1 << 22, 1 << 27
_MIN_TOKENS = 512


class RMSNorm(nn.Module):
    """Root mean square norm in float32, cast back to the input's dtype before the weight is applied."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = nn.functional.rms_norm(hidden_states.float(), self.weight.shape, eps=self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` without biases; the dense layers and the shared experts."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[hidden_act]
        self.intermediate_size = intermediate_size

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden) to (..., hidden); without gradients, a long prompt some tokens at a time."""
        tokens = hidden_states.numel() // hidden_states.shape[-1]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or tokens <= _MIN_TOKENS:
            return self._multiply(hidden_states)
        step = self._tokens_at_a_time(hidden_states.device)
        if tokens <= step:
            return self._multiply(hidden_states)
        output, pieces = None, hidden_states.reshape(tokens, -1).split(step)
        for index, piece in enumerate(pieces):
            part = self._multiply(piece)
            if output is None:  # under autocast its dtype is not that of the input
                output = part.new_empty(tokens, part.shape[-1])
            output[index * step : index * step + len(part)] = part
        return output.view_as(hidden_states)

    def _multiply(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))

    def _tokens_at_a_time(self, device: torch.device) -> float:
        if hasattr(self.gate_proj, "_hf_hook"):  # offloaded weights would be fetched for every part
            return math.inf
        elements = _INNER_ELEMENTS_CPU if device.type == "cpu" else _INNER_ELEMENTS
        return max(_MIN_TOKENS, elements // self.intermediate_size)
