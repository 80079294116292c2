"""The cost model against the Step3 report's table, published sizes, models on the meta device and real caches."""

import copy
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file
from testing import GOLDENS
from tiny import FAMILIES as TINY
from tiny import random_ids, tiny_config, tiny_model
from tiny_step3 import text_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe.conversion.families import find_family, is_float32
from hf_moe.conversion.structure import read_structure
from hf_moe.inspect import cost
from hf_moe.inspect.architecture import READERS, read_architecture
from hf_moe.inspect.count import build_on_meta, count_on_meta, count_parameters
from hf_moe.inspect.sources import Source, read_source, shipped_names, stored_precision
from hf_moe.register import FAMILIES

CONTEXT = 32768
NAMES = [
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseek-v3",
    "ernie-4.5-300b",
    "kimi-k2",
    "longcat-flash",
    "longcat-flash-lite",
    "qwen3-235b",
    "qwen3-32b",
    "step3",
]
# arXiv 2507.19427, table of models: cache bytes and attention FLOPs at 32K, intensity, projections, FFN, billions of
# parameters in total and active per token, as its authors and the releases print them.
TABLE = {
    "step3": (1.02e9, 1.31e11, 128, 2.07e10, 5.33e10, 316, 38),
    "deepseek-v3": (1.15e9, 5.89e11, 512, 2.28e10, 4.84e10, 671, 37),
    "qwen3-235b": (3.15e9, 1.01e11, 32, 1.34e10, 2.84e10, 235, 22),
    "ernie-4.5-300b": (3.62e9, 5.80e10, 16, 1.63e10, 7.61e10, 300, 47),
    "qwen3-32b": (4.29e9, 6.87e10, 16, 1.21e10, 5.03e10, 32, 32),
    "kimi-k2": (1.15e9, 2.95e11, 256, 1.23e10, 4.84e10, None, 32),
}
# Billions, as released: main model, without MTP layers.
PUBLISHED = {
    "deepseek-v2": 236,
    "deepseek-v2-lite": 15.7,
    "deepseek-v3": 671,
    "ernie-4.5-300b": 300,
    "kimi-k2": 1026.4,
    "longcat-flash": 560.7,
    "longcat-flash-lite": 68.5,
    "qwen3-235b": 235,
    "qwen3-32b": 32.8,
    "step3": 316,
}


def architecture(name: str):
    return read_architecture(read_source(name).config, name)


def rounds_to(value: float, printed: float) -> bool:
    """Whether `value` has the three digits that are printed, rounded or cut."""
    unit = 10.0 ** (len(str(int(printed))) - 3)
    return abs(value - printed) <= 0.5 * unit * (1 + 1e-9) or printed <= value < printed + unit


# --- the report and the releases --------------------------------------------------------------------------------------


def test_shipped_names():
    assert shipped_names() == NAMES


@pytest.mark.parametrize("name", TABLE)
def test_table_of_the_report(name):
    a = architecture(name)
    cache, attention, intensity, linear, ffn, total, active = TABLE[name]
    parts = cost.parameters(a)
    assert rounds_to(cost.kv_cache_bytes(a, CONTEXT, 1, "fp8"), cache)
    assert rounds_to(cost.attention_flops(a, CONTEXT), attention)
    assert cost.arithmetic_intensity(a, "fp8") == intensity
    assert rounds_to(cost.linear_flops(a), linear)
    assert rounds_to(cost.ffn_flops(a), ffn)
    if total is not None:
        assert cost.total_params(parts) / 1e9 == pytest.approx(total, rel=0.005) or name == "qwen3-32b"
        assert int(cost.total_params(parts) / 1e9) == total or round(cost.total_params(parts) / 1e9, -1) == total
    # Published figures are cut, with or without the input table.
    assert int(cost.active_params(parts) / 1e9) == active
    eighth = (cost.kv_cache_bytes(a, 8192, 1, "fp8"), cost.attention_flops(a, 8192))
    assert [4 * value for value in eighth] == [
        cost.kv_cache_bytes(a, CONTEXT, 1, "fp8"),
        cost.attention_flops(a, CONTEXT),
    ]


def test_table_to_five_digits():
    """What the sizes give, where the report prints less."""
    rows = {
        "step3": (316.29, 38.84, 37.92),
        "deepseek-v3": (671.03, 37.55, 36.63),
        "qwen3-235b": (235.09, 22.19, 21.57),
        "ernie-4.5-300b": (299.48, 47.93, 47.08),
        "qwen3-32b": (32.76, 32.76, 31.98),
        "kimi-k2": (1026.4, 32.86, 31.69),
    }
    for name, expected in rows.items():
        parts = cost.parameters(architecture(name))
        values = cost.total_params(parts), cost.active_params(parts), cost.active_params(parts, embedding=False)
        for value, printed in zip(values, expected):
            assert value / 1e9 == pytest.approx(printed, abs=0.051 if printed > 1000 else 0.0051), name


@pytest.mark.parametrize("name", NAMES)
def test_published_sizes(name):
    parts = cost.parameters(architecture(name))
    assert cost.total_params(parts) / 1e9 == pytest.approx(PUBLISHED[name], rel=0.005)


def test_step3_to_the_last_element():
    parts = cost.parameters(architecture("step3"))
    assert cost.total_params(parts) == 316_294_538_240 and parts["vision"].total == 4_675_374_592


def test_exact_attention_of_latent_values():
    a = architecture("deepseek-v3")
    assert cost.attention_flops_exact(a, CONTEXT) == pytest.approx(5.57e11, rel=1e-3)
    assert cost.attention_flops_exact(a, CONTEXT) == 2 * CONTEXT * 61 * 128 * (576 + 512)
    step3 = architecture("step3")
    assert cost.attention_flops_exact(step3, 100) == cost.attention_flops(step3, 100)


def test_longcat_meets_eight_experts_of_its_twelve_choices():
    a = architecture("longcat-flash")
    assert a.real_experts_per_token == 8
    parts = cost.parameters(a)
    assert cost.active_params(parts, embedding=False) / 1e9 == pytest.approx(27, rel=0.01)
    assert a.num_attentions == 56 and cost.kv_cache_bytes(a, 1, 1, "bf16") == 56 * 576 * 2
    dense = sum(parts[name].total for name in ("head", "attention", "dense", "router", "norm"))
    assert dense / 1e9 == pytest.approx(18.6, abs=0.1)  # every choice a zero expert
    assert (dense + 12 * 28 * a.expert_params) / 1e9 == pytest.approx(31.3, abs=0.1)


def test_total_operations():
    """Everything counted once, from the weights: a product with a weight is two operations per element."""
    for name in ("deepseek-v3", "step3", "qwen3-32b"):
        a = architecture(name)
        parts = cost.parameters(a)
        norms = a.num_attentions * a.attention.other_params + a.norm_params
        weights = cost.active_params(parts, embedding=False) - norms
        assert cost.decode_flops(a, 1000) == pytest.approx(2 * weights + cost.attention_flops_exact(a, 1000), rel=1e-9)
    a = architecture("deepseek-v3")
    causal = sum(2 * length * 61 * 128 * (192 + 128) for length in range(1, 11)) / 10
    other = cost.linear_flops(a) + cost.ffn_flops(a) + cost.other_flops(a)["router"] + 2 * 129280 * 7168 / 10
    assert cost.prefill_flops_per_token(a, 10) == pytest.approx(causal + other, rel=1e-12)


# --- models -----------------------------------------------------------------------------------------------------------


def assert_counts_agree(source: Source) -> None:
    a = read_architecture(source.config, source.name)
    formula = cost.parameters(a)
    counted = count_on_meta(source)
    assert counted == {name: part.total for name, part in formula.items()}
    model = build_on_meta(source)
    assert sum(counted.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert a.router_buffers == sum(b.numel() for n, b in model.named_buffers() if n.endswith("correction_bias"))
    parts, origin = count_parameters(source, a)
    assert origin == "meta-device model" and parts == formula


@pytest.mark.parametrize("name", NAMES)
def test_formulas_agree_with_our_models(name):
    """To the last element, part by part, for every shipped name whose class is here."""
    source = read_source(name)
    model_type = source.config["model_type"]
    if model_type in FAMILIES:
        assert_counts_agree(source)
    else:
        a = read_architecture(source.config, name)
        assert count_parameters(source, a)[1] == "formula"


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_nextn_predict_layers": 2},
        {"attention_bias": True, "q_lora_rank": None},
        {"moe_layer_freq": 2, "num_hidden_layers": 6},
        {"tie_word_embeddings": True},
        {"n_shared_experts": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", TINY)
def test_formulas_agree_with_tiny_models(family, overrides):
    if family.startswith("longcat") and "q_lora_rank" in overrides:
        overrides = {"attention_bias": True, "router_bias": True}  # LongCat always has the low-rank query
    config = json.loads(tiny_config(family, **overrides).to_json_string(use_diff=False))
    assert_counts_agree(Source("tiny", "test", config))


@pytest.mark.parametrize("case", sorted(path.name for path in GOLDENS.iterdir() if (path / "config.json").exists()))
def test_formulas_agree_with_the_goldens(case):
    """The models of the checkpoints, and the bytes of the files where we know their precision."""
    source = read_source(str(GOLDENS / case))
    a = read_architecture(source.config, case)
    if a.model_type in FAMILIES:
        assert_counts_agree(source)
    if case.startswith(("v2", "v3", "kimi")):
        tensors = load_file(GOLDENS / case / "model.safetensors")
        stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        precision = {"v3_fp8": "fp8", "kimi_k2_int4": "int4"}.get(case)
        if precision is None:  # `torch_dtype` of these files is not what they hold
            precision = "fp32" if tensors["lm_head.weight"].dtype == torch.float32 else "bf16"
        else:
            assert stored_precision(source.config) == precision
        # INT4 files also hold the shape of each weight, two numbers of 4 bytes.
        slack = 8 * 3 * a.num_moe * a.num_experts if precision == "int4" else 0
        assert cost.checkpoint_bytes(a, precision) == stored - slack


NATIVE = {
    "llama": {"num_key_value_heads": 2, "attention_bias": True},
    "mistral": {"num_key_value_heads": 2, "head_dim": 24},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True},
    "qwen3_moe": {"num_key_value_heads": 2, "head_dim": 24, "num_experts": 6, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 20, "mlp_only_layers": [1]},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 6},
    "ernie4_5_moe": {"num_key_value_heads": 2, "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 20,
                     "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 2},
}  # fmt: skip


@pytest.mark.parametrize("model_type", NATIVE)
def test_formulas_agree_with_native_models(model_type):
    sizes = {"vocab_size": 90, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 4}
    config = AutoConfig.for_model(model_type, **sizes, num_attention_heads=4, **NATIVE[model_type])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    a = read_architecture(json.loads(config.to_json_string(use_diff=False)), model_type)
    assert cost.total_params(cost.parameters(a)) == model.num_parameters()


@pytest.mark.parametrize("name", ["qwen3-235b", "qwen3-32b", "ernie-4.5-300b"])
def test_formulas_agree_with_native_models_of_the_shipped_size(name):
    config = read_source(name).config
    values = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values))
    assert cost.total_params(cost.parameters(architecture(name))) == model.num_parameters()


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY)
def test_cache_bytes_are_those_of_a_real_cache(family):
    model = tiny_model(family)
    with torch.no_grad():
        cache = model(random_ids(3, 21), use_cache=True).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t.is_floating_point()]
    held = sum(t.numel() * t.element_size() for t in tensors)  # n-gram models also keep token ids
    a = read_architecture(json.loads(model.config.to_json_string(use_diff=False)), family)
    assert cost.kv_cache_bytes(a, 21, 3, "fp32") == held
    assert cost.kv_cache_bytes(a, 21, 3, "bf16") * 2 == held and cost.kv_cache_bytes(a, 21, 3, "fp8") * 4 == held


def test_cache_bytes_of_step3():
    model = text_model()
    with torch.no_grad():
        cache = model(random_ids(3, 21, high=model.config.vocab_size), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    a = read_architecture(json.loads(model.config.to_json_string(use_diff=False)), "step3_text")
    assert cost.kv_cache_bytes(a, 21, 3, "fp32") == held


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe", "ernie4_5_moe"])
def test_cache_bytes_of_native_models(model_type):
    sizes = {"vocab_size": 90, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 4}
    config = AutoConfig.for_model(model_type, **sizes, num_attention_heads=4, **NATIVE[model_type])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        cache = model(random_ids(2, 9, high=80), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    a = read_architecture(json.loads(config.to_json_string(use_diff=False)), model_type)
    assert cost.kv_cache_bytes(a, 9, 2, "fp32") == held


@pytest.mark.parametrize(
    "name, precision, gigabytes",
    [
        ("step3", "bf16", 641.940),
        ("step3", "fp8", 327.589),
        ("deepseek-v3", "fp8", 688.59),
        ("kimi-k2", "int4", 594.2),
    ],
)
def test_sizes_of_published_repositories(name, precision, gigabytes):
    assert cost.checkpoint_bytes(architecture(name), precision) / 1e9 == pytest.approx(gigabytes, rel=1e-4)


OWN = [name for name in NAMES if not name.startswith(("ernie", "qwen"))]


# MTP layers and vision: no release has a main layer 61.
BESIDE = re.compile(r"\.mtp\.|^model\.layers\.61\.|^vision|^vit_")


def tensors_of_files(name: str) -> dict[str, tuple[int, ...]]:
    """Every tensor that the files of a release hold, MTP layers and their copies included, and its shape."""
    config = {key: value for key, value in read_source(name).config.items() if key != "quantization_config"}
    depths = config.get("num_nextn_predict_layers") or 0
    places = (f"model.layers.{config.get('num_hidden_layers')}.", "model.mtp.layers.0.")
    structure = read_structure(config, {f"{place}eh_proj.weight": (1, 1) for place in places * depths})
    copies = {copy: structure.shapes[original] for copy, original in structure.duplicates.items()}
    return {**structure.shapes, **copies}


@pytest.mark.parametrize("name", OWN)
def test_checkpoint_bytes_are_those_of_every_tensor(name):
    family = find_family(read_source(name).config)
    totals = dict.fromkeys(cost.PRECISIONS, 0)
    in_memory = 0  # of what decoding runs
    for tensor, shape in tensors_of_files(name).items():
        elements, width = math.prod(shape), 4 if is_float32(family, tensor) else 2
        blocks = math.prod(shape[:-2]) * -(-shape[-2] // 128) * -(-shape[-1] // 128) if len(shape) > 1 else 0
        is_fp8 = any(re.fullmatch(pattern, tensor) for pattern in family.fp8_weights)
        is_expert = re.search(r"\.experts\.\d+\.|\.moe\.(gate|up|down)_proj", tensor)
        totals["fp32"] += 4 * elements
        totals["bf16"] += width * elements
        totals["fp8"] += elements + 4 * blocks if is_fp8 else width * elements
        totals["int4"] += elements // 2 + elements // 32 * 2 if is_expert else width * elements
        if not BESIDE.search(tensor) and "correction_bias" not in tensor:
            in_memory += elements + 4 * blocks if is_fp8 else width * elements
    a = architecture(name)
    assert {precision: cost.checkpoint_bytes(a, precision) for precision in cost.PRECISIONS} == totals
    held = cost.weight_bytes(a, "fp8")
    assert held["attention"] + held["ffn"] == in_memory


@pytest.mark.parametrize("name", OWN)
def test_operations_of_a_decoded_token_are_those_of_every_matrix(name):
    a, products = architecture(name), 0.0
    for tensor, shape in tensors_of_files(name).items():
        if BESIDE.search(tensor) or len(shape) < 2 or re.search(r"embed_tokens|ngram_embeddings\.embedders", tensor):
            continue  # tables are looked up
        elements = math.prod(shape)
        if re.search(r"\.experts\.\d+\.|\.moe\.(gate|up|down)_proj", tensor):
            elements *= a.experts_per_token / (a.num_experts + a.num_zero_experts)
        products += 2 * elements
    config = read_source(name).config
    text = config.get("text_config", config)
    heads, layers = text["num_attention_heads"], text.get("num_layers") or text["num_hidden_layers"]
    if name == "step3":
        attention = 2 * CONTEXT * layers * heads * 2 * 256
    else:
        sublayers = layers * (2 if name.startswith("longcat") else 1)
        attention = 2 * CONTEXT * sublayers * heads * (576 + 512)
    assert cost.decode_flops(a, CONTEXT) == pytest.approx(products + attention, rel=1e-12)


def test_attention_weights_of_a_step3_layer():
    """Section 5 of the report: 67 MB in FP8, the output projection over eight devices."""
    *others, output = architecture("step3").attention.linears
    assert sum(rows * columns for rows, columns in others) + output[0] * output[1] / 8 == pytest.approx(67e6, rel=0.01)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_unknown_model_type():
    with pytest.raises(ValueError, match="'gpt2'.*deepseek_v3"):
        read_architecture({"model_type": "gpt2"}, "x")
    with pytest.raises(ValueError, match="None"):
        read_architecture({}, "x")


@pytest.mark.parametrize("model_type", READERS)
def test_missing_key(model_type):
    with pytest.raises(ValueError, match="x: the configuration lacks '"):
        read_architecture({"model_type": model_type}, "x")


@pytest.mark.parametrize("name", ["longcat-flash", "deepseek-v3", "deepseek-v2-lite"])
def test_model_type_by_architecture(name):
    config = {**read_source(name).config}
    expected = read_architecture(config, "x")
    del config["model_type"]
    assert read_architecture(config, "x") == expected


@pytest.mark.parametrize("key, value", [("hidden_size", "x"), ("num_hidden_layers", 2.5), ("vocab_size", None)])
@pytest.mark.parametrize("name", ["deepseek-v3", "step3"])
def test_sizes_that_are_none(name, key, value):
    config = copy.deepcopy(read_source(name).config)
    config.get("text_config", config)[key] = value
    with pytest.raises(ValueError, match=f"x: `{key}` must be a whole number"):
        read_architecture(config, "x")
