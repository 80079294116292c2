"""Training and expert parallelism in two real processes over gloo, against one process with the whole batch."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_ranks
from testing import GOLDENS, assert_close
from tiny import random_ids
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

HERE = Path(__file__).parent
# Releases without a dispatch of tokens cannot tell zero experts from those of another rank.
HAS_DISPATCH = hasattr(DistributedConfig, "ep_size")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two_processes")
    for family in two_ranks.EXPERT_PARALLEL:
        target = folder / f"{family}_checkpoint"
        if family == "fp8":
            target.mkdir()
            for name in ("config.json", "model.safetensors"):
                shutil.copy(GOLDENS / "v3_fp8" / name, target / name)
        elif family != "longcat_flash" or HAS_DISPATCH:
            two_ranks.make_model(family).save_pretrained(target)
    return folder


@pytest.fixture(scope="module")
def ranks(checkpoints) -> list[dict]:
    """What both processes wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, **own, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-W", "ignore", str(HERE / "two_ranks.py"), str(checkpoints)]
        with open(checkpoints / f"rank{rank}.log", "w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(checkpoints / f"rank{rank}.log").read_text()[-3000:] for rank in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    return [torch.load(checkpoints / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def _single(family: str, optimizer: str = "sgd") -> dict:
    model = two_ranks.make_model(family)
    result = two_ranks.train(model, two_ranks.make_optimizer(model, optimizer), family)
    return {**result, "state": two_ranks.plain_state(model)}


def _assert_same_state(actual: dict, expected: dict, fmt: str) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert_close(name, tensor, expected[name], fmt)


@pytest.mark.parametrize("family", two_ranks.DDP_FAMILIES)
def test_two_processes_equal_one_with_the_whole_batch(family, ranks):
    expected = _single(family)
    for rank in ranks:
        result = rank[f"ddp {family}"]
        _assert_same_state(result["state"], expected["state"], "float32")  # biases and clipped projections, too
        assert torch.equal(result["loads"], expected["loads"])
        if expected["logits"] is not None:
            assert_close("largest logits", result["logits"], expected["logits"], "float32")
    first, second = (rank[f"ddp {family}"]["own"][0] for rank in ranks)
    assert ((first == 0) != (second == 0)).any()  # an expert without tokens on one rank
    assert torch.equal(first + second, expected["own"][0])


def test_micro_batches_on_two_processes(ranks):
    expected = _single("deepseek_v3")
    for rank in ranks:
        _assert_same_state(rank["ddp micro"]["state"], expected["state"], "float32")
        assert torch.equal(rank["ddp micro"]["loads"], expected["loads"])


def test_muon_on_two_processes(ranks):
    expected = _single("deepseek_v3", "muon")
    for name, tensor in ranks[0]["ddp muon"]["state"].items():
        assert torch.equal(tensor, ranks[1]["ddp muon"]["state"][name]), name
        # The iteration amplifies directions in which there is nothing but the rounding of sums.
        assert_close(name, tensor, expected["state"][name], "float32_grad")


@pytest.mark.parametrize("layout", two_ranks.PLACEMENTS)
def test_muon_on_matrices_laid_out(layout, ranks):
    for rank in ranks:
        for actual, expected in zip(rank["matrices"][layout], two_ranks.update_matrices()):
            assert_close(str(tuple(expected.shape)), actual, expected, "float32")


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_fsdp2_equals_one_process_and_reloads(optimizer, ranks, checkpoints):
    expected = _single("deepseek_v3", optimizer)
    fmt = "float32" if optimizer == "sgd" else "float32_grad"
    for rank in ranks:
        result = rank[f"fsdp2 {optimizer}"]
        assert any("experts.gate_up_proj" in name for name in result["sharded"])
        _assert_same_state(result["state"], expected["state"], fmt)
        assert torch.equal(result["loads"], expected["loads"])
        for name, tensor in result["state"].items():
            assert torch.equal(result["reloaded"][name], tensor), name
        for name, tensor in result["straight"].items():
            assert torch.equal(result["resumed"][name], tensor), name


def test_fsdp2_saves_a_checkpoint_for_one_process(ranks, checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "fsdp2_whole")
    _assert_same_state(two_ranks.plain_state(model), ranks[0]["fsdp2 muon"]["state"], "exact")


@pytest.mark.parametrize("family", two_ranks.EXPERT_PARALLEL)
def test_expert_parallel_equals_one_process(family, ranks, checkpoints):
    if f"ep {family}" not in ranks[0]:
        pytest.skip("this release of Transformers does not dispatch tokens to experts")
    model = AutoModelForCausalLM.from_pretrained(checkpoints / f"{family}_checkpoint", dtype=torch.float32)
    ids = random_ids(2, 13, high=60)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    model.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    num_experts = model.config.get_text_config().n_routed_experts
    for rank in ranks:
        result = rank[f"ep {family}"]
        assert result["local"] and all(shape[0] == num_experts // 2 for shape in result["local"].values())
        assert_close("logits", result["logits"], logits, "float32")
        assert result["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert_close(name, result["gradients"][name], gradient, "float32_grad")


@pytest.mark.parametrize(
    ("kind", "family"),
    [*((kind, family) for kind in ("ddp", "ep") for family in two_ranks.ADAPTER_FAMILIES), ("ep", "fp8")],
)
def test_adapter_on_two_processes(kind, family, ranks, checkpoints):
    if f"{kind} lora {family}" not in ranks[0]:
        pytest.skip("this release of Transformers does not dispatch tokens to experts")
    if family == "fp8":
        model = AutoModelForCausalLM.from_pretrained(checkpoints / "fp8_checkpoint", dtype=torch.float32).train()
    else:
        model = two_ranks.make_model(family)
    model = two_ranks.with_adapter(model)
    losses = two_ranks.train_adapter(model)
    state = two_ranks.adapter_state(model)
    results = [rank[f"{kind} lora {family}"] for rank in ranks]
    for result in results:
        _assert_same_state(result["state"], state, "float32")
    summed = [sum(parts) if kind == "ddp" else parts[0] for parts in zip(*(result["losses"] for result in results))]
    assert summed == pytest.approx(losses, rel=1e-5)
