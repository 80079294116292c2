"""Routed experts with fused weights, and the MoE block that joins router, experts and shared experts."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .layer_dense import GatedMLP
from .layer_fp8 import Fp8Module
from .layer_router import TopkRouter
from .op_expert_lora import ExpertLora
from .op_fp8 import fp8_linear
from .op_moe import BACKEND_NAME, LoraBackends  # noqa: F401  importing registers the backend with Transformers


@use_experts_implementation(experts_interface=LoraBackends())
class Experts(Fp8Module):
    """E gated experts in two stacked parameters: `gate_up_proj` (E, 2I, H), gate rows first, and `down_proj` (E, H, I).

    `forward(hidden_states, topk_indices, topk_weights)` takes (T, H), (T, K) and (T, K) and returns (T, H). The
    decorator sends the call to the backend that the configuration names (`set_experts_implementation`); the method
    below is the definition, `"eager"`. `lora`, a keyword argument, holds low-rank factors that go along.

    Both parameters may be block FP8, with scales `gate_up_proj_scale_inv` (E, 2 ceil(I / rows), ceil(H / cols)), those
    of the gate first, and `down_proj_scale_inv` (E, ceil(H / rows), ceil(I / cols)).
    """

    fp8_parts = {"gate_up_proj": 2, "down_proj": 1}
    lora_class = ExpertLora  # what `forward` takes as `lora`; a bundle's modules name their own copy
    local_lora: ExpertLora | None = None  # the same where the call goes through others, who would not pass it on

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]
        self.register_scales()

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_indices: torch.Tensor,
        topk_weights: torch.Tensor,
        lora: ExpertLora | None = None,
    ) -> torch.Tensor:
        return self.define(hidden_states, topk_indices, topk_weights, lora)

    def define(self, hidden_states, topk_indices, topk_weights, lora: ExpertLora | None = None) -> torch.Tensor:
        """`forward` in plain steps, whatever the backend."""
        lora = lora or ExpertLora()
        output = torch.zeros_like(hidden_states)
        for factor in lora.factors:
            if factor is not None:  # takes part in the backward pass also where no expert has rows
                output = output + factor[:0].sum().to(output.dtype)
        for expert in topk_indices.unique().tolist():
            if expert >= self.num_experts:  # under expert parallelism: an expert of another rank
                continue
            token, choice = torch.where(topk_indices == expert)
            rows = hidden_states[token]
            pre = lora.add(self._multiply(rows, "gate_up_proj", expert), rows, "gate_up", expert, token)
            gate, up = pre.chunk(2, dim=-1)
            inner = self.act_fn(gate) * up
            slots = token * topk_indices.shape[1] + choice
            expert_output = lora.add(self._multiply(inner, "down_proj", expert), inner, "down", expert, slots)
            weighted = expert_output * topk_weights[token, choice].unsqueeze(-1)
            output = output.index_add(0, token, weighted.to(output.dtype))
        return output

    def _multiply(self, rows: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        weight = getattr(self, name)[expert]
        if self.fp8 is None:
            return F.linear(rows, weight)
        scale = getattr(self, f"{name}_scale_inv")[expert]
        return fp8_linear(rows, weight, scale, self.fp8, parts=self.fp8_parts[name], quantize=self.quantizes(rows))

    def extra_repr(self) -> str:
        sizes = f"experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}"
        return sizes + ("" if self.fp8 is None else f", fp8={self.fp8.block_size}")


class MoE(nn.Module):
    """Routed experts plus shared experts; the shared ones are added as they are, never scaled.

    Parameter names are those of the upstream checkpoints: `gate`, `experts`, `shared_experts` (one wide MLP).
    """

    def __init__(self, config):
        super().__init__()
        self.gate = TopkRouter(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = GatedMLP(config.hidden_size, width, config.hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, seq, H) to (batch, seq, H)."""
        _, topk_weights, topk_indices = self.gate(hidden_states)
        tokens = hidden_states.view(-1, hidden_states.shape[-1])  # (T, H)
        output = self.experts(tokens, topk_indices, topk_weights).view_as(hidden_states)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)
        return output
