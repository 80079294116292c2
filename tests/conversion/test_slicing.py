"""Slices: which layers, experts and router rows remain, and that the result loads and runs, for every family."""

import json

import pytest
import torch
from command_line import message, run
from models.checkpoints import assert_same_bits, edited_golden, golden, read_config, read_tensors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import hf_moe  # noqa: F401  registers the families
from hf_moe.conversion.source import LocalStore

CASES = (
    "v3_basic", "v3_fp8", "v3_mtp2", "v3_qlora_none", "v2_group_limited", "v2_lite_greedy", "kimi_k2", "kimi_k2_int4",
    "step3_text", "step3_fp8", "step3_vl", "longcat_flash", "longcat_fp8", "longcat_lite_ngram",
)  # fmt: skip


def sliced(tmp_path, case, *options):
    result = run("slice", golden(case), tmp_path / "slice", *options)
    assert result.exit_code == 0, message(result)
    return tmp_path / "slice"


@pytest.mark.parametrize("case", CASES)
def test_slice_is_sound_and_generates(case, tmp_path):
    folder = sliced(tmp_path, case, "--first-layers", 1, "--last-layers", 1, "--experts", 4)
    assert run("verify", folder).exit_code == 0
    vision = case == "step3_vl"
    model = (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert model(ids).logits.isfinite().all()
    assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=-1).shape == (1, 7)
    assert model.config.get_text_config().n_routed_experts == 4


@pytest.mark.parametrize("case", ["v3_basic", "v2_group_limited", "kimi_k2", "step3_text", "longcat_flash"])
def test_whole_slice_is_the_checkpoint(case, tmp_path):
    """All layers and all experts by their ids: the same tensors, bit for bit, and the same configuration."""
    config = AutoConfig.from_pretrained(golden(case))
    layers = config.num_layers if case.startswith("longcat") else config.num_hidden_layers
    last = f"0-{config.n_routed_experts - 1}"
    folder = sliced(tmp_path, case, "--first-layers", layers - 1, "--last-layers", 1, "--experts", last)
    tensors, whole = read_tensors(folder), read_tensors(golden(case))
    assert set(tensors) == set(whole)
    for name, tensor in tensors.items():
        assert_same_bits(name, tensor, whole[name])
    assert read_config(folder) == read_config(golden(case))


def test_rows_follow_the_experts(tmp_path):
    """Two whole groups and half of none: experts 4-7 and 12-15 of 16 in 4 groups."""
    folder = sliced(tmp_path, "v3_basic", "--last-layers", 2, "--experts", "4-7,12-15")
    tensors, whole, config = read_tensors(folder), read_tensors(golden("v3_basic")), read_config(folder)
    chosen = [4, 5, 6, 7, 12, 13, 14, 15]
    # Layers 2 and 3 of 4 become 0 and 1, and the MTP layer 4 becomes 2.
    for new, old in ((0, 2), (1, 3), (2, 4)):
        for leaf in ("weight", "e_score_correction_bias"):
            rows = whole[f"model.layers.{old}.mlp.gate.{leaf}"][chosen]
            assert_same_bits(leaf, tensors[f"model.layers.{new}.mlp.gate.{leaf}"], rows)
        for index, expert in enumerate(chosen):
            name = "mlp.experts.{}.up_proj.weight"
            wanted = whole[f"model.layers.{old}." + name.format(expert)]
            assert_same_bits(name, tensors[f"model.layers.{new}." + name.format(index)], wanted)
    assert_same_bits("eh_proj", tensors["model.layers.2.eh_proj.weight"], whole["model.layers.4.eh_proj.weight"])
    changed = {key: value for key, value in config.items() if value != read_config(golden("v3_basic")).get(key)}
    assert changed == {"num_hidden_layers": 2, "n_routed_experts": 8, "n_group": 2, "first_k_dense_replace": 0}
    assert not any(name.startswith("model.layers.3.") for name in tensors)


def test_zero_experts_keep_their_rows(tmp_path):
    folder = sliced(tmp_path, "longcat_flash", "--experts", "1,6")
    tensors, whole, config = read_tensors(folder), read_tensors(golden("longcat_flash")), read_config(folder)
    total, zero = read_config(golden("longcat_flash"))["n_routed_experts"], config["zero_expert_num"]
    rows = [1, 6, *range(total, total + zero)]
    for leaf in ("classifier.weight", "e_score_correction_bias"):
        name = f"model.layers.1.mlp.router.{leaf}"
        assert_same_bits(name, tensors[name], whole[name][rows])
    assert config["n_routed_experts"] == 2 and config["moe_topk"] <= 2 + zero
    assert any(name.startswith("model.mtp.") for name in tensors)


def test_stacks_of_step3_keep_chosen_experts_and_scales(tmp_path):
    folder = sliced(tmp_path, "step3_fp8", "--experts", "0,2-3,7")
    tensors, whole = read_tensors(folder), read_tensors(golden("step3_fp8"))
    for name, tensor in tensors.items():
        per_expert = ".moe." in name
        assert_same_bits(name, tensor, whole[name][[0, 2, 3, 7]] if per_expert else whole[name])
    assert read_config(folder)["moe_num_experts"] == 4


@pytest.mark.parametrize("layers, wanted", [(("--last-layers", 2), "0"), (("--first-layers", 1), "1")])
def test_moe_layers_of_step3_are_renumbered(layers, wanted, tmp_path):
    """The golden has experts in layers 1 and 2 of 4."""
    assert read_config(golden("step3_text"))["moe_layers_enum"] == "1,2"
    folder = sliced(tmp_path, "step3_text", *layers)
    assert read_config(folder)["moe_layers_enum"] == wanted


def test_sharded_source_and_modules_that_stay(tmp_path):
    """The list of modules that are not quantised follows the layers."""
    quantization = read_config(golden("v3_fp8"))["quantization_config"]
    kept = {**quantization, "modules_to_not_convert": ["lm_head", "model.layers.2.self_attn", "model.layers.1.mlp"]}
    edited_golden(tmp_path / "source", "v3_fp8", shards=3, quantization_config=kept)
    result = run("slice", tmp_path / "source", tmp_path / "slice", "--last-layers", 1, "--max-shard-size", "200KB")
    assert result.exit_code == 0, message(result)
    written = read_config(tmp_path / "slice")["quantization_config"]["modules_to_not_convert"]
    assert written == ["lm_head", "model.layers.0.self_attn"]
    assert run("verify", tmp_path / "slice").exit_code == 0


def test_dry_run_writes_nothing(tmp_path):
    result = run("slice", golden("v3_basic"), tmp_path / "slice", "--first-layers", 2, "--dry-run")
    assert result.exit_code == 0 and "layers 0-1 of 4 are kept" in message(result)
    assert not list(tmp_path.iterdir())


def test_manifest_names_the_choice(tmp_path):
    folder = sliced(tmp_path, "kimi_k2", "--first-layers", 2, "--experts", 6)
    step = json.loads((folder / "conversion.json").read_text())["steps"][-1]
    assert step["options"] == {"layers": [0, 1], "experts": [0, 1, 2, 3, 4, 5]}


@pytest.mark.parametrize("case", ["v3_fp8", "step3_text"])
def test_only_what_is_kept_is_read(case, tmp_path, monkeypatch):
    """Of a repository, too, no more than headers, small files and the chosen tensors and rows are fetched."""
    read = []
    original = LocalStore.read_into

    def count(self, filename, begin, buffer, what):
        read.append((filename, len(buffer)))
        return original(self, filename, begin, buffer, what)

    monkeypatch.setattr(LocalStore, "read_into", count)
    folder = edited_golden(tmp_path / "source", case, shards=4)
    read.clear()
    result = run("slice", folder, tmp_path / "slice", "--first-layers", 2, "--experts", "2,3")
    assert result.exit_code == 0, message(result)
    kept = sum(tensor.nbytes for tensor in read_tensors(tmp_path / "slice").values())
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))
    assert sum(size for name, size in read if name.endswith(".safetensors")) == kept + headers
