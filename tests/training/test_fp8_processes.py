"""LoRA on FP8 weights in two real processes over gloo: sharded by FSDP2, and under DDP, against one process."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import fp8_ranks
import pytest
import torch
from processes import run_ranks
from safetensors.torch import load_file, save_file
from testing import GOLDENS, assert_close
from tiny import random_ids, tiny_model
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import MixedPrecision
from transformers import AutoModelForCausalLM

from hf_moe.training.distributed import keep_fp8, prepare, refuse_fp8_under_deepspeed
from hf_moe.training.trainer import DistributedType, check_launch

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fp8_processes")
    for family in fp8_ranks.FAMILIES:
        (folder / family).mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(GOLDENS / ("v3_fp8" if family == "powers" else family) / name, folder / family / name)
    tensors = load_file(folder / "powers" / "model.safetensors")
    scales = {name: tensor.to(torch.float8_e8m0fnu) for name, tensor in tensors.items() if name.endswith("_scale_inv")}
    save_file({**tensors, **scales}, folder / "powers" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def ranks(checkpoints) -> list[dict]:
    """What both processes wrote."""
    return run_ranks("fp8_ranks.py", checkpoints)


@pytest.fixture(scope="module")
def single(checkpoints) -> dict[str, dict]:
    """The same steps in this process, with the whole batch."""
    return {family: fp8_ranks.train(fp8_ranks.load(checkpoints, family)) for family in fp8_ranks.FAMILIES}


def _assert_same_training(results: list[dict], expected: dict) -> None:
    summed = [sum(parts) for parts in zip(*(result["losses"] for result in results))]
    assert summed == pytest.approx(expected["losses"], rel=1e-5)
    for result in results:
        assert result["factors"].keys() == expected["factors"].keys() and len(result["factors"]) > 8
        for name, factor in expected["factors"].items():
            assert_close(name, result["factors"][name], factor, "float32")


@pytest.mark.parametrize("family", fp8_ranks.FAMILIES)
def test_fsdp2_equals_one_process(family, ranks, single):
    _assert_same_training([rank[f"fsdp2 {family}"] for rank in ranks], single[family])


def test_factors_have_moved(single, checkpoints):
    before = dict(fp8_ranks.load(checkpoints, "v3_fp8").named_parameters())
    for name, factor in single["v3_fp8"]["factors"].items():
        assert (factor - before[name]).norm() > 1e-3 * factor.norm(), name


@pytest.mark.parametrize("family", fp8_ranks.FAMILIES)
def test_sharded_fp8_weights_stay_bit_for_bit(family, ranks, checkpoints):
    """After training, the shares of both ranks are the weights and scales of the checkpoint."""
    wanted = fp8_ranks.fp8_parameters(fp8_ranks.load(checkpoints, family))
    shares = [rank[f"fsdp2 {family}"]["fp8"] for rank in ranks]
    assert shares[0].keys() == shares[1].keys() == wanted.keys() and len(wanted) > 40
    for name, tensor in wanted.items():
        assert torch.equal(torch.cat([share[name] for share in shares]), tensor), name


@pytest.mark.parametrize("family", fp8_ranks.FAMILIES)
def test_a_rank_holds_its_share_alone(family, ranks, checkpoints):
    """All FP8 memory of a rank, while nothing runs, is that of its shares: of each tensor half of the rows."""
    whole = fp8_ranks.fp8_parameters(fp8_ranks.load(checkpoints, family))
    values = {name: tensor for name, tensor in whole.items() if not name.endswith("_scale_inv")}
    for rank in ranks:
        for name, tensor in whole.items():
            assert rank[f"fsdp2 {family}"]["fp8"][name].shape[0] <= -(-tensor.shape[0] // 2), name
        half = sum(tensor[: -(-tensor.shape[0] // 2)].numel() for tensor in values.values())
        assert 0 < rank[f"fsdp2 {family}"]["live bytes"] <= half
    assert half < 0.51 * sum(tensor.numel() for tensor in values.values())


def test_layers_see_their_whole_fp8_weights(ranks):
    """While a layer runs, its weights are plain FP8 tensors beside scales of the checkpoint's dtype."""
    for rank in ranks:
        for case, scale in ((rank["mixed"]["fsdp2"], "float32"), (rank["fsdp2 powers"], "float8_e8m0fnu")):
            fp8 = {dtype for name, dtype, _ in case["seen"] if not name.endswith(("_scale_inv", "bias"))}
            assert fp8 == {"torch.float8_e4m3fn"}
            assert {dtype for name, dtype, _ in case["seen"] if name.endswith("_scale_inv")} == {f"torch.{scale}"}
            assert not any(is_sharded for *_, is_sharded in case["seen"])


def test_ddp_equals_one_process(ranks, single):
    _assert_same_training([rank["ddp"] for rank in ranks], single["v3_fp8"])


def test_weights_of_one_process_are_dealt_out(ranks):
    for rank in ranks:
        assert rank["once"]["losses"] == rank["fsdp2 v3_fp8"]["losses"]
        for kind in ("factors", "fp8"):
            for name, tensor in rank["fsdp2 v3_fp8"][kind].items():
                assert torch.equal(rank["once"][kind][name], tensor), name


def test_weights_of_one_process_are_dealt_out_as_accelerate_widens_them(ranks):
    model = tiny_model().to(torch.bfloat16)
    for rank in ranks:
        for name, parameter in model.named_parameters():
            assert rank["once widened"][name].dtype == torch.float32
            assert torch.equal(rank["once widened"][name], parameter.float()), name


def test_mixed_precision_of_fsdp2_is_that_of_ddp(ranks, checkpoints):
    wanted = fp8_ranks.fp8_parameters(fp8_ranks.load(checkpoints, "v3_fp8"))
    for rank in ranks:
        fsdp2, ddp = rank["mixed"]["fsdp2"], rank["mixed"]["ddp"]
        assert fsdp2["losses"] == pytest.approx(ddp["losses"], rel=1e-5)
        for name, factor in ddp["factors"].items():
            assert factor.dtype == fsdp2["factors"][name].dtype == torch.float32
            assert_close(name, fsdp2["factors"][name], factor, "float32_grad")
    for name, tensor in wanted.items():
        assert torch.equal(torch.cat([rank["mixed"]["fsdp2"]["fp8"][name] for rank in ranks]), tensor), name


def test_cast_weights_are_refused_in_the_forward_pass(ranks):
    for rank in ranks:
        for word in ("weight is torch.bfloat16", "without their scales", "param_dtype", "keep_fp8"):
            assert word in rank["mixed"]["message"]


def test_a_resumed_run_is_the_same_bit_for_bit(ranks, checkpoints):
    for rank in ranks:
        straight, resumed = (rank["checkpoints"][name] for name in ("straight", "resumed"))
        assert len(straight) == 4 and straight[2:] == resumed
    first, second = (load_file(checkpoints / name / "adapter_model.safetensors") for name in ("straight", "resumed"))
    assert first.keys() == second.keys() and any("experts" in name for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_checkpoints_hold_the_factors_alone(ranks, checkpoints):
    sharded = checkpoints / "straight" / "checkpoint-4" / "sharded"
    stored = FileSystemReader(sharded).read_metadata().state_dict_metadata
    held = {name.removeprefix("model.") for name in stored if name.startswith("model.")}
    model = fp8_ranks.load(checkpoints, "v3_fp8")
    assert held - set(dict(model.named_buffers())) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_the_adapter_is_read_by_one_process(ranks, checkpoints):
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(checkpoints / "v3_fp8", dtype=torch.float32)
    ids = random_ids(2, 9, high=60)
    with torch.no_grad():
        plain = base.eval()(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, checkpoints / "straight").eval()(input_ids=ids).logits
    assert (adapted - plain).norm() > 1e-2 * plain.norm()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fp8_model(checkpoints):
    return AutoModelForCausalLM.from_pretrained(checkpoints / "step3_fp8")


def _accelerator(kind: DistributedType, **plugin):
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(mixed_precision_policy=None, **plugin))
    return SimpleNamespace(distributed_type=kind, state=state, device="cpu", num_processes=2)


def test_keep_fp8_where_there_is_nothing_to_do(fp8_model):
    assert not keep_fp8(_accelerator(DistributedType.MULTI_GPU), fp8_model)
    assert not keep_fp8(_accelerator(DistributedType.FSDP, fsdp_version=1), tiny_model())


def test_keep_fp8_refuses_other_ways(fp8_model):
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        keep_fp8(_accelerator(DistributedType.FSDP, fsdp_version=1), fp8_model)
    with pytest.raises(ValueError, match="cpu_ram_efficient_loading"):
        keep_fp8(_accelerator(DistributedType.FSDP, fsdp_version=2, cpu_ram_efficient_loading=True), fp8_model)


def test_fsdp1_does_not_round_the_biases_of_routers():
    accelerator, seen = _accelerator(DistributedType.FSDP, fsdp_version=1, cpu_ram_efficient_loading=False), []
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = before = MixedPrecision(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    accelerator.prepare = lambda *prepared: seen.append(plugin.mixed_precision_policy) or prepared
    prepare(accelerator, tiny_model(), None)
    assert seen[0].buffer_dtype is None and seen[0].param_dtype == torch.bfloat16
    assert plugin.mixed_precision_policy is before


@pytest.mark.parametrize("config", [{"bf16": {"enabled": True}}, {}], ids=["config", "accelerator"])
def test_deepspeed_may_not_round_scales(fp8_model, config):
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    accelerator = SimpleNamespace(state=state, mixed_precision="no" if config else "bf16")
    with pytest.raises(ValueError, match="rounds the scales"):
        refuse_fp8_under_deepspeed(accelerator, fp8_model)
    refuse_fp8_under_deepspeed(accelerator, tiny_model())


def test_a_launch_that_would_do_something_else_is_refused(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    alone, ddp = SimpleNamespace(num_processes=1), _accelerator(DistributedType.MULTI_CPU)
    check_launch(alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch(ddp)
    with pytest.raises(ValueError, match="one of 2 processes.*--use_cpu"):
        check_launch(alone)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_launch(_accelerator(DistributedType.FSDP))
    with pytest.raises(ValueError, match="FSDP is asked for.*cpu"):
        check_launch(ddp)
