"""Damaged, foreign and inconsistent checkpoints: one error each, which names the file, tensor or option at fault."""

import json
import pickle
import shutil
import struct

import pytest
import torch
from checkpoints import LogRecorder, copy_golden, edited_golden, golden, load_file, read_config, read_tensors
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

import hf_moe  # noqa: F401  registers the classes
from hf_moe.models.modeling_deepseek_v3 import DeepseekV3PreTrainedModel
from hf_moe.models.weights_safetensors import CheckpointError

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"
SECOND = "model-00002-of-00003.safetensors"


def assert_refused(folder, *named, error=CheckpointError, auto_class=AutoModelForCausalLM, **kwargs):
    """Loading fails with `error`, whose one message names everything in `named`; returns the message."""
    with pytest.raises(error) as caught:
        auto_class.from_pretrained(folder, **kwargs)
    message = str(caught.value)
    for word in named:
        assert word in message, f"the message does not name {word!r}: {message}"
    assert len(message) < 600, f"a message of {len(message)} characters is not one clear error: {message[:800]}"
    return message


@pytest.fixture
def sharded(tmp_path):
    return edited_golden(tmp_path / "checkpoint", "v3_basic", shards=3)


def edit_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


def shard_of(folder, name):
    return json.loads((folder / INDEX).read_text())["weight_map"][name]


def test_checkpoint_error_is_caught_by_both_usual_handlers():
    assert issubclass(CheckpointError, OSError) and issubclass(CheckpointError, ValueError)


# --- files ------------------------------------------------------------------------------------------------------------


def test_missing_shard(sharded):
    (sharded / SECOND).unlink()
    assert_refused(sharded, SECOND, "missing")


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, -1], ids=lambda kept: f"keep-{kept}")
@pytest.mark.parametrize("form", ["sharded", "single"])
def test_truncated_file(form, kept, tmp_path):
    folder = edited_golden(tmp_path, "v3_basic", shards=3 if form == "sharded" else 1)
    path = folder / (SECOND if form == "sharded" else "model.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    assert_refused(folder, path.name)


@pytest.mark.parametrize(
    "content",
    [
        b"\x00" * 200,
        b"<html><body>404 not found, but with status 200 and enough text to look like a file</body></html>" * 20,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 163234\n",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 16) + b"{'not': 'json'} " + b"\x00" * 64,
        struct.pack("<Q", 4) + b"null" + b"\x00" * 64,
        struct.pack("<Q", 2) + b"[]" + b"\x00" * 64,
        struct.pack("<Q", 10) + b'{"a": 123}' + b"\x00" * 64,
        struct.pack("<Q", 8) + b'{"\xff\xfe":}' + b"\x00" * 64,
    ],
    ids=["zeros", "html", "lfs-pointer", "endless", "no-json", "null", "list", "no-fields", "no-utf8"],
)
def test_garbage_instead_of_a_shard(sharded, content):
    (sharded / SECOND).write_bytes(content)
    assert_refused(sharded, SECOND)


def write_raw(path, header: dict, data: bytes = b""):
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 32]},
        {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]},
        {"dtype": "Q7", "shape": [4], "data_offsets": [0, 16]},
        {"shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4]},
    ],
    ids=lambda fields: str(fields).replace("'", ""),
)
def test_inconsistent_header_fields(tmp_path, fields):
    copy_golden(tmp_path, "v3_basic")
    write_raw(tmp_path / "model.safetensors", {"model.norm.weight": fields}, b"\x00" * 64)
    assert_refused(tmp_path, "model.safetensors")


@pytest.mark.parametrize(
    "filename", ["../outside.safetensors", "/etc/outside.safetensors", "sub/outside.safetensors", "..", "", 7, None]
)
def test_index_that_names_a_file_outside_of_the_folder(sharded, filename):
    outside = sharded.parent / "outside.safetensors"
    shutil.copy(sharded / SECOND, outside)
    (sharded / "sub").mkdir()
    shutil.copy(sharded / SECOND, sharded / "sub" / "outside.safetensors")
    absolute = str(outside) if filename == "/etc/outside.safetensors" else filename
    (sharded / SECOND).unlink()

    def edit(index):
        index["weight_map"] = {
            name: absolute if shard == SECOND else shard for name, shard in index["weight_map"].items()
        }

    edit_index(sharded, edit)
    assert_refused(sharded, INDEX)


def test_index_that_puts_a_tensor_into_the_wrong_shard(sharded):
    name = "model.layers.1.self_attn.o_proj.weight"
    wrong = FIRST if shard_of(sharded, name) != FIRST else SECOND
    edit_index(sharded, lambda index: index["weight_map"].update({name: wrong}))
    assert_refused(sharded, name, wrong)


def test_index_that_promises_a_tensor_that_no_shard_has(sharded):
    edit_index(sharded, lambda index: index["weight_map"].update({"model.layers.9.phantom": FIRST}))
    assert_refused(sharded, "model.layers.9.phantom", FIRST)


def test_tensor_in_two_shards(sharded):
    name = "model.layers.1.self_attn.o_proj.weight"
    other = FIRST if shard_of(sharded, name) != FIRST else SECOND
    tensors = load_file(sharded / other)
    save_file({**tensors, name: read_tensors(sharded)[name]}, sharded / other, metadata={"format": "pt"})
    assert_refused(sharded, name, FIRST, shard_of(sharded, name))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": null}', "\x00\x01"],
)
def test_index_that_is_none(sharded, text):
    (sharded / INDEX).write_text(text)
    assert_refused(sharded, INDEX)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused(tmp_path, name):
    copy_golden(tmp_path, "v3_basic")
    tensors = read_tensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / name)
    assert_refused(tmp_path, name, "safetensors")
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)


class Explosive:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickles_are_not_even_opened(tmp_path):
    copy_golden(tmp_path / "checkpoint", "v3_basic")
    (tmp_path / "checkpoint" / "model.safetensors").unlink()
    (tmp_path / "checkpoint" / "pytorch_model.bin").write_bytes(pickle.dumps(Explosive(tmp_path / "ran")))
    assert_refused(tmp_path / "checkpoint", "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()


def test_folder_without_weights(tmp_path):
    copy_golden(tmp_path, "v3_basic")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.kv_b_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.experts.3.gate_proj.weight",
        "model.layers.1.mlp.experts.15.down_proj.weight",
        "model.layers.2.mlp.gate.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.3.input_layernorm.weight",
        "model.layers.4.eh_proj.weight",
        "model.layers.4.mlp.experts.0.up_proj.weight",
        "model.layers.4.shared_head.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
    ],
)
def test_wrong_shape(name, shards, tmp_path):
    def edit(tensors):
        tensors[name] = tensors[name][:-1]

    shape = tuple(read_tensors(golden("v3_basic"))[name].shape)
    folder = edited_golden(tmp_path, "v3_basic", edit, shards=shards)
    message = assert_refused(folder, name, str((shape[0] - 1, *shape[1:])), str(shape))
    assert "config.json" in message


def test_transposed_expert(tmp_path):
    name = "model.layers.1.mlp.experts.2.down_proj.weight"

    def edit(tensors):
        tensors[name] = tensors[name].T

    assert_refused(edited_golden(tmp_path, "v3_basic", edit), name, "(32, 64)", "(64, 32)")


def test_wrong_number_of_dimensions(tmp_path):
    name = "model.layers.1.mlp.experts.2.down_proj.weight"

    def edit(tensors):
        tensors[name] = tensors[name].flatten()

    assert_refused(edited_golden(tmp_path, "v3_basic", edit), name, "(2048,)", "(64, 32)")


def test_wrong_mtp_duplicate_shape(tmp_path):
    name = "model.layers.4.embed_tokens.weight"

    def edit(tensors):
        tensors[name] = tensors[name][:-1]

    assert_refused(edited_golden(tmp_path, "v3_basic", edit), name, "(511, 64)", "(512, 64)")


def test_config_of_another_size(tmp_path):
    folder = edited_golden(tmp_path, "v3_basic", hidden_size=128)
    assert_refused(folder, "config.json", "128")


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("layer", [1, 4])
def test_missing_expert(auto_class, shards, part, layer, tmp_path):
    name = f"model.layers.{layer}.mlp.experts.7.{part}.weight"
    folder = edited_golden(tmp_path, "v3_basic", lambda tensors: tensors.pop(name), shards=shards)
    assert_refused(folder, name, "missing", auto_class=auto_class)


@pytest.mark.parametrize("case", ["v2_group_limited", "kimi_k2", "v3_fp8"])
def test_missing_expert_in_the_other_families(case, tmp_path):
    def edit(tensors):
        for name in [name for name in tensors if ".layers.2.mlp.experts.5." in name]:
            del tensors[name]

    assert_refused(edited_golden(tmp_path, case, edit), "model.layers.2.mlp.experts.5.", "missing")


def test_last_expert_missing(tmp_path):
    """Without a look at the configuration, fifteen experts would just be a smaller stack."""

    def edit(tensors):
        for name in [name for name in tensors if ".experts.15." in name]:
            del tensors[name]

    assert_refused(edited_golden(tmp_path, "v3_basic", edit), ".mlp.experts.15.", "n_routed_experts=16")


def test_surplus_expert(tmp_path):
    def edit(tensors):
        for name in [name for name in tensors if ".layers.1.mlp.experts.0." in name]:
            tensors[name.replace("experts.0.", "experts.16.")] = tensors[name].clone()

    assert_refused(edited_golden(tmp_path, "v3_basic", edit), "model.layers.1.mlp.experts.16.", "n_routed_experts=16")


def test_experts_beyond_the_configured_number(tmp_path):
    """Sixteen experts in the files and eight in the configuration, also with other numbers in between missing."""
    folder = edited_golden(tmp_path, "v3_basic", n_routed_experts=8)
    assert_refused(folder, "config.json", ".mlp.experts.", "n_routed_experts=8")

    def edit(tensors):
        for name in [name for name in tensors if ".layers.1.mlp.experts.0." in name]:
            tensors[name.replace("experts.0.", "experts.40.")] = tensors[name].clone()

    folder = edited_golden(tmp_path / "far", "v3_basic", edit)
    assert_refused(folder, "model.layers.1.mlp.experts.40.", "n_routed_experts=16")


def test_no_experts_at_all(tmp_path):
    def edit(tensors):
        for name in [name for name in tensors if ".layers.1.mlp.experts." in name]:
            del tensors[name]

    assert_refused(edited_golden(tmp_path, "v3_basic", edit), "model.layers.1.mlp.experts.0.", "missing")


@pytest.mark.parametrize(
    "name",
    [
        "enorm.weight",
        "hnorm.weight",
        "shared_head.norm.weight",
        "self_attn.kv_b_proj.weight",
        "mlp.gate.weight",
        "mlp.experts.2.up_proj.weight",
        "mlp.gate.e_score_correction_bias",
        "input_layernorm.weight",
    ],
)
def test_missing_mtp_tensor(name, tmp_path):
    full = f"model.layers.4.{name}"
    assert_refused(edited_golden(tmp_path, "v3_basic", lambda tensors: tensors.pop(full)), full, "missing")


def test_mtp_layer_without_its_projection(tmp_path):
    """`eh_proj` alone missing must not pass as a checkpoint without MTP layers."""
    name = "model.layers.4.eh_proj.weight"
    folder = edited_golden(tmp_path, "v3_basic", lambda tensors: tensors.pop(name))
    assert_refused(folder, name, "missing")


@pytest.mark.parametrize("shards", [1, 3])
def test_missing_fused_experts(shards, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(golden("v3_basic"))
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    tensors = read_tensors(tmp_path / "fused")
    del tensors["model.layers.2.mlp.experts.down_proj"]
    save_file(tensors, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    assert_refused(tmp_path / "fused", "model.layers.2.mlp.experts.", "missing")


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("v3_basic", "model.embed_tokens.weight"),
        ("v3_basic", "model.norm.weight"),
        ("v3_basic", "model.layers.1.post_attention_layernorm.weight"),
        ("v3_fp8", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("kimi_k2_int4", "model.layers.2.mlp.gate.weight"),
        ("v2_lite_greedy", "model.layers.1.self_attn.q_proj.weight"),
        ("v2_group_limited", "model.layers.1.mlp.shared_experts.up_proj.weight"),
        ("longcat_flash", "model.layers.0.mlps.1.down_proj.weight"),
        ("longcat_lite_ngram", "model.ngram_embeddings.post_projs.5.weight"),
        ("step3_text", "model.layers.2.moe.gate.weight"),
        ("step3_vl", "model.layers.0.self_attn.inter_norm.weight"),
        ("step3_vl", "vit_downsampler.bias"),
        ("step3_vl", "vision_model.embeddings.class_embedding"),
    ],
)
def test_missing_tensor(case, name, tmp_path):
    """A decoder, tower or projector with a newly initialised part would answer nonsense."""
    auto_class = AutoModelForImageTextToText if case == "step3_vl" else AutoModelForCausalLM
    folder = edited_golden(tmp_path, case, lambda tensors: tensors.pop(name))
    assert_refused(folder, f"tensor {name} missing", auto_class=auto_class)


# --- quantised tensors ------------------------------------------------------------------------------------------------

FP8_NAMES = [
    "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.1.mlp.experts.3.down_proj.weight",
    "model.layers.3.mlp.shared_experts.up_proj.weight",
]


@pytest.mark.parametrize("name", FP8_NAMES)
def test_fp8_weight_without_scales(name, tmp_path):
    scale = f"{name}_scale_inv"
    assert_refused(edited_golden(tmp_path, "v3_fp8", lambda tensors: tensors.pop(scale)), name, scale, "missing")


@pytest.mark.parametrize("name", FP8_NAMES)
def test_scales_without_an_fp8_weight(name, tmp_path):
    scale = f"{name}_scale_inv"
    assert_refused(edited_golden(tmp_path / "gone", "v3_fp8", lambda tensors: tensors.pop(name)), name)

    def decoded(tensors):
        tensors[name] = tensors[name].bfloat16()

    assert_refused(edited_golden(tmp_path / "plain", "v3_fp8", decoded), scale)


@pytest.mark.parametrize("name", FP8_NAMES)
@pytest.mark.parametrize("change", ["row", "column", "transposed", "flat", "scalar"])
def test_wrong_grid_of_scales(name, change, tmp_path):
    scale = f"{name}_scale_inv"
    grids = {
        "row": lambda tensor: torch.cat((tensor, tensor[:1])),
        "column": lambda tensor: torch.cat((tensor, tensor[:, :1]), dim=1),
        "transposed": lambda tensor: torch.cat((tensor, tensor[:1])).T,
        "flat": lambda tensor: tensor.flatten(),
        "scalar": lambda tensor: tensor[0, 0],
    }

    def edit(tensors):
        tensors[scale] = grids[change](tensors[scale]).clone()

    shape = tuple(read_tensors(golden("v3_fp8"))[scale].shape)
    assert_refused(edited_golden(tmp_path, "v3_fp8", edit), scale, str(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("case", "name", "options"),
    [
        *(("v3_fp8", f"{name}_scale_inv", options) for name in FP8_NAMES for options in ({}, {"dequantize": True})),
        ("longcat_fp8", "model.mtp.layers.0.eh_proj.weight_scale_inv", {}),
        ("step3_fp8", "model.layers.1.moe.down_proj.weight_scale_inv", {}),
        ("kimi_k2_int4", "model.layers.1.mlp.experts.3.up_proj.weight_scale", {}),
    ],
)
def test_scales_that_are_not_finite(case, name, options, value, tmp_path):
    def edit(tensors):
        tensors[name].view(-1)[-1] = value

    assert_refused(edited_golden(tmp_path, case, edit), name, "not finite", "model.safetensors", **options)


def test_wrong_shape_of_an_fp8_weight(tmp_path):
    name = "model.layers.1.self_attn.kv_b_proj.weight"

    def edit(tensors):
        tensors[name] = tensors[name].view(torch.uint8)[:-1].view(torch.float8_e4m3fn)

    assert_refused(edited_golden(tmp_path, "v3_fp8", edit), name, "(255, 128)", "(256, 128)")


@pytest.mark.parametrize("case", ["v3_fp8", "kimi_k2_int4"])
def test_quantised_tensors_without_quantization_config(case, tmp_path):
    copy_golden(tmp_path, case)
    config = read_config(tmp_path)
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_refused(tmp_path, "model.layers.", "config.json")


@pytest.mark.parametrize("suffix", ["_scale", "_shape", "_packed"])
def test_incomplete_int4_weight(suffix, tmp_path):
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    folder = edited_golden(tmp_path, "kimi_k2_int4", lambda tensors: tensors.pop(name + suffix))
    assert_refused(folder, name)


@pytest.mark.parametrize("suffix", ["_scale", "_packed"])
def test_int4_tensors_that_do_not_belong_together(suffix, tmp_path):
    name = "model.layers.1.mlp.experts.3.down_proj.weight"

    def edit(tensors):
        tensors[name + suffix] = tensors[name + suffix][:-1]

    assert_refused(edited_golden(tmp_path, "kimi_k2_int4", edit), name)


def test_int4_weight_of_the_wrong_shape(tmp_path):
    name = "model.layers.1.mlp.experts.3.down_proj.weight"

    def edit(tensors):
        tensors[f"{name}_shape"] = tensors[f"{name}_shape"].flip(0)

    assert_refused(edited_golden(tmp_path, "kimi_k2_int4", edit), name)


def changed_weights(**changes) -> dict:
    config = read_config(golden("kimi_k2_int4"))["quantization_config"]
    config["config_groups"]["group_0"]["weights"].update(changes)
    return config


FP8 = read_config(golden("v3_fp8"))["quantization_config"]


@pytest.mark.parametrize(
    ("case", "quantization", "named"),
    [
        ("v3_fp8", {"quant_method": "fp8", "activation_scheme": "dynamic"}, ["fp8", "weight_block_size"]),
        ("v3_fp8", {**FP8, "weight_block_size": None}, ["fp8", "weight_block_size"]),
        ("v3_fp8", {**FP8, "weight_block_size": [128]}, ["fp8", "weight_block_size"]),
        ("v3_fp8", {**FP8, "weight_block_size": [0, 128]}, ["fp8", "weight_block_size"]),
        ("v3_fp8", {**FP8, "weight_block_size": [64, 64]}, ["weight_scale_inv"]),
        ("v3_fp8", {**FP8, "weight_block_size": "128"}, ["fp8", "weight_block_size"]),
        ("kimi_k2_int4", changed_weights(num_bits=8), ["compressed-tensors", "8"]),
        ("kimi_k2_int4", changed_weights(symmetric=False), ["compressed-tensors", "symmetric"]),
        ("kimi_k2_int4", changed_weights(strategy="channel"), ["compressed-tensors", "channel"]),
        ("kimi_k2_int4", changed_weights(group_size=64), ["model.layers."]),
        ("kimi_k2_int4", changed_weights(group_size=None), ["group_size"]),
        ("kimi_k2_int4", {**changed_weights(), "format": "marlin-24"}, ["compressed-tensors", "marlin-24"]),
        ("kimi_k2_int4", {**changed_weights(), "config_groups": {}}, ["compressed-tensors"]),
    ],
    ids=map(str, range(13)),
)
def test_unsupported_quantization(case, quantization, named, tmp_path):
    folder = edited_golden(tmp_path, case, quantization_config=quantization)
    assert_refused(folder, *named, error=ValueError)


# --- no partial state -------------------------------------------------------------------------------------------------


def test_a_refused_load_leaves_no_trace(tmp_path, monkeypatch):
    """The same process loads a good checkpoint afterwards, and no weight had been set when the bad one was refused."""
    name = "model.layers.3.mlp.experts.15.up_proj.weight"
    folder = edited_golden(tmp_path, "v3_basic", lambda tensors: tensors.pop(name))
    files = sorted(path.name for path in folder.iterdir())
    made = []
    original = DeepseekV3PreTrainedModel.__init__

    def remember(self, *args, **kwargs):
        made.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(DeepseekV3PreTrainedModel, "__init__", remember)
    default_dtype = torch.get_default_dtype()
    with LogRecorder() as log:
        assert_refused(folder, name)
    assert "newly initialized" not in log.text
    assert made and all(parameter.device.type == "meta" for parameter in made[0].parameters())
    assert sorted(path.name for path in folder.iterdir()) == files
    assert torch.get_default_dtype() == default_dtype
    assert torch.empty(1).device.type == "cpu"
    monkeypatch.undo()
    model = AutoModelForCausalLM.from_pretrained(golden("v3_basic"))
    assert not any(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize("ids", [[[0, 512]], [[-1, 3]], [[2**40, 0]]], ids=str)
def test_token_ids_out_of_range(ids):
    model = AutoModelForCausalLM.from_pretrained(golden("v3_qlora_none")).eval()
    with pytest.raises(IndexError) as caught:
        model(torch.tensor(ids))
    assert "512" in str(caught.value) and "vocabulary" in str(caught.value)
