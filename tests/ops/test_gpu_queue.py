"""The queue of `benchmarks/gpu/run_all.py`: what fails or takes too long keeps nothing from the rest."""

import json
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

    return run_all


def test_a_part_that_fails_stops_no_other(run_all, tmp_path):
    queue = run_all.Queue(tmp_path / "not" / "there", dry=False)
    queue.run(run_all.Part("wrong", 60, ["-c", f"{SAVING}; sys.exit(3)"], []))
    queue.run(run_all.Part("right", 60, ["-c", SAVING], []))
    queue.run(run_all.Part("late", 0, ["-c", SAVING], []))
    results = json.loads((tmp_path / "not" / "there" / "results.json").read_text())
    assert [part["ending"] for part in results["parts"]] == [3, 0, "no time was left"]
    assert results["benchmarks"] == {"wrong": [{"rows": []}], "right": [{"rows": []}]}


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
