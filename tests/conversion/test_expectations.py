"""What is written has the names, shapes and dtypes that the loaders of vLLM and SGLang and native Transformers take.

The tables say, from configurations alone, what those loaders register: every linear layer of a block FP8 checkpoint has
a `weight` in float8_e4m3fn and a `weight_scale_inv` in float32 of ceil(out / 128) x ceil(in / 128); experts come one by
one (Step3's stacked, with three-dimensional scales); routers, embeddings, norms and heads have no scales.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

from hf_moe.conversion.quantization import plan_bf16, plan_fp8_ue8m0
from hf_moe.conversion.run import convert
from hf_moe.conversion.source import open_source

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
FP8, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32


def linear(name, *shape):
    """A quantised layer: weight and scales."""
    *stack, rows, columns = shape
    grid = (*stack, -(-rows // 128), -(-columns // 128))
    return {f"{name}.weight": (shape, FP8), f"{name}.weight_scale_inv": (grid, F32)}


def plain(name, *shape, dtype=BF16):
    """A tensor without scales."""
    return {name: (shape, dtype)}


def mlp(name, hidden, width, *stack):
    """Gate, up and down projection."""
    return {
        **linear(f"{name}.gate_proj", *stack, width, hidden),
        **linear(f"{name}.up_proj", *stack, width, hidden),
        **linear(f"{name}.down_proj", *stack, hidden, width),
    }


def latent_attention(name, config):
    """Multi-head latent attention with a low-rank query."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query, latent = config["q_lora_rank"], config["kv_lora_rank"]
    return {
        **linear(f"{name}.q_a_proj", query, hidden),
        **plain(f"{name}.q_a_layernorm.weight", query),
        **linear(f"{name}.q_b_proj", heads * (nope + rope), query),
        **linear(f"{name}.kv_a_proj_with_mqa", latent + rope, hidden),
        **plain(f"{name}.kv_a_layernorm.weight", latent),
        **linear(f"{name}.kv_b_proj", heads * (nope + value), latent),
        **linear(f"{name}.o_proj", hidden, heads * value),
    }


def ends(config):
    """Embedding, last norm and head."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    return {
        **plain("model.embed_tokens.weight", vocab, hidden),
        **plain("model.norm.weight", hidden),
        **plain("lm_head.weight", vocab, hidden),
    }


def deepseek(config):
    """DeepSeek-V3 and Kimi-K2, MTP layers included."""
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    main, mtp = config["num_hidden_layers"], config.get("num_nextn_predict_layers") or 0
    table = ends(config)
    for layer in range(main + mtp):
        name = f"model.layers.{layer}"
        table |= latent_attention(f"{name}.self_attn", config)
        table |= plain(f"{name}.input_layernorm.weight", hidden)
        table |= plain(f"{name}.post_attention_layernorm.weight", hidden)
        if layer < config["first_k_dense_replace"]:
            table |= mlp(f"{name}.mlp", hidden, config["intermediate_size"])
            continue
        table |= plain(f"{name}.mlp.gate.weight", config["n_routed_experts"], hidden)
        table |= plain(f"{name}.mlp.gate.e_score_correction_bias", config["n_routed_experts"], dtype=F32)
        table |= mlp(f"{name}.mlp.shared_experts", hidden, width * config["n_shared_experts"])
        for expert in range(config["n_routed_experts"]):
            table |= mlp(f"{name}.mlp.experts.{expert}", hidden, width)
        if layer >= main:
            table |= plain(f"{name}.eh_proj.weight", hidden, 2 * hidden)
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                table |= plain(f"{name}.{norm}.weight", hidden)
            for copy in ("embed_tokens", "shared_head.head"):
                table |= plain(f"{name}.{copy}.weight", config["vocab_size"], hidden)
    return table


def longcat(config):
    """LongCat-Flash: two attentions and dense layers a layer, one MoE, a dense MTP layer."""
    hidden, routed = config["hidden_size"], config["n_routed_experts"]
    table = ends(config)
    for layer in range(config["num_layers"]):
        name = f"model.layers.{layer}"
        for half in (0, 1):
            table |= latent_attention(f"{name}.self_attn.{half}", config)
            table |= mlp(f"{name}.mlps.{half}", hidden, config["ffn_hidden_size"])
            table |= plain(f"{name}.input_layernorm.{half}.weight", hidden)
            table |= plain(f"{name}.post_attention_layernorm.{half}.weight", hidden)
        rows = routed + config["zero_expert_num"]
        table |= plain(f"{name}.mlp.router.classifier.weight", rows, hidden, dtype=F32)
        table |= plain(f"{name}.mlp.router.e_score_correction_bias", rows, dtype=F32)
        for expert in range(routed):
            table |= mlp(f"{name}.mlp.experts.{expert}", hidden, config["expert_ffn_hidden_size"])
    name = "model.mtp.layers.0"
    table |= latent_attention(f"{name}.self_attn", config)
    table |= mlp(f"{name}.transformer_layer.mlp", hidden, config["ffn_hidden_size"])
    table |= linear(f"{name}.eh_proj", hidden, 2 * hidden)
    for norm in ("enorm.m", "hnorm.m", "input_layernorm", "post_attention_layernorm"):
        table |= plain(f"{name}.{norm}.weight", hidden)
    table |= plain("model.mtp.embed_tokens.weight", config["vocab_size"], hidden)
    return table | plain("model.mtp.norm.weight", hidden)


def step3(config):
    """The text model of Step3: experts in stacks."""
    hidden, heads, head = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    moe = {int(layer) for layer in config["moe_layers_enum"].split(",")}
    table = ends(config)
    for layer in range(config["num_hidden_layers"]):
        name, attention = f"model.layers.{layer}", f"model.layers.{layer}.self_attn"
        table |= linear(f"{attention}.q_proj", config["share_q_dim"], hidden)
        table |= plain(f"{attention}.inter_norm.weight", config["share_q_dim"])
        table |= linear(f"{attention}.wq", heads * head, config["share_q_dim"])
        table |= linear(f"{attention}.k_proj", head, hidden)
        table |= linear(f"{attention}.v_proj", head, hidden)
        table |= linear(f"{attention}.o_proj", hidden, heads * head)
        table |= plain(f"{name}.input_layernorm.weight", hidden)
        table |= plain(f"{name}.post_attention_layernorm.weight", hidden)
        if layer not in moe:
            table |= mlp(f"{name}.mlp", hidden, config["intermediate_size"])
            continue
        table |= plain(f"{name}.moe.gate.weight", config["moe_num_experts"], hidden)
        table |= mlp(f"{name}.moe", hidden, config["moe_intermediate_size"], config["moe_num_experts"])
        table |= mlp(f"{name}.share_expert", hidden, config["share_expert_dim"])
    return table


TABLES = [
    ("v3_basic", deepseek),
    ("v3_mtp2", deepseek),
    ("v3_fp8", deepseek),
    ("kimi_k2", deepseek),
    ("kimi_k2_int4", deepseek),
    ("longcat_flash", longcat),
    ("longcat_fp8", longcat),
    ("step3_text", step3),
    ("step3_fp8", step3),
]


def converted(case, plan, folder):
    """Tensors of a converted golden."""
    source = open_source(GOLDENS / case)
    convert(source, plan(source), folder, progress=False)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("case", "table"), TABLES, ids=[case for case, _ in TABLES])
def test_fp8_checkpoints_hold_what_engines_register(case, table, tmp_path):
    config = json.loads((GOLDENS / case / "config.json").read_text())
    tensors = converted(case, plan_fp8_ue8m0, tmp_path / "out")
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert found == table(config)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    # vLLM and SGLang ask for these keys; `scale_fmt` is what SGLang and vLLM know power-of-two scales by.
    assert fields["quant_method"] == "fp8" and fields["activation_scheme"] == "dynamic"
    assert fields["weight_block_size"] == [128, 128] and fields["scale_fmt"] == "ue8m0"


@pytest.mark.parametrize(("case", "table"), TABLES, ids=[case for case, _ in TABLES])
def test_bfloat16_checkpoints_hold_the_same_without_scales(case, table, tmp_path):
    config = json.loads((GOLDENS / case / "config.json").read_text())
    if "quantization_config" not in config:
        pytest.skip("is bfloat16")
    tensors = converted(case, plan_bf16, tmp_path / "out")
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    expected = {name: row for name, row in table(config).items() if not name.endswith("_scale_inv")}
    assert found == {name: (shape, BF16 if dtype == FP8 else dtype) for name, (shape, dtype) in expected.items()}


def test_deepseeks_own_sizes_fit_the_releases():
    # From the configuration of DeepSeek-V3: the grid of the 576 rows, and the number of tensors of the release.
    config = {
        **{"hidden_size": 7168, "vocab_size": 129280, "num_attention_heads": 128, "q_lora_rank": 1536},
        **{"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        **{"intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61},
        **{"first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1, "num_nextn_predict_layers": 1},
    }
    table = deepseek(config)
    assert table["model.layers.61.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == ((5, 56), F32)
    assert table["model.layers.5.self_attn.o_proj.weight_scale_inv"] == ((56, 128), F32)
    assert len(table) == 91991


def test_native_transformers_loads_what_is_written(tmp_path):
    converted("v3_fp8", plan_bf16, tmp_path / "bf16")
    config = DeepseekV3Config.from_pretrained(tmp_path / "bf16")
    model, info = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "bf16", config=config, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])  # native drops MTP layers
    expected = load_file(GOLDENS / "v3_fp8" / "expected.safetensors")
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    # The weights are rounded to bfloat16; the wrong block size of native loading would be off by 15.
    assert (logits - expected["logits"]).abs().max() < 1
    assert (logits - expected["logits"]).norm() < 0.05 * expected["logits"].norm()
