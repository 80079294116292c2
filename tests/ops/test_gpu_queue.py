"""The queue of `benchmarks/gpu/run_all.py`: what fails or takes too long keeps nothing from the rest."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
SAVING = "import pathlib, sys; (pathlib.Path(sys.argv[-1]) / 'x.json').write_text('{\"rows\": []}')"
# Says how far it came when it is interrupted, and leaves a process behind that would go on.
LONG = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
try:
    print("begun", child.pid, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("so far", flush=True)
"""

RESUMING = """
import argparse, sys
from pathlib import Path
sys.path[:0] = {folders}
import common, torch
from timing import LOST, Rows, add_resume, attempt
common.device_name = lambda device: "none"
lost = []
torch.cuda.is_available = lambda: True
def synchronize():
    if lost:
        raise RuntimeError("lost")
torch.cuda.synchronize = synchronize
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
parser.add_argument("--seconds", type=float, default=50)
add_resume(parser)
args = parser.parse_args()
assert args.seconds > 30
rows = Rows("tried", ("case",), args)
def case(number):
    if number == 1:
        lost.append(number)
        raise RuntimeError("an address that is none")
    return {{"resumed": args.resume}}
for number in range(3):
    if not rows.has(number):
        rows.keep({{"case": number}} | attempt(lambda: case(number)))
"""


@pytest.fixture
def run_all(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import run_all

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as the queue does: parts heed interrupts
    yield run_all
    signal.signal(signal.SIGINT, before)


def test_a_part_that_fails_stops_no_other(run_all, tmp_path):
    queue = run_all.Queue(tmp_path / "not" / "there", dry=False)
    queue.run(run_all.Part("wrong", 10, 60, ["-c", f"{SAVING}; sys.exit(3)"], []))
    queue.run(run_all.Part("right", 10, 60, ["-c", SAVING], []))
    queue.run(run_all.Part("late", 0, 0, ["-c", SAVING], []))
    results = json.loads((tmp_path / "not" / "there" / "results.json").read_text())
    assert [part["ending"] for part in results["parts"]] == [3, 0, "no time was left"]
    assert results["benchmarks"] == {"wrong": [{"rows": []}], "right": [{"rows": []}]}


def test_parts_find_what_this_process_was_told_to_find(run_all, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    queue = run_all.Queue(tmp_path, dry=False)
    queue.run(run_all.Part("paths", 10, 60, ["-c", "import os; print(os.environ['PYTHONPATH'])"], []))
    assert (tmp_path / "log.txt").read_text().split()[0].split(":") == [str(run_all.ROOT), "/elsewhere"]


def test_logs_stay_small_and_apart(run_all, tmp_path, monkeypatch):
    """A part may say any amount; what compiles meanwhile does not come between the lines of the tests."""
    queue = run_all.Queue(tmp_path, dry=False)
    monkeypatch.setattr(run_all, "WARM", [["-c", "print('compiled')"]])
    for process in queue.warm():
        process.wait()
    long = "print('first'); [print('x' * 1000) for _ in range(5000)]; print('last')"
    for name in ("one", "two"):
        queue.run(run_all.Part(name, 10, 60, ["-c", f"print('{name}'); {long}"], []))
    log = (tmp_path / "log.txt").read_text()
    assert log.startswith("one\nfirst\nx") and log.endswith("x\nlast\n") and log.count("last\n") == 2
    assert "two\nfirst" in log and log.count("characters are left out") == 2 and "compiled" not in log
    assert len(log) < 2 * run_all.MOST_LOGGED + 200 and len(run_all.QUEUE) * run_all.MOST_LOGGED < 16 << 20
    assert (tmp_path / "warm.txt").read_text() == "compiled\n"
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "warm.txt", "results.json"}


def test_every_part_gets_its_least(run_all, tmp_path):
    queue = run_all.Queue(tmp_path, dry=False)
    assert sum(part.least for part in run_all.QUEUE) < run_all.LIMIT_SECONDS - run_all.WARM_SECONDS
    for number, part in enumerate(run_all.QUEUE):
        later = run_all.QUEUE[number + 1 :]
        queue.start = time.monotonic()
        assert queue.seconds_for(part, later) == pytest.approx(part.seconds, abs=0.1)
        queue.start -= run_all.LIMIT_SECONDS - part.least - sum(other.least for other in later)
        assert queue.seconds_for(part, later) == pytest.approx(part.least, abs=0.5)  # if others took all of theirs
        queue.start -= 1000
        assert queue.seconds_for(part, later) < 0


def test_outcomes_of_tests_are_known_however_they_ended(run_all):
    lines = ["tests/a.py::test_one[4 of x] PASSED            [ 10%]", "tests/a.py::test_two SKIPPED (why) [ 30%]"]
    lines += ["[gw3] [ 20%] FAILED tests/a.py::test_three[PASSED-FAILED] ", "[gw1] [ 40%] ERROR tests/b.py::test_one"]
    lines += ["[gw1] [100%] PASSED tests/b.py::test_two ", "no PASSED test", "tests/b.py::test_three "]
    lines += ["FAILED tests/a.py::test_three[PASSED-FAILED] - AssertionError"]
    found = run_all.outcomes([f"{line}\n" for line in lines])
    assert found["counts"] == {"PASSED": 2, "SKIPPED": 1, "FAILED": 1, "ERROR": 1}
    assert found["failed"] == ["tests/a.py::test_three[PASSED-FAILED]", "tests/b.py::test_one"]


def test_the_queue_understands_what_its_tests_say(run_all, tmp_path):
    part, queue = run_all.QUEUE[0], run_all.Queue(tmp_path, dry=False)
    options = [option for option in part.command if option not in run_all.TESTS]
    options[options.index("gpu")] = "not gpu"
    queue.command = lambda *given: [*options, "tests/ops/test_gpu_queue.py", "-k", "finds_what or however_they_ended"]
    queue.run(part)
    assert json.loads((tmp_path / "results.json").read_text())["tests"] == {"counts": {"PASSED": 1}, "failed": []}


def test_a_script_that_lost_the_device_goes_on_in_another_process(tmp_path):
    """What was measured stays, and what lost the device is not tried again."""
    script = tmp_path / "script.py"
    script.write_text(RESUMING.format(folders=[str(FOLDER), str(FOLDER.parent)]))
    result = subprocess.run([sys.executable, script, "--out", tmp_path], capture_output=True, text=True, check=True)
    rows = json.loads((tmp_path / "tried_gpu.json").read_text())["rows"]
    assert [row["case"] for row in rows] == [0, 1, 2], result.stdout
    assert "failed" in rows[1] and [row.get("resumed") for row in rows] == [False, None, True]


def test_targets_are_held_against_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from targets import judge

    def layer(kind, tokens, **figures):
        return {"model": "m", "kind": kind, "tokens": tokens, **figures}

    figures = {"share of copy bandwidth": 0.9, "share of dense bf16": 0.6, "TFLOP/s": 500.0}
    rows = [layer("bf16", 1, **figures), layer("bf16", 4096, **figures), layer("w8a8", 4096, **figures)]
    rows += [layer("w8a16", 64, failed="no"), layer("w8a8", 8192, **figures)]  # of which bfloat16 was not measured
    rows += [{"model": "lora", "kind": "fold", "tokens": 9, "GB": 3.0, "ms": 9.0}]
    rows += [{"model": "lora", "kind": "grouped", "tokens": 9, "GB": 1.0, "ms": 3.0, "ratio": 3.0}]
    kernel = {"batch": 1, "context": 4096, "of copy bandwidth": 0.4}
    layers = [{"context": 4096, "ratio": 9.0}, {"context": 32768, "ratio": 60.0}]
    records = [("expert_kernels", rows), ("mla_kernel", [kernel]), ("mla_layer", layers)]
    judged = judge({"part": [{"benchmark": name, "rows": some} for name, some in records]})
    assert [(entry["wanted"], entry["met"]) for entry in judged] == [
        (0.85, True),
        (0.75, False),
        (1.5, False),
        (2.0, True),
        (2.0, True),
        (0.8, False),
        (50.0, True),
    ]
    assert [entry["share"] for entry in judged[4:]] == [1.5, 0.5, 1.2]


def test_a_layer_that_cannot_be_captured_is_measured_as_called(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import mla_decode

    def fail(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(mla_decode, "seconds_of_each", fail)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    row = mla_decode.layer_row(40, "cpu", sizes, 1)
    assert row["ratio"] > 0 and "not permitted" in row["graph failed"] and "failed" not in row


def test_what_is_interrupted_tells_how_far_it_came_and_leaves_nothing_behind(run_all):
    pipes = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", LONG], **pipes)
    child = int(process.stdout.readline().split()[1])
    run_all.interrupt(process)
    assert process.stdout.read() == "so far\n"
    state, deadline = Path(f"/proc/{child}/stat"), time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"
