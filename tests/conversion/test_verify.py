"""`hf-moe verify`: sound checkpoints pass, every fault is named, and differences are measured."""

import json
import math

import pytest
import torch
from command_line import edit_json, edited_golden, message, read_tensors, rewrite_header, run
from models.checkpoints import GOLDENS, golden, quantise_fp8, read_config
from safetensors.torch import save_file
from tiny import tiny_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_moe.conversion import progress, verify
from hf_moe.conversion.compare import compare_checkpoints
from hf_moe.conversion.source import LocalStore, open_source, read_header
from hf_moe.conversion.verify import verify_folder

CASES = sorted(path.parent.name for path in GOLDENS.glob("*/model.safetensors"))
Q_A = "model.layers.0.self_attn.q_a_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("case", CASES)
def test_goldens_are_sound(case):
    report = verify_folder(golden(case))
    assert report.ok and report.problems == [], report.problems
    tensors = read_tensors(golden(case))
    assert report.tensors == len(tensors)
    assert report.bytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2_lite", "longcat_flash_ngram"])
def test_saved_models_are_sound(family, auto_class, tied, tmp_path):
    if family.startswith("longcat") and auto_class is AutoModelForSequenceClassification:
        pytest.skip("LongCat has no such model")
    model = tiny_model(family, auto_class=auto_class, dtype=torch.bfloat16, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / INDEX).exists() and verify_folder(tmp_path).problems == []


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_values_of_every_piece_are_counted(dtype, bad, tmp_path):
    values = torch.ones(2 * verify.PIECE + 7).to(dtype)
    bad = math.nan if dtype == torch.float8_e4m3fn else bad  # which has no infinity
    values[[0, verify.PIECE - 1, verify.PIECE, -1]] = torch.tensor(bad).to(dtype)
    save_file({"x.weight": values, "y.weight": torch.ones(3).to(dtype)}, tmp_path / "model.safetensors")
    entries, _ = read_header(LocalStore(tmp_path), "model.safetensors", (tmp_path / "model.safetensors").stat().st_size)
    found = [problem for entry in entries for problem in verify.bad_values(entry)]
    assert len(found) == 1 and "x.weight holds 4 values that are not finite" in found[0]


def test_sound_values_are_not_counted(tmp_path, monkeypatch):
    """Counting takes ten times as long as looking at the bounds."""
    monkeypatch.setattr(torch.Tensor, "isfinite", None)
    save_file({"x.weight_scale_inv": torch.ones(9), "y": torch.ones(9).bfloat16()}, tmp_path / "model.safetensors")
    entries, _ = read_header(LocalStore(tmp_path), "model.safetensors", (tmp_path / "model.safetensors").stat().st_size)
    assert [problem for entry in entries for problem in verify.bad_values(entry)] == []


def set_value(name, value):
    def edit(tensors):
        tensors[name].view(-1)[-1] = value

    return edit


def rename(old, new):
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


def change(name, value):
    return lambda tensors: tensors.__setitem__(name, value(tensors[name]))


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
PACKED = "model.layers.1.mlp.experts.0.down_proj.weight_packed"
# Golden, edit of the tensors, and what some problem must hold.
TENSORS = {
    "missing": ("v3_basic", lambda t: t.pop(EXPERT), [EXPERT, "missing", "n_routed_experts=16"]),
    "missing_norm": ("v3_basic", lambda t: t.pop("model.norm.weight"), ["model.norm.weight", "missing"]),
    "missing_mtp": ("v3_basic", lambda t: t.pop("model.layers.4.hnorm.weight"), ["model.layers.4.hnorm.weight"]),
    "misnamed": ("kimi_k2", rename(EXPERT, EXPERT.replace("up_proj", "upp_proj")), ["upp_proj"]),
    "surplus_expert": ("kimi_k2", lambda t: t.update({EXPERT.replace(".3.", ".24."): t[EXPERT].clone()}), [".24."]),
    "shape": ("v3_basic", change(EXPERT, lambda t: t[:-1].clone()), [EXPERT, "shape", "config.json"]),
    "router_rows": ("longcat_flash", change("model.layers.0.mlp.router.classifier.weight", lambda t: t[:8].clone()),
                    ["classifier.weight", "shape"]),
    "integers": ("v3_basic", change(EXPERT, torch.Tensor.int), [EXPERT, "int32"]),
    "mixed_halves": ("step3_text", change(Q_A.replace("q_a", "q"), torch.Tensor.half), ["float16", "bfloat16"]),
    "uneven_experts": ("v2_lite_greedy", change(EXPERT, torch.Tensor.half), [EXPERT, "float16"]),
    "nan": ("v3_basic", set_value(EXPERT, math.nan), [EXPERT, "not finite"]),
    "infinite": ("longcat_flash", set_value("lm_head.weight", math.inf), ["lm_head.weight", "not finite"]),
    "nan_fp8": ("v3_fp8", change(Q_A, lambda t: torch.full_like(t.view(torch.uint8), 255).view(t.dtype)),
                [Q_A, "not finite"]),
    "scale_missing": ("v3_fp8", lambda t: t.pop(f"{Q_A}_scale_inv"), [Q_A, "scale"]),
    "scale_stray": ("v3_fp8", lambda t: t.update({"norm.weight_scale_inv": torch.ones(1, 1)}), ["norm", "belongs"]),
    "scale_grid": ("v3_fp8", change(f"{Q_A}_scale_inv", lambda t: torch.cat([t, t])), [f"{Q_A}_scale_inv", "blocks"]),
    "scale_negative": ("v3_fp8", set_value(f"{Q_A}_scale_inv", -1.0), [f"{Q_A}_scale_inv", "not positive"]),
    "scale_zero": ("step3_fp8", set_value("model.layers.1.moe.up_proj.weight_scale_inv", 0.0), ["not positive"]),
    "scale_nan": ("longcat_fp8", set_value("model.layers.0.mlps.0.up_proj.weight_scale_inv", math.nan), ["not finite"]),
    "int4_part": ("kimi_k2_int4", lambda t: t.pop(PACKED.replace("packed", "scale")), ["down_proj", "weight_scale"]),
    "int4_shape": ("kimi_k2_int4", change(PACKED, lambda t: t[:-1].clone()), [PACKED, "shape"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_faulty_tensors(case, tmp_path):
    name, edit, fragments = TENSORS[case]
    edited_golden(tmp_path / "folder", name, edit, shards=2)
    report = verify_folder(tmp_path / "folder")
    assert any(all(part in problem for part in fragments) for problem in report.problems), report.problems
    result = run("verify", tmp_path / "folder")
    assert result.exit_code == 2 and all(part in message(result) for part in fragments)


def shard(number):
    return f"model-{number:05d}-of-00002.safetensors"


FILES = {
    "no_config": (lambda f: (f / "config.json").unlink(), ["config.json", "missing"]),
    "config_no_json": (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
    "layers_unlike_config": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(num_hidden_layers=6)), ["model.layers.5", "missing"],
    ),
    "config_of_other_family": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="gpt2", architectures=["X"])), ["gpt2"],
    ),
    "impossible_config": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(n_group=3)), ["config.json", "n_group=3"],
    ),
    "missing_shard": (lambda f: (f / shard(1)).unlink(), [shard(1), "missing"]),
    "stray_shard": (lambda f: (f / shard(3)).write_bytes((f / shard(1)).read_bytes()), [shard(3), "no index"]),
    "stray_single": (lambda f: (f / "model.safetensors").write_bytes((f / shard(1)).read_bytes()), ["beside"]),
    "total_size": (
        lambda f: edit_json(f / INDEX, lambda c: c["metadata"].update(total_size=7)), [INDEX, "total_size", "7"],
    ),
    "not_in_index": (lambda f: edit_json(f / INDEX, lambda c: [c["weight_map"].pop(EXPERT)] and None), [EXPERT]),
    "index_escapes": (
        lambda f: edit_json(f / INDEX, lambda c: c["weight_map"].update({EXPERT: "../x.safetensors"})), ["../x"],
    ),
    "index_wrong": (
        lambda f: edit_json(f / INDEX, lambda c: c["weight_map"].update({"other.weight": shard(1)})), ["other.weight"],
    ),
    "truncated": (lambda f: (f / shard(2)).write_bytes((f / shard(2)).read_bytes()[:-5]), [shard(2), "truncated"]),
    "overlap": (
        lambda f: rewrite_header(f / shard(1), lambda h: list(h.values())[2].update(data_offsets=[0, 4]) or h),
        [shard(1)],
    ),
    "pickles": (
        lambda f: [(f / name).unlink() for name in (INDEX, shard(1), shard(2))] + [(f / "pytorch_model.bin").touch()],
        ["pytorch_model.bin", "pickle"],
    ),
    "nothing": (lambda f: [(f / name).unlink() for name in (INDEX, shard(1), shard(2))], ["no safetensors"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_faulty_files(case, tmp_path):
    folder = edited_golden(tmp_path / "folder", "v3_basic", shards=2)
    breaks, fragments = FILES[case]
    breaks(folder)
    result = run("verify", folder)
    assert result.exit_code == 2, message(result)
    assert all(part in message(result) for part in fragments), message(result)


def test_an_index_needs_no_total_size(tmp_path):
    """As DeepSeek's own fp8_cast_bf16.py writes it; Transformers asks for `metadata` alone."""
    folder = edited_golden(tmp_path, "v3_basic", shards=2)
    edit_json(folder / INDEX, lambda content: content["metadata"].clear())
    report = verify_folder(folder)
    assert report.ok and any("total_size" in note for note in report.notes)
    edit_json(folder / INDEX, lambda content: {"weight_map": content["weight_map"]})
    assert any("total_size" in problem for problem in verify_folder(folder).problems)


def test_no_folder(tmp_path):
    result = run("verify", tmp_path / "nothing")
    assert result.exit_code == 2 and "no such folder" in message(result)


def test_every_problem_is_listed(tmp_path):
    """Several faults at once, and many of one kind in few lines."""

    def edit(tensors):
        for name in [name for name in tensors if "experts.1" in name and "layers.1" in name]:
            del tensors[name]
        tensors["lm_head.weight"][0, 0] = math.nan

    folder = edited_golden(tmp_path / "folder", "v3_basic", edit, shards=2)
    (folder / shard(9)).write_bytes(b"stray")
    problems = verify_folder(folder).problems
    text = "\n".join(problems)
    assert "lm_head.weight" in text and shard(9) in text and "experts.1." in text and "more problems" in text
    assert len(problems) < 15
    content = json.loads(run("verify", folder, "--json").stdout)
    assert content["ok"] is False and content["problems"] == problems


def test_values_can_be_left_out(tmp_path):
    folder = edited_golden(tmp_path / "folder", "v3_basic", set_value("lm_head.weight", math.nan))
    assert run("verify", folder).exit_code == 2
    assert run("verify", folder, "--no-values").exit_code == 0


def test_checksums(tmp_path):
    """A changed byte that no other check can see is seen by the manifest's checksum."""
    folder = tmp_path / "converted"
    assert run("convert", golden("v3_fp8"), folder, "--to", "bf16").exit_code == 0
    assert "checksums of conversion.json compared" in message(run("verify", folder))
    tensors = read_tensors(folder)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = run("verify", folder)
    assert result.exit_code == 2 and "SHA-256" in message(result) and "model.safetensors" in message(result)
    assert run("verify", folder, "--no-checksums").exit_code == 0
    (folder / "model.safetensors").unlink()
    assert "conversion.json lists this file" in message(run("verify", folder))
    (folder / "conversion.json").write_text('{"files": 3}')
    assert "not a manifest" in message(run("verify", folder))


# --- differences ------------------------------------------------------------------------------------------------------


def test_differences_are_measured(tmp_path):
    torch.manual_seed(0)
    noise = {}

    def edit(tensors):
        for name in (Q_A, EXPERT):
            noise[name] = 1e-2 * torch.randn(tensors[name].shape)
            before = tensors[name].float()
            tensors[name] = (before + noise[name]).to(tensors[name].dtype)
            noise[name] = tensors[name].double() - before.double()
        tensors["extra.weight"] = torch.ones(3)

    folder = edited_golden(tmp_path / "folder", "v3_basic", edit)
    comparison = compare_checkpoints(open_source(folder), open_source(golden("v3_basic")))
    assert comparison.only_left == ["extra.weight"] and comparison.only_right == [] and comparison.worst == math.inf
    changed = {tensor.name: tensor for tensor in comparison.tensors if tensor.max_abs}
    assert set(changed) == {Q_A, EXPERT} and comparison.equal == len(comparison.tensors) - 2
    originals = read_tensors(golden("v3_basic"))
    for name, tensor in changed.items():
        assert tensor.max_abs == pytest.approx(noise[name].abs().max().item(), rel=1e-6)
        assert tensor.relative == pytest.approx((noise[name].norm() / originals[name].double().norm()).item(), rel=1e-6)
    assert [tensor.relative for tensor in comparison.tensors] == sorted(t.relative for t in comparison.tensors)[::-1]


@pytest.mark.parametrize("sides", [("folder", "golden"), ("golden", "folder"), ("folder", "folder")])
def test_infinite_values_are_an_infinite_difference(sides, tmp_path):
    places = {"golden": golden("v3_basic")}
    places["folder"] = edited_golden(tmp_path, "v3_basic", lambda t: t["model.norm.weight"][1:2].fill_(math.inf))
    left, right = (places[side] for side in sides)
    comparison = compare_checkpoints(open_source(left), open_source(right))
    assert comparison.worst == math.inf and comparison.tensors[0].name == "model.norm.weight"
    result = run("verify", left, "--against", right, "--tolerance", "0.1", "--no-values", "--json")
    assert result.exit_code == 2 and json.loads(result.stdout)["comparison"]["worst"] is None


def test_formats_are_compared_decoded(tmp_path):
    """FP8 against its own bfloat16 differs by that rounding; requantised weights by that of FP8."""
    assert run("convert", golden("v3_fp8"), tmp_path / "bf16", "--to", "bf16").exit_code == 0
    comparison = compare_checkpoints(open_source(tmp_path / "bf16"), open_source(golden("v3_fp8")))
    assert not comparison.only_left and not comparison.only_right
    assert 0 < comparison.worst < 2**-8
    kinds = {tensor.name: (tensor.left, tensor.right) for tensor in comparison.tensors}
    assert kinds[Q_A] == ("bfloat16", "fp8") and kinds["lm_head.weight"][0] == kinds["lm_head.weight"][1]
    assert run("convert", tmp_path / "bf16", tmp_path / "ue8m0", "--to", "fp8-ue8m0").exit_code == 0
    comparison = compare_checkpoints(open_source(tmp_path / "ue8m0"), open_source(tmp_path / "bf16"))
    assert 2**-8 < comparison.worst < 0.05
    assert run("verify", tmp_path / "ue8m0", "--against", tmp_path / "bf16", "--tolerance", 0.05).exit_code == 0
    result = run("verify", tmp_path / "ue8m0", "--against", tmp_path / "bf16", "--tolerance", 0.001)
    assert result.exit_code == 2 and "differ by more than 0.001" in message(result)


def test_large_tensors_are_compared_in_pieces(tmp_path, monkeypatch):
    """Rows in pieces that do not fit the blocks; the numbers are those of the whole."""
    from hf_moe.conversion import compare, plain

    config = {**read_config(golden("v2_lite_greedy")), "vocab_size": 1000}
    config["quantization_config"] = read_config(golden("v3_fp8"))["quantization_config"]
    weight = torch.randn(900, 300)
    values, scales = quantise_fp8(weight)
    for name, tensors in {
        "plain": {"x.weight": weight, "y": torch.randn(5, 4, 3)},
        "fp8": {"x.weight": values, "x.weight_scale_inv": scales, "y": torch.randn(5, 4, 3)},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / name / "model.safetensors")
    sources = [open_source(tmp_path / name) for name in ("fp8", "plain")]
    whole = compare_checkpoints(*sources).to_dict()
    monkeypatch.setattr(plain.Plain.runs, "__defaults__", (40_000,))
    assert len(list(plain.plain_view(sources[0].entries, config)["x.weight"].runs())) > 3
    pieces = compare.compare_checkpoints(*sources).to_dict()
    for one, other in zip(whole["tensors"], pieces["tensors"]):
        assert other["relative"] == pytest.approx(one["relative"], rel=1e-9) and other["max_abs"] == one["max_abs"]


def test_json_of_a_comparison(tmp_path):
    folder = edited_golden(tmp_path / "folder", "step3_text", lambda t: t["lm_head.weight"].neg_())
    content = json.loads(run("verify", folder, "--against", golden("step3_text"), "--json").stdout)
    assert content["ok"] and content["comparison"]["equal"] == content["tensors"] - 1
    worst = content["comparison"]["tensors"][0]
    assert worst["name"] == "lm_head.weight" and worst["relative"] == pytest.approx(2.0)
    result = run("verify", folder, "--against", golden("v3_basic"))
    assert result.exit_code == 0 and "only here" in message(result) and "only there" in message(result)


@pytest.mark.parametrize(
    "key, value, words",
    [("quantization_config", "fp8", "quantization_config"), ("num_hidden_layers", "3", "number of layers")],
)
def test_odd_configurations_are_one_clear_error_everywhere(key, value, words, tmp_path):
    folder = edited_golden(tmp_path / "folder", "v3_fp8", **{key: value})
    out = tmp_path / "out"
    commands = [["verify", folder], ["slice", folder, out, "--experts", "4"], ["convert", folder, out, "--to", "fused"]]
    if key == "quantization_config":
        commands[1:2] = [["convert", folder, out, "--to", "bf16"]]
        assert run("inspect", folder).exit_code == 0  # counts parameters, whatever the format
    for command in commands:
        result = run(*command)
        assert result.exit_code == 2 and isinstance(result.exception, SystemExit), (command, result.exception)
        assert "config.json" in message(result) and words in message(result)


@pytest.mark.parametrize("place", ["with [b]old words", "closed [", "[v2]"])
def test_brackets_in_paths_are_no_markup(place, tmp_path):
    source, target = edited_golden(tmp_path / place / "in", "v3_fp8"), tmp_path / place / "b] [/b]"
    result = run("convert", source, target, "--to", "bf16")
    assert result.exit_code == 0, result.exception
    assert f"written to {target}" in result.output
    result = run("verify", target, "--against", source, "--tolerance", "0")
    assert result.exit_code == 2 and f"largest differences from {source}" in result.output
    assert f"{target} and {source} differ by more than 0." in result.output


def test_tolerance_needs_something_to_compare_with():
    result = run("verify", golden("v3_basic"), "--tolerance", 0.1)
    assert result.exit_code == 2 and "--against" in message(result)


@pytest.mark.parametrize("other", ["nothing", "ranks"])
def test_what_cannot_be_compared_is_said_before_the_reading(other, tmp_path, monkeypatch):
    assert run("convert", golden("v3_basic"), tmp_path / "ranks", "--to", "inference").exit_code == 0
    monkeypatch.setattr("hf_moe.conversion.checkpoint_command.verify_folder", None)
    result = run("verify", golden("v3_basic"), "--against", tmp_path / other)
    assert result.exit_code == 2 and str(tmp_path / other) in result.output
    result = run("verify", tmp_path / "ranks", "--against", golden("v3_basic"))
    assert result.exit_code == 2 and "ranks: files of DeepSeek's inference code are not compared" in result.output


@pytest.mark.parametrize("options, titles", [
    (("--against", golden("v3_basic")), {"values", "checksums", "as bfloat16"}),
    (("--no-values",), {"checksums"}),
    (("--json",), set()),
])  # fmt: skip
def test_progress_is_said_while_values_are_read(options, titles, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    assert run("convert", golden("v3_basic"), tmp_path / "out", "--to", "same").exit_code == 0
    result = run("verify", tmp_path / "out", *options)
    assert result.exit_code == 0, message(result)
    said = {title for title in ("values", "checksums", "as bfloat16") if f"{title}: " in result.stderr}
    assert said == titles
    assert " of " in result.stderr if titles else not result.stderr
