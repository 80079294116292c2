"""What every benchmark shares: interleaved timing, one record format, a table and a JSON file."""

import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def time_interleaved(
    cases: dict[str, Callable[[], object]], repeats: int, device: str = "cpu", block: int = 1
) -> dict[str, float]:
    """Median seconds of each case. The cases take turns, in a new order each time, so that a change of the machine's
    speed and the caches that another case leaves behind meet all of them.

    Args:
        cases: what to time, by name.
        repeats: turns of each case, after one that warms up.
        device: waits for it before the clock is read, unless it is the CPU.
        block: calls of a case in a row, each timed: for steps that follow one another in use, as in decoding.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    order, shuffler = list(cases.items()), random.Random(0)
    for turn in range(repeats + 1):
        shuffler.shuffle(order)
        for name, case in order:
            for _ in range(block):
                if device != "cpu":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                case()
                if device != "cpu":
                    torch.cuda.synchronize()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


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


def report(name: str, rows: list[dict], device: str, out: Path | None) -> None:
    """Prints `rows` as a table and writes them, with device and versions, to `<out>/<name>.json`."""
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
    """Writes `rows` and `facts` with device and versions; called again with more rows, it replaces the file."""
    record = {
        "benchmark": name,
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **facts,
        "rows": rows,
    }
    folder = out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{'cpu' if device == 'cpu' else 'gpu'}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    return temporary.replace(path)
