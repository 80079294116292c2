"""Merged adapters: against PEFT's own merging of the loaded model, and for FP8 against a second quantisation."""

import copy
import json
import shutil

import pytest
import tiny_step3
import torch
from command_line import edit_json, edited_golden, fills_up, message, read_tensors, run, tree
from models.checkpoints import assert_same_bits, decode_fp8, golden, quantise_fp8, read_config
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from hf_moe.models.modeling_step3_text import Step3TextForCausalLM

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
STACKS = ["moe.experts.gate_up_proj", "moe.experts.down_proj"]
# Family or maker of a model, target modules, target parameters, further settings.
CASES = {
    "deepseek_v3": (["q_a_proj", "o_proj", "kv_b_proj"], [*EXPERTS, "mlp.gate.weight"], {}),
    "deepseek_v3_ends": (["lm_head", "embed_tokens", "eh_proj"], None, {"use_rslora": True}),
    "deepseek_v2": (["q_b_proj"], EXPERTS[:1], {"modules_to_save": ["q_a_layernorm"]}),
    "deepseek_v2_lite": (["q_proj"], EXPERTS[1:], {}),
    "deepseek_v3_mlps": (["gate_proj", "up_proj", "down_proj"], None, {}),
    "kimi_k2": (["q_b_proj"], EXPERTS, {"use_rslora": True}),
    "longcat_flash": (["o_proj", "eh_proj"], [*EXPERTS, "router.classifier.weight"], {"modules_to_save": ["lm_head"]}),
    "longcat_flash_ngram": (["kv_a_proj_with_mqa"], EXPERTS, {}),
    "step3_text": (["q_proj", "wq", "o_proj"], STACKS, {}),
    "step3_vl": (["o_proj", "vit_large_projector"], STACKS, {}),
}  # fmt: skip
PATTERNS = {
    "rank_pattern": {"o_proj": 2},
    "alpha_pattern": {"experts.down_proj": 3, "o_proj": 5, "lm_head": 7},
}


@pytest.fixture(autouse=True)
def plain_peft(monkeypatch):
    """PEFT with its own layers everywhere, so that the reference is nothing of ours."""
    from peft.tuners.lora.model import LoraModel

    original = getattr(LoraModel._create_new_module, "hf_moe_original", None)
    if original is not None:
        monkeypatch.setattr(LoraModel, "_create_new_module", staticmethod(original))


def make_model(case):
    if case == "step3_text":
        return tiny_step3.text_model()
    if case == "step3_vl":
        return tiny_step3.vl_model()
    return tiny_model(case.removesuffix("_ends").removesuffix("_mlps"))


def make_adapter(model, folder, modules, parameters=None, **settings):
    """Trains nothing: draws the factors and saves them as PEFT does; returns PEFT's model."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=modules,
        target_parameters=parameters,
        **copy.deepcopy({**PATTERNS, **settings}),
    )
    adapted = peft.get_peft_model(model, config)
    draw(adapted)
    adapted.save_pretrained(folder)
    return adapted


@torch.no_grad()
def draw(adapted):
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape))


def merged(base, adapter, target, *options):
    result = run("merge", base, adapter, target, *options)
    assert result.exit_code == 0, message(result)
    return read_tensors(target)


@pytest.mark.parametrize("case", CASES)
def test_merge_is_that_of_peft(case, tmp_path):
    """In float32, to the last digits; everything that the adapter does not touch is the same bit for bit."""
    modules, parameters, settings = CASES[case]
    model = make_model(case)
    model.save_pretrained(tmp_path / "base")
    adapted = make_adapter(model, tmp_path / "adapter", modules, parameters, **settings)
    ours = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(tmp_path / "peft")
    theirs, base = read_tensors(tmp_path / "peft"), read_tensors(tmp_path / "base")
    assert set(ours) == set(theirs) == set(base)
    changed = 0
    for name, tensor in ours.items():
        if torch.equal(theirs[name], base[name]):
            assert_same_bits(name, tensor, base[name])
        else:
            changed += 1
            torch.testing.assert_close(
                tensor, theirs[name], rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )
    assert changed >= 2
    assert run("verify", tmp_path / "merged").exit_code == 0


@pytest.mark.parametrize("case", ["deepseek_v3", "step3_text", "longcat_flash"])
def test_merge_in_bfloat16(case, tmp_path):
    """The sum is rounded once: within one step of bfloat16 of the exact sum."""
    modules, parameters, settings = CASES[case]
    model = make_model(case)
    model.save_pretrained(tmp_path / "wide")
    adapted = make_adapter(model, tmp_path / "adapter", modules, parameters, **settings)
    adapted.merge_and_unload().save_pretrained(tmp_path / "peft")
    assert run("convert", tmp_path / "wide", tmp_path / "base", "--to", "bf16").exit_code == 0
    ours = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    theirs, wide, base = (read_tensors(tmp_path / name) for name in ("peft", "wide", "base"))
    for name, tensor in ours.items():
        exact = base[name].double() + (theirs[name].double() - wide[name].double())
        if torch.equal(theirs[name], wide[name]) or "modules_to_save" in settings and name.startswith("lm_head"):
            continue
        step = torch.finfo(tensor.dtype).eps * exact.abs().clamp_min(1e-3)
        assert ((tensor.double() - exact).abs() <= 0.51 * step + 1e-6).all(), name


@pytest.mark.parametrize("layout", ["fused", "sharded"])
def test_merge_into_other_layouts(layout, tmp_path):
    """Experts may stand in the files as they like."""
    model = make_model("deepseek_v3")
    model.save_pretrained(tmp_path / "base")
    make_adapter(model, tmp_path / "adapter", ["o_proj"], EXPERTS)
    wanted = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "wanted")
    to = "fused" if layout == "fused" else "same"
    options = ["--to", to, "--max-shard-size", "20KB"]
    assert run("convert", tmp_path / "base", tmp_path / "other", *options).exit_code == 0
    merged(tmp_path / "other", tmp_path / "adapter", tmp_path / "merged", "--max-shard-size", "30KB")
    assert run("convert", tmp_path / "merged", tmp_path / "back", "--to", "per-expert").exit_code == 0
    back = read_tensors(tmp_path / "back")
    for name, tensor in wanted.items():
        assert_same_bits(name, back[name], tensor)


@pytest.mark.parametrize("case", ["v3_fp8", "step3_fp8", "longcat_fp8"])
def test_merge_into_fp8(case, tmp_path):
    """Decoded, added, quantised again; weights without a factor keep their bytes."""
    model = AutoModelForCausalLM.from_pretrained(golden(case), dtype=torch.float32, dequantize=True)
    experts = STACKS if case.startswith("step3") else EXPERTS
    adapted = make_adapter(model, tmp_path / "adapter", ["o_proj"], experts)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any("lora_" in name for name in plain)
    ours = merged(golden(case), tmp_path / "adapter", tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(tmp_path / "peft")
    theirs, base = read_tensors(tmp_path / "peft"), read_tensors(golden(case))
    assert set(ours) == set(base)
    touched = 0
    for name, tensor in ours.items():
        if name.endswith("_scale_inv"):
            continue
        is_touched = "o_proj" in name or ".experts." in name or ".moe." in name and "gate.weight" not in name
        if not is_touched or base[name].dtype != torch.float8_e4m3fn:
            assert_same_bits(name, tensor, base[name])
            continue
        touched += 1
        for index in range(tensor.shape[0]) if tensor.dim() == 3 else [...]:
            values, scale, wanted = tensor[index], ours[f"{name}_scale_inv"][index], theirs[name][index]
            again, again_scale = quantise_fp8(wanted)
            torch.testing.assert_close(scale, again_scale, rtol=1e-5, atol=0)
            same = (values.view(torch.uint8) == again.view(torch.uint8)).float().mean()
            assert same > 0.999, (name, same)
            error = (decode_fp8(values, scale) - wanted.double()).norm() / wanted.double().norm()
            assert error < 0.04, (name, error)
    assert touched >= 10
    assert run("verify", tmp_path / "merged").exit_code == 0


def test_adapter_of_an_fp8_model(tmp_path, monkeypatch):
    """Trained on FP8 weights as they are, by our own layers: saved as PEFT saves, merged as that model computes."""
    monkeypatch.undo()
    model = AutoModelForCausalLM.from_pretrained(golden("v3_fp8"), dtype=torch.float32)
    adapted = make_adapter(model, tmp_path / "adapter", ["o_proj"], EXPERTS)
    assert type(adapted.get_submodule("base_model.model.model.layers.1.mlp.experts")).__module__.startswith("hf_moe")
    ids = torch.arange(4, 20)[None]
    merged(golden("v3_fp8"), tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(golden("v3_fp8"), dtype=torch.float32)(ids).logits
        wanted = adapted.eval()(ids).logits
        actual = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
    # Requantising moves the weights by 3 %; a factor in the wrong place moves the logits as the adapter does.
    assert (actual - wanted).norm() < 0.5 * (before - wanted).norm()


def test_power_of_two_scales_stay_so(tmp_path):
    assert run("convert", golden("v3_fp8"), tmp_path / "base", "--to", "fp8-ue8m0").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(golden("v3_fp8"), dtype=torch.float32, dequantize=True)
    make_adapter(model, tmp_path / "adapter", ["o_proj"])
    ours = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    scales = ours["model.layers.0.self_attn.o_proj.weight_scale_inv"]
    assert torch.equal(torch.exp2(scales.log2().round()), scales)
    assert read_config(tmp_path / "merged")["quantization_config"]["scale_fmt"] == "ue8m0"


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.bfloat16])
def test_scales_of_fewer_bits_fit_their_values(dtype, tmp_path):
    """Stored as UE8M0 or bfloat16, whatever `scale_fmt` says: no scale is rounded behind its values."""
    name = "model.layers.0.self_attn.o_proj.weight"

    def shorten(tensors):
        for scale in [key for key in tensors if key.endswith("_scale_inv")]:
            tensors[scale] = torch.exp2(tensors[scale].log2().ceil()).to(dtype)

    base = edited_golden(tmp_path / "base", "v3_fp8", shorten)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, dequantize=True)
    adapted = make_adapter(model, tmp_path / "adapter", ["o_proj"])
    ours = merged(base, tmp_path / "adapter", tmp_path / "merged")
    wanted = adapted.merge_and_unload().state_dict()[name].double()
    assert ours[f"{name}_scale_inv"].dtype == dtype
    error = (decode_fp8(ours[name], ours[f"{name}_scale_inv"].float()) - wanted).norm() / wanted.norm()
    assert error < 0.04


def test_attention_of_an_int4_checkpoint(tmp_path):
    """Its attention is bfloat16; packed experts keep their bytes, and an adapter for them is refused."""
    model = AutoModelForCausalLM.from_pretrained(golden("kimi_k2_int4"), dtype=torch.float32)
    make_adapter(model, tmp_path / "attention", ["o_proj"])
    ours, base = merged(golden("kimi_k2_int4"), tmp_path / "attention", tmp_path / "merged"), None
    base = read_tensors(golden("kimi_k2_int4"))
    changed = {name for name in base if not torch.equal(ours[name], base[name])}
    assert changed == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(3)}
    model = AutoModelForCausalLM.from_pretrained(golden("kimi_k2_int4"), dtype=torch.float32)
    make_adapter(model, tmp_path / "experts", [], EXPERTS)
    result = run("merge", golden("kimi_k2_int4"), tmp_path / "experts", tmp_path / "no")
    assert result.exit_code == 2 and "INT4" in message(result) and "convert" in message(result)


def test_adapters_of_older_peft(tmp_path):
    """Before PEFT 0.20 the factor `lora_A` of a fused parameter belonged to its rows: rank and experts as ever."""
    model = make_model("deepseek_v3")
    model.save_pretrained(tmp_path / "base")
    make_adapter(model, tmp_path / "adapter", ["o_proj"], EXPERTS)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    factors = load_file(path)
    experts, rank = 8, 4
    for name in [name for name in factors if ".experts." in name and "lora_A" in name]:
        a, b = factors[name], factors[name.replace("lora_A", "lora_B")]
        # The factors of the transposed product: A' = B^T and B' = A^T, expert by expert.
        by_expert_a = a.view(experts, rank, -1)
        by_expert_b = b.view(b.shape[0], rank, experts).permute(2, 0, 1)
        factors[name] = by_expert_b.transpose(1, 2).reshape(experts * rank, -1).contiguous()
        old_b = by_expert_a.transpose(1, 2).permute(1, 2, 0).reshape(a.shape[1], -1)
        factors[name.replace("lora_A", "lora_B")] = old_b.contiguous()
    shutil.copytree(tmp_path / "adapter", tmp_path / "older")
    save_file(factors, tmp_path / "older" / "adapter_model.safetensors")
    new = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged_new")
    old = merged(tmp_path / "base", tmp_path / "older", tmp_path / "merged_old")
    for name, tensor in new.items():
        torch.testing.assert_close(old[name], tensor, rtol=1e-6, atol=1e-6)


def test_square_experts_need_the_release(tmp_path):
    """Where rows and columns are equally many, only PEFT's release says which factor belongs to which."""
    model = tiny_model("deepseek_v3", hidden_size=32, moe_intermediate_size=16)
    model.save_pretrained(tmp_path / "base")
    adapted = make_adapter(model, tmp_path / "adapter", [], EXPERTS[:1])
    ours = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(tmp_path / "peft")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    torch.testing.assert_close(ours[name], read_tensors(tmp_path / "peft")[name], rtol=1e-6, atol=1e-6)
    edit_json(tmp_path / "adapter" / "adapter_config.json", lambda content: content.pop("peft_version") and None)
    result = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "no")
    assert result.exit_code == 2 and "peft_version" in message(result)


def test_expert_by_expert_and_base_model_names(tmp_path):
    """Names of modelling code with a module for each expert, and of a base model without a head."""
    model = make_model("deepseek_v3")
    model.save_pretrained(tmp_path / "base")
    make_adapter(model, tmp_path / "adapter", ["o_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.manual_seed(1)
    a, b = torch.randn(4, 48), torch.randn(16, 4)
    stem = "base_model.model.layers.1.mlp.experts.5.up_proj"
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, path)
    ours, base = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"), read_tensors(tmp_path / "base")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    torch.testing.assert_close(ours[name], base[name] + 1.5 * b @ a)
    assert [key for key in base if not torch.equal(ours[key], base[key])] == [name]


def test_text_adapter_and_vision_checkpoint(tmp_path):
    """An adapter of the text model alone fits the checkpoint that has vision, too."""
    tiny_step3.vl_model().save_pretrained(tmp_path / "base")
    text = Step3TextForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = make_adapter(text, tmp_path / "adapter", ["o_proj"], STACKS)
    ours = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    theirs = adapted.merge_and_unload().state_dict()
    name = "model.layers.2.self_attn.o_proj.weight"
    torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
    fused = theirs["model.layers.2.moe.experts.gate_up_proj"]
    torch.testing.assert_close(ours["model.layers.2.moe.up_proj.weight"], fused[:, 20:], rtol=1e-6, atol=1e-6)


def test_merge_into_mtp_duplicates(tmp_path):
    """A table that the MTP layer repeats changes there, too, where both were equal."""
    model = make_model("deepseek_v3")
    model.save_pretrained(tmp_path / "base")
    make_adapter(model, tmp_path / "adapter", ["lm_head"])
    ours, base = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"), read_tensors(tmp_path / "base")
    assert_same_bits("head", ours["model.layers.3.shared_head.head.weight"], ours["lm_head.weight"])
    assert not torch.equal(ours["lm_head.weight"], base["lm_head.weight"])


def config(**changes):
    return lambda folder: edit_json(folder / "adapter_config.json", lambda content: content.update(changes))


def factors(change):
    def edit(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        result = change(tensors)
        save_file(tensors if result is None else result, folder / "adapter_model.safetensors")

    return edit


O_PROJ = "base_model.model.model.layers.0.self_attn.o_proj"
BAD = {
    "no_config": (lambda f: (f / "adapter_config.json").unlink(), ["adapter_config.json"]),
    "no_json": (lambda f: (f / "adapter_config.json").write_text("no"), ["adapter_config.json", "JSON"]),
    "no_weights": (lambda f: (f / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors", "missing"]),
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), ["adapter_model.bin", "pickle"],
    ),
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        ["adapter_model.safetensors", "truncated"],
    ),
    "other_method": (config(peft_type="IA3"), ["peft_type", "IA3"]),
    "dora": (config(use_dora=True), ["DoRA"]),
    "dora_tensor": (factors(lambda t: t.update({f"{O_PROJ}.lora_magnitude_vector": torch.ones(48)})), ["DoRA"]),
    "pissa": (config(init_lora_weights="pissa_niter_4"), ["pissa_niter_4"]),
    "trainable_tokens": (config(trainable_token_indices=[1]), ["trainable_token_indices"]),
    "matches_nothing": (
        factors(lambda t: {n.replace("layers.0.self_attn", "layers.9.self_attn"): v for n, v in t.items()}),
        ["layers.9.self_attn.o_proj", "matches nothing"],
    ),
    "saved_matches_nothing": (
        factors(lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 48)})), ["score.weight", "nothing"],
    ),
    "saved_misshapen": (
        factors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(99, 48)})), ["lm_head.weight", "99"],
    ),
    "half_a_pair": (factors(lambda t: [t.pop(f"{O_PROJ}.lora_B.weight")] and None), ["o_proj", "lora_B"]),
    "ranks_differ": (
        factors(lambda t: t.update({f"{O_PROJ}.lora_B.weight": torch.ones(48, 3)})), ["o_proj.lora_B", "(48, 3)"],
    ),
    "sizes_differ": (
        factors(lambda t: t.update({f"{O_PROJ}.lora_B.weight": torch.ones(47, 2)})), ["o_proj", "(47, 30)", "(48, 30)"],
    ),
    "not_finite": (factors(lambda t: [t[f"{O_PROJ}.lora_A.weight"].fill_(float("nan"))] and None),
                   ["model.layers.0.self_attn.o_proj.weight", "not finite"]),
    "no_bias_there": (factors(lambda t: t.update({f"{O_PROJ}.lora_B.bias": torch.ones(48)})), ["o_proj", "bias"]),
    "empty": (factors(lambda t: {}), ["no tensors"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model = make_model("deepseek_v3")
    model.save_pretrained(folder / "base")
    make_adapter(model, folder / "adapter", ["o_proj"])
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_adapter(case, adapter_folder, tmp_path):
    shutil.copytree(adapter_folder / "adapter", tmp_path / "adapter")
    breaks, fragments = BAD[case]
    breaks(tmp_path / "adapter")
    before = tree(tmp_path)
    result = run("merge", adapter_folder / "base", tmp_path / "adapter", tmp_path / "merged")
    assert result.exit_code == 2, message(result)
    assert all(fragment in message(result) for fragment in fragments), message(result)
    assert tree(tmp_path) == before


def test_interrupted_merge_goes_on(adapter_folder, tmp_path, monkeypatch):
    """After a full disk the same command goes on where it was, and another adapter is refused."""
    command = ["merge", adapter_folder / "base", adapter_folder / "adapter", tmp_path / "merged"]
    command += ["--max-shard-size", "20KB", "--workers", 1]
    with monkeypatch.context() as patched:
        fills_up(patched, 300_000, tmp_path / "merged.partial" / "state.json")
        assert run(*command).exit_code == 2
    shutil.copytree(adapter_folder / "adapter", tmp_path / "other")
    factors(lambda tensors: [tensors[f"{O_PROJ}.lora_A.weight"].mul_(2)] and None)(tmp_path / "other")
    refused = run(*command[:2], tmp_path / "other", *command[3:])
    assert refused.exit_code == 2 and "another conversion" in message(refused)
    result = run(*command)
    assert result.exit_code == 0 and "going on" in message(result), message(result)
    whole = merged(adapter_folder / "base", adapter_folder / "adapter", tmp_path / "whole")
    for name, tensor in read_tensors(tmp_path / "merged").items():
        assert_same_bits(name, tensor, whole[name])


def test_manifest_names_the_adapter(adapter_folder, tmp_path):
    merged(adapter_folder / "base", adapter_folder / "adapter", tmp_path / "merged")
    step = json.loads((tmp_path / "merged" / "conversion.json").read_text())["steps"][-1]
    assert step["options"]["adapter"] == "adapter"
    assert "adapter_model.safetensors" in step["options"]["adapter_files"]
