"""The tiles that products with the experts' weights, and with FP8 ones of dense layers, are launched with."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch

# How a kernel reads a weight.
PLAIN, FP8, FP8_BITS = 0, 1, 2
SCALE_BLOCK = 128
# What is tried instead of what is shipped, by the name of a launch.
_TRIED: dict[str, object] = {}


class Tile(NamedTuple):
    """What one program computes at a time: rows x columns of the product in steps of the inner dimension."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    per_processor: int  # programs of a persistent launch on each multiprocessor; 0: one program per tile


@contextlib.contextmanager
def trying(**choices):
    """Within, launches of these names take these tiles, or numbers of splits, instead of the shipped ones, or what a
    function makes of the shipped ones: for sweeps.

    `benchmarks/gpu/tune.py` names them all. The tile of an experts' product has as many rows as its layout.
    """
    before = dict(_TRIED)
    _TRIED.update(choices)
    try:
        yield
    finally:
        _TRIED.clear()
        _TRIED.update(before)


def chosen(name: str, shipped):
    """What a launch takes: the tile (or number of splits) that is tried, or the shipped one."""
    tried = _TRIED.get(name, shipped)
    return tried(shipped) if callable(tried) else tried


def tile_rows(num_slots: int, num_experts: int, dtype: torch.dtype) -> int:
    """Rows of a tile, from the mean number of rows per expert."""
    mean = num_slots / num_experts
    if mean <= 16:
        return 16
    return 64 if mean <= 64 or dtype == torch.float32 else 128


@functools.lru_cache(maxsize=256)  # of a handful: a decode step asks for each layer
def product_tile(block_m: int, dtype: torch.dtype, weight: int, capability: tuple[int, int]) -> Tile:
    """The shipped tile for `block_m` rows of `dtype` and a weight that is read as `weight`.

    A program keeps `stages` steps of both operands in shared memory: at most 163 KiB on compute capability 8.0, 99 KiB
    on 8.6, 8.9 and 12.0, 227 KiB on 9.0 and 10.0.
    """
    small_memory = capability in ((8, 6), (8, 9)) or capability[0] == 12
    if dtype == torch.float32:
        return Tile(16, 64, 32, 4, 3, 0) if block_m == 16 else Tile(block_m, 64, 32, 8, 3, 1)
    if block_m == 16:
        # A step reads 64 weight rows of 256 bytes (128 in FP8); the programs of a multiprocessor keep ~100 KiB coming.
        return Tile(16, 64, 128, 4, 3 if small_memory else 4, 0)
    large_memory = capability[0] in (9, 10)
    if dtype == torch.float8_e4m3fn:  # a step spans a block of scales
        if block_m == 64:
            return Tile(64, 128, 128, 4, 2 if small_memory else 3, 2)
        # Such a step takes an H100 0.3 us, and memory twice as long to answer: four of them lie between.
        return Tile(128, 128, 128, 8, 2 if small_memory else 6 if large_memory else 3, 1)
    if weight != PLAIN:
        if block_m == 64:  # so few rows wait for weights: where there is room for it, 64 KiB of them are coming
            return Tile(64, 128, 128 if large_memory else 64, 4, 3, 2)
        return Tile(128, 128, 64, 8, 5 if large_memory else 3, 1)
    if block_m == 64:
        return Tile(64, 128, 64, 8 if capability[0] == 8 else 4, 3, 2)
    if capability[0] == 8 or small_memory:
        return Tile(128, 128, 64 if not small_memory else 32, 8, 3, 1)
    return Tile(128, 256, 64, 8, 4, 1)
