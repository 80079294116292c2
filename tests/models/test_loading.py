"""Loading: upstream tensors into fused parameters bit for bit, quantised formats, MTP layers, devices and memory."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import (
    CASES,
    LOGITS_ATOL,
    QUANTISED,
    UNQUANTISED,
    LogRecorder,
    assert_same_bits,
    assert_same_tensors,
    copy_golden,
    decode_checkpoint,
    decode_fp8,
    edited_golden,
    expected,
    fused_experts,
    golden,
    is_fp8_name,
    max_difference,
    quantise_fp8,
    read_config,
    read_tensors,
    run_python,
    upstream_shapes,
    upstream_tensors,
    write_checkpoint,
)
from testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import hf_moe  # noqa: F401  registers the classes
from hf_moe.models.layer_linear import Linear
from hf_moe.models.modeling_base import MoePreTrainedModel
from hf_moe.models.modeling_deepseek_v3 import DeepseekV3ForCausalLM
from hf_moe.models.weights_safetensors import CheckpointError

WITH_MTP = ("v3_basic", "v3_mtp2", "v3_fp8")
# What a model without a language model head has no place for: the head, and the MTP layer's copy of it in v3_basic.
HEADS = {"lm_head.weight", "model.layers.4.shared_head.head.weight"}


def load(folder, dtype=torch.float32, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs).eval()


@torch.no_grad()
def logits_of(model, case):
    return model(expected(case)["input_ids"]).logits


def without_duplicates(tensors, config):
    """Upstream tensors less the MTP layers' copies of embedding and head, which a model holds once."""
    main = config["num_hidden_layers"]
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (name.endswith(("embed_tokens.weight", "shared_head.head.weight")) and ".layers." in name)
        or int(name.split(".")[2]) < main
    }


def assert_parameters(model, tensors, config, dtype):
    """Every parameter of the model equals the upstream tensor, cast to `dtype`, bit for bit; there are no others."""
    wanted = fused_experts(without_duplicates(tensors, config), config["n_routed_experts"])
    state = model.state_dict()
    assert set(state) == set(wanted), sorted(set(state) ^ set(wanted))[:6]
    for name, tensor in wanted.items():
        kept = torch.float32 if name.endswith("e_score_correction_bias") else dtype
        assert_same_bits(name, state[name], tensor.to(kept))


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"], ids=str)
@pytest.mark.parametrize("case", UNQUANTISED)
def test_upstream_tensors_become_parameters_bit_for_bit(case, dtype):
    config = read_config(golden(case))
    model, info = AutoModelForCausalLM.from_pretrained(golden(case), dtype=dtype, output_loading_info=True)
    resolved = getattr(torch, config["torch_dtype"]) if dtype == "auto" else dtype
    assert model.dtype == resolved and model.config.dtype == resolved
    assert_parameters(model, read_tensors(golden(case)), config, resolved)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_equal_the_golden(case):
    assert max_difference(logits_of(load(golden(case)), case), expected(case)["logits"]) < LOGITS_ATOL


@pytest.mark.parametrize("case", CASES)
def test_shards_load_as_one_file_does(case, tmp_path):
    whole = load(golden(case)).state_dict()
    sharded = load(edited_golden(tmp_path, case, shards=5)).state_dict()
    assert set(whole) == set(sharded)
    for name in whole:
        assert_same_bits(name, sharded[name], whole[name])


def test_default_dtype_is_that_of_the_file():
    assert AutoModelForCausalLM.from_pretrained(golden("v3_basic")).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(golden("v2_lite_greedy")).dtype == torch.float32


@pytest.mark.parametrize("case", ["v3_basic", "v2_group_limited"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_correction_bias_stays_float32(dtype, case, tmp_path):
    def edit(tensors):
        for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
            bias = name.replace("weight", "e_score_correction_bias")
            tensors.setdefault(bias, torch.randn(len(tensors[name])))  # V2's configuration may ask for one
        tensors[bias] = tensors[bias].bfloat16()  # as some re-exports store it

    model = load(edited_golden(tmp_path, case, edit, topk_method="noaux_tc"), dtype=dtype)
    biases = {name: tensor for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias")}
    assert len(biases) == {"v3_basic": 4, "v2_group_limited": 3}[case]
    assert {tensor.dtype for tensor in biases.values()} == {torch.float32}
    stored = read_tensors(tmp_path)
    for name, tensor in biases.items():
        assert_same_bits(name, tensor, stored[name].float())


@pytest.mark.parametrize("case", ["v3_basic", "v2_group_limited", "kimi_k2"])
def test_base_model_loads_from_a_causal_lm_checkpoint(case):
    model, info = AutoModel.from_pretrained(golden(case), dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) <= HEADS
    state, whole = model.state_dict(), load(golden(case)).model.state_dict()
    assert set(state) == set(whole)
    for name in whole:
        assert_same_bits(name, state[name], whole[name])
    with torch.no_grad():
        states = model.eval()(expected(case)["input_ids"]).last_hidden_state
    assert max_difference(states, expected(case)["last_hidden_state"]) < LOGITS_ATOL


@pytest.mark.parametrize("case", ["v3_basic", "v2_group_limited", "kimi_k2"])
def test_a_class_of_the_user_loads_and_saves(case, tmp_path):
    """Transformers finds conversions by the name of a class; one that it does not know has the same experts."""
    expected = AutoModel.from_pretrained(golden(case), dtype=torch.float32)

    class Derived(type(expected)):
        pass

    model, info = Derived.from_pretrained(golden(case), dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) <= HEADS
    model.save_pretrained(tmp_path / "saved")
    again = type(expected).from_pretrained(tmp_path / "saved")
    for name, tensor in expected.state_dict().items():
        assert_same_bits(name, model.state_dict()[name], tensor)
        assert_same_bits(name, again.state_dict()[name], tensor)


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
@pytest.mark.parametrize("case", ["v3_basic", "v2_group_limited", "kimi_k2"])
def test_classification_heads_load_the_backbone_and_say_that_the_head_is_new(case, auto_class):
    model, info = auto_class.from_pretrained(golden(case), dtype=torch.float32, output_loading_info=True, num_labels=3)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"score"}
    assert set(info["unexpected_keys"]) <= HEADS
    state, whole = model.model.state_dict(), load(golden(case)).model.state_dict()
    for name in whole:
        assert_same_bits(name, state[name], whole[name])


def test_base_model_checkpoint_loads_into_the_causal_lm_and_reports_the_new_head(tmp_path):
    """Tensors without the `model.` prefix, as a bare base model writes them."""
    bare = {
        name.removeprefix("model."): tensor
        for name, tensor in read_tensors(golden("v3_basic")).items()
        if name != "lm_head.weight" and not name.endswith("shared_head.head.weight")
    }
    folder = write_checkpoint(tmp_path, read_config(golden("v3_basic")), bare)
    base = AutoModel.from_pretrained(folder, dtype=torch.float32)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    whole = load(golden("v3_basic")).model.state_dict()
    for state in (base.state_dict(), model.model.state_dict()):
        assert set(state) == set(whole)
        for name in whole:
            assert_same_bits(name, state[name], whole[name])


@pytest.mark.parametrize("case", ["v3_basic", "v2_lite_greedy"])
def test_fused_checkpoint_loads(case, tmp_path):
    """What `save_original_format=False` writes: experts stacked as in memory."""
    model = load(golden(case))
    model.save_pretrained(tmp_path, save_original_format=False)
    stored = read_tensors(tmp_path)
    assert "model.layers.1.mlp.experts.gate_up_proj" in stored
    assert not any(".experts.0." in name for name in stored)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    state = loaded.state_dict()
    assert set(state) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert_same_bits(name, state[name], tensor)


@pytest.mark.parametrize("case", ["v3_basic", "v3_fp8"])
def test_unexpected_tensors_are_reported(case, tmp_path):
    def edit(tensors):
        tensors["model.layers.1.mlp.a_stranger.weight"] = torch.ones(3)
        tensors["stranger"] = torch.ones(2)

    with LogRecorder() as log:
        _, info = AutoModelForCausalLM.from_pretrained(edited_golden(tmp_path, case, edit), output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"model.layers.1.mlp.a_stranger.weight", "stranger"}
    assert "a_stranger" in log.text
    assert not info["missing_keys"]


def test_rotary_frequencies_of_third_party_exports_are_ignored(tmp_path):
    def edit(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    model = load(edited_golden(tmp_path, "v3_basic", edit))
    assert max_difference(logits_of(model, "v3_basic"), expected("v3_basic")["logits"]) < LOGITS_ATOL


def test_a_missing_head_is_reported(tmp_path):
    folder = edited_golden(tmp_path, "v3_qlora_none", lambda tensors: tensors.pop("lm_head.weight"))
    with LogRecorder() as log:
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert "lm_head.weight" in log.text


# --- quantised checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_golden_equals_the_definition_bit_for_bit(case, dtype):
    config = read_config(golden(case))
    model, info = AutoModelForCausalLM.from_pretrained(
        golden(case), dtype=dtype, dequantize=True, output_loading_info=True
    )
    plain = decode_checkpoint(read_tensors(golden(case)))
    assert_parameters(model, plain, config, dtype)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert getattr(model.config, "quantization_config", None) is None
    assert not getattr(model, "is_quantized", False)


def test_float32_product_of_the_fp8_definition_is_exact_in_float64():
    """The bit-for-bit comparison rests on this: e4m3 times float32 has at most 28 significant bits."""
    weight, scale = quantise_fp8(torch.randn(130, 7, generator=torch.Generator().manual_seed(0)))
    assert_same_bits("product", decode_fp8(weight, scale)[:128].float(), weight[:128].float() * scale[0, 0])


EDGE_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 64,
    "hidden_size": 136,  # 2 column blocks, the second of 8
    "intermediate_size": 257,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 192,  # 2 row blocks that divide evenly into 96: the wrong answer is silent there
    "kv_lora_rank": 512,  # 512 + 64 rows of kv_a_proj_with_mqa: 5 row blocks, as in DeepSeek-V3
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 40,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "rope_theta": 10000,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}


@pytest.mark.parametrize("scales", ["float32", "float32 powers of two", "float8_e8m0fnu"])
def test_fp8_edge_blocks_and_scale_formats(scales, tmp_path):
    tensors = {}
    for name, tensor in upstream_tensors(EDGE_CONFIG).items():
        if not is_fp8_name(name):
            tensors[name] = tensor
            continue
        # Rows of very different size: a scale taken from a neighbouring block cannot go unnoticed.
        tensor = tensor.float() * torch.logspace(-1, 1, tensor.shape[0])[:, None]
        tensors[name], scale = quantise_fp8(tensor, power_of_two=scales != "float32")
        tensors[f"{name}_scale_inv"] = scale.to(torch.float8_e8m0fnu) if scales == "float8_e8m0fnu" else scale
    stem = "model.layers.0.self_attn"
    assert tensors[f"{stem}.kv_a_proj_with_mqa.weight"].shape == (576, 136)
    assert tensors[f"{stem}.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 2)
    assert tensors[f"{stem}.q_a_proj.weight_scale_inv"].shape == (2, 2)
    model = load(write_checkpoint(tmp_path / "in", EDGE_CONFIG, tensors, shards=3), dequantize=True)
    assert_parameters(model, decode_checkpoint(tensors), EDGE_CONFIG, torch.float32)
    assert len(model.model.mtp_layers()) == 1
    bfloat16 = load(tmp_path / "in", dtype=torch.bfloat16, dequantize=True)
    assert_parameters(bfloat16, decode_checkpoint(tensors), EDGE_CONFIG, torch.bfloat16)
    kept = load(tmp_path / "in")
    with torch.no_grad():
        ids = torch.arange(12).view(2, 6)
        outputs = [variant(ids, output_mtp_logits=True) for variant in (kept, model)]
    for name in ("logits", "mtp_logits"):
        actual, wanted = (getattr(output, name) for output in outputs)
        assert_close(name, *((actual[0], wanted[0]) if name == "mtp_logits" else (actual, wanted)), "float32")
    load(tmp_path / "in", dtype=torch.bfloat16).save_pretrained(tmp_path / "out", max_shard_size="200KB")
    assert_same_tensors(read_tensors(tmp_path / "out"), tensors)


def test_fp8_mtp_layer_gives_the_expected_logits():
    want = expected("v3_fp8")
    with torch.no_grad():
        output = load(golden("v3_fp8"))(want["input_ids"], output_mtp_logits=True)
    assert max_difference(output.mtp_logits[0], want["mtp1_logits"]) < LOGITS_ATOL


def test_fp8_base_model_and_classifier(tmp_path):
    whole = load(golden("v3_fp8")).model.state_dict()
    base = AutoModel.from_pretrained(golden("v3_fp8"), dtype=torch.float32)
    classifier = AutoModelForSequenceClassification.from_pretrained(golden("v3_fp8"), dtype=torch.float32, num_labels=2)
    for state in (base.state_dict(), classifier.model.state_dict()):
        for name in whole:
            assert_same_bits(name, state[name], whole[name])


# --- MTP layers -------------------------------------------------------------------------------------------------------


def drop_mtp(main):
    def edit(tensors):
        for name in [name for name in tensors if name.startswith(f"model.layers.{main}.")]:
            del tensors[name]

    return edit


@pytest.mark.parametrize(("case", "main"), [("v3_basic", 4), ("v3_fp8", 3)])
def test_mtp_tensors_absent_although_the_config_promises_them(case, main, tmp_path):
    folder = edited_golden(tmp_path, case, drop_mtp(main))
    assert read_config(folder)["num_nextn_predict_layers"] == 1
    with LogRecorder() as log:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert model.model.mtp_layers() == []
    assert model.config.num_nextn_predict_layers == 0
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert "newly initialized" not in log.text and "MISSING" not in log.text, log.text
    assert max_difference(logits_of(model.eval(), case), expected(case)["logits"]) < LOGITS_ATOL
    model.save_pretrained(tmp_path / "saved")
    assert not any(f".layers.{main}." in name for name in read_tensors(tmp_path / "saved"))


@pytest.mark.parametrize("claimed", [0, None])
def test_mtp_tensors_present_although_the_config_says_none(claimed, tmp_path):
    folder = edited_golden(tmp_path, "v3_mtp2", num_nextn_predict_layers=claimed)
    if claimed is None:
        config = read_config(folder)
        del config["num_nextn_predict_layers"]
        (folder / "config.json").write_text(json.dumps(config))
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert [index for index, _ in model.model.mtp_layers()] == [3, 4]
    assert model.config.num_nextn_predict_layers == 2
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys")), info
    want = expected("v3_mtp2")
    with torch.no_grad():
        output = model.eval()(want["input_ids"], output_mtp_logits=True)
    for depth, name in enumerate(("mtp1_logits", "mtp2_logits")):
        assert max_difference(output.mtp_logits[depth], want[name]) < LOGITS_ATOL, name


@pytest.mark.parametrize("case", ["v3_basic", "v3_fp8", "v3_mtp2"])
def test_fewer_layers_than_the_checkpoint_has(case, tmp_path, caplog):
    """The usual way to try a large model: the first layers alone. Its MTP layers belong to the last ones."""
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(golden(case), num_hidden_layers=2, **options)
    assert "the first 2 are loaded" in caplog.text and "MTP layers" in caplog.text
    assert not info["unexpected_keys"]  # a report of thousands of tensors would say nothing more
    assert len(model.model.layers) == 2 and model.config.num_nextn_predict_layers == 0
    whole = AutoModelForCausalLM.from_pretrained(golden(case), dtype=torch.float32)
    ids = expected(case)["input_ids"]
    with torch.no_grad():
        states = whole.eval()(ids, output_hidden_states=True).hidden_states[2]
        assert torch.equal(model.eval()(ids).logits, whole.lm_head(whole.model.norm(states)))
    model.save_pretrained(tmp_path)
    assert not any(f".layers.{index}." in name for name in read_tensors(tmp_path) for index in (2, 3, 4))


def test_fewer_layers_by_the_file_alone_are_an_error(tmp_path):
    """Nobody asked for fewer: the file and the tensors contradict one another."""
    folder = edited_golden(tmp_path, "v3_basic", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match="layers.2"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = AutoConfig.from_pretrained(golden("v3_basic"))
    config.num_hidden_layers = 2
    model = AutoModelForCausalLM.from_pretrained(golden("v3_basic"), config=config, dtype=torch.float32)
    assert len(model.model.layers) == 2


def test_the_callers_config_is_not_changed_by_loading(tmp_path):
    config = AutoConfig.from_pretrained(golden("v3_fp8"))
    config.num_nextn_predict_layers = 0
    before = config.to_dict()
    model = AutoModelForCausalLM.from_pretrained(golden("v3_fp8"), config=config, dtype=torch.float32)
    assert len(model.model.mtp_layers()) == 1
    assert config.to_dict() == before
    assert "load_options" not in vars(config) and "load_options" not in vars(model.config)


@pytest.mark.parametrize("case", WITH_MTP)
def test_equal_mtp_duplicates_are_held_once(case):
    model = load(golden(case))
    for _, layer in model.model.mtp_layers():
        assert layer.embed_tokens is None and layer.shared_head.head is None


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("case", ["v3_basic", "v3_fp8"])
def test_mtp_duplicates_that_differ_are_kept(case, shards, tmp_path):
    main = read_config(golden(case))["num_hidden_layers"]
    embed, head = f"model.layers.{main}.embed_tokens.weight", f"model.layers.{main}.shared_head.head.weight"

    def edit(tensors):
        tensors[embed] = tensors[embed] * 1.5
        tensors[head] = tensors[head].flip(0)

    folder = edited_golden(tmp_path / "in", case, edit, shards=shards)
    stored = read_tensors(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys")), info
    state = model.state_dict()
    for name in (embed, head, "model.embed_tokens.weight", "lm_head.weight"):
        assert_same_bits(name, state[name], stored[name])
    model.save_pretrained(tmp_path / "out")
    saved = read_tensors(tmp_path / "out")
    for name in (embed, head, "model.embed_tokens.weight", "lm_head.weight"):
        assert_same_bits(name, saved[name], stored[name])
    want = expected(case)
    with torch.no_grad():
        logits = load(folder)(want["input_ids"], output_mtp_logits=True).mtp_logits[0]
    assert (logits - want["mtp1_logits"]).abs().max() > 0.1, "the layer's own embedding and head are not used"


@pytest.mark.parametrize("which", ["embed_tokens.weight", "shared_head.head.weight"])
def test_checkpoint_without_one_mtp_duplicate(which, tmp_path):
    folder = edited_golden(tmp_path, "v3_basic", lambda tensors: tensors.pop(f"model.layers.4.{which}"))
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys")), info
    want = expected("v3_basic")
    with torch.no_grad():
        logits = model.eval()(want["input_ids"], output_mtp_logits=True).mtp_logits[0]
    assert max_difference(logits, want["mtp1_logits"]) < LOGITS_ATOL


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "cpu"], ids=str)
@pytest.mark.parametrize("case", ["v3_basic", "v2_group_limited", "v3_fp8", "kimi_k2_int4"])
def test_device_map_gives_the_same_logits(case, device_map):
    model = load(golden(case), device_map=device_map)
    assert max_difference(logits_of(model, case), expected(case)["logits"]) < LOGITS_ATOL
    if case == "v3_fp8":
        assert len(model.model.mtp_layers()) == 1


@pytest.mark.parametrize("case", ["v3_basic", "v2_group_limited", "v3_fp8", "kimi_k2_int4"])
def test_disk_offload_gives_the_same_logits_and_saves_the_same_tensors(case, tmp_path):
    plain = load(golden(case))
    layers = read_config(golden(case))["num_hidden_layers"]
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(layers)}
    model = load(golden(case), device_map=device_map, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].self_attn.o_proj.weight.device.type == "meta"
    assert max_difference(logits_of(model, case), logits_of(plain, case)) < LOGITS_ATOL / 10
    model.save_pretrained(tmp_path / "saved")
    plain.save_pretrained(tmp_path / "plain")
    saved, wanted = read_tensors(tmp_path / "saved"), read_tensors(tmp_path / "plain")
    assert set(saved) == set(wanted)
    for name in wanted:
        assert_same_bits(name, saved[name], wanted[name])


# --- the host ---------------------------------------------------------------------------------------------------------


def test_the_private_loading_hook_has_the_signature_that_we_override():
    theirs = inspect.signature(PreTrainedModel._load_pretrained_model)
    assert list(theirs.parameters) == ["model", "state_dict", "checkpoint_files", "load_config", "expected_keys"]
    assert isinstance(inspect.getattr_static(PreTrainedModel, "_load_pretrained_model"), staticmethod)
    ours = inspect.signature(MoePreTrainedModel._load_pretrained_model)
    assert list(ours.parameters) == list(theirs.parameters)


def test_a_subfolder_loads(tmp_path):
    copy_golden(tmp_path / "checkpoints" / "last", "v3_qlora_none")
    model = load(tmp_path / "checkpoints", subfolder="last")
    assert max_difference(logits_of(model, "v3_qlora_none"), expected("v3_qlora_none")["logits"]) < LOGITS_ATOL


def test_a_given_state_dict_loads():
    tensors = read_tensors(golden("v3_basic"))
    config = AutoConfig.from_pretrained(golden("v3_basic"))
    model = DeepseekV3ForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).eval()
    assert max_difference(logits_of(model, "v3_basic"), expected("v3_basic")["logits"]) < LOGITS_ATOL


# --- memory -----------------------------------------------------------------------------------------------------------

MEMORY_CONFIG = {
    **{key: value for key, value in EDGE_CONFIG.items() if key != "quantization_config"},
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 5,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "num_attention_heads": 8,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 22,
    "num_nextn_predict_layers": 1,
}
LOAD_AND_MEASURE = """
import json, sys
import torch
import hf_moe
from transformers import AutoModelForCausalLM

def status(field):  # bytes
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith(field + ":"))

options = {"dtype": getattr(torch, sys.argv[3]), **json.loads(sys.argv[4])}
AutoModelForCausalLM.from_pretrained(sys.argv[2], **options)  # tiny: imports and caches are paid before
with open("/proc/self/clear_refs", "w") as stream:
    stream.write("5")  # the peak starts over
before = status("VmRSS")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
peak = status("VmHWM")
held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
print(json.dumps({"before": before, "peak": peak, "held": held, "after": status("VmRSS")}))
"""


def large_tensors(config, quantised):
    """Upstream tensors of a few hundred MB, filled quickly: random values, or random FP8 codes and scales."""
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for name, shape in upstream_shapes(config).items():
        if name.endswith(("layers.5.embed_tokens.weight", "shared_head.head.weight")):
            continue
        if quantised and is_fp8_name(name):
            codes = torch.randint(0, 120, shape, dtype=torch.uint8, generator=generator)  # no NaN among them
            tensors[name] = codes.view(torch.float8_e4m3fn)
            grid = tuple(-(-size // 128) for size in shape)
            tensors[f"{name}_scale_inv"] = torch.empty(grid).uniform_(1e-3, 2e-3, generator=generator)
        else:
            dtype = torch.float32 if name.endswith("bias") else torch.bfloat16
            tensors[name] = torch.empty(shape, dtype=dtype).uniform_(-0.05, 0.05, generator=generator)
    return tensors


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux's /proc"
)
@pytest.mark.parametrize(
    ("stored", "dtype", "case", "dequantize"),
    [
        ("bfloat16", "bfloat16", "v3_basic", False),
        ("bfloat16", "float32", "v3_basic", False),
        ("fp8", "bfloat16", "v3_fp8", True),
        ("fp8", "bfloat16", "v3_fp8", False),
    ],
    ids=["as-stored", "cast", "fp8-decoded", "fp8"],
)
def test_peak_memory_while_loading(stored, dtype, case, dequantize, tmp_path):
    """Peak growth of the resident set, mapped pages of the files included, within 1.15x the model plus one shard."""
    config = dict(MEMORY_CONFIG, num_nextn_predict_layers=1)
    if stored == "fp8":
        config["quantization_config"] = EDGE_CONFIG["quantization_config"]
    folder = write_checkpoint(tmp_path / "large", config, large_tensors(config, stored == "fp8"), shards=6)
    files = [path.stat().st_size for path in folder.glob("*.safetensors")]
    arguments = json.dumps({"dequantize": True} if dequantize else {})
    measured = json.loads(run_python(LOAD_AND_MEASURE, folder, golden(case), dtype, arguments).splitlines()[-1])
    shutil.rmtree(folder)  # pytest would keep a few hundred MB for its last three runs
    expected_ratio = 1.9 if dequantize else 2 if dtype == "float32" else 1
    assert measured["held"] > 200e6 and abs(measured["held"] / sum(files) - expected_ratio) < 0.1, measured
    growth, limit = measured["peak"] - measured["before"], 1.15 * measured["held"] + max(files)
    assert growth > 0.9 * measured["held"], f"the measurement is broken: {measured}"
    assert growth <= limit, f"peak grew by {growth / 1e6:.0f} MB, allowed {limit / 1e6:.0f} MB: {measured}"


# --- quantisation by other libraries ----------------------------------------------------------------------------------


@register_quantization_config("exact_class")
class ExactClassConfig(QuantizationConfigMixin):
    def __init__(self, **kwargs):
        self.quant_method = "exact_class"


class RowMajorLinear(torch.nn.Linear):
    """As kernels in C: reads its input row by row, whatever its strides."""

    def forward(self, hidden_states):
        assert hidden_states.is_contiguous()
        return super().forward(hidden_states)


@register_quantizer("exact_class")
class ExactClassQuantizer(HfQuantizer):
    """Replaces modules that are `nn.Linear` and nothing derived from it, as bitsandbytes does."""

    requires_calibration = False
    is_serializable = is_trainable = False

    def _process_model_before_weight_loading(self, model, **kwargs):
        for name, module in list(model.named_modules()):
            if type(module) is torch.nn.Linear and name != "lm_head":
                linear = RowMajorLinear(module.in_features, module.out_features, module.bias is not None, device="meta")
                model.set_submodule(name, linear)


@pytest.mark.parametrize("mla_mode", ["expanded", "absorbed"])
@pytest.mark.parametrize("case", ["v3_basic", "v3_fp8", "longcat_flash", "step3_text"])
def test_quantisers_that_look_for_linear_layers_find_them(case, mla_mode):
    model = AutoModelForCausalLM.from_pretrained(
        golden(case), dtype=torch.float32, quantization_config=ExactClassConfig()
    ).eval()
    model.config.mla_mode = mla_mode
    found = [name for name, module in model.named_modules() if type(module) is RowMajorLinear]
    assert all(any(name.endswith(part) for name in found) for part in ("o_proj", "down_proj", "gate_proj")), found
    # MTP layers that the configuration does not announce, as LongCat's, are found later and stay as they are.
    assert not any(type(module) is Linear and "mtp" not in name for name, module in model.named_modules())
    ids = torch.arange(3, 21).view(2, 9)
    want = AutoModelForCausalLM.from_pretrained(golden(case), dtype=torch.float32, dequantize=True).eval()
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        logits = model(ids[:, 5:], past_key_values=cache).logits
        assert max_difference(logits, want(ids).logits[:, 5:]) < LOGITS_ATOL
