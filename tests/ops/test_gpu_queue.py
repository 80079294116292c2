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


@pytest.fixture
def run_all(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import run_all

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as the queue does: parts heed interrupts
    yield run_all
    signal.signal(signal.SIGINT, before)


def test_a_part_that_fails_stops_no_other(run_all, tmp_path):
    queue = run_all.Queue(tmp_path / "not" / "there", dry=False)
    queue.run(run_all.Part("wrong", 60, ["-c", f"{SAVING}; sys.exit(3)"], []))
    queue.run(run_all.Part("right", 60, ["-c", SAVING], []))
    queue.run(run_all.Part("late", 0, ["-c", SAVING], []))
    results = json.loads((tmp_path / "not" / "there" / "results.json").read_text())
    assert [part["ending"] for part in results["parts"]] == [3, 0, "no time was left"]
    assert results["benchmarks"] == {"wrong": [{"rows": []}], "right": [{"rows": []}]}


def test_parts_find_what_this_process_was_told_to_find(run_all, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    queue = run_all.Queue(tmp_path, dry=False)
    queue.run(run_all.Part("paths", 60, ["-c", "import os; print(os.environ['PYTHONPATH'])"], []))
    assert (tmp_path / "log.txt").read_text().split()[0].split(":") == [str(run_all.ROOT), "/elsewhere"]


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
