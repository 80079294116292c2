"""Timing of kernels: many calls in one CUDA graph, over operands that no cache can hold between two of them; and what
becomes of a case that fails.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence

import torch
from common import save
from triton.errors import TritonError

CACHE_BYTES = 1 << 28  # several times the largest cache of a GPU
LOST = "the device is lost to this process"


def attempt(function: Callable[[], dict]) -> dict:
    """What `function` gives, or the error that kept it from it: the other cases go on. After an error of the device
    itself, such as an address that is none, nothing goes on in the same process; the result then says `LOST`."""
    try:
        return function()
    except (AssertionError, RuntimeError, ValueError, TritonError) as error:
        result = {"failed": f"{type(error).__name__}: {error}"[:2000]}
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        result[LOST] = True
    return result


class Rows:
    """The rows of a benchmark, in a file that has all of them after each.

    `add_resume` gives the script an option with which it goes on where another process of it ended: what that wrote
    is kept and not measured again. A script whose process lost the device starts itself again with it.
    """

    def __init__(self, name: str, keys: Sequence[str], args: argparse.Namespace, device: str = "cuda"):
        self.name, self.keys, self.args, self.device = name, keys, args, device
        self.deadline = time.monotonic() + getattr(args, "seconds", 0)
        self.rows: list[dict] = []
        path = None if args.out is None else args.out / f"{name}_{'cpu' if device == 'cpu' else 'gpu'}.json"
        if args.resume and path is not None and path.exists():
            self.rows = json.loads(path.read_text())["rows"]
        self.before = {self._key(row) for row in self.rows}

    def _key(self, row: dict) -> tuple:
        return tuple(row.get(key) for key in self.keys)

    def has(self, *values) -> bool:
        """Whether an earlier process left the row with these values of `keys`."""
        return values in self.before

    def forget(self, row: dict) -> None:
        """Measures the row of an earlier process again."""
        self.rows = [other for other in self.rows if other is not row]
        self.before.discard(self._key(row))

    def keep(self, row: dict, extra: Sequence[dict] = (), **facts) -> None:
        """Adds a row, or what has been added to one, and saves all; `extra` rows are saved behind them."""
        if not any(row is other for other in self.rows):
            self.rows.append(row)
        lost = row.pop(LOST, False)
        save(self.name, [*self.rows, *extra], self.device, self.args.out, **facts)
        if lost and self.args.out is not None:
            self._start_again()

    def _start_again(self) -> None:
        print(f"{LOST}: another one goes on", flush=True)
        command = [sys.executable, *sys.argv, "--resume"]
        if hasattr(self.args, "seconds"):
            command += ["--seconds", f"{self.deadline - time.monotonic():.0f}"]
        sys.stdout.flush()
        os.closerange(3, 4096)  # gives the memory of the device back
        os.execv(sys.executable, command)


def add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out holds, and add the others")


def copies_beyond_cache(nbytes: int, limit: int = 64) -> int:
    """How many copies of an operand of `nbytes` make it come from memory each time."""
    return max(2, min(limit, -(-CACHE_BYTES // max(1, nbytes))))


def seconds_per_call(calls: Sequence[Callable[[], object]], device: str, repeats: int = 5) -> float:
    """Median seconds of one of `calls`, which are made in their order: on a GPU in a graph, and that behind another
    one, so that launching is not what is measured."""
    return seconds_of_each({"calls": calls}, device, repeats)["calls"]


def seconds_of_each(
    forms: dict[str, Sequence[Callable[[], object]]], device: str, repeats: int = 5
) -> dict[str, float]:
    """Median seconds of a call of each form, as in `seconds_per_call`; they take turns, in a new order each time."""
    runs = {name: _as_one(calls, device) for name, calls in forms.items()}
    seconds, order, shuffler = {name: [] for name in runs}, list(runs), random.Random(0)
    for turn in range(repeats + 1):
        shuffler.shuffle(order)
        for name in order:
            value = _seconds_of(runs[name], device)
            if turn:
                seconds[name].append(value)
    return {name: sorted(values)[len(values) // 2] / len(forms[name]) for name, values in seconds.items()}


def _seconds_of(run: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()  # keeps the GPU busy until it has been told of everything that follows
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _as_one(calls: Sequence[Callable[[], object]], device: str) -> Callable[[], object]:
    """All calls, on a GPU as one graph."""
    if device == "cpu":
        return lambda: [call() for call in calls]
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
    return graph.replay


def copy_bandwidth(device: str, megabytes: int = 1024) -> float:
    """Bytes a second that a copy on the device reads and writes: what a kernel that only reads can hope for."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_per_call([lambda: target.copy_(source)] * 4, device)
