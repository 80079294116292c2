"""The dense layers' kernels as they would run on GPUs of three generations, compiled without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_moe.models.triton_compat import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.fixture(scope="module", params=sorted(SHARED_MEMORY), ids=lambda capability: f"sm_{capability}")
def compiled(request):
    """(capability, one record for each distinct launch)."""
    return request.param, launches_of(request.param, "fp8_quantisers", "fp8_linear", "mla_decode", "mla_prefill")


def launches_of(capability: int, *cases: str) -> list[dict]:
    script = Path(__file__).parents[1] / "aot.py"
    command = [sys.executable, str(script), "--capability", str(capability), "--cases", *cases]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_launch_fits(compiled):
    capability, launches = compiled
    assert len(launches) >= (15 if capability == 80 else 25)
    for launch in launches:
        assert launch["spills"] == 0, launch
        assert not launch["serialized"], launch
        assert launch["registers"] <= 255 and launch["shared"] <= SHARED_MEMORY[capability], launch


def test_launches_fit_on_gpus_with_less_shared_memory():
    launches = launches_of(120, "mla_decode", "bfloat16", "w8a16", "w8a8")
    assert {launch["kernel"] for launch in launches} > {"gate_up_kernel", "rows_kernel", "mla_decode_kernel"}
    for launch in launches:
        assert launch["spills"] == 0 and launch["shared"] <= 99 * 1024, launch


def test_large_products_use_the_tensor_cores_of_their_generation(compiled):
    capability, launches = compiled
    products = [launch for launch in launches if launch["kernel"] == "linear_kernel"]
    seen = set()
    for launch in products:
        constants = launch["constants"]
        if not constants["X_FP8"] and "bf16" not in "".join(launch["types"]):
            continue  # float32 rows: exact products
        large = constants["BLOCK_M"] >= 64
        instruction = {80: "mma", 90: "wgmma", 100: "tcgen05"}[capability] if large else "mma"
        assert launch[instruction], launch
        if capability == 90 and large and constants["X_FP8"]:
            assert launch["fp8_wgmma"], launch
        seen.add((large, constants["X_FP8"]))
    assert seen == {
        (large, fp8) for large in (False, True) for fp8 in ((False,) if capability == 80 else (False, True))
    }


def test_attention_uses_the_tensor_cores_and_copies_ahead(compiled):
    capability, launches = compiled
    attention = [launch for launch in launches if launch["kernel"] == "mla_decode_kernel"]
    assert {launch["constants"]["HAS_MASK"] for launch in attention} == {False, True}
    for launch in attention:
        wide = launch["constants"]["BLOCK_M"] == 64
        assert launch[{80: "mma", 90: "wgmma", 100: "tcgen05"}[capability] if wide else "mma"], launch
        assert launch["async_copy"], launch
        if wide and capability == 90:  # half of a step's scores for each group of warps, 576 / 16 products of 64 x 16
            assert launch["wgmma"] <= 36 + 2, launch
    assert any(launch["constants"]["BLOCK_M"] == 64 for launch in attention)


def test_attention_of_prompts_uses_the_tensor_cores_and_copies_ahead(compiled):
    capability, launches = compiled
    attention = [launch for launch in launches if launch["kernel"] == "mla_prefill_kernel"]
    kinds = {tuple(launch["constants"][name] for name in ("HAS_MASK", "IS_FIRST", "IS_PIECE")) for launch in attention}
    assert kinds == {(masked, first, piece) for masked in (False, True) for first, piece in ((1, 0), (1, 1), (0, 1))}
    for launch in attention:
        assert launch[{80: "mma", 90: "wgmma", 100: "tcgen05"}[capability]] and launch["async_copy"], launch
