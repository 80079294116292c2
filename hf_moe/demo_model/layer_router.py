"""Routers: hidden states to expert ids and weights. Nothing here knows what an expert does.

Shapes: T tokens, K choices per token, E routed experts, G groups.
"""

from typing import Any

import torch
from torch import nn

from .op_linear import linear, unless_narrowed, without_autocast
from .op_routing import route, weigh_experts

# Choices of more tokens than these are kept in fewer bytes.
_MANY_TOKENS = 4096


class TopkRouter(nn.Module):
    """Top-k router of DeepSeek-V2 (softmax) and DeepSeek-V3 / Kimi-K2 (sigmoid with a correction bias).

    `forward(hidden_states)` takes (..., hidden) and returns `(router_logits, topk_weights, topk_indices)`:
    (T, E) float32, (T, K) float32 and (T, K) int64, the choices unordered. The whole computation is in float32,
    whatever the dtype of the model (DeepSeek-V3 report, section 2.1.2; V2 report, section 2.2).

    `tokens_per_expert`, (E,) int64, holds how many choices each expert received in the last forward pass: what a
    balance controller works from. `token_mask`, (T,) bool, leaves padding out of the count. With gradient
    checkpointing the recomputation counts the same tokens again into the same place, so that reading it after the
    backward pass stays right.
    """

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.n_routed_experts
        self.hidden_size = config.hidden_size
        self.num_group = config.n_group or 1
        self.topk_group = config.topk_group or self.num_group
        self.topk_method = config.topk_method
        self.scoring_func = config.scoring_func
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        if self.topk_method == "noaux_tc":
            # A buffer: moved by the balance rule, never by a gradient. Float32 through casts,
            # too, since rounding reorders routes.
            self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts, dtype=torch.float32))
        else:
            self.e_score_correction_bias = None
        self._last_topk_indices: torch.Tensor | None = None
        self._last_token_mask: torch.Tensor | None = None

    @property
    def tokens_per_expert(self) -> torch.Tensor | None:
        """Choices per expert in the last forward pass, (E,) int64; `None` before the first."""
        if self._last_topk_indices is None:
            return None
        indices = self._last_topk_indices
        if self._last_token_mask is not None:  # padding counts as an expert that is cut off
            indices = indices.masked_fill(~self._last_token_mask.unsqueeze(-1), self.num_experts)
        return torch.bincount(indices.flatten(), minlength=self.num_experts)[: self.num_experts]

    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_states = hidden_states.reshape(-1, self.hidden_size)
        with without_autocast(hidden_states.device.type):
            router_logits = self._project(hidden_states)
        topk_weights, topk_indices = self.route(router_logits)
        if self.training or not torch.compiler.is_compiling():  # a compiled decode step keeps no statistics
            self._last_topk_indices = self._compact(topk_indices.detach())
            self._last_token_mask = token_mask
        return router_logits, topk_weights, topk_indices

    def _compact(self, topk_indices: torch.Tensor) -> torch.Tensor:
        """A long prompt's choices as int16: every layer keeps its own until the next pass."""
        many = topk_indices.shape[0] > _MANY_TOKENS and not self.training
        return topk_indices.to(torch.int16) if many and self.num_experts < 1 << 15 else topk_indices

    def route(self, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, E) logits to weights (T, K) and expert ids (T, K). The bias picks experts, it never weighs them."""
        grouped = self.topk_method != "greedy"
        return route(
            router_logits,
            None if self.e_score_correction_bias is None else self.e_score_correction_bias.float(),
            top_k=self.top_k,
            num_group=self.num_group if grouped else 1,
            topk_group=self.topk_group if grouped else 1,
            best_two=self.topk_method == "noaux_tc",
            **self._weighing(),
        )

    def weigh(self, router_logits: torch.Tensor, topk_indices: torch.Tensor) -> torch.Tensor:
        """Weights (T, K) of a choice that was made before, such as in the pass that checkpointing repeats."""
        return weigh_experts(router_logits, topk_indices, **self._weighing())

    def _project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, hidden) to router logits (T, E) in float32."""
        return linear(hidden_states.float(), self.weight.float())

    def _apply(self, fn, recurse=True):
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias is not None:
            self.e_score_correction_bias = unless_narrowed(bias, self.e_score_correction_bias)
        return self

    def _weighing(self) -> dict[str, Any]:
        """How scores become weights, in the terms of `op_routing`."""
        sigmoid = self.scoring_func == "sigmoid"
        normalise = self.norm_topk_prob and (self.top_k > 1 or sigmoid)
        # V2: normalised weights are not scaled (upstream modeling code).
        factor = 1.0 if normalise and not sigmoid else self.routed_scaling_factor
        return {"sigmoid": sigmoid, "normalise": normalise, "factor": factor}


class SoftmaxRouter(TopkRouter):
    """Top-k router of Step3: softmax over all experts, the K largest, divided by their sum if `norm_topk_prob` is set.

    Inputs, outputs and statistics are those of `TopkRouter`. Unlike V2's, a single choice is normalised, too.
    """

    def __init__(self, config):
        nn.Module.__init__(self)
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.n_routed_experts
        self.hidden_size = config.hidden_size
        self.num_group = self.topk_group = 1
        self.topk_method, self.scoring_func = "greedy", "softmax"
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.e_score_correction_bias = None
        self._last_topk_indices: torch.Tensor | None = None

    def _weighing(self) -> dict[str, Any]:
        return {"sigmoid": False, "normalise": self.norm_topk_prob, "factor": 1.0}


class RouterClassifier(nn.Module):
    """The weight of `ZeroExpertRouter`; no `nn.Linear`, so that nothing that replaces those quantises it."""

    def __init__(self, hidden_size: int, columns: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(columns, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(columns, dtype=torch.float32)) if bias else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, hidden) to (T, columns), in float32 or wider."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return linear(hidden_states.to(wide), self.weight.to(wide), bias)


class ZeroExpertRouter(TopkRouter):
    """Top-k router of LongCat over N real experts and, behind them, Z zero experts (technical report, section 2.1).

    One softmax spans all N + Z columns; the correction bias picks and never weighs; nothing is normalised unless
    `norm_topk_prob` says so; every weight, those of zero experts too, is scaled by `routed_scaling_factor`. Ids of N
    and above are zero experts, and E = N + Z in `forward` and `tokens_per_expert`.

    Weight and bias stay in float32 through `.to(bfloat16)`, `.half()` and their like; only float64 widens them.
    """

    def __init__(self, config):
        nn.Module.__init__(self)
        self.top_k = config.moe_topk
        self.num_real_experts = config.n_routed_experts
        self.num_experts = config.n_routed_experts + config.zero_expert_num
        self.hidden_size = config.hidden_size
        self.num_group = self.topk_group = 1
        self.topk_method, self.scoring_func = "noaux_tc", "softmax"
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.classifier = RouterClassifier(config.hidden_size, self.num_experts, config.router_bias)
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts, dtype=torch.float32))
        self._last_topk_indices: torch.Tensor | None = None
        self._last_token_mask: torch.Tensor | None = None

    @property
    def real_experts_per_token(self) -> torch.Tensor | None:
        """Real experts that each token of the last forward pass went to, (T,) int64; padding has 0."""
        if self._last_topk_indices is None:
            return None
        counts = (self._last_topk_indices < self.num_real_experts).sum(-1)
        return counts if self._last_token_mask is None else counts * self._last_token_mask

    def _project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.classifier(hidden_states)

    def _weighing(self) -> dict[str, Any]:
        return {"sigmoid": False, "normalise": self.norm_topk_prob, "factor": self.routed_scaling_factor}

    def _apply(self, fn, recurse=True):
        return super()._apply(lambda tensor: unless_narrowed(tensor, fn(tensor)), recurse)
