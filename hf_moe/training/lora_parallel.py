"""LoRA on experts that several ranks share out: whole ones (expert parallelism), or a part of the inner width of each
(tensor parallelism).

Every rank holds the factors of all experts, which are small, and uses what belongs to its own weights. A product is
linear in what ranks have apart: with the inner width cut, B of gate and up has rows less and A of down columns, and the
sum of the ranks' outputs, which Transformers takes anyway, is the whole. In the backward pass the gradients of all
ranks are summed, so that the factors, and what an optimiser makes of them, stay the same everywhere.

Shapes: E experts, H hidden, I intermediate, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

_ALL = slice(None)
_UNSUITED = (
    "LoRA on experts whose inner width tensor parallelism does not cut evenly, or not by the plan of the model, is not "
    "supported: share out whole experts by `DistributedConfig(tp_size=N, ep_size=N)`, or use another number of ranks."
)


@dataclass(frozen=True)
class Share:
    """What a rank has of experts: some of them, or of each a part of its inner width."""

    experts: slice
    inner: slice
    group: dist.ProcessGroup | None = None

    def place(self, name: str) -> tuple[slice, ...]:
        """Where the rank's part of a factor is: of `gate_up_b` as (E, 2, I, R), gate and up apart."""
        places = {"gate_up_b": (self.experts, _ALL, self.inner), "down_a": (self.experts, _ALL, self.inner)}
        return places.get(name, (self.experts,))


class _OwnPart(torch.autograd.Function):
    """Factors to the part of this rank; the gradient is that of all ranks."""

    @staticmethod
    def forward(ctx, factors: torch.Tensor, place: tuple[slice, ...], group):
        ctx.shape, ctx.place, ctx.group = factors.shape, place, group
        return factors[place].contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        whole = grad.new_zeros(ctx.shape)
        whole[ctx.place] = grad
        dist.all_reduce(whole, group=ctx.group)
        return whole, None, None


def check_sharding(experts: nn.Module) -> None:
    """Raises `ValueError` for experts that are cut in a way that factors cannot follow."""
    if is_shared_out(experts):
        share_of(experts)


def is_shared_out(experts: nn.Module) -> bool:
    """Whether ranks share out the stacks of `experts`, and have their own part while they run (unlike with FSDP2)."""
    weight = experts._parameters["down_proj"]
    return isinstance(weight, DTensor) and getattr(experts, "_is_hooked", False)


def share_of(experts: nn.Module) -> Share:
    """What this rank has of experts that are shared out.

    Raises:
        ValueError: for a layout that factors cannot follow.
    """
    gate_up, down = (experts._parameters[name] for name in ("gate_up_proj", "down_proj"))
    mesh = down.device_mesh
    if mesh.ndim != 1:
        raise ValueError("LoRA on experts needs experts that are sharded over one dimension of devices.")
    (cut,), (packed,) = down.placements, gate_up.placements
    dims = [getattr(placement, "dim", None) for placement in (packed, cut)]
    size, rank, group = mesh.size(), mesh.get_local_rank(), mesh.get_group()
    if dims == [0, 0]:
        count = down.to_local().shape[0]
        return Share(slice(rank * count, (rank + 1) * count), _ALL, group)
    by_inner = dims[1] is not None and dims[1] % 3 == 2 and dims[0] is not None and dims[0] % 3 == 1
    width = down.to_local().shape[2]
    even = width * size == down.shape[2] and gate_up.to_local().shape[1] == 2 * width
    if not by_inner or not even or getattr(packed, "split_factor", 1) != 2 or getattr(experts, "unpadded_shapes", None):
        raise ValueError(_UNSUITED)
    return Share(_ALL, slice(rank * width, (rank + 1) * width), group)


def own_factors(share: Share, name: str, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of this rank of A (E, R, I) and B (E, O, R) of a weight, `"gate_up"` or `"down"`; differentiable."""
    a = _OwnPart.apply(a, share.place(f"{name}_a"), share.group)
    if name == "down":
        return a, _OwnPart.apply(b, share.place("down_b"), share.group)
    return a, _OwnPart.apply(b.unflatten(1, (2, -1)), share.place("gate_up_b"), share.group).flatten(1, 2)


def call_with_own_factors(experts: nn.Module, hidden_states: torch.Tensor, *args: torch.Tensor, lora) -> torch.Tensor:
    """`experts(hidden_states, *args)` of experts that are shared out, with the factors of all experts in `lora`.

    Raises:
        ValueError: for dropout, whose masks would have to be the same, or travel with the tokens.
    """
    if lora.dropout:
        raise ValueError("LoRA on experts that are shared out has no dropout: set `lora_dropout=0`.")
    share, own = share_of(experts), {}
    for name in ("gate_up", "down"):
        a, b = (getattr(lora, f"{name}_{letter}") for letter in "ab")
        if a is not None:
            own[f"{name}_a"], own[f"{name}_b"] = own_factors(share, name, a, b)
    # What Transformers puts around the experts passes tokens, ids and weights only.
    experts.local_lora = replace(lora, **own)
    try:
        return experts(hidden_states, *args)
    finally:
        experts.local_lora = None
