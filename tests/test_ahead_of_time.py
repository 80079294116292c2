"""Every shipped configuration of the experts' kernels, compiled for three generations of GPUs without one.

Each capability is compiled in a process of its own (see `aot.py`), two at a time.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

CAPABILITIES = (80, 90, 100)
CASES = ("routing", "bfloat16", "float16", "float32", "w8a16", "w8a8", "backward", "lora", "activations")
# Most bytes of shared memory that one program may use.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
HERE = Path(__file__).parent


def compile_all(capability: int) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "aot.py"), "--capability", str(capability), "--cases", *CASES]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    with ThreadPoolExecutor(2) as pool:
        return [launch for launches in pool.map(compile_all, CAPABILITIES) for launch in launches]


def describe(launch: dict) -> str:
    tile = "x".join(str(launch["constants"].get(f"BLOCK_{side}", "-")) for side in "MNK")
    return f"{launch['case']} {launch['kernel']} {tile} on sm_{launch['capability']}"


def products(compiled: list[dict]) -> list[dict]:
    return [launch for launch in compiled if {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= launch["constants"].keys()]


def test_everything_is_compiled_for_every_capability(compiled):
    kernels = {capability: set() for capability in CAPABILITIES}
    for launch in compiled:
        kernels[launch["capability"]].add((launch["case"], launch["kernel"]))
    assert {case for case, _ in kernels[90]} == set(CASES)
    assert kernels[90] == kernels[100]
    assert kernels[80] == {(case, kernel) for case, kernel in kernels[90] if "w8a8" not in case}


def test_nothing_spills(compiled):
    spilling = {describe(launch): launch["spills"] for launch in compiled if launch["spills"]}
    assert not spilling


def test_products_do_not_wait_for_one_another(compiled):
    assert not [describe(launch) for launch in compiled if launch["serialized"]]


def test_shared_memory_and_registers_fit(compiled):
    for launch in compiled:
        assert launch["shared"] <= SHARED_MEMORY[launch["capability"]], describe(launch)
        assert launch["registers"] * 32 * launch.get("num_warps", 4) <= 65536, describe(launch)


def test_persistent_programs_share_a_multiprocessor_as_planned(compiled):
    """Shared memory and registers for all programs of a persistent launch; `aot.py` says 132 multiprocessors."""
    seen = 0
    for launch in products(compiled):
        if launch["constants"].get("GROUP_M", 0) > 0:
            programs = -(-launch["grid"][0] // 132)
            seen += programs > 1
            assert programs * (launch["shared"] + 1024) <= SHARED_MEMORY[launch["capability"]] + 1024, describe(launch)
            assert programs * launch["registers"] * 32 * launch["num_warps"] <= 65536, describe(launch)
    assert seen


def test_products_use_tensor_cores_and_asynchronous_copies(compiled):
    for launch in products(compiled):
        if not {"*bf16", "*fp16"} & set(launch["types"]):
            continue  # float32 is computed as such
        assert launch["async_copy"], describe(launch)
        small = launch["constants"]["BLOCK_M"] < 64 or launch["constants"]["BLOCK_N"] < 16
        if launch["capability"] == 80 or small:
            assert launch["mma"], describe(launch)
        elif launch["capability"] == 90:
            assert launch["wgmma"], describe(launch)
        else:
            assert launch["tcgen05"] or launch["mma"], describe(launch)


def test_fp8_products_multiply_fp8(compiled):
    for launch in products(compiled):
        if "w8a8" in launch["case"] and launch["capability"] == 90 and launch["constants"]["BLOCK_M"] >= 64:
            assert launch["fp8_wgmma"], describe(launch)
