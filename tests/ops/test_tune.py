"""The sweep over tiles, `benchmarks/gpu/tune.py`, tried without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from testing import can_run_kernels

from hf_moe.models.kernel_tiles import Tile, chosen, trying
from hf_moe.models.triton_compat import HAS_TRITON, INTERPRETING

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
interpreted = pytest.mark.skipif(not (INTERPRETING and can_run_kernels()), reason="needs Triton's interpreter")


@pytest.fixture
def tune(monkeypatch):
    for folder in (BENCHMARKS, BENCHMARKS / "gpu"):
        monkeypatch.syspath_prepend(str(folder))
    import tune

    return tune


def test_a_tile_is_tried_within_and_not_beyond():
    shipped, other = Tile(16, 64, 128, 4, 4, 0), Tile(16, 32, 128, 4, 4, 0)
    with trying(rows=other), trying(gate_up=lambda tile: tile._replace(stages=5)):
        assert chosen("rows", shipped) == other and chosen("outer", shipped) == shipped
        assert chosen("gate_up", shipped) == shipped._replace(stages=5)
    with pytest.raises(KeyError), trying(rows=other):
        raise KeyError
    assert chosen("rows", shipped) == chosen("gate_up", shipped) == shipped


# Number of the case in its family, and what is multiplied.
TRIED = [("experts", 0, "w8a16"), ("experts", 3, "w8a8"), ("linear", 0, "w8a16"), ("backward", 1, "bf16")]
TRIED += [("backward", 3, "bf16"), ("mla_decode", 0, None), ("mla_prefill", 0, None)]


@interpreted
@pytest.mark.parametrize("family, number, kind", TRIED)
@torch.no_grad()
def test_a_candidate_is_checked_and_timed(tune, family, number, kind):
    from pretend_cuda import pretend_cuda

    case = [case for case in tune.all_cases(True) if case.label["family"] == family][number]
    assert case.label.get("kind") == kind
    with pretend_cuda():
        row = tune.try_case(case, None, 1.0, 1)
    shipped, candidate = row["candidates"]
    assert row["ratio"] >= 1 and shipped["us"] > 0 and candidate["us"] > 0, row
    assert shipped[case.names[0]] != candidate[case.names[0]]


@interpreted
@torch.no_grad()
def test_a_wrong_candidate_is_not_timed(tune):
    from pretend_cuda import pretend_cuda

    case = next(case for case in tune.all_cases(True) if case.label["family"] == "linear")
    wrong = case._replace(build=lambda device: wrong_one(case.build(device)))
    with pretend_cuda():
        row = tune.try_case(wrong, None, 1.0, 1)
    assert "off by" in row["candidates"][1]["failed"] and row["ratio"] == 1


def wrong_one(problem):
    return problem._replace(launch=lambda choices, copy=0: problem.launch(choices, copy) * (2 if choices else 1))


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_what_the_compiler_says_of_a_launch(tmp_path):
    script = [str(BENCHMARKS / "gpu" / "tune.py"), "--static", "--families", "mla_decode", "--cases", "1"]
    options = ["--candidates", "1", "--processes", "1", "--out", str(tmp_path)]
    result = subprocess.run([sys.executable, *script, *options], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    shipped, candidate = json.loads((tmp_path / "tune_static_cpu.json").read_text())["rows"]
    assert shipped["shipped"] and not candidate["shipped"] and shipped["taken"] != candidate["taken"]
    # Twice 64 heads, 64 parts of the context: at most one program on each of 132 multiprocessors.
    assert (shipped["programs"], shipped["per processor"], shipped["waves"]) == (128, 1, 128 / 132)
    assert shipped["stack"] == 0 and shipped["KB in flight"] == 72 * 128 / 132
