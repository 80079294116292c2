"""Triton kernels of routing: scores to chosen experts, and chosen experts to the layout that the grouped products read.

Nothing here waits for the device, and every launch depends on shapes alone, so that a CUDA graph can hold it.

The layout. A *slot* is one choice of one token: slot t * K + k. Its N slots are sorted by expert, stably, so that the
rows of an expert are neighbours (*sorted rows*), and each expert's rows are cut into *tiles* of at most `block_m` rows.
An id outside 0..E-1 means "no expert": such slots come after the last expert's rows and belong to no tile.

Shapes: T tokens, K choices per token, E experts, N = T * K slots.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .triton_compat import cdiv, jit, jit_for_any, next_power_of_2, tl

# Slots that a program of the layout kernel reads at once.
_CHUNK = 1024
# From so many chunks on they are counted beforehand, and not by each of the programs, as many as there are experts: by
# its instructions, that takes an H100 some 0.4 ms at 8,192 tokens of LongCat-Flash.
_MANY_CHUNKS = 5


class Layout(NamedTuple):
    """Sorted slots, cut into tiles. All int32 and on the device."""

    order: torch.Tensor  # (N,) slot of each sorted row
    offsets: torch.Tensor  # (E + 1,) first sorted row of each expert, then of the slots without one
    tiles: torch.Tensor  # (2, max_tiles): expert, first sorted row; valid below num_tiles
    num_tiles: torch.Tensor  # (1,)
    block_m: int

    @property
    def max_tiles(self) -> int:
        """How many tiles there can be, by shapes alone: what a launch grid is made from."""
        return self.tiles.shape[1]


def most_tiles(num_slots: int, num_experts: int, block_m: int) -> int:
    """Upper bound of the number of tiles, whatever the routing."""
    return min(num_slots, num_experts + num_slots // block_m)


@jit
def _load_ids(ids_ptr, slots, num_slots, E: tl.constexpr):
    """Expert ids of `slots`; E for those that have none."""
    ids = tl.load(ids_ptr + slots, mask=slots < num_slots, other=E)
    return tl.where((ids < 0) | (ids > E), E, ids).to(tl.int32)


@jit_for_any("num_slots")
def count_kernel(
    ids_ptr,  # (N,) any integer type
    counts_ptr,  # (chunks, BINS) int32 slots of each expert
    num_slots,
    E: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    slots = chunk * CHUNK + tl.arange(0, CHUNK)
    counts = tl.histogram(_load_ids(ids_ptr, slots, num_slots, E), BINS, mask=slots < num_slots)
    tl.store(counts_ptr + chunk * BINS + tl.arange(0, BINS), counts)


@jit_for_any("num_slots", "max_tiles")
def layout_kernel(
    ids_ptr,  # (N,) any integer type
    counts_ptr,  # (chunks, BINS) int32 slots of each expert, or unused
    order_ptr,  # (N,) int32
    offsets_ptr,  # (E + 1,) int32
    tiles_ptr,  # (2, max_tiles) int32
    num_tiles_ptr,  # (1,) int32
    num_slots,
    max_tiles,
    E: tl.constexpr,
    BINS: tl.constexpr,  # a power of two above E
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTED: tl.constexpr,
):
    # One program per expert, and one for the slots of none. Each counts all slots (they fit into the cache), or adds
    # the counts of all chunks, then writes the places of its own: no program waits for another, and the order is that
    # of the slots.
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    if COUNTED:
        chunks = tl.cdiv(num_slots, CHUNK)
        for first in range(0, chunks, 4):
            chunk = first + tl.arange(0, 4)[:, None]
            counts += tl.sum(tl.load(counts_ptr + chunk * BINS + bins[None, :], mask=chunk < chunks, other=0), 0)
    else:
        for start in range(0, num_slots, CHUNK):
            slots = start + tl.arange(0, CHUNK)
            counts += tl.histogram(_load_ids(ids_ptr, slots, num_slots, E), BINS, mask=slots < num_slots)
    tiles = tl.where(bins < E, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    count = tl.sum(tl.where(bins == expert, counts, 0))
    first_row = tl.sum(tl.where(bins < expert, counts, 0))
    first_tile = tl.sum(tl.where(bins < expert, tiles, 0))
    tl.store(offsets_ptr + expert, first_row)
    if expert == E:
        tl.store(num_tiles_ptr, tl.sum(tiles))

    if count > 0:
        for tile in range(0, tl.where(expert < E, (count + BLOCK_M - 1) // BLOCK_M, 0)):
            tl.store(tiles_ptr + first_tile + tile, expert)
            tl.store(tiles_ptr + max_tiles + first_tile + tile, first_row + tile * BLOCK_M)
        place = first_row
        for start in range(0, num_slots, CHUNK):
            slots = start + tl.arange(0, CHUNK)
            mine = ((_load_ids(ids_ptr, slots, num_slots, E) == expert) & (slots < num_slots)).to(tl.int32)
            rank = tl.cumsum(mine, 0)  # from 1
            tl.store(order_ptr + place + rank - 1, slots, mask=mine > 0)
            place += tl.sum(mine)


@functools.lru_cache(maxsize=1024)  # all layers ask the same
def _layout_sizes(num_slots: int, num_experts: int, block_m: int) -> tuple[int, list[int], int, int, int]:
    """Most tiles; elements of the four parts of a layout, each with what is left free behind it; slots that a program
    reads at once, how many such chunks there are, and bins of counts."""
    max_tiles = most_tiles(num_slots, num_experts, block_m)
    sizes = num_slots, num_experts + 1, 2 * max_tiles, 1
    chunk = _CHUNK if num_slots > 64 else 64
    bins = next_power_of_2(num_experts + 1)
    return max_tiles, [part for size in sizes for part in (size, -size % 4)], chunk, cdiv(num_slots, chunk), bins


def build_layout(topk_indices: torch.Tensor, num_experts: int, block_m: int) -> Layout:
    """The layout of (T, K) integer expert ids, T * K > 0."""
    ids = topk_indices.contiguous()
    num_slots, device, counts = ids.numel(), ids.device, None
    max_tiles, sizes, chunk, chunks, bins = _layout_sizes(num_slots, num_experts, block_m)
    # One allocation for the four parts. Each begins at a multiple of 16 bytes: kernels are compiled anew for others.
    parts = torch.empty(sum(sizes), dtype=torch.int32, device=device).split_with_sizes(sizes)
    layout = Layout(parts[0], parts[2], parts[4].view(2, max_tiles), parts[6], block_m)
    if chunks >= _MANY_CHUNKS:
        counts = torch.empty(chunks, bins, dtype=torch.int32, device=device)
        count_kernel[(chunks,)](ids, counts, num_slots, E=num_experts, BINS=bins, CHUNK=chunk, num_warps=4)
    layout_kernel[(num_experts + 1,)](
        ids,
        counts,
        *layout[:4],
        num_slots,
        max_tiles,
        E=num_experts,
        BINS=bins,
        BLOCK_M=block_m,
        CHUNK=chunk,
        COUNTED=counts is not None,
        num_warps=4,
    )
    return layout


@jit
def _first_largest(values, indices, axis: tl.constexpr):
    """Largest value and the smallest index that holds it, along `axis`."""
    largest = tl.max(values, axis)
    at = tl.min(tl.where(values == tl.expand_dims(largest, axis), indices, 2147483647), axis)
    return largest, at


@jit
def topk_kernel(
    logits_ptr,  # (T, E) float32
    bias_ptr,  # (E,) float32, or unused
    weights_ptr,  # (T, K) float32
    indices_ptr,  # (T, K) int64
    factor,  # of the weights
    E: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,  # groups that stay; GROUPS if all do
    BEST_TWO: tl.constexpr,  # a group counts as the sum of its two best experts, instead of as its best
    SIGMOID: tl.constexpr,  # instead of softmax
    NORMALISE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,  # experts of a group
    BLOCK_K: tl.constexpr,
):
    # One program per token; experts as (groups, members).
    token = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = E // GROUPS
    groups = tl.arange(0, BLOCK_G)
    members = tl.arange(0, BLOCK_S)
    experts = groups[:, None] * size + members[None, :]  # (BLOCK_G, BLOCK_S)
    valid = (groups[:, None] < GROUPS) & (members[None, :] < size)
    logits = tl.load(logits_ptr + token * E + experts, mask=valid, other=-float("inf"))
    if SIGMOID:
        scores = 1 / (1 + tl.exp(-logits))
    else:
        powers = tl.exp(logits - tl.max(tl.max(logits, 1), 0))
        scores = powers / tl.sum(tl.sum(powers, 1), 0)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + experts, mask=valid, other=0.0)
    choice = tl.where(valid & (choice == choice), choice, -float("inf"))  # NaN is never chosen before a number

    if TOPK_GROUP < GROUPS:
        group_scores, best = _first_largest(choice, members[None, :], 1)
        if BEST_TWO and size > 1:
            group_scores += tl.max(tl.where(members[None, :] == best[:, None], -float("inf"), choice), 1)
        group_scores = tl.where(groups < GROUPS, group_scores, -float("inf"))
        kept = tl.zeros((BLOCK_G,), tl.int32)
        for _ in tl.static_range(TOPK_GROUP):
            _, group = _first_largest(tl.where(kept > 0, -float("inf"), group_scores), groups, 0)
            kept = tl.where(groups == group, 1, kept)
        choice = tl.where(kept[:, None] > 0, choice, -float("inf"))

    ks = tl.arange(0, BLOCK_K)
    weights = tl.zeros((BLOCK_K,), tl.float32)
    for k in tl.static_range(K):
        row_best, row_at = _first_largest(choice, experts, 1)
        _, expert = _first_largest(row_best, row_at, 0)
        # The smallest index among the rows that hold the largest value: rows are in the order of their experts.
        expert = tl.minimum(expert, E - 1)
        here = experts == expert
        weight = tl.sum(tl.sum(tl.where(here & valid, scores, 0.0), 1), 0)  # the bias picks, it never weighs
        weights = tl.where(ks == k, weight, weights)
        tl.store(indices_ptr + token * K + k, expert.to(tl.int64))
        choice = tl.where(here, -float("inf"), choice)
    if NORMALISE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    tl.store(weights_ptr + token * K + ks, weights * factor, mask=ks < K)


def choose_experts(
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
    """(T, E) float32 logits to weights (T, K) float32 and indices (T, K) int64, best first."""
    tokens, num_experts = logits.shape
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    indices = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    if tokens:
        topk_kernel[(tokens,)](
            logits.contiguous(),
            bias,
            weights,
            indices,
            factor,
            E=num_experts,
            K=top_k,
            GROUPS=num_group,
            TOPK_GROUP=topk_group,
            BEST_TWO=best_two,
            SIGMOID=sigmoid,
            NORMALISE=normalise,
            HAS_BIAS=bias is not None,
            BLOCK_G=next_power_of_2(num_group),
            BLOCK_S=next_power_of_2(num_experts // num_group),
            BLOCK_K=next_power_of_2(top_k),
            num_warps=1 if num_experts <= 64 else 4,
        )
    return weights, indices
