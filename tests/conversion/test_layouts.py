"""DeepSeek's inference files, fused experts and resharding: against a second writing of the rules, there and back."""

import json

import pytest
import torch
from command_line import edit_json, edited_golden, message, read_tensors, run, write_checkpoint
from models.checkpoints import assert_same_tensors, decode_fp8, golden, quantise_fp8, read_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_moe.conversion import writer
from hf_moe.conversion.fused import plan_fused, plan_upstream
from hf_moe.conversion.inference import MODULES, to_inference_name, to_upstream_name
from hf_moe.conversion.run import convert
from hf_moe.conversion.slicing import plan_slice
from hf_moe.conversion.source import open_source
from hf_moe.conversion.writer import lay_out, pieces_of

DEEPSEEK = ("v3_basic", "v3_qlora_none", "v2_group_limited", "v2_lite_greedy", "kimi_k2", "v3_mtp2")
# What deepseek-ai/DeepSeek-V3's inference/convert.py does with a tensor, by the module's name: the new one, and the
# dimension that is cut. Written down apart from the code under test.
RULES = (
    "embed_tokens embed 0 | input_layernorm attn_norm - | post_attention_layernorm ffn_norm - | q_proj wq 0 | "
    "q_a_proj wq_a - | q_a_layernorm q_norm - | q_b_proj wq_b 0 | kv_a_proj_with_mqa wkv_a - | "
    "kv_a_layernorm kv_norm - | kv_b_proj wkv_b 0 | o_proj wo 1 | gate gate - | gate_proj w1 0 | down_proj w2 1 | "
    "up_proj w3 0 | norm norm - | lm_head head 0"
)


def by_the_rules(tensors: dict[str, torch.Tensor], layers: int, experts: int, ranks: int) -> list[dict]:
    """The tensors of every rank's file."""
    table = {old: (new, cut) for old, new, cut in (rule.split() for rule in RULES.split("|"))}
    files: list[dict] = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        if any(name.startswith(f"model.layers.{layer}.") for layer in range(layers, layers + 4)):
            continue
        short = name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
        short = short.replace("weight_scale_inv", "scale").replace("e_score_correction_bias", "bias")
        parts = short.split(".")
        parts[-2], cut = table[parts[-2]]
        for rank in range(ranks):
            kept = tensor
            if ".experts." in name:
                if int(name.split(".experts.")[1].split(".")[0]) // (experts // ranks) != rank:
                    continue
            elif cut != "-":
                kept = tensor.chunk(ranks, dim=int(cut))[rank]
            files[rank][".".join(parts)] = kept.contiguous()
    return files


def converted(source, target, *options):
    result = run("convert", source, target, *options)
    assert result.exit_code == 0, message(result)
    return message(result)


def main_tensors(case):
    """Tensors of a golden without those of MTP layers."""
    layers = read_config(golden(case))["num_hidden_layers"]
    mtp = tuple(f"model.layers.{layers + depth}." for depth in range(4))
    return {name: tensor for name, tensor in read_tensors(golden(case)).items() if not name.startswith(mtp)}


def wide_fp8(folder):
    """An FP8 checkpoint whose every dimension that ranks split is two blocks of 128 wide, with its plain tensors."""
    config = {
        **read_config(golden("v3_fp8")), "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 4, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "q_lora_rank": 96, "kv_lora_rank": 96, "vocab_size": 128, "num_hidden_layers": 2,
        "num_nextn_predict_layers": 0,
    }  # fmt: skip
    from models.checkpoints import is_fp8_name, upstream_tensors

    config["topk_method"] = "noaux_tc"
    plain = upstream_tensors(config)
    tensors = {}
    for name, tensor in plain.items():
        if is_fp8_name(name):
            tensors[name], tensors[f"{name}_scale_inv"] = quantise_fp8(tensor)
        else:
            tensors[name] = tensor
    return write_checkpoint(folder, config, tensors), tensors


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", DEEPSEEK)
def test_inference_files(case, ranks, tmp_path):
    text = converted(golden(case), tmp_path / "to", "--to", "inference", "--world-size", ranks)
    config, tensors = read_config(golden(case)), read_tensors(golden(case))
    wanted = by_the_rules(tensors, config["num_hidden_layers"], config["n_routed_experts"], ranks)
    for rank in range(ranks):
        assert_same_tensors(load_file(tmp_path / "to" / f"model{rank}-mp{ranks}.safetensors"), wanted[rank])
    assert not list((tmp_path / "to").glob("*.index.json"))
    assert ("MTP layers" in text and "left out" in text) == (len(main_tensors(case)) < len(tensors))
    converted(tmp_path / "to", tmp_path / "back", "--to", "hub")
    assert_same_tensors(read_tensors(tmp_path / "back"), main_tensors(case))
    assert run("verify", tmp_path / "to").exit_code == run("verify", tmp_path / "back").exit_code == 0


def test_inference_files_of_fp8(tmp_path):
    """Scales are cut with their weights, and each rank decodes its part of the matrix."""
    source, tensors = wide_fp8(tmp_path / "source")
    converted(source, tmp_path / "to", "--to", "inference", "--world-size", 2)
    for rank, wanted in enumerate(by_the_rules(tensors, 2, 8, 2)):
        held = load_file(tmp_path / "to" / f"model{rank}-mp2.safetensors")
        assert_same_tensors(held, wanted)
        name, whole = "model.layers.0.self_attn.o_proj.weight", "layers.0.attn.wo"
        full = decode_fp8(tensors[name], tensors[f"{name}_scale_inv"])
        part = decode_fp8(held[f"{whole}.weight"], held[f"{whole}.scale"])
        assert torch.equal(part, full[:, rank * 256 : (rank + 1) * 256])
    converted(tmp_path / "to", tmp_path / "back", "--to", "hub", "--max-shard-size", "300KB")
    assert_same_tensors(read_tensors(tmp_path / "back"), tensors)
    arguments = json.loads((tmp_path / "to" / "inference_config.json").read_text())
    assert arguments["dtype"] == "fp8" and "scale_fmt" not in arguments


def test_inference_configuration():
    """Of V3, against the published inference/configs/config_671B.json, and back."""
    from hf_moe.conversion.inference import inference_config, upstream_config
    from hf_moe.conversion.structure import read_config_class
    from hf_moe.inspect.sources import read_source

    published = {
        "vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61,
        "n_dense_layers": 3, "n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "n_activated_experts": 8,
        "n_expert_groups": 8, "n_limited_groups": 4, "route_scale": 2.5, "score_func": "sigmoid", "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "dtype": "fp8",
    }  # fmt: skip
    stored = read_source("deepseek-v3").config
    arguments = inference_config(stored, read_config_class(stored))
    assert {key: arguments[key] for key in published} == published
    assert {key: arguments[key] for key in ("rope_theta", "rope_factor", "original_seq_len", "mscale")} == {
        "rope_theta": 10000, "rope_factor": 40, "original_seq_len": 4096, "mscale": 1.0,
    }  # fmt: skip
    back = upstream_config(published, has_bias=True, path="config_671B.json")
    same = set(back) - {"num_nextn_predict_layers", "architectures", "quantization_config"}
    assert {key: back[key] for key in same if stored.get(key) != back[key]} == {}
    assert back["quantization_config"].items() <= stored["quantization_config"].items()


@pytest.mark.parametrize("named", ["inference_config.json", "config.json"])
def test_inference_files_without_our_configuration(named, tmp_path):
    """Files that DeepSeek's own script wrote, with its own configuration beside them."""
    tensors, config = read_tensors(golden("v2_lite_greedy")), read_config(golden("v2_lite_greedy"))
    folder = tmp_path / "source"
    folder.mkdir()
    for rank, held in enumerate(by_the_rules(tensors, 3, config["n_routed_experts"], 2)):
        save_file(held, folder / f"model{rank}-mp2.safetensors")
    result = run("convert", folder, tmp_path / "back", "--to", "hub")
    assert result.exit_code == 2 and "inference_config.json" in message(result)
    converted(golden("v2_lite_greedy"), tmp_path / "ours", "--to", "inference")
    (folder / named).write_bytes((tmp_path / "ours" / "inference_config.json").read_bytes())
    converted(folder, tmp_path / "back", "--to", "hub")
    assert_same_tensors(read_tensors(tmp_path / "back"), tensors)
    ids = torch.arange(5, 17)[None]
    logits = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits
              for f in (tmp_path / "back", golden("v2_lite_greedy"))]  # fmt: skip
    assert torch.equal(*logits)


def test_names_go_both_ways():
    assert {module: (new, cut) for module, (new, cut) in MODULES.items()} == {
        old: (new, None if cut == "-" else int(cut)) for old, new, cut in (rule.split() for rule in RULES.split("|"))
    }
    for case in DEEPSEEK:
        for name in main_tensors(case):
            place = to_inference_name(name)
            back = to_upstream_name(place.name)
            assert (back.name, back.dim, back.expert) == (name, place.dim, place.expert)


def break_rank(change):
    def edit(folder):
        path = folder / "model1-mp2.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


BROKEN_RANKS = {
    "missing_rank": (lambda f: (f / "model1-mp2.safetensors").unlink(), ["model1-mp2.safetensors", "missing"]),
    "two_worlds": (lambda f: (f / "model0-mp1.safetensors").write_bytes(b""), ["1, 2"]),
    "missing_tensor": (break_rank(lambda t: t.pop("norm.weight")), ["model1-mp2.safetensors", "norm.weight"]),
    "unknown_tensor": (break_rank(lambda t: t.update({"layers.0.attn.other.weight": torch.ones(2)})), ["attn.other"]),
    "uneven": (break_rank(lambda t: t.update({"head.weight": t["head.weight"][:-1].contiguous()})), ["head.weight"]),
    "expert_twice": (
        break_rank(
            lambda t: t.update({"layers.1.ffn.experts.0.w1.weight": t["layers.1.ffn.experts.8.w1.weight"].clone()})
        ),
        ["experts.0.w1.weight"],
    ),
    "sized_otherwise": (
        lambda f: (
            edit_json(f / "inference_config.json", lambda c: c.update(surprise=1)) or (f / "config.json").unlink()
        ),
        ["inference_config.json", "surprise"],
    ),
}


@pytest.mark.parametrize("case", BROKEN_RANKS)
def test_broken_inference_files(case, tmp_path):
    converted(golden("v3_basic"), tmp_path / "to", "--to", "inference", "--world-size", 2)
    breaks, fragments = BROKEN_RANKS[case]
    breaks(tmp_path / "to")
    for command in (["convert", tmp_path / "to", tmp_path / "back", "--to", "hub"], ["verify", tmp_path / "to"]):
        result = run(*command)
        assert result.exit_code == 2, message(result)
        assert all(fragment in message(result) for fragment in fragments), message(result)
    assert not (tmp_path / "back").exists()


def test_verify_compares_what_all_ranks_hold(tmp_path):
    converted(golden("v3_basic"), tmp_path / "to", "--to", "inference", "--world-size", 2)
    break_rank(lambda tensors: tensors["norm.weight"].view(-1)[3].add_(1))(tmp_path / "to")
    result = run("verify", tmp_path / "to", "--no-checksums")
    assert result.exit_code == 2 and "norm.weight" in message(result) and "differs" in message(result)


# --- fused experts ----------------------------------------------------------------------------------------------------

FUSED = ("v3_basic", "v2_group_limited", "kimi_k2", "step3_text", "step3_vl", "longcat_flash", "longcat_lite_ngram")


@pytest.mark.parametrize("case", ["v3_basic", "step3_text"])
def test_experts_are_moved_in_pieces(case, tmp_path, monkeypatch):
    """A layer of DeepSeek-V3's fused experts has 15 GB, and 30 GB in bfloat16."""
    monkeypatch.setattr(writer, "PIECE_BYTES", 512)
    upstream = open_source(golden(case))
    plans = {"fused": plan_fused, "upstream": plan_upstream, "slice": lambda source: plan_slice(source, experts=2)}
    for name, plan_of in plans.items():
        source = open_source(tmp_path / "fused") if name != "fused" else upstream
        plan = plan_of(source)
        pieces = [
            p for shard in lay_out(plan, 10**9) for group in shard.groups for p in pieces_of(source, shard, group)
        ]
        assert max(piece.memory for piece in pieces) <= 256
        convert(source, plan, tmp_path / name, progress=False)
    assert_same_tensors(read_tensors(tmp_path / "upstream"), read_tensors(golden(case)))
    whole, part = read_tensors(tmp_path / "fused"), read_tensors(tmp_path / "slice")
    fused = [name for name in whole if name.endswith(("experts.gate_up_proj", ".experts.down_proj"))]
    assert fused and all(torch.equal(bits(part[name]), bits(whole[name][:2])) for name in fused)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("case", FUSED)
def test_fused_and_back(case, tmp_path):
    converted(golden(case), tmp_path / "fused", "--to", "fused")
    fused, tensors = read_tensors(tmp_path / "fused"), read_tensors(golden(case))
    stem = "model.layers.1.moe." if case.startswith("step3") else "model.layers.1.mlp."
    if case.startswith("step3"):
        wanted = torch.cat([tensors[f"{stem}gate_proj.weight"], tensors[f"{stem}up_proj.weight"]], dim=1)
        down = tensors[f"{stem}down_proj.weight"]
    else:
        count = sum(name.startswith(f"{stem}experts.") and ".up_proj" in name for name in tensors)
        pairs = [[tensors[f"{stem}experts.{e}.{part}_proj.weight"] for part in ("gate", "up")] for e in range(count)]
        wanted = torch.stack([torch.cat(pair) for pair in pairs])
        down = torch.stack([tensors[f"{stem}experts.{e}.down_proj.weight"] for e in range(count)])
    assert torch.equal(fused[f"{stem}experts.gate_up_proj"], wanted)
    assert torch.equal(fused[f"{stem}experts.down_proj"], down)
    assert not any(".experts.0." in name or ".moe.gate_proj" in name for name in fused)
    comparison = run("verify", tmp_path / "fused", "--against", golden(case), "--tolerance", 0)
    assert comparison.exit_code == 0, message(comparison)
    converted(tmp_path / "fused", tmp_path / "back", "--to", "per-expert")
    assert_same_tensors(read_tensors(tmp_path / "back"), tensors)
    if case != "step3_vl":
        ids = torch.arange(4, 16)[None]
        models = [AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "fused", golden(case))]
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)


@pytest.mark.parametrize("case", ["v3_basic", "v2_lite_greedy"])
def test_native_transformers_loads_fused_names(case, tmp_path):
    """Transformers' own class, which has the experts under these names, finds every one of them."""
    from transformers import models

    converted(golden(case), tmp_path / "fused", "--to", "fused")
    native = models.deepseek_v3 if case.startswith("v3") else models.deepseek_v2
    name = "DeepseekV3ForCausalLM" if case.startswith("v3") else "DeepseekV2ForCausalLM"
    config_class = native.DeepseekV3Config if case.startswith("v3") else native.DeepseekV2Config
    config = config_class.from_pretrained(tmp_path / "fused")
    model, info = getattr(native, name).from_pretrained(
        tmp_path / "fused", config=config, dtype=torch.float32, output_loading_info=True
    )
    main = config.num_hidden_layers
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(f"layers.{main}." in key for key in info["unexpected_keys"])
    held = load_file(tmp_path / "fused" / "model.safetensors")
    for parameter in ("gate_up_proj", "down_proj"):
        key = f"model.layers.2.mlp.experts.{parameter}"
        assert torch.equal(model.get_parameter(key), held[key].float())


def test_fused_fp8(tmp_path):
    """With experts as wide as blocks, scales are fused like weights and both load."""
    source, tensors = wide_fp8(tmp_path / "source")
    converted(source, tmp_path / "fused", "--to", "fused")
    fused, stem = read_tensors(tmp_path / "fused"), "model.layers.1.mlp.experts."
    for suffix in ("", "_scale_inv"):
        pair = [tensors[f"{stem}5.{part}_proj.weight{suffix}"].view(torch.uint8) for part in ("gate", "up")]
        assert torch.equal(fused[f"{stem}gate_up_proj{suffix}"][5].view(torch.uint8), torch.cat(pair))
    assert run("verify", tmp_path / "fused").exit_code == 0
    ids = torch.arange(4, 16)[None]
    models = [AutoModelForCausalLM.from_pretrained(f, dequantize=True) for f in (tmp_path / "fused", source)]
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    converted(tmp_path / "fused", tmp_path / "back", "--to", "hub")
    assert_same_tensors(read_tensors(tmp_path / "back"), tensors)


@pytest.mark.parametrize("layout", ["hub", "per-expert"])
@pytest.mark.parametrize("case", ["v3_fp8", "step3_fp8", "longcat_fp8"])
def test_experts_that_are_not_fused_may_have_any_width(case, layout, tmp_path):
    """Only what is fused has blocks that could reach over the border of gate and up."""
    converted(golden(case), tmp_path / "out", "--to", layout)
    assert_same_tensors(read_tensors(tmp_path / "out"), read_tensors(golden(case)))


# --- resharding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["v3_fp8", "kimi_k2_int4", "longcat_flash"])
def test_same_tensors_in_other_files(case, tmp_path):
    edited_golden(tmp_path / "source", case, shards=3)
    converted(tmp_path / "source", tmp_path / "small", "--to", "same", "--max-shard-size", "100KB")
    shards = sorted((tmp_path / "small").glob("*.safetensors"))
    assert len(shards) > 3
    held = {}
    for path in shards:
        with safe_open(path, "pt") as stream:
            names = list(stream.keys())
        size = sum(tensor.nbytes for tensor in load_file(path).values())
        assert size <= 100_000 or len(names) == 1, (path.name, size)
        held |= dict.fromkeys(names, path.name)
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == held
    assert_same_tensors(read_tensors(tmp_path / "small"), read_tensors(golden(case)))
    assert read_config(tmp_path / "small") == read_config(tmp_path / "source")
    assert run("verify", tmp_path / "small").exit_code == 0
