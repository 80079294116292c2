"""Multi-token prediction block (DeepSeek-V3 report, section 2.2), under the upstream names."""

import torch
from torch import nn

from .layer_dense import RMSNorm
from .layer_linear import Linear


class SharedHead(nn.Module):
    """The MTP block's output norm and, where a checkpoint brings one that differs from `lm_head`, its own head."""

    def __init__(self, config):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head: nn.Linear | None = None


class MTPMixin:
    """Turns a decoder layer class into an MTP block: `class Block(MTPMixin, DecoderLayer)`.

    The block at depth d joins the state of depth d - 1 (depth 0: the main model's output after its final norm) with
    the embedding of the token d + 1 places ahead, and runs one decoder layer over the result. Embedding table and
    head are the main model's unless the checkpoint's copies differ from them.
    """

    def add_mtp_modules(self, config) -> None:
        """Adds `enorm`, `hnorm`, `eh_proj`, `shared_head` and an unset `embed_tokens`."""
        self.enorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)
        self.embed_tokens: nn.Embedding | None = None

    def join(self, hidden_states: torch.Tensor, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Input of the decoder layer from states and embeddings, both (batch, seq, hidden).

        The embedding comes first: what the released weights expect, though equation 21 of the report writes the
        state first.
        """
        return self.eh_proj(torch.cat((self.enorm(inputs_embeds), self.hnorm(hidden_states)), dim=-1))
