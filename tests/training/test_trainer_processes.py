"""Two processes over gloo on the CPU, data parallel and sharded, against one process with the doubled batch."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import free_port, place_of
from safetensors.torch import load_file
from testing import assert_close
from transformers import AutoModelForCausalLM

import hf_moe  # noqa: F401  registers the models

pytest.importorskip("peft")
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO3 = pytest.param("zero3", marks=pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs DeepSpeed"))
SCRIPT = Path(__file__).with_name("trainer_ranks.py")


def start(folder: Path, way: str, batch_size: int, world: int) -> list[subprocess.Popen]:
    folder.mkdir()
    port, processes = free_port(), []
    for rank in range(world):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment |= {"DS_ACCELERATOR": "cpu"} if way == "zero3" else {"ACCELERATE_USE_CPU": "true"}
        environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parents[2])])
        if world > 1:
            environment |= place_of(rank, world, port)
        command = [sys.executable, str(SCRIPT), str(folder), str(batch_size), way]
        with (folder / f"rank{rank}.log").open("wb") as log:  # a pipe that nobody reads would stop a process
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of the three ways to run, all at once."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = {
        "one": start(folder / "one", "one", 4, 1),
        "ddp": start(folder / "ddp", "ddp", 2, 2),
        "fsdp2": start(folder / "fsdp2", "fsdp2", 2, 2),
    }
    if HAS_DEEPSPEED:
        processes["zero3"] = start(folder / "zero3", "zero3", 2, 2)
    deadline = time.monotonic() + 500
    everyone = sum(processes.values(), [])
    while any(process.poll() is None for process in everyone) and time.monotonic() < deadline:
        if any(process.poll() for process in everyone):
            break  # the other one waits for it
        time.sleep(0.1)
    for process in everyone:
        process.kill()
        process.wait()
    for name, started in processes.items():
        logs = [(folder / name / f"rank{rank}.log").read_text()[-3000:] for rank in range(len(started))]
        assert all(process.returncode == 0 for process in started), f"{name}: {logs}"
    return {name: (json.loads((folder / name / "summary.json").read_text()), folder / name) for name in processes}


@pytest.mark.parametrize("way", ["ddp", "fsdp2", ZERO3])
def test_two_processes_are_one_with_the_doubled_batch(runs, way):
    expected, one = runs["one"]
    summary, folder = runs[way]
    assert summary["kind"].endswith({"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[way])
    assert len(summary["losses"]) == len(expected["losses"]) == 6
    for actual, line in zip(summary["losses"], expected["losses"]):
        assert set(actual) == set(line)
        for name, value in line.items():
            assert actual[name] == pytest.approx(value, rel=1e-3 if name == "grad_norm" else 1e-5), name
    weights, reference = (load_file(path / "weights.safetensors") for path in (folder, one))
    assert set(weights) == set(reference)
    for name, value in reference.items():
        assert_close(name, weights[name], value, "float32_grad")


@pytest.mark.parametrize("way", ["one", "ddp", "fsdp2", ZERO3])
def test_a_resumed_run_is_the_same_bit_for_bit(runs, way):
    summary, _ = runs[way]
    assert summary["equal"]
    assert summary["resumed"] == [line for line in summary["losses"] if line["step"] > 2]


@pytest.mark.parametrize("way", ["ddp", "fsdp2", ZERO3])
def test_the_written_model_is_whole(runs, way):
    reference, written = (
        AutoModelForCausalLM.from_pretrained(runs[name][1] / "straight", dtype=torch.float32).state_dict()
        for name in ("one", way)
    )
    assert set(written) == set(reference)
    for name, value in reference.items():
        assert_close(name, written[name], value, "float32_grad")


@pytest.mark.parametrize("way", ["ddp", "fsdp2", ZERO3])
def test_lora_on_experts_in_two_processes(runs, way):
    """Bfloat16 weights, float32 factors, gradient checkpointing: as one process, within what bfloat16 rounds."""
    expected, _ = runs["one"]
    summary, folder = runs[way]
    assert len(summary["lora"]) == len(expected["lora"])
    for actual, line in zip(summary["lora"], expected["lora"]):
        assert actual["main_loss" if "main_loss" in line else "eval_loss"] == pytest.approx(
            line["main_loss" if "main_loss" in line else "eval_loss"], rel=1e-2
        )
    first, second = (load_file(folder / name / "adapter_model.safetensors") for name in ("lora", "lora2"))
    assert set(first) == set(second) and any("experts" in name for name in first)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert value.norm() > 0, name


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs DeepSpeed")
@pytest.mark.parametrize("name", ["full", "factors"])
def test_zero3_from_a_checkpoint_to_a_result(runs, name):
    """Weights are read into partitioned parameters, MTP layers and experts too; weight decay finds the matrices."""
    expected, one = runs["one"]
    summary, folder = runs["zero3"]
    (trained, *log), (parameters, *lines) = summary["finetuned"][name], expected["finetuned"][name]
    assert trained == parameters and len(log) == len(lines) == 2
    for actual, line in zip(log, lines):
        assert set(actual) == set(line)
        for key, value in line.items():
            assert actual[key] == pytest.approx(value, rel=1e-3 if key == "grad_norm" else 1e-5), key
    (path,) = (one / name).glob("*.safetensors")
    reference, written = load_file(path), load_file(folder / name / path.name)
    assert set(written) == set(reference) and any("experts" in key for key in written)
    for key, value in reference.items():
        assert_close(key, written[key], value, "float32_adamw" if name == "factors" else "float32_grad")
