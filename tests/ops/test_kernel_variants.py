"""Kernels are compiled a few times, however many lengths of prompts and contexts there are. Counted without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_moe.models.triton_compat import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

# Most compilations of each kernel for 347 numbers of tokens from 1 to 8,192, or as many lengths of the context. Three
# tiles (rows of 16, 64 and 128), sums in float32 or not, and what else is said.
MOST = {
    "experts": {"gate_up_kernel": 3, "rows_kernel": 4, "combine_kernel": 2, "layout_kernel": 5, "count_kernel": 1},
    "experts in FP8": {
        "gate_up_kernel": 3,
        "rows_kernel": 4,
        "combine_kernel": 2,
        "layout_kernel": 5,
        "count_kernel": 1,
        "quantize_rows_kernel": 2,
    },
    "training of LoRA on FP8": {  # seven products of rows
        "gate_up_kernel": 3,
        "rows_kernel": 24,
        "combine_kernel": 6,
        "layout_kernel": 5,
        "count_kernel": 1,
        "inner_grad_kernel": 3,
        "outer_kernel": 4,
    },
    "routing": {"topk_kernel": 1},
    "linear": {"linear_kernel": 12, "split_sum_kernel": 6, "quantize_rows_kernel": 1},  # three kinds; split or not
    "attention": {"mla_decode_kernel": 4, "combine_kernel": 5},  # with a mask and without; split or not
}


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, int]]:
    script = Path(__file__).parents[1] / "aot_variants.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("case", MOST)
def test_every_length_is_served_by_a_few_compilations(case, counted):
    counts = {kernel.rpartition(".")[2]: count for kernel, count in counted[case].items()}
    assert counts.keys() == MOST[case].keys()
    assert all(count <= MOST[case][kernel] for kernel, count in counts.items()), counts
