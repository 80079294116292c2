"""What every benchmark shares: interleaved timing, one record format, a table and a JSON file."""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def time_interleaved(
    cases: dict[str, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    block: int = 1,
    warm_ups: dict[str, Callable[[], object]] | None = None,
) -> dict[str, float]:
    """Median seconds of each case, see `time_turns`."""
    seconds = time_turns(cases, repeats, device, block, warm_ups)
    return {name: statistics.median(values) for name, values in seconds.items()}


def time_turns(
    cases: dict[str, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    block: int = 1,
    warm_ups: dict[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each case, turn by turn. The cases take turns, in a new order each time, so that a change of the
    machine's speed and the caches that another case leaves behind meet all of them.

    Args:
        cases: what to time, by name.
        repeats: turns of each case, after one that warms up.
        device: waits for it before the clock is read, unless it is the CPU.
        block: calls of a case in a row, each timed: for steps that follow one another in use, as in decoding.
        warm_ups: what is called in the turn that warms up, in place of a case that takes long.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    order, shuffler = list(cases.items()), random.Random(0)
    for turn in range(repeats + 1):
        shuffler.shuffle(order)
        for name, case in order:
            if turn == 0 and warm_ups is not None:
                case = warm_ups.get(name, case)
            for _ in range(block):
                if device != "cpu":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                case()
                if device != "cpu":
                    torch.cuda.synchronize()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def device_name(device: str) -> str:
    """Name of the processor or GPU, and how many threads or none."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def report(name: str, rows: list[dict], device: str, out: Path | None, keys: tuple[str, ...] = ()) -> None:
    """Prints `rows` as a table and saves them.

    Args:
        keys: columns that tell rows apart, for a benchmark that runs in pieces: what earlier pieces wrote, with the
            same device and versions, stays beside what was measured now.
    """
    path = _path(name, device, out)
    if keys and path.exists():
        earlier = json.loads(path.read_text())
        if {**earlier, "rows": None} == {**_record(name, device), "rows": None}:
            measured = [[row[key] for key in keys] for row in rows]
            rows = [row for row in earlier["rows"] if [row[key] for key in keys] not in measured] + rows
    table = Table(title=f"{name} on {device_name(device)}")
    columns = dict.fromkeys(column for row in rows for column in row)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        values = (row.get(column, "") for column in columns)
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    Console().print(table)
    print(f"written to {save(name, rows, device, out)}")


def save(name: str, rows: list[dict], device: str, out: Path | None, **facts) -> Path:
    """Writes `rows` and `facts`, with device and versions, to `<out>/<name>_<cpu or gpu>.json`; called again with more
    rows, it replaces the file."""
    path = _path(name, device, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**_record(name, device), **facts, "rows": rows}, indent=1) + "\n")
    return temporary.replace(path)


def _path(name: str, device: str, out: Path | None) -> Path:
    return (out or RESULTS) / f"{name}_{'cpu' if device == 'cpu' else 'gpu'}.json"


def _record(name: str, device: str) -> dict[str, str]:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"benchmark": name, "device": device_name(device), **versions}


def process_memory(field: str) -> int:
    """Bytes in a field of this process's status (Linux): `VmRSS`, what is in memory, or `VmHWM`, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def run_alone(script: str, *arguments: object) -> dict:
    """What a script of Python prints last, as JSON, in a process of its own; it can import what is in this folder."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path}
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])
