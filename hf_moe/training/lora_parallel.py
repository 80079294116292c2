"""LoRA on experts that several ranks share out (expert parallelism).

Every rank holds the factors of all experts, which are small, and uses those of its own. In the backward pass the
gradients of all ranks are summed, so that the factors, and what an optimiser makes of them, stay the same everywhere.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


class _OwnExperts(torch.autograd.Function):
    """(E, ...) factors to those of this rank's experts; the gradient is that of all ranks."""

    @staticmethod
    def forward(ctx, factors: torch.Tensor, start: int, stop: int, group):
        ctx.shape, ctx.start, ctx.stop, ctx.group = factors.shape, start, stop, group
        return factors[start:stop].contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        whole = grad.new_zeros(ctx.shape)
        whole[ctx.start : ctx.stop] = grad
        dist.all_reduce(whole, group=ctx.group)
        return whole, None, None, None


def check_sharding(experts: nn.Module) -> None:
    """Raises `ValueError` for experts of which every rank has a part: factors belong to whole ones."""
    weight = experts._parameters["down_proj"]
    if any(getattr(placement, "dim", 0) % weight.ndim for placement in getattr(weight, "placements", ())):
        raise ValueError(
            "LoRA on experts needs whole experts, and tensor parallelism has cut them: share them out with "
            "`DistributedConfig(tp_size=N, ep_size=N)`."
        )


def is_shared_out(experts: nn.Module) -> bool:
    """Whether the stacks of `experts` are sharded by expert."""
    weight = experts._parameters["down_proj"]
    return isinstance(weight, DTensor) and getattr(experts, "_is_hooked", False)


def call_with_own_factors(experts: nn.Module, hidden_states: torch.Tensor, *args: torch.Tensor, lora) -> torch.Tensor:
    """`experts(hidden_states, *args)` of sharded experts, with the factors of all experts in `lora`.

    Raises:
        ValueError: for dropout, whose masks would have to travel with the tokens.
    """
    if lora.dropout:
        raise ValueError("LoRA on experts under expert parallelism has no dropout: set `lora_dropout=0`.")
    weight = experts._parameters["down_proj"]
    mesh = weight.device_mesh
    if mesh.ndim != 1:
        raise ValueError("LoRA on experts needs experts that are sharded over one dimension of devices.")
    count = weight.to_local().shape[0]
    start, group = mesh.get_local_rank() * count, mesh.get_group()
    names = ("gate_up_a", "gate_up_b", "down_a", "down_b")
    own = {
        name: _OwnExperts.apply(getattr(lora, name), start, start + count, group)
        for name in names
        if getattr(lora, name) is not None
    }
    # What Transformers puts around the experts passes tokens, ids and weights only.
    experts.local_lora = replace(lora, **own)
    try:
        return experts(hidden_states, *args)
    finally:
        experts.local_lora = None
