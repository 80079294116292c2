"""What is refused: one clear message that names the file or tensor, exit code 2, and nothing new on the disk."""

import errno
import json
import os
import shutil

import pytest
import torch
from command_line import (
    edit_json,
    edited_golden,
    fills_up,
    message,
    read_tensors,
    rewrite_header,
    run,
    tree,
    write_checkpoint,
)
from models.checkpoints import golden, read_config

FP8, BF16, INT4 = "v3_fp8", "v2_lite_greedy", "kimi_k2_int4"
Q_A = "model.layers.0.self_attn.q_a_proj.weight"
SHARD = "model-00001-of-00002.safetensors"


def fp8(folder, edit=None, shards=1, **config):
    return edited_golden(folder, FP8, edit, shards, **config)


def weights(folder):
    return next(iter(sorted(folder.glob("*.safetensors"))))


def set_value(name, value, at=0):
    def edit(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[at] = value

    return edit


def set_byte(name, value):
    def edit(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(torch.uint8).view(-1)[0] = value

    return edit


def header(change):
    """A checkpoint whose header `change` has edited, given the header and one tensor's fields."""

    def make(folder):
        fp8(folder)

        def edit(content):
            names = [name for name in content if name != "__metadata__"]
            result = change(content, content[names[0]], content[names[1]])
            return content if result is None else result

        rewrite_header(weights(folder), edit)

    return make


def index(change):
    """A sharded checkpoint whose index `change` has edited."""

    def make(folder):
        fp8(folder, shards=2)
        edit_json(folder / "model.safetensors.index.json", change)

    return make


def first_shard(change):
    """A sharded checkpoint whose first file `change` has edited."""

    def make(folder):
        fp8(folder, shards=2)
        change(folder / SHARD)

    return make


def with_bytes(path, change):
    path.write_bytes(change(path.read_bytes()))


def with_single_file(folder):
    fp8(folder, shards=2)
    shutil.copy(golden("v3_fp8") / "model.safetensors", folder / "model.safetensors")


def only_pickle(folder):
    fp8(folder)
    weights(folder).rename(folder / "pytorch_model.bin")


def link_out(name):
    def make(folder):
        fp8(folder, shards=2)
        outside = folder.parent / "outside"
        outside.mkdir()
        target = folder / name
        if target.exists():
            shutil.move(target, outside / name)
        else:
            (outside / name).write_text("{}")
        target.symlink_to(outside / name)

    return make


def config(change):
    def make(folder):
        fp8(folder)
        edit_json(folder / "config.json", change)

    return make


def int4(change):
    return lambda folder: edited_golden(folder, INT4, change)


def bf16(change):
    return lambda folder: edited_golden(folder, BF16, change)


def drop(name):
    return lambda tensors: tensors.pop(name)


def replaced(name, value):
    return lambda tensors: tensors.__setitem__(name, value(tensors[name]))


def quantization(**changes):
    return config(lambda content: content["quantization_config"].update(changes))


PACKED = "model.layers.1.mlp.experts.0.down_proj.weight_packed"
NAN, INF = float("nan"), float("inf")
# Name, what makes the source, the arguments behind source and target, and what the message must hold.
SOURCES = [
    ("missing_folder", lambda folder: None, "bf16", ["source", "no such folder"]),
    ("file_for_folder", lambda folder: folder.write_text(""), "bf16", ["source", "file"]),
    ("empty_folder", lambda folder: folder.mkdir(), "bf16", ["config.json", "missing"]),
    ("no_weights", lambda f: (fp8(f), weights(f).unlink()), "bf16", ["no weights"]),
    ("no_config", lambda f: (fp8(f), (f / "config.json").unlink()), "bf16", ["config.json", "missing"]),
    ("config_is_no_json", lambda f: (fp8(f), (f / "config.json").write_text("{")), "bf16", ["config.json", "JSON"]),
    ("config_is_a_list", config(lambda content: [content]), "bf16", ["config.json", "list"]),
    ("config_without_type", config(lambda c: [c.pop("model_type"), c.pop("architectures")] and None), "bf16",
     ["config.json", "model_type"]),
    ("config_key_twice", lambda f: (fp8(f), with_bytes(f / "config.json", lambda b: b'{"vocab_size": 1,' + b[1:])),
     "bf16", ["config.json", "vocab_size", "twice"]),
    ("unknown_family", config(lambda c: c.update(model_type="llama", architectures=["LlamaForCausalLM"])), "fp8-ue8m0",
     ["llama"]),
    ("pickle", only_pickle, "bf16", ["pytorch_model.bin", "pickle"]),
    ("index_names_pickle", index(lambda c: c["weight_map"].update({Q_A: "pytorch_model.bin"})), "bf16",
     ["pytorch_model.bin", "pickle"]),
    ("index_beside_single_file", with_single_file, "bf16", ["model.safetensors: stands beside", "move the other"]),
    ("adapter", lambda f: (fp8(f), weights(f).rename(f / "adapter_model.safetensors")), "bf16",
     ["is an adapter", "hf-moe merge"]),
    ("index_empty", index(lambda c: c.update(weight_map={})), "bf16", ["index.json", "names no tensor"]),
    ("index_is_no_json", lambda f: (fp8(f, shards=2), (f / "model.safetensors.index.json").write_text("no")), "bf16",
     ["index.json", "JSON"]),
    ("index_without_map", index(lambda c: c.pop("weight_map") and None), "bf16", ["index.json", "weight_map"]),
    ("index_of_numbers", index(lambda c: c["weight_map"].update({Q_A: 1})), "bf16", ["index.json"]),
    ("index_leaves_folder", index(lambda c: c["weight_map"].update({Q_A: "../other.safetensors"})), "bf16",
     ["index.json", "../other.safetensors"]),
    ("index_absolute", index(lambda c: c["weight_map"].update({Q_A: "/etc/other.safetensors"})), "bf16",
     ["index.json", "/etc/other.safetensors"]),
    ("missing_shard", first_shard(lambda path: path.unlink()), "bf16", [SHARD, "missing"]),
    ("index_wrong", index(lambda c: c["weight_map"].update(no_such_tensor=SHARD)), "bf16", ["no_such_tensor"]),
    ("tensor_without_index", index(lambda c: c["weight_map"].pop(Q_A) and None), "bf16", [Q_A]),
    ("tensor_in_two_files", first_shard(lambda p: shutil.copy(p, p.parent / SHARD.replace("00001-", "00002-"))),
     "bf16", ["model.layers", SHARD]),
    ("shard_links_out", link_out(SHARD), "bf16", [SHARD, "link"]),
    ("config_links_out", link_out("config.json"), "bf16", ["config.json", "link"]),
    ("tokenizer_links_out", link_out("tokenizer.json"), "bf16", ["tokenizer.json", "link"]),
    ("truncated", first_shard(lambda path: with_bytes(path, lambda data: data[:-100])), "bf16", [SHARD, "truncated"]),
    ("too_long", first_shard(lambda path: with_bytes(path, lambda data: data + b"12345")), "bf16", [SHARD, "5 bytes"]),
    ("no_bytes", first_shard(lambda path: path.write_bytes(b"")), "bf16", [SHARD]),
    ("cut_in_header", first_shard(lambda path: with_bytes(path, lambda data: data[:50])), "bf16", [SHARD, "header"]),
    ("header_length_huge", first_shard(lambda path: with_bytes(path, lambda data: b"\xff" * 8 + data[8:])), "bf16",
     [SHARD]),
    ("header_is_no_json", header(lambda h, a, b: "{" + " " * 20), "bf16", ["model.safetensors", "header"]),
    ("header_is_a_list", header(lambda h, a, b: "[]"), "bf16", ["model.safetensors", "header"]),
    ("header_key_twice", header(lambda h, a, b: json.dumps(h)[:-1] + f', "lm_head.weight": {json.dumps(a)}}}'), "bf16",
     ["model.safetensors", "lm_head.weight", "twice"]),
    ("overlapping", header(lambda h, a, b: b.update(data_offsets=[n - 2 for n in b["data_offsets"]])), "bf16",
     ["model.safetensors", "overlap"]),
    ("hole", header(lambda h, a, b: h.pop(next(iter(n for n in h if n != "__metadata__"))) and None), "bf16",
     ["model.safetensors", "belong to none"]),
    ("negative_offset", header(lambda h, a, b: a.update(data_offsets=[-2, 0])), "bf16",
     ["model.safetensors", "damaged"]),
    ("offsets_swapped", header(lambda h, a, b: a["data_offsets"].reverse()), "bf16", ["model.safetensors"]),
    ("shape_disagrees", header(lambda h, a, b: a["shape"].append(3)), "bf16", ["model.safetensors", "shape"]),
    ("shape_of_floats", header(lambda h, a, b: a.update(shape=[1.5])), "bf16", ["model.safetensors", "damaged"]),
    ("unknown_dtype", header(lambda h, a, b: a.update(dtype="F4")), "bf16", ["model.safetensors", "F4"]),
    ("no_offsets", header(lambda h, a, b: a.pop("data_offsets") and None), "bf16", ["model.safetensors", "damaged"]),
    ("no_tensors", lambda f: write_checkpoint(f, read_config(golden(FP8)), {}), "bf16", ["no tensor"]),
    ("no_scale", lambda f: fp8(f, drop(f"{Q_A}_scale_inv")), "bf16", [Q_A, "scale"]),
    ("scale_alone", lambda f: fp8(f, drop(Q_A)), "bf16", [f"{Q_A}_scale_inv"]),
    ("scale_of_plain_weight", lambda f: fp8(f, replaced(Q_A, torch.Tensor.bfloat16)), "bf16", [Q_A]),
    ("wrong_grid", lambda f: fp8(f, replaced(f"{Q_A}_scale_inv", lambda t: torch.cat([t, t]))), "bf16", [Q_A, "shape"]),
    ("scale_nan", lambda f: fp8(f, set_value(f"{Q_A}_scale_inv", NAN)), "bf16", [f"{Q_A}_scale_inv"]),
    ("scale_infinite", lambda f: fp8(f, set_value(f"{Q_A}_scale_inv", INF)), "bf16", [f"{Q_A}_scale_inv"]),
    ("scale_negative", lambda f: fp8(f, set_value(f"{Q_A}_scale_inv", -1.0)), "bf16", [f"{Q_A}_scale_inv"]),
    ("zero_block", lambda f: fp8(f, set_value(f"{Q_A}_scale_inv", 0.0)), "bf16", [f"{Q_A}_scale_inv"]),
    ("scale_of_integers", lambda f: fp8(f, replaced(f"{Q_A}_scale_inv", torch.Tensor.int)), "bf16", [Q_A]),
    ("weight_nan", lambda f: fp8(f, set_byte(Q_A, 127)), "bf16", [Q_A]),
    ("fp8_unannounced", config(lambda c: c.pop("quantization_config") and None), "bf16", [".weight", "FP8"]),
    ("unknown_quantisation", quantization(quant_method="awq"), "bf16", ["awq"]),
    ("no_block_size", quantization(weight_block_size=None), "bf16", ["weight_block_size"]),
    ("block_size_of_zero", quantization(weight_block_size=[0, 128]), "bf16", ["weight_block_size"]),
    ("quantisation_is_a_list", config(lambda c: c.update(quantization_config=[1])), "bf16", ["quantization_config"]),
    ("nan_to_fp8", bf16(set_value("model.layers.0.self_attn.o_proj.weight", NAN)), "fp8", ["self_attn.o_proj.weight"]),
    ("infinite_to_fp8", bf16(set_value("model.layers.0.self_attn.o_proj.weight", INF)), "fp8",
     ["self_attn.o_proj.weight"]),
    ("mixed_dtypes", bf16(replaced("model.layers.0.self_attn.o_proj.weight", torch.Tensor.int)), "fp8",
     ["self_attn.o_proj.weight", "int32"]),
    ("int4_without_shape", int4(drop(PACKED.replace("packed", "shape"))), "bf16", ["experts.0.down_proj"]),
    ("int4_without_scale", int4(drop(PACKED.replace("packed", "scale"))), "bf16", ["experts.0.down_proj"]),
    ("int4_wrong_shape", int4(replaced(PACKED, lambda t: t[:, :-1])), "bf16", ["experts.0.down_proj"]),
    ("int4_shape_of_zeros", int4(replaced(PACKED.replace("packed", "shape"), torch.zeros_like)), "bf16",
     ["experts.0.down_proj"]),
    ("int4_scale_nan", int4(set_value(PACKED.replace("packed", "scale"), NAN)), "bf16", ["experts.0.down_proj"]),
    ("int4_unannounced", lambda f: edited_golden(f, INT4, quantization_config=None), "bf16", ["weight_packed"]),
    ("unknown_format", fp8, "gguf", ["gguf", "bf16"]),
    ("fused_unaligned", fp8, "fused", ["72 rows", "128"]),
    ("fused_int4", int4(None), "fused", ["INT4"]),
    ("fused_without_expert", bf16(drop("model.layers.1.mlp.experts.5.up_proj.weight")), "fused",
     ["model.layers.1.mlp.experts.5.up_proj.weight", "missing"]),
    ("fused_expert_too_many",
     bf16(lambda t: t.update({"model.layers.1.mlp.experts.12.up_proj.weight": t["lm_head.weight"].clone()})), "fused",
     ["experts.12"]),
    ("fused_uneven", bf16(replaced("model.layers.1.mlp.experts.5.up_proj.weight", torch.Tensor.half)), "fused",
     ["model.layers.1.mlp.experts.5.up_proj.weight"]),
    ("inference_of_int4", int4(None), "inference", ["INT4"]),
    ("inference_of_longcat", lambda f: edited_golden(f, "longcat_flash"), "inference", ["longcat_flash"]),
    ("inference_unknown_tensor", bf16(lambda t: t.update({"model.layers.0.self_attn.other.weight": torch.ones(3)})),
     "inference", ["self_attn.other.weight"]),
]  # fmt: skip


def refused(result, fragments) -> None:
    text = message(result)
    assert result.exit_code == 2, f"exit code {result.exit_code}: {text} {result.exception!r}"
    assert "Traceback" not in text
    for fragment in fragments:
        assert fragment in text, f"{fragment!r} is not in: {text}"


@pytest.mark.parametrize("make, to, fragments", [case[1:] for case in SOURCES], ids=[case[0] for case in SOURCES])
def test_bad_source(make, to, fragments, tmp_path):
    make(tmp_path / "source")
    before = tree(tmp_path)
    refused(run("convert", tmp_path / "source", tmp_path / "target", "--to", to), fragments)
    assert tree(tmp_path) == before


def occupied(target, source):
    target.mkdir()
    (target / "precious.txt").write_text("kept")
    return target


def is_file(target, source):
    target.write_text("kept")
    return target


def linked(target, source):
    (target.parent / "elsewhere").mkdir()
    target.symlink_to(target.parent / "elsewhere")
    return target


def below_file(target, source):
    target.write_text("kept")
    return target / "below"


TARGETS = {
    "occupied": (occupied, ["target", "not empty"]),
    "file": (is_file, ["target", "file"]),
    "link": (linked, ["target", "link"]),
    "below_file": (below_file, ["target", "file"]),
    "source_itself": (lambda target, source: source, ["source"]),
    "in_source": (lambda target, source: source / "new", ["source"]),
}


@pytest.mark.parametrize("command", ["convert", "slice"])
@pytest.mark.parametrize("case", TARGETS)
def test_bad_target(case, command, tmp_path):
    source = fp8(tmp_path / "source")
    prepare, fragments = TARGETS[case]
    target = prepare(tmp_path / "target", source)
    before = tree(tmp_path)
    options = ["--to", "bf16"] if command == "convert" else ["--first-layers", 1]
    refused(run(command, source, target, *options), fragments)
    assert tree(tmp_path) == before


def read_only(monkeypatch):
    """A file system that takes nothing new; root, too, is told so."""

    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr(os, "makedirs", refuse)


def no_room(monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))


DISKS = {"read_only": (read_only, ["target"]), "no_room": (no_room, ["target", "free"]), "full": (fills_up, ["full"])}


@pytest.mark.parametrize("command", ["convert", "slice"])
@pytest.mark.parametrize("case", DISKS)
def test_bad_disk(case, command, tmp_path, monkeypatch):
    source = fp8(tmp_path / "source")
    before = tree(tmp_path)
    breaks, fragments = DISKS[case]
    with monkeypatch.context() as patched:
        breaks(patched)
        options = ["--to", "bf16"] if command == "convert" else ["--first-layers", 2]
        refused(run(command, source, tmp_path / "target", *options), fragments)
    assert tree(tmp_path) == before
    assert run(command, source, tmp_path / "target", *options).exit_code == 0


OPTIONS = {
    "shard_size": (["convert", "--to", "bf16", "--max-shard-size", "many"], ["many"]),
    "shard_size_zero": (["convert", "--to", "bf16", "--max-shard-size", "0"], ["0"]),
    "no_workers": (["convert", "--to", "bf16", "--workers", 0], ["workers"]),
    "world_size": (["convert", "--to", "inference", "--world-size", 3], ["world-size", "3"]),
    "world_size_cuts_blocks": (["convert", "--to", "inference", "--world-size", 2], ["2 ranks"]),
    "foreign_option": (["convert", "--to", "bf16", "--world-size", 2], ["world-size"]),
    "revision_of_a_folder": (["convert", "--to", "bf16", "--revision", "main"], ["source is a folder", "'main'"]),
    "slice_revision_of_a_folder": (["slice", "--experts", "4", "--revision", "v1"], ["source is a folder", "'v1'"]),
    "slice_nothing": (["slice"], ["--first-layers"]),
    "slice_no_layer": (["slice", "--first-layers", 0], ["3 layers"]),
    "slice_too_many": (["slice", "--first-layers", 3, "--last-layers", 1], ["3 layers"]),
    "slice_no_such_expert": (["slice", "--experts", "1,99"], ["99", "0 to 7"]),
    "slice_range_backwards": (["slice", "--experts", "1,7-3"], ["7-3", "ends before it begins"]),
    "slice_no_number": (["slice", "--experts", "a-b"], ["a-b"]),
    "slice_no_experts": (["slice", "--experts", "0"], ["8 experts"]),
    "slice_uneven_groups": (["slice", "--experts", "0,1,2"], ["n_group"]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_option(case, tmp_path):
    source = fp8(tmp_path / "source")
    before = tree(tmp_path)
    (command, *options), fragments = OPTIONS[case]
    refused(run(command, source, tmp_path / "target", *options), fragments)
    assert tree(tmp_path) == before


def test_full_disk_keeps_finished_files(tmp_path, monkeypatch):
    """What was finished before the disk was full is not written again; the target is not there until it is whole."""
    source, target = fp8(tmp_path / "source"), tmp_path / "target"
    command = ["convert", source, target, "--to", "bf16", "--max-shard-size", "50KB"]
    with monkeypatch.context() as patched:
        fills_up(patched, 1_000_000, tmp_path / "target.partial" / "state.json")
        refused(run(*command), ["full", "target", "weight files are finished"])
    assert not target.exists() and (tmp_path / "target.partial").is_dir()
    assert "going on" in message(run(*command))
    assert run("verify", target).exit_code == 0 and not (tmp_path / "target.partial").exists()


def test_matrix_is_large_enough():
    assert len(SOURCES) + len(TARGETS) + len(DISKS) + len(OPTIONS) >= 90
    assert len({case[0] for case in SOURCES}) == len(SOURCES)
    assert read_tensors(golden(FP8))[f"{Q_A}_scale_inv"].dtype == torch.float32
