"""Rotary position embedding with YaRN, in the pairwise layout of the upstream checkpoints.

Frequencies come from Transformers' RoPE functions (plain, linear, dynamic NTK, Llama 3 and YaRN, arXiv 2309.00071).
The rotary dimensions are interleaved pairs (0, 1), (2, 3), ...: the rotation below turns the pairs where they stand, so
cached keys keep the upstream order.
"""

import math

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .op_linear import unless_narrowed


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles.

    `forward(hidden_states, position_ids)` takes `position_ids` (batch, seq) and returns `(cos, sin)`, each
    (batch, seq, rotary_dim / 2) in the dtype of `hidden_states`. Angles are computed in float32, and frequencies stay
    in it through `.to(bfloat16)`, `.half()` and their like. YaRN's attention factor, g(mscale) / g(mscale_all_dim), is
    in both.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        self.rope_init_fn = (
            self.compute_default_rope_parameters if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        )
        inv_freq, self.attention_scaling = self.rope_init_fn(config)
        if self.rope_type == "yarn" and config.rope_parameters.get("attention_factor") is None:
            # Transformers' function goes by its own rule where only one of the two keys is given.
            self.attention_scaling = _yarn_gain(config.rope_parameters, "mscale", 1.0)
            self.attention_scaling /= _yarn_gain(config.rope_parameters, "mscale_all_dim", 0.0)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Plain RoPE: `theta ** (-2 j / rotary_dim)`, shape (rotary_dim / 2,), and an attention factor of 1."""
        rotary_dim = config.head_dim  # what Transformers' own functions read; MLA's configurations mean its rotary part
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float, device=device)
        return config.rope_parameters["rope_theta"] ** (-exponents / rotary_dim), 1.0

    def _apply(self, fn, recurse=True):
        # Rounded to bfloat16 they would turn position 1,000 by up to three radians too much or too little.
        return super()._apply(lambda tensor: unless_narrowed(tensor, fn(tensor)), recurse)

    @torch.no_grad()
    @dynamic_rope_update  # recomputes the frequencies of "dynamic" when a longer sequence arrives
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inv_freq = self.inv_freq.to(device=hidden_states.device, dtype=torch.float32)
        angles = position_ids[..., None].float() * inv_freq  # (batch, seq, rotary_dim / 2)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate_interleaved(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (0, 1), (2, 3), ... of the last dimension.

    Args:
        states: (batch, seq, heads, rotary_dim).
        cos, sin: (batch, seq, rotary_dim / 2), as `RotaryEmbedding` returns them.
    """
    even, odd = states.view(*states.shape[:-1], -1, 2).unbind(-1)  # each (batch, seq, heads, rotary_dim / 2)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def rotate_halves(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As `rotate_interleaved`, for checkpoints whose pairs are (j, j + rotary_dim / 2) (`rope_interleave: false`)."""
    first, second = states.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def yarn_softmax_gain(rope_parameters: dict) -> float:
    """Factor g(mscale_all_dim) ** 2 on the softmax scale, g(m) = 0.1 m ln(factor) + 1; 1 without YaRN.

    It is static: it applies to short prompts too.
    """
    if rope_parameters["rope_type"] == "default":
        return 1.0
    return _yarn_gain(rope_parameters, "mscale_all_dim", 0.0) ** 2


def _yarn_gain(rope_parameters: dict, key: str, default: float) -> float:
    """g(m) of a key that the upstream code gives a default."""
    mscale, factor = rope_parameters.get(key), rope_parameters.get("factor") or 1.0
    mscale = default if mscale is None else mscale
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
