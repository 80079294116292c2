"""What the compiler's word on a launch says about how it will run, without running it.

A GPU is kept busy by what is in flight on it: at `BANDWIDTH`, and `LATENCY` from asking for bytes until they are there,
`bytes_needed` have to be on their way to each multiprocessor. Products cannot beat the rooflines of arithmetic and of
the bytes that have to be read, whichever tile they take; and rows that fill up a tile are multiplied for nothing.
"""

import math
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """Figures of an H100 SXM from its data sheet, and of one multiprocessor."""

    processors: int = 132
    shared: int = 228 * 1024  # of which every program takes 1 KiB more than it asks for
    registers: int = 65536
    warps: int = 64
    bandwidth: float = 3.35e12
    latency: float = 750e-9  # of memory under load
    bfloat16: float = 989e12
    float8: float = 1979e12

    @property
    def bytes_needed(self) -> float:
        """In flight on a multiprocessor, on average, while the whole GPU reads at its bandwidth."""
        return self.bandwidth * self.latency / self.processors


H100 = Gpu()


def programs_per_processor(usage: dict, gpu: Gpu = H100) -> int:
    """How many programs of a launch fit on a multiprocessor: `registers` of a thread, `shared` bytes and `warps`."""
    registers = -(-usage["registers"] // 8) * 8 * 32 * usage["warps"]
    limits = gpu.registers // registers, gpu.shared // (usage["shared"] + 1024), gpu.warps // usage["warps"]
    return min(*limits, 32)


def waves(usage: dict, programs: int | None = None, gpu: Gpu = H100) -> float:
    """How often the launch, or so many of its programs, fills the GPU."""
    return (programs or math.prod(usage["grid"])) / (programs_per_processor(usage, gpu) * gpu.processors)


def kilobytes_in_flight(usage: dict, step_bytes: int, stages: int, gpu: Gpu = H100) -> float:
    """On their way to a multiprocessor while every program waits for one of its `stages` steps; of what is read from
    memory, `step_bytes` in each."""
    resident = min(programs_per_processor(usage, gpu), math.prod(usage["grid"]) / gpu.processors)
    return resident * max(1, stages - 1) * step_bytes / 1024


def padded_rows(topk_indices: torch.Tensor, num_experts: int, block_m: int) -> float:
    """Rows that tiles of `block_m` multiply for one real row. Tiles of 128 that are at most half full count as 64."""
    block_m = min(block_m, 64)
    counts = torch.bincount(topk_indices.flatten(), minlength=num_experts)
    return ((counts + block_m - 1) // block_m * block_m).sum().item() / topk_indices.numel()


def most_of_rate(nbytes: float, flops: float, rate: float, gpu: Gpu = H100) -> float:
    """The share of `rate` (operations a second) that reading `nbytes` leaves, were both at their peaks."""
    return min(1.0, flops / rate / (nbytes / gpu.bandwidth))
