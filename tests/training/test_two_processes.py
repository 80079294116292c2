"""Training and expert parallelism in two real processes over gloo, against one process with the whole batch."""

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import two_ranks
from processes import run_ranks
from safetensors.torch import load_file, save_file
from testing import GOLDENS, assert_close
from tiny import random_ids, tiny_model
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.distributed import DistributedConfig

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
    for case in ("v3_fp8", "longcat_fp8", "step3_fp8"):
        (folder / f"tp_{case}").mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(GOLDENS / case / name, folder / f"tp_{case}" / name)
    tiny_model(**two_ranks.BLOCKS).save_pretrained(folder / "tp_plain")
    tiny_model(**two_ranks.EVEN).save_pretrained(folder / "plain_even")
    AutoModelForCausalLM.from_pretrained(
        folder / "plain_even", quantization_config=FineGrainedFP8Config()
    ).save_pretrained(folder / "even_checkpoint")
    request = FineGrainedFP8Config(scale_fmt="ue8m0")
    AutoModelForCausalLM.from_pretrained(folder / "tp_plain", quantization_config=request).save_pretrained(
        folder / "tp_blocks"
    )
    tensors = load_file(folder / "tp_blocks" / "model.safetensors")
    scales = {name: tensor.to(torch.float8_e8m0fnu) for name, tensor in tensors.items() if name.endswith("_scale_inv")}
    save_file({**tensors, **scales}, folder / "tp_blocks" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def ranks(checkpoints) -> list[dict]:
    """What both processes wrote."""
    return run_ranks("two_ranks.py", checkpoints)


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


@pytest.mark.parametrize("folder", ["fp8_checkpoint", "tp_v3_fp8_as_stored"])
def test_fp8_checkpoint_of_two_ranks_is_that_of_one(folder, ranks, checkpoints):
    _assert_same_files(checkpoints / f"{folder}_again", GOLDENS / "v3_fp8", exact=folder.endswith("as_stored"))


def _assert_same_files(actual: Path, expected: Path, exact: bool) -> None:
    """Fails unless all tensors agree bit for bit; those that are not FP8 may be of a wider dtype unless `exact`."""
    tensors, wanted = (load_file(folder / "model.safetensors") for folder in (actual, expected))
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if tensor.dtype == torch.bfloat16 and not exact:
            tensor = tensor.float()
        assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape, name
        assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("family", two_ranks.TENSOR_PARALLEL)
def test_tensor_parallel_fp8_equals_one_process(family, ranks, checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints / f"tp_{family}", dtype=torch.float32)
    ids = random_ids(2, 13, high=100)
    logits, tokens = two_ranks.evaluate(model, ids), two_ranks.generate(model, ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    cut = {name: _of_one_rank(name, p) for name, p in model.named_parameters() if re.search(CUT, name)}
    assert len(cut) > 8
    for rank in ranks:
        result = rank[f"tp {family}"]
        for name in ("logits", "dequantized", "decoded on load"):
            assert_close(name, result[name], logits, "float32")
        assert torch.equal(result["ids"], tokens)
        assert result["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert_close(name, result["gradients"][name], gradient, "float32_grad")
        assert {name: shape for name, shape in result["local"].items() if re.search(CUT, name)} == cut
        for name, shape in cut.items():  # no more is kept alive
            assert result["bytes"][name] == model.get_parameter(name).dtype.itemsize * torch.Size(shape).numel(), name


CUT = r"^model\.layers\.\d+\.(mlps?|moe|share_expert)\..*_proj"


def _of_one_rank(name: str, parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of one of two ranks' parts, in whole blocks."""
    dim, parts = (-1, 1) if "down_proj" in name else (-2, 2 if "gate_up_proj" in name else 1)
    block = 1 if name.endswith("_scale_inv") else 128
    shape = list(parameter.shape)
    shape[dim] = parts * block * math.ceil(shape[dim] / parts / block / 2)
    return tuple(shape)


@pytest.mark.parametrize("family", two_ranks.TENSOR_PARALLEL)
def test_tensor_parallel_fp8_saves_the_checkpoint(family, ranks, checkpoints):
    _assert_same_files(checkpoints / f"tp_{family}_again", checkpoints / f"tp_{family}", exact=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoints / f"tp_{family}_decoded", dtype=torch.float32)
    wanted = AutoModelForCausalLM.from_pretrained(checkpoints / f"tp_{family}", dtype=torch.float32, dequantize=True)
    assert not hasattr(model.config, "quantization_config")
    _assert_same_state(two_ranks.plain_state(model), two_ranks.plain_state(wanted), "exact")


def test_tensor_parallel_quantised_on_load(ranks, checkpoints):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoints / "tp_plain", quantization_config=FineGrainedFP8Config(), dtype=torch.float32
    )
    logits = two_ranks.evaluate(model, random_ids(2, 13, high=100))
    for rank in ranks:
        assert_close("logits", rank["tp on load"], logits, "float32")


def test_what_tensor_parallelism_cannot_do_with_fp8_is_refused(ranks):
    for rank in ranks:
        messages = rank["refused"]
        assert set(messages) == {"cut", "mixed", "adapter", "distributed checkpoint"}
        assert "2 matrices in other places" in messages["mixed"] and "experts.gate_up_proj" in messages["mixed"]
        for word in ("layers.0.self_attn.o_proj.weight", "128 columns", "2 ranks", "ep_size", "dequantize=True"):
            assert word in messages["cut"]
        assert "ep_size=N" in messages["adapter"]
        assert "`distributed_checkpoint`" in messages["distributed checkpoint"]


@pytest.mark.parametrize(("kind", "family"), two_ranks.ADAPTERS)
def test_adapter_on_two_processes(kind, family, ranks, checkpoints):
    if f"{kind} lora {family}" not in ranks[0]:
        pytest.skip("this release of Transformers does not dispatch tokens to experts")
    if family in ("fp8", "even"):
        path = checkpoints / f"{family}_checkpoint"
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    else:
        model = two_ranks.make_model(family)
    model = two_ranks.with_adapter(model)
    losses = two_ranks.train_adapter(model)
    state = two_ranks.adapter_state(model)
    results = [rank[f"{kind} lora {family}"] for rank in ranks]
    merged = two_ranks.evaluate(model.merge_and_unload(), random_ids(2, 13, high=60))
    for result in results:
        _assert_same_state(result["state"], state, "float32")
        if family in two_ranks.ADAPTER_FAMILIES:
            assert_close("merged", result["merged"], merged, "float32")
        else:  # a last bit of a factor makes another FP8 number of a sum now and then
            assert (result["merged"] - merged).norm() < 1e-3 * merged.norm()
    summed = [sum(parts) if kind == "ddp" else parts[0] for parts in zip(*(result["losses"] for result in results))]
    assert summed == pytest.approx(losses, rel=1e-5)
