"""LongCat's mixture of experts: real experts, and zero experts that hand the token through."""

from dataclasses import dataclass

import torch
from torch import nn

from .layer_experts import Experts
from .layer_router import ZeroExpertRouter


@dataclass(frozen=True)
class ExpertLoad:
    """Choices of one layer in one forward pass, padding left out.

    `real` (N,) and `zero` (Z,) int64: choices per expert. `tokens`: how many tokens chose. `real_experts_per_token`:
    their average number of real experts, what the balance controller steers.
    """

    real: torch.Tensor
    zero: torch.Tensor
    tokens: int

    @property
    def real_experts_per_token(self) -> float:
        return self.real.sum().item() / max(self.tokens, 1)


class ZeroExpertMoE(nn.Module):
    """Real experts by the shared `Experts`, and zero experts as one scaled addition.

    Parameter names are those of the upstream checkpoints: `router`, `experts`. Zero experts (`zero_expert_type`
    `"identity"`) own no weights and no rows: their ids reach `Experts` as the id behind the last expert, which every
    backend skips. A token's picks of zero experts add their summed weight times the token.
    """

    def __init__(self, config):
        super().__init__()
        self.router = ZeroExpertRouter(config)
        self.experts = Experts(config)
        # What tells Transformers' own backends that ids behind the last expert are to be skipped.
        self.experts._is_expert_parallel = True
        self.num_real_experts = config.n_routed_experts  # of all ranks; `experts` may hold those of one
        self.has_identity = config.zero_expert_num > 0 and config.zero_expert_type == "identity"

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        topk_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, seq, H) to (batch, seq, H), by the routes that `route` gave, or gives if they are left out."""
        if topk_weights is None:
            topk_weights, topk_indices = self.route(hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        is_zero = topk_indices >= self.num_real_experts  # (T, K)
        # Their weights, too: older Transformers take the last expert for an id behind it, at no weight.
        output = self.experts(tokens, self._ids_of_experts(topk_indices), topk_weights.masked_fill(is_zero, 0.0))
        if self.has_identity:
            weight = (topk_weights * is_zero).sum(-1, keepdim=True)  # (T, 1)
            output = torch.addcmul(output, weight, tokens).to(hidden_states.dtype)  # added in float32, rounded once
        return output.view_as(hidden_states)

    def route(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (T, K) float32 and ids (T, K) int64, ids of zero experts included.

        `token_mask`, (batch, seq) bool, leaves padding out of the statistics.
        """
        _, topk_weights, topk_indices = self.router(hidden_states, None if token_mask is None else token_mask.flatten())
        return topk_weights, topk_indices

    def _ids_of_experts(self, topk_indices: torch.Tensor) -> torch.Tensor:
        """(T, K) ids for `experts`, which skips those behind its last expert.

        Where ranks hold different experts, every id must be that of one: tokens are sent to it. Those of zero experts
        then go round, to be multiplied with a weight of zero.
        """
        experts = self.experts
        while not isinstance(experts, Experts) and hasattr(experts, "base_layer"):  # under an adapter
            experts = experts.base_layer
        if experts.num_experts == self.num_real_experts:
            return topk_indices.clamp_max(self.num_real_experts)
        return topk_indices.remainder(self.num_real_experts)

    def load(self) -> ExpertLoad:
        """Choices of the last forward pass.

        Raises:
            ValueError: before the first one.
        """
        counts = self.router.tokens_per_expert
        if counts is None:
            raise ValueError("There is no expert load yet: run a forward pass first.")
        tokens = counts.sum().item() // self.router.top_k
        return ExpertLoad(counts[: self.num_real_experts], counts[self.num_real_experts :], tokens)
