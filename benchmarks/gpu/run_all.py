"""The GPU queue: the `gpu`-marked tests, then every benchmark on the device, inside nine minutes.

    python benchmarks/gpu/run_all.py --out results_folder

Each part is a process of its own with a time of its own, so that none can take another with it; the most important come
first, and leave all others the least that these need. While the tests run, other processes compile what the benchmarks
will launch. `results.json` holds what there is after every part: how it ended, the rows that benchmarks had written by
then, the tests' outcomes, and how far each target was reached. `log.txt` holds what the parts said, of each the
beginning and the end; `part.txt` what the part said that was never ended, and `warm.txt` what compiled. Exits with 1 if
a part failed; a target that is missed is printed, and fails nothing.

`--dry` tries the queue itself without a GPU, at tiny sizes, in Triton's interpreter on a CPU that says it is one.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))

from targets import judge  # noqa: E402

# Every test that is marked `gpu` is in one of them. What only a GPU can show of the kernels comes first.
TESTS = ["tests/gpu/test_cuda_experts.py", "tests/gpu/test_cuda_dense.py", "tests/ops", "tests/gpu/test_cuda.py"]
# Lines of a verbose run of pytest, of one process and of several.
ONE_PROCESS = re.compile(r"^(?P<name>\S+?::.*) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED)(?: \(.*\))? +\[ *\d+%\]$")
SEVERAL = re.compile(r"^\[gw\d+\] \[ *\d+%\] (?P<outcome>PASSED|FAILED|ERROR|SKIPPED) (?P<name>\S+?::.*)$")
LIMIT_SECONDS = 8.75 * 60
WARM_SECONDS = 20  # that may pass after the tests until everything is compiled
INTERRUPT_SECONDS = 5  # that a part has to end after it was interrupted
MOST_LOGGED = 1 << 20  # characters of a part's output, so that `log.txt` stays small enough to be fetched


class Part(NamedTuple):
    name: str
    least: float  # seconds that parts before it leave
    seconds: float  # at most
    command: list[str]
    dry: list[str]  # what replaces the options of `command` for a dry run
    ends_itself: bool = False  # within `--seconds`, give or take a case


def experts_part(model: str, least: float, seconds: float, *options: str) -> Part:
    script = ["benchmarks/gpu/expert_kernels.py", "--models", model, *options]
    return Part(f"experts_{model}", least, seconds, script, ["--dry", *script[1:]], True)


CUDA = ["--device", "cuda"]
TINY_MLA = ["--contexts", "40", "--batches", "2", "--heads", "2", "--hidden", "64", "--repeats", "1"]
TINY_MLA += ["--megabytes", "1"]
TINY_PREFILL = ["--cases", "40:70", "70:70", "--heads", "2"]
TINY_DECODE = [*CUDA, "--contexts", "20", "--repeats", "1", "--block", "1"]
TINY_EXPERTS = [*CUDA, "--dtypes", "bfloat16", "--tokens", "2", "--experts", "4", "--top-k", "2", "--hidden", "64"]
TINY_EXPERTS += ["--intermediate", "32", "--layers", "1", "--repeats", "1", "--block", "1"]
TINY_LONGCAT = [*CUDA, "--dtypes", "bfloat16", "--tokens", "2", "--experts", "4", "--zero-experts", "2", "--top-k", "2"]
TINY_LONGCAT += ["--hidden", "64", "--intermediate", "32", "--repeats", "1"]
QUEUE = [
    Part(
        "tests",
        120,
        210,
        ["-m", "pytest", "-m", "gpu", "-vv", "--tb=short", "-rf", "-p", "no:cacheprovider", *TESTS],
        [],
    ),
    experts_part("deepseek_v3", 55, 75, "--lora"),
    Part("mla_decode", 30, 45, ["benchmarks/gpu/mla_decode.py"], TINY_MLA),
    experts_part("longcat_flash", 40, 60),
    experts_part("kimi_k2", 35, 60),
    experts_part("step3", 35, 50),
    Part("mla_prefill", 20, 30, ["benchmarks/gpu/mla_prefill.py"], TINY_PREFILL),
    Part(
        "linear_fp8",
        25,
        45,
        ["benchmarks/gpu/linear_fp8.py"],
        ["--rows", "2", "--layers", "40x136", "--megabytes", "1"],
    ),
    Part(
        "decode",
        25,
        45,
        ["benchmarks/decode.py", *CUDA, "--contexts", "256", "4096", "16384", "32768"],
        TINY_DECODE,
    ),
    # LongCat-Flash-Chat's shapes: 512 experts of 2048 x 6144, 12 per token (38.7 GB a layer; native has half more).
    Part(
        "longcat_moe",
        30,
        60,
        ["benchmarks/longcat_moe.py", *CUDA, "--dtypes", "bfloat16", "--hidden", "6144", "--intermediate", "2048"]
        + ["--repeats", "7"],
        TINY_LONGCAT,
    ),
    Part("experts", 15, 40, ["benchmarks/experts.py", *CUDA, "--dtypes", "bfloat16", "--layers", "2"], TINY_EXPERTS),
]
WARM = [["benchmarks/gpu/expert_kernels.py", "--warm", "--models", name] for name in ("deepseek_v3", "longcat_flash")]
WARM += [["benchmarks/gpu/expert_kernels.py", "--warm", "--models", name] for name in ("kimi_k2", "step3")]
WARM += [["benchmarks/gpu/linear_fp8.py", "--warm"], ["benchmarks/gpu/mla_decode.py", "--warm"]]
WARM += [["benchmarks/gpu/mla_prefill.py", "--warm"]]
DRY_WARM = [["benchmarks/gpu/expert_kernels.py", "--warm", "--dry"]]
DRY_WARM += [["benchmarks/gpu/linear_fp8.py", "--warm", "--rows", "2", "--layers", "40x136"]]
DRY_WARM += [["benchmarks/gpu/mla_decode.py", "--warm", *TINY_MLA]]
DRY_WARM += [["benchmarks/gpu/mla_prefill.py", "--warm", *TINY_PREFILL]]
# Of the tests a dry run collects all, and runs the experts' with a few tokens.
DRY_TESTS = ["tests/gpu/test_cuda_experts.py", "-k", "T1-E or T0- or T5- or T17-"]


class Queue:
    """Runs parts one after another and keeps `results.json` up to date."""

    def __init__(self, out: Path, dry: bool):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.dry, self.start = out, dry, time.monotonic()
        self.log, self.part_log = out / "log.txt", out / "part.txt"
        self.log.write_text("", encoding="utf-8")
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        self.environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a process for each core is more than it has to do
        self.results: dict = {"dry": dry, "parts": [], "benchmarks": {}, "targets": []}

    def left(self) -> float:
        return LIMIT_SECONDS - (time.monotonic() - self.start)

    def seconds_for(self, part: Part, later: list[Part]) -> float:
        """What `part` may take, so that each of those behind it gets its least."""
        if self.dry:
            return 600
        return min(part.seconds, max(self.left() - sum(other.least for other in later), min(part.least, self.left())))

    def launch(self, command: list[str], log: Path) -> subprocess.Popen:
        """Starts a script or module whose output is added to `log`."""
        with log.open("ab") as file:
            options = {"cwd": ROOT, "env": self.environment, "stdout": file, "stderr": subprocess.STDOUT}
            return subprocess.Popen([sys.executable, *command], start_new_session=True, **options)

    def warm(self) -> list[subprocess.Popen]:
        """What compiles, with a log of its own: its lines would cut those that say how a test ended."""
        return [self.launch(command, self.out / "warm.txt") for command in WARM]

    def run(self, part: Part, later: list[Part] = ()) -> None:
        seconds, begin = self.seconds_for(part, later), time.monotonic()
        if seconds < 10:
            self.keep(part, "no time was left", 0.0)
            return
        self.part_log.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            process = self.launch(self.command(part, folder, seconds), self.part_log)
            try:
                ending = process.wait(seconds)
            except subprocess.TimeoutExpired:
                interrupt(process)
                ending = f"stopped after {seconds:.0f} s"
            for path in sorted(Path(folder).glob("*.json")):
                self.results["benchmarks"].setdefault(part.name, []).append(json.loads(path.read_text()))
        text = self.part_log.read_text(encoding="utf-8", errors="replace")
        with self.log.open("a", encoding="utf-8") as file:
            file.write(shortened(text))
        self.part_log.unlink()
        lines = text.splitlines(keepends=True)
        if part.name == "tests":
            self.results["tests"] = outcomes(lines)
        self.keep(part, ending, time.monotonic() - begin)
        print("".join(lines[-25:]), flush=True)

    def command(self, part: Part, folder: str, seconds: float) -> list[str]:
        if part.name == "tests":
            if self.dry:
                return ["tests/pretend_cuda.py", *part.command[: -len(TESTS)], *DRY_TESTS]
            workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
            return [*part.command, *workers]
        if self.dry:
            return ["tests/pretend_cuda.py", part.command[0], *part.dry, "--out", folder]
        # Some of it goes to what comes before the clock of the script, and to the case that is late.
        limit = ["--seconds", f"{seconds - 18:.0f}"] if part.ends_itself else []
        return [*part.command, *limit, "--out", folder]

    def keep(self, part: Part, ending: int | str, seconds: float) -> None:
        entry = {"name": part.name, "ending": ending, "seconds": round(seconds, 1)}
        self.results["parts"].append(entry)
        self.results["targets"] = judge(self.results["benchmarks"])
        print(f"[{time.monotonic() - self.start:.0f} s] {entry}", flush=True)
        temporary = self.out / "results.tmp"
        temporary.write_text(json.dumps(self.results, indent=1) + "\n")
        temporary.replace(self.out / "results.json")


def shortened(text: str, most: int = MOST_LOGGED) -> str:
    """`text`, or its first quarter and last three quarters of `most` characters."""
    if len(text) <= most:
        return text
    first = most // 4
    return f"{text[:first]}\n[{len(text) - most} characters are left out]\n{text[first - most :]}"


def outcomes(lines: list[str]) -> dict:
    """How many tests of a verbose run ended in which way, and the names of those that failed."""
    found = [ONE_PROCESS.match(line.rstrip()) or SEVERAL.match(line.rstrip()) for line in lines]
    tests = {match["name"]: match["outcome"] for match in found if match}
    failed = [name for name, outcome in tests.items() if outcome in ("FAILED", "ERROR")]
    return {"counts": dict(Counter(tests.values())), "failed": failed}


def interrupt(process: subprocess.Popen) -> None:
    """Ends a process that may say first how far it came, as pytest does with the failures so far."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(INTERRUPT_SECONDS)
    with contextlib.suppress(ProcessLookupError):  # what it started may still be there
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stop(process: subprocess.Popen) -> None:
    """Ends a process and those that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for log.txt and results.json")
    names = [part.name for part in QUEUE]
    parser.add_argument("--parts", nargs="+", default=names, choices=names, help="only these")
    parser.add_argument("--dry", action="store_true", help="try the queue at tiny sizes without a GPU")
    args = parser.parse_args()
    # A queue that was started in the background ignores interrupts, and its parts would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    queue = Queue(args.out, args.dry)
    warming = [] if args.dry else queue.warm()
    try:
        parts = [part for part in QUEUE if part.name in args.parts]
        for number, part in enumerate(parts):
            if part.name != "tests":
                until = time.monotonic() + WARM_SECONDS
                while any(process.poll() is None for process in warming) and time.monotonic() < until:
                    time.sleep(0.2)
                for process in warming:
                    stop(process)
            queue.run(part, parts[number + 1 :])
        for number, command in enumerate(DRY_WARM if args.dry else ()):
            queue.run(Part(f"warm_{number}", 0, 0, command[:1], command[1:]))
    finally:
        for process in warming:
            stop(process)
    failed = [entry["name"] for entry in queue.results["parts"] if entry["ending"] != 0]
    rows = [row for records in queue.results["benchmarks"].values() for record in records for row in record["rows"]]
    failed += [f"{row.get('model')} {row.get('kind')}: {row['failed']}" for row in rows if "failed" in row]
    for entry in queue.results["targets"]:
        figures = f"{entry['measured']:.3g} of {entry['wanted']:.3g} ({entry['share']:.0%})"
        print(f"{'met' if entry['met'] else 'MISSED'}: {entry['target']}, {entry['case']}: {figures}")
    if "tests" in queue.results:
        print(f"tests: {queue.results['tests']['counts']}")
    for name in failed:
        print(f"FAILED: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
