"""Routing as operations on tensors: scores to weights and expert ids, and expert ids to the sorted layout.

The twins are the definitions and the CPU path; the kernels of `kernel_routing` do the same on a device.

Shapes: T tokens, K choices per token, E experts, G groups, N = T * K slots.
"""

from __future__ import annotations

import torch

from .kernel_routing import Layout, build_layout, choose_experts, most_tiles
from .triton_compat import on_device, runs_kernels


def choose_experts_torch(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    top_k: int,
    num_group: int,
    topk_group: int,
    best_two: bool,
    sigmoid: bool,
    normalise: bool,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `choose_experts`, also where its gradient comes from. Weights are those of `weigh_experts`."""
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    with torch.no_grad():
        choice = (scores if bias is None else scores + bias).nan_to_num(float("-inf"), float("inf"), float("-inf"))
        if topk_group < num_group:
            groups = choice.unflatten(-1, (num_group, -1))  # (T, G, E / G)
            if best_two:
                group_scores = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
            else:
                group_scores = groups.amax(-1)
            kept = torch.zeros_like(group_scores, dtype=torch.bool)
            kept.scatter_(-1, group_scores.topk(topk_group, dim=-1, sorted=False).indices, True)
            # Not 0: a biased score can be negative, and a masked expert must never beat it.
            choice = groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
        indices = choice.topk(top_k, dim=-1).indices
    return _weigh(scores, indices, normalise, factor), indices


def weigh_experts(
    logits: torch.Tensor, indices: torch.Tensor, *, sigmoid: bool, normalise: bool, factor: float
) -> torch.Tensor:
    """Weights (T, K) of chosen experts: their plain scores, normalised to a sum of 1 if asked, times `factor`."""
    return _weigh(logits.sigmoid() if sigmoid else logits.softmax(-1), indices, normalise, factor)


def _weigh(scores: torch.Tensor, indices: torch.Tensor, normalise: bool, factor: float) -> torch.Tensor:
    scores = scores.gather(-1, indices)
    if normalise:
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    return scores if factor == 1.0 else scores * factor


class _ChooseExperts(torch.autograd.Function):
    """The kernel, with the gradient of `weigh_experts`: the choice itself has none."""

    @staticmethod
    def forward(ctx, logits, bias, choice: dict, weighing: dict):
        weights, indices = choose_experts(logits, bias, **choice, **weighing)
        ctx.save_for_backward(logits, indices)
        ctx.weighing = weighing
        ctx.mark_non_differentiable(indices)
        return weights, indices

    @staticmethod
    def backward(ctx, grad_weights, _):
        logits, indices = ctx.saved_tensors
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            weights = weigh_experts(logits, indices, **ctx.weighing)
        return torch.autograd.grad(weights, logits, grad_weights)[0], None, None, None


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    top_k: int,
    num_group: int = 1,
    topk_group: int = 1,
    best_two: bool = True,
    sigmoid: bool = True,
    normalise: bool = True,
    factor: float = 1.0,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert choice of DeepSeek-V3, V2 and relatives in one kernel.

    Args:
        logits: (T, E) float32.
        bias: (E,) float32, added to the scores for the choice alone.
        num_group, topk_group: experts are cut into `num_group` groups, of which `topk_group` stay.
        best_two: a group counts as the sum of its two best experts (DeepSeek-V3), instead of as its best (V2).
        sigmoid: scores are sigmoids, instead of a softmax over the experts.
        normalise: the chosen scores are divided by their sum; then multiplied with `factor`.
        impl: `"triton"` or `"torch"`; by the device if not given.

    Returns weights (T, K) float32, differentiable in `logits`, and indices (T, K) int64, best first.

    Raises:
        ValueError: if the groups do not divide the experts, or there are fewer than `top_k` of these.
    """
    num_experts = logits.shape[-1]
    if num_experts % num_group or not 0 < topk_group <= num_group:
        raise ValueError(f"{num_experts} experts in {num_group} groups, {topk_group} of which stay: not possible")
    if not 0 < top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, and there are {num_experts} experts")
    choice = {"top_k": top_k, "num_group": num_group, "topk_group": topk_group, "best_two": best_two}
    weighing = {"sigmoid": sigmoid, "normalise": normalise, "factor": factor}
    if impl is None:
        on_kernel = logits.is_cuda and logits.dtype == torch.float32 and runs_kernels(logits.device)
        # Where the groups that stay hold too few, native routers go on with the others, which the kernel does not.
        on_kernel = on_kernel and top_k <= num_experts // num_group * topk_group
        impl = "triton" if on_kernel and not torch.compiler.is_compiling() else "torch"
    if impl == "torch":
        return choose_experts_torch(logits, bias, **choice, **weighing)
    with on_device(logits):
        return _ChooseExperts.apply(logits, bias, choice, weighing)


def build_layout_torch(topk_indices: torch.Tensor, num_experts: int, block_m: int) -> Layout:
    """The definition of `build_layout`: slots sorted by expert, cut into tiles of at most `block_m` rows."""
    ids = topk_indices.flatten().long()
    ids = ids.where((ids >= 0) & (ids < num_experts), num_experts)
    counts = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()  # (E + 1,)
    per_expert = (counts + block_m - 1) // block_m
    experts = torch.arange(num_experts, device=ids.device).repeat_interleave(per_expert)  # (number of tiles,)
    within = torch.arange(len(experts), device=ids.device) - (per_expert.cumsum(0) - per_expert)[experts]
    tiles = topk_indices.new_zeros(2, most_tiles(len(ids), num_experts, block_m), dtype=torch.int32)
    tiles[0, : len(experts)] = experts
    tiles[1, : len(experts)] = offsets[experts] + within * block_m
    num_tiles = torch.tensor([len(experts)], dtype=torch.int32, device=ids.device)
    return Layout(ids.argsort(stable=True).int(), offsets, tiles, num_tiles, block_m)


def expert_layout(topk_indices: torch.Tensor, num_experts: int, block_m: int, impl: str | None = None) -> Layout:
    """Layout of (T, K) expert ids; ids outside 0..E-1 belong to no expert."""
    kernel = runs_kernels(topk_indices.device) if impl is None else impl == "triton"
    return (build_layout if kernel else build_layout_torch)(topk_indices, num_experts, block_m)
