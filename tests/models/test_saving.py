"""Saving: upstream names bit for bit, nothing half written, and what is written loads again."""

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoints import (
    CASES,
    LOGITS_ATOL,
    QUANTISED,
    UNQUANTISED,
    assert_same_bits,
    assert_same_tensors,
    decode_checkpoint,
    edited_golden,
    expected,
    golden,
    max_difference,
    raw_bytes,
    read_config,
    read_tensors,
    stored_dtype,
    upstream_shapes,
)
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers import modeling_utils as host

import hf_moe  # noqa: F401  registers the classes

AUTO_CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)


def load(folder, dtype="auto", **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs).eval()


def index_of(folder) -> dict:
    return json.loads((folder / "model.safetensors.index.json").read_text())


# --- round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["1GB", "60KB"])
@pytest.mark.parametrize("case", UNQUANTISED)
def test_round_trip_is_bitwise(case, max_shard_size, tmp_path):
    load(golden(case), dtype=stored_dtype(case)).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if max_shard_size == "1GB":
        assert files == ["model.safetensors"]
        assert not (tmp_path / "model.safetensors.index.json").exists()
    else:
        assert len(files) > 3
        assert sorted(set(index_of(tmp_path)["weight_map"].values())) == files
    assert_same_tensors(read_tensors(tmp_path), read_tensors(golden(case)))


@pytest.mark.parametrize("case", UNQUANTISED)
def test_index_agrees_with_the_shards(case, tmp_path):
    load(golden(case)).save_pretrained(tmp_path, max_shard_size="60KB")
    held = {}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as stream:
            held.update(dict.fromkeys(stream.keys(), path.name))
    index = index_of(tmp_path)
    assert index["weight_map"] == held
    sizes = [tensor.numel() * tensor.element_size() for tensor in read_tensors(tmp_path).values()]
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("case", CASES)
def test_saved_copy_gives_the_expected_logits(case, tmp_path):
    load(golden(case), dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="200KB")
    with torch.no_grad():
        logits = load(tmp_path)(expected(case)["input_ids"]).logits
    assert max_difference(logits, expected(case)["logits"]) < LOGITS_ATOL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", QUANTISED)
def test_dequantised_golden_is_saved_in_plain_form(case, dtype, tmp_path):
    load(golden(case), dtype=dtype, dequantize=True).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert "quantization_config" not in config
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    wanted = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.to(dtype)
        for name, tensor in decode_checkpoint(read_tensors(golden(case))).items()
    }
    assert_same_tensors(read_tensors(tmp_path), wanted)


@pytest.mark.parametrize("case", CASES)
def test_saved_config_is_the_upstream_one(case, tmp_path):
    load(golden(case)).save_pretrained(tmp_path)
    upstream, output = read_config(golden(case)), read_config(tmp_path)
    changed = {
        key: (value, output.get(key, "absent"))
        for key, value in upstream.items()
        if key not in ("transformers_version", "quantization_config") and output.get(key, "absent") != value
    }
    assert not changed, f"{{key: (upstream, written)}}: {changed}"


@pytest.mark.parametrize("case", ["v3_basic", "v2_lite_greedy"])
def test_second_save_writes_the_same_bytes(case, tmp_path):
    load(golden(case)).save_pretrained(tmp_path / "first")
    load(tmp_path / "first").save_pretrained(tmp_path / "second")
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir() if path.is_file()}
    second = {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir() if path.is_file()}
    assert set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []


def test_saved_twice_from_the_same_model(tmp_path):
    model = load(golden("v3_basic"))
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        assert_same_tensors(read_tensors(tmp_path / name), read_tensors(golden("v3_basic")))


@pytest.mark.parametrize("case", ["v3_basic", "v3_mtp2"])
def test_base_model_round_trip(case, tmp_path):
    model = AutoModel.from_pretrained(golden(case), dtype="auto")
    model.save_pretrained(tmp_path)
    stored = read_tensors(golden(case))
    saved = {name.removeprefix("model."): tensor for name, tensor in read_tensors(tmp_path).items()}
    wanted = {
        name.removeprefix("model."): tensor
        for name, tensor in stored.items()
        if name != "lm_head.weight" and not name.endswith("shared_head.head.weight")
    }
    assert_same_tensors(saved, wanted)
    again = AutoModel.from_pretrained(tmp_path, dtype="auto").state_dict()
    for name, tensor in model.state_dict().items():
        assert_same_bits(name, again[name], tensor)


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_classifier_round_trip(auto_class, tmp_path):
    model = auto_class.from_pretrained(golden("v3_basic"), dtype=torch.float32, num_labels=5)
    model.save_pretrained(tmp_path)
    saved = read_tensors(tmp_path)
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in saved and saved["score.weight"].shape == (5, 64)
    again, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert again.config.num_labels == 5
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert_same_bits(name, state[name], tensor)


# --- MTP duplicates ---------------------------------------------------------------------------------------------------


def test_a_state_dict_that_is_given_gets_its_mtp_duplicates(tmp_path):
    """As trainers of sharded models save: with the gathered state."""
    model = load(golden("v3_basic"))
    model.save_pretrained(tmp_path / "own")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = set(state)
    model.save_pretrained(tmp_path / "given", state_dict=state)
    assert_same_tensors(read_tensors(tmp_path / "given"), read_tensors(tmp_path / "own"))
    assert set(state) == names


def test_mtp_duplicates_follow_a_changed_original(tmp_path):
    model = load(golden("v3_mtp2"))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
        model.lm_head.weight.mul_(-1)
    model.save_pretrained(tmp_path)
    saved = read_tensors(tmp_path)
    for layer in (3, 4):
        assert_same_bits(
            "embed", saved[f"model.layers.{layer}.embed_tokens.weight"], saved["model.embed_tokens.weight"]
        )
        assert_same_bits("head", saved[f"model.layers.{layer}.shared_head.head.weight"], saved["lm_head.weight"])
    assert not torch.equal(saved["lm_head.weight"], read_tensors(golden("v3_mtp2"))["lm_head.weight"])


# --- models that were never loaded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["v3_basic", "v3_mtp2", "v2_group_limited", "v2_lite_greedy", "kimi_k2"])
def test_model_from_config_is_saved_under_upstream_names(case, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(golden(case)), dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    saved = read_tensors(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == upstream_shapes(read_config(golden(case)))
    again = load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert_same_bits(name, again.state_dict()[name], tensor)
    ids = expected(case)["input_ids"]
    with torch.no_grad():
        assert max_difference(again(ids).logits, model(ids).logits) < 1e-6
    assert read_config(tmp_path)["auto_map"].keys() == set(AUTO_CLASSES)


@pytest.mark.parametrize("case", ["v3_basic", "v2_group_limited", "kimi_k2"])
def test_tied_embeddings(case, tmp_path):
    config = AutoConfig.from_pretrained(golden(case))
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert read_config(tmp_path)["tie_word_embeddings"] is True
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_same_bits("embedding", again.lm_head.weight, model.lm_head.weight)
    ids = expected(case)["input_ids"]
    with torch.no_grad():
        assert max_difference(again.eval()(ids).logits, model(ids).logits) < 1e-6


def test_state_dict_argument_is_saved(tmp_path):
    model = load(golden("v3_qlora_none"), dtype=torch.float32)
    state = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    stored = read_tensors(golden("v3_qlora_none"))
    assert_same_tensors(read_tensors(tmp_path), {name: tensor * 2 for name, tensor in stored.items()})


# --- the model after saving -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["v3_basic", "v3_fp8"])
def test_saving_changes_nothing_in_the_model(case, tmp_path):
    model = load(golden(case), dtype=torch.float32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    before = model.config.to_dict()
    model.save_pretrained(tmp_path)
    after = model.state_dict()
    assert list(after) == list(state)
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == addresses
    for name, tensor in state.items():
        assert_same_bits(name, after[name], tensor)
    config = model.config.to_dict()
    changed = {key for key in {*before, *config} if before.get(key, "absent") != config.get(key, "absent")}
    assert changed <= {"architectures", "auto_map"}, changed  # Transformers notes both when it saves
    with torch.no_grad():
        assert max_difference(model(expected(case)["input_ids"]).logits, expected(case)["logits"]) < LOGITS_ATOL


# --- files ------------------------------------------------------------------------------------------------------------


def everything(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fails_at", [0, 2])
def test_interrupted_save_leaves_the_old_checkpoint(fails_at, tmp_path, monkeypatch):
    load(golden("v3_basic")).save_pretrained(tmp_path, max_shard_size="200KB")
    (tmp_path / "notes.txt").write_text("the user's own file")
    before = everything(tmp_path)
    assert sum(name.endswith(".safetensors") for name in before) > 3

    calls, real = [], host.safe_save_file

    def failing(*args, **kwargs):
        calls.append(args[1])
        if len(calls) > fails_at:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(host, "safe_save_file", failing)
    model = load(golden("v3_qlora_none"))
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(calls) == fails_at + 1
    assert everything(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(name for name in before)
    monkeypatch.undo()
    assert_same_tensors(read_tensors(tmp_path), read_tensors(golden("v3_basic")))


def test_interrupted_first_save_leaves_no_files(tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise KeyboardInterrupt

    model = load(golden("v3_qlora_none"))
    monkeypatch.setattr(host, "safe_save_file", failing)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "new")
    assert everything(tmp_path) == {}


def test_complete_save_leaves_no_temporary_files(tmp_path):
    load(golden("v3_qlora_none")).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() or path.name.startswith(".")] == []


@pytest.mark.parametrize(("first", "second"), [("60KB", "1GB"), ("1GB", "60KB"), ("60KB", "300KB")])
def test_stale_weight_files_are_removed(first, second, tmp_path):
    load(golden("v3_basic")).save_pretrained(tmp_path, max_shard_size=first)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not ours")
    load(golden("v3_qlora_none"), dtype=torch.float32).save_pretrained(tmp_path, max_shard_size=second)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert_same_tensors(read_tensors(tmp_path), read_tensors(golden("v3_qlora_none")))
    assert (tmp_path / "model.safetensors.index.json").exists() == (second != "1GB")
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    load(tmp_path)


def test_saving_over_the_checkpoint_that_was_loaded(tmp_path):
    """The parameters may still be views of the files that are replaced."""
    load(golden("v3_basic"), dtype=torch.float32).save_pretrained(tmp_path)
    model = load(tmp_path)
    before = {name: raw_bytes(tensor).clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(raw_bytes(tensor), before[name]), name
    saved = read_tensors(tmp_path)
    for name, tensor in read_tensors(golden("v3_basic")).items():
        assert_same_bits(name, saved[name], tensor.float())


@pytest.mark.parametrize("case", ["v3_basic", "v2_group_limited", "kimi_k2"])
def test_auto_map_names_every_class(case, tmp_path):
    model = load(golden(case))
    model.save_pretrained(tmp_path)
    auto_map = read_config(tmp_path)["auto_map"]
    assert auto_map == model.config.remote_code_map
    assert set(auto_map) == set(AUTO_CLASSES)
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()


def test_architecture_is_the_upstream_name(tmp_path):
    for case in ("v3_basic", "v2_group_limited", "kimi_k2"):
        load(golden(case)).save_pretrained(tmp_path / case)
        upstream, output = read_config(golden(case)), read_config(tmp_path / case)
        assert output["architectures"] == upstream["architectures"]
        assert output["model_type"] == upstream["model_type"]


def test_generation_config_is_saved(tmp_path):
    model = load(golden("v3_basic"))
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    assert load(tmp_path).generation_config.max_new_tokens == 7


@pytest.mark.parametrize("max_shard_size", ["50GB", "300KB"], ids=["one_file", "sharded"])
def test_a_variant_lies_beside_the_default_weights(max_shard_size, tmp_path):
    """Saving a variant removes nothing of the default checkpoint, and each is checked and loaded under its own name."""
    golden = Path(__file__).parents[1] / "goldens" / "v3_basic"
    model = AutoModelForCausalLM.from_pretrained(golden)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    before = {path.name for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path, variant="zero", max_shard_size=max_shard_size)
    assert before <= {path.name for path in tmp_path.iterdir()}
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.any()
    assert not AutoModelForCausalLM.from_pretrained(tmp_path, variant="zero").lm_head.weight.any()
    damaged = sorted(path for path in tmp_path.glob("model.zero*.safetensors"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(OSError, match=re.escape(damaged.name)):
        AutoModelForCausalLM.from_pretrained(tmp_path, variant="zero")


@pytest.mark.parametrize("case", ["v3_basic", "longcat_flash", "longcat_lite_ngram"])
def test_resized_vocabulary_round_trip(case, tmp_path):
    """MTP layers with tables and heads of their own get the new rows, and n-grams are hashed as before."""

    def own_copies(tensors):
        for name in tensors:
            if case == "v3_basic" and name.endswith(("layers.4.embed_tokens.weight", "shared_head.head.weight")):
                tensors[name] = tensors[name].flip(0)

    folder = edited_golden(tmp_path / "in", case, own_copies)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.mtp_vocabulary()
    size = model.config.vocab_size
    ids = torch.arange(3, 11).unsqueeze(0)
    with torch.no_grad():
        before = model(ids, output_mtp_logits=True)
        model.resize_token_embeddings(size + 9)
        after = model(ids, output_mtp_logits=True)
        assert torch.equal(after.logits[..., :size], before.logits)
        assert torch.equal(after.mtp_logits[0][..., :size], before.mtp_logits[0])
        model.save_pretrained(tmp_path / "out")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        new = ids + size - 3
        ours, theirs = (any_model(new, output_mtp_logits=True) for any_model in (model, again))
    assert torch.equal(theirs.logits, ours.logits) and torch.equal(theirs.mtp_logits[0], ours.mtp_logits[0])
    assert ours.mtp_logits[0].shape[-1] == size + 9
