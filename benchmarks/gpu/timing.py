"""Timing of kernels: many calls in one CUDA graph, over operands that no cache can hold between two of them; and what
becomes of a case that fails.
"""

import time
from collections.abc import Callable, Sequence

import torch
from triton.errors import TritonError

CACHE_BYTES = 1 << 28  # several times the largest cache of a GPU


def attempt(function: Callable[[], dict]) -> dict:
    """What `function` gives, or the error that kept it from it: the other cases go on."""
    try:
        return function()
    except (AssertionError, RuntimeError, ValueError, TritonError) as error:
        return {"failed": f"{type(error).__name__}: {error}"[:2000]}


def copies_beyond_cache(nbytes: int, limit: int = 64) -> int:
    """How many copies of an operand of `nbytes` make it come from memory each time."""
    return max(2, min(limit, -(-CACHE_BYTES // max(1, nbytes))))


def seconds_per_call(calls: Sequence[Callable[[], object]], device: str, repeats: int = 5) -> float:
    """Median seconds of one of `calls`, which are made in their order: on a GPU in a graph, so that launching is not
    what is measured."""
    if device == "cpu":
        return _median(lambda: [call() for call in calls], repeats, lambda: None) / len(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels and sets up libraries
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _median(graph.replay, repeats, torch.cuda.synchronize) / len(calls)


def _median(run: Callable[[], object], repeats: int, wait: Callable[[], None]) -> float:
    seconds = []
    for turn in range(repeats + 1):
        wait()
        start = time.perf_counter()
        run()
        wait()
        if turn:
            seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


def copy_bandwidth(device: str, megabytes: int = 1024) -> float:
    """Bytes a second that a copy on the device reads and writes: what a kernel that only reads can hope for."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_per_call([lambda: target.copy_(source)] * 4, device)
