"""Runs a conversion again and again, killed each time, then once to its end. Run by test_engine.py as a process.

    python interruptions.py SOURCE TARGET KILLS SEED SIGNAL

The children are forks, so that ten of them do not import the libraries ten times. Prints a JSON object: how many files
were finished after each kill, and the return codes.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import hf_moe.conversion.command  # noqa: F401  before forking
import hf_moe.conversion.run as engine
from hf_moe.cli import app

PIECE_SECONDS = 0.02  # so that fast machines do not finish before the last kill


def start(source: str, target: str) -> int:
    """Forks a child that runs the command."""
    child = os.fork()
    if child:
        return child
    code, do = 70, engine._do

    def slowly(*args):
        time.sleep(PIECE_SECONDS)
        do(*args)

    engine._do = slowly
    try:
        app(["convert", source, target, "--to", "bf16", "--max-shard-size", "1MB"], standalone_mode=True)
        code = 0
    except SystemExit as exit_:
        code = exit_.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finished(target: Path) -> int:
    """Weight files that the state accounts for; -1 without a state."""
    path = target.with_name(target.name + ".partial") / "state.json"
    return len(json.loads(path.read_text())["finished"]) if path.exists() else -1


def main() -> None:
    source, target, kills, seed, signal_name = sys.argv[1:]
    picker, counts, codes = random.Random(int(seed)), [], []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with it ignored
    os.dup2(2, 1)  # tables of the children; the report goes to the descriptor below
    for _ in range(int(kills)):
        child, before = start(source, target), max(finished(Path(target)), 0)
        while finished(Path(target)) <= before:  # a kill after something was done; the rest is chance
            assert not Path(target).exists(), f"finished before kill {len(codes) + 1}"
            time.sleep(0.001)
        time.sleep(picker.uniform(0.0, 0.08))
        os.kill(child, getattr(signal, signal_name))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        counts.append(finished(Path(target)))
        assert not Path(target).exists() or codes[-1] == 0
    codes.append(os.waitstatus_to_exitcode(os.waitpid(start(source, target), 0)[1]))
    Path(f"{target}.json").write_text(json.dumps({"finished": counts, "codes": codes}))


if __name__ == "__main__":
    main()
