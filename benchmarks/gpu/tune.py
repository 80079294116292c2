"""Tries tiles around the shipped ones, at real layer shapes, and says which would be faster on this GPU.

    python benchmarks/gpu/tune.py --out results --seconds 480

The most important shapes come first, and what was found is kept after each: time of the shipped tile, the best
candidate, and how much faster it is. Candidates are checked against the shipped tile's result, take turns in being
timed, and read operands that no cache holds. What they launch is compiled before, by as many processes as there are
cores; a candidate that fits no multiprocessor is left out. At the end, the best pair of products for each number of
rows in an experts' tile, since both products of a layer share it.

Without a GPU, `--static` compiles all of it for compute capability 9.0 and prints what `occupancy.py` makes of it;
`--dry` tries the script at tiny sizes (`python tests/pretend_cuda.py benchmarks/gpu/tune.py --dry`).
"""

import argparse
import functools
import gc
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu"), str(ROOT / "tests")]

import tune_cases  # noqa: E402
from occupancy import kilobytes_in_flight, most_of_rate, padded_rows, programs_per_processor, waves  # noqa: E402
from timing import LOST, Rows, add_resume, attempt, copy_bandwidth, seconds_of_each  # noqa: E402
from tune_cases import Case, all_cases  # noqa: E402

from hf_moe.models.kernel_tiles import trying  # noqa: E402

# What tells cases apart.
LABELS = ("family", "model", "layer", "tokens", "rows", "kind", "part")
LABELS += ("batch", "queries", "context", "heads", "masked")
TOLERANCE = 1e-2  # between two tiles, which add in different orders
REPEATS = 7


class Attempt(NamedTuple):
    """One candidate of a case, and what its launches took in the end."""

    case: Case
    choices: dict
    taken: dict

    def call(self, launch: Callable[[], torch.Tensor]) -> torch.Tensor:
        def note(name: str, shipped):
            choice = self.choices.get(name, shipped)
            self.taken[name] = choice(shipped) if callable(choice) else choice
            return self.taken[name]

        with trying(**{name: functools.partial(note, name) for name in self.case.names}):
            return launch()

    def described(self) -> dict:
        return {name: tile._asdict() if hasattr(tile, "_asdict") else tile for name, tile in self.taken.items()}


def attempts(case: Case, most: int | None) -> list[Attempt]:
    """The shipped tile, and then the candidates."""
    candidates = case.candidates if most is None else case.candidates[:most]
    return [Attempt(case, choices, {}) for choices in [{}, *candidates]]


def compile_attempt(dry: bool, place: int, number: int, capability: int, processors: int) -> list[dict]:
    """Compiles what a candidate launches, in a process that has no GPU; what `aot.Launch.warm` says of each."""
    import aot

    chosen = attempts(all_cases(dry)[place], None)[number]
    with aot.recording(capability, processors) as launches:
        launch = chosen.case.build("meta").launch
        launches.clear()
        chosen.call(lambda: launch(chosen.choices))
    return [{**recorded.warm(capability), "taken": chosen.described()} for recorded in launches.values()]


class Compiler:
    """Processes that compile ahead, in the order of the cases."""

    def __init__(self, cases: list[Case], args: argparse.Namespace, capability: int, processors: int):
        # A fresh interpreter each, without a GPU: none of it is Triton's interpreter, and none takes time on a device.
        environment = {name: os.environ.pop(name) for name in ("TRITON_INTERPRET",) if name in os.environ}
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(args.processes, mp_context=context)
        self.futures: dict[tuple, Future] = {}
        for case in cases:
            for number, chosen in enumerate(attempts(case, args.candidates)):
                key = (case.place if args.static else case.kernel, str(chosen.choices))
                if key not in self.futures:
                    work = compile_attempt, args.dry, case.place, number, capability, processors
                    self.futures[key] = self.pool.submit(*work)
        self.by_place = args.static
        os.environ.update(environment)

    def result(self, chosen: Attempt) -> list[dict]:
        key = (chosen.case.place if self.by_place else chosen.case.kernel, str(chosen.choices))
        return self.futures[key].result()

    def largest(self, chosen: Attempt) -> dict:
        """What a program of the largest launch takes."""
        launch = max(self.result(chosen), key=lambda launch: launch["shared"])
        return {name: launch[name] for name in ("registers", "stack", "shared")}

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def limit_of_shared_memory() -> int:
    return getattr(torch.cuda.get_device_properties(0), "shared_memory_per_block_optin", 227 * 1024)


def try_case(
    case: Case, compiler: Compiler | None, bandwidth: float, most: int | None, harmful: frozenset[int] = frozenset()
) -> dict:
    """The row of one case. Candidates of numbers in `harmful` lost another process the device; a row that is `LOST`
    says in the same way which one did."""
    problem = case.build("cuda")
    tried, forms, entries, reference = attempts(case, most), {}, [], None
    for number, chosen in enumerate(tried):
        entry = {"number": number}
        if compiler is not None:
            entry |= attempt(lambda chosen=chosen: compiler.largest(chosen))
        if "failed" in entry:  # then it is compiled here, or fails once more
            entry["not compiled ahead"] = entry.pop("failed")
        if entry.get("shared", 0) > limit_of_shared_memory():
            entry["left out"] = "needs more shared memory than there is"
        elif number in harmful:
            entry |= {"left out": "loses the device", LOST: True}
        else:
            entry |= attempt(lambda chosen=chosen: {"output": chosen.call(lambda: problem.launch(chosen.choices))})
        output = entry.pop("output", None)
        entry |= chosen.described()
        entries.append(entry)
        if output is None:
            if number == 0 or (LOST in entry and number not in harmful):
                row = case.label | {"failed": entry.get("failed", entry.get("left out")), "candidates": entries}
                return row | ({LOST: True} if LOST in entry else {})
            continue
        reference = output if reference is None else reference
        error = ((output.float() - reference.float()).norm() / reference.float().norm()).item()
        if not error < TOLERANCE:
            entry["failed"] = f"off by {error:.1e} from the shipped tile's result"
            continue
        del output
        calls = [lambda c=chosen, n=n: c.call(lambda: problem.launch(c.choices, n)) for n in range(problem.copies)]
        forms[number] = calls * (problem.repeats if compiler else 1)
    del reference
    seconds = seconds_of_each(forms, "cuda", REPEATS if compiler else 1)
    for number, value in seconds.items():
        entries[number]["us"] = value * 1e6
    best = min(seconds, key=seconds.get)
    row = case.label | {"shipped us": seconds[0] * 1e6, "best us": seconds[best] * 1e6}
    row |= {"ratio": seconds[0] / seconds[best], "best": tried[best].described(), "shipped": tried[0].described()}
    row["of copy bandwidth"] = problem.nbytes / seconds[best] / bandwidth
    row["TFLOP/s"] = problem.flops / seconds[best] / 1e12
    return row | {"candidates": entries}


def best_pairs(rows: list[dict]) -> list[dict]:
    """Of each experts layer and each number of rows in a tile, the microseconds of the best two products."""
    layers: dict[tuple, dict] = {}
    for row in rows:
        for entry in row.get("candidates", ()):
            name = next((name for name in ("gate_up", "rows") if name in entry), None)
            if name is None or "us" not in entry or row["family"] != "experts":
                continue
            block_m = entry[name]["block_m"]
            parts = layers.setdefault((row["model"], row["tokens"], row["kind"]), {}).setdefault(block_m, {})
            parts[name] = min(parts.get(name, float("inf")), entry["us"])
    result = []
    for (model, tokens, kind), by_rows in layers.items():
        sums = {rows: sum(parts.values()) for rows, parts in by_rows.items() if len(parts) == 2}
        result.append({"family": "layer", "model": model, "tokens": tokens, "kind": kind, "us by rows": sums})
    return result


def judge(case: Case, compiler: Compiler, most: int | None) -> list[dict]:
    """What can be said of a case without a GPU."""
    problem, result = case.build("meta"), []
    for number, chosen in enumerate(attempts(case, most)):
        usage = attempt(lambda chosen=chosen: {"usage": compiler.result(chosen)})
        if "failed" in usage:
            result.append(case.label | {"choices": str(chosen.choices), **usage})
            continue
        launch = max(usage["usage"], key=lambda launch: launch["shared"])  # the product, beside sums of its parts
        tile = next(tile for tile in launch["taken"].values() if isinstance(tile, dict))
        row = case.label | {"shipped": number == 0, "taken": launch["taken"], **launch}
        row.pop("grid")
        row["programs"] = math.prod(launch["grid"])
        row["per processor"] = programs_per_processor(launch)
        row["waves"] = waves(launch)
        if problem.step_bytes:
            row["KB in flight"] = kilobytes_in_flight(launch, problem.step_bytes(tile), tile["stages"])
        if problem.routing:
            ids, experts = problem.routing
            row["padded rows"] = padded_rows(ids, experts, tile["block_m"])
        row["most of the rate"] = most_of_rate(problem.nbytes, problem.flops, problem.rate) if problem.flops else None
        result.append(row)
    return result


def found_harmful(rows: Rows) -> dict[tuple, frozenset[int]]:
    """By case, the candidates that lost an earlier process the device; the case is then tried again without them."""
    harmful = {}
    for row in list(rows.rows):
        numbers = frozenset(entry["number"] for entry in row.get("candidates", ()) if LOST in entry)
        if numbers and "failed" in row and 0 not in numbers:
            harmful[tuple(row.get(name) for name in LABELS)] = numbers
            rows.forget(row)
        elif row["family"] == "layer":  # made from the others
            rows.forget(row)
    return harmful


def show(row: dict) -> None:
    brief = {name: value for name, value in row.items() if name not in ("candidates", "taken")}
    rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in brief.items()}
    print(json.dumps(rounded), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--families", nargs="+", default=list(tune_cases.FAMILIES), choices=list(tune_cases.FAMILIES))
    parser.add_argument("--cases", type=int, help="only so many of the first cases")
    parser.add_argument("--candidates", type=int, help="only so many of the first candidates beside the shipped tile")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile")
    parser.add_argument("--static", action="store_true", help="no GPU: what the compiler says")
    parser.add_argument("--capability", type=int, default=90, help="that --static compiles for")
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    add_resume(parser)
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    torch.manual_seed(0)
    cases = [case for case in all_cases(args.dry) if case.label["family"] in args.families][: args.cases]
    rows = Rows("tune_static" if args.static else "tune", LABELS, args, "cpu" if args.static else "cuda")
    harmful, failed = found_harmful(rows), False
    if args.static:
        compiler = Compiler(cases, args, args.capability, 132)
    elif args.dry:
        compiler = None
    else:
        properties = torch.cuda.get_device_properties(0)
        capability = properties.major * 10 + properties.minor
        compiler = Compiler(cases, args, capability, properties.multi_processor_count)
    bandwidth = 0.0 if args.static else copy_bandwidth("cuda", 1 if args.dry else 1024)
    facts = {} if args.static else {"copy bytes/s": bandwidth}
    try:
        for case in cases:
            key = tuple(case.label.get(name) for name in LABELS)
            if rows.has(*key):
                continue
            if time.monotonic() > deadline:
                print("no time was left for the other cases")
                break
            if args.static:
                new = judge(case, compiler, args.candidates)
            else:
                given = case, compiler, bandwidth, args.candidates, harmful.get(key, frozenset())
                new = [attempt(lambda given=given: try_case(*given))]
                new = [row if "family" in row else case.label | row for row in new]
            for row in new:
                failed |= "failed" in row
                show(row)
                if not args.static:
                    rows.keep(row, best_pairs(rows.rows), **facts)
            if args.static:
                rows.rows += new
                if args.out:
                    rows.keep(new[-1])
            gc.collect()
            if not args.static:
                torch.cuda.empty_cache()
    finally:
        if compiler is not None:
            compiler.close()
    for row in best_pairs(rows.rows):
        show(row)
    sys.exit(failed)


if __name__ == "__main__":
    with torch.no_grad():
        main()
