"""LongCat-Flash: configurations, and checkpoints as files."""

import json

import pytest
import torch
from checkpoints import (
    assert_same_tensors,
    decode_checkpoint,
    edited_golden,
    read_config,
    read_tensors,
    run_python,
    write_checkpoint,
)
from longcat_goldens import CASES, MTP_CASES, load, real_only, run
from testing import GOLDENS, assert_close, assert_golden, load_golden
from tiny import random_ids, tiny_model
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe.models.configuration_longcat_flash import LongcatFlashConfig
from hf_moe.models.weights_safetensors import CheckpointError

# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag, other", [("mla_scale_q_lora", "mla_scale_kv_lora"), ("mla_scale_kv_lora", "mla_scale_q_lora")]
)
def test_scale_flags_are_honoured(flag, other):
    ids = random_ids(1, 7)
    with torch.no_grad():
        both = tiny_model("longcat_flash")(ids).logits
        one = tiny_model("longcat_flash", **{flag: False})
        assert getattr(one.config, other) is True
        assert (one(ids).logits - both).abs().max() > 1e-2
        for attention in one.model.layers[0].self_attn:
            scaled = attention.scaling / attention.qk_head_dim**-0.5
            assert scaled == pytest.approx(1.0 if flag == "mla_scale_q_lora" else (48 / 28) ** 0.5)
            assert (attention.latent_scale is None) == (flag == "mla_scale_kv_lora")


@pytest.mark.parametrize("claimed", [28, 56, 2, None])
def test_num_layers_is_the_only_truth(claimed):
    extra = {} if claimed is None else {"num_hidden_layers": claimed}
    config = LongcatFlashConfig.from_dict({"num_layers": 28, **extra})
    assert config.num_layers == 28 and config.num_hidden_layers == 56
    assert config.to_dict().get("num_hidden_layers") == claimed, "a file's number is written back as it was"


@pytest.mark.parametrize(("claimed", "written"), [(28, 4), (56, 8)])
def test_fewer_layers_are_written_as_the_file_counts(claimed, written):
    """Native Transformers reads `num_layers` out of the derived number, whatever `num_layers` says."""
    fields = {"num_layers": 28, "num_hidden_layers": claimed}
    config = LongcatFlashConfig.from_dict(fields, num_layers=4)
    assert config.to_dict()["num_hidden_layers"] == written
    changed = LongcatFlashConfig.from_dict(fields)
    changed.num_layers = 4
    assert changed.to_dict()["num_hidden_layers"] == written
    assert LongcatFlashConfig.from_dict(changed.to_dict()).to_dict()["num_hidden_layers"] == written


def test_the_derived_number_of_layers_cannot_be_asked_for():
    with pytest.raises(ValueError, match="num_layers=28"):
        LongcatFlashConfig.from_dict({"num_layers": 28}, num_hidden_layers=4)
    assert LongcatFlashConfig.from_dict({"num_layers": 28}, num_hidden_layers=56).num_layers == 28


@pytest.mark.parametrize("case", CASES)
def test_config_round_trip_is_verbatim(case, tmp_path):
    stored = read_config(GOLDENS / case)
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / case)
    model.save_pretrained(tmp_path)
    saved = read_config(tmp_path)
    assert {key: saved.get(key) for key in stored} == stored
    assert "num_hidden_layers" not in saved and "mla_mode" not in saved and "num_nextn_predict_layers" not in saved
    assert saved["model_type"] == model.config.model_type


@pytest.mark.parametrize(
    "change, message",
    [
        ({"zero_expert_type": "copy"}, "zero_expert_type"),
        ({"moe_topk": 99}, "moe_topk=99"),
        ({"attention_method": "GQA"}, "attention_method"),
        ({"attention_method": "LSA"}, "index_topk"),
        ({"ngram_vocab_size_ratio": 3}, "longcat_flash_ngram"),
        ({"linear_method": "KDA"}, "linear_method"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        LongcatFlashConfig.from_dict({**read_config(GOLDENS / "longcat_flash"), **change})


@pytest.mark.parametrize("kind, zero", [("identity", 4), ("drop", 4), ("identity", 0), ("identity", None)])
def test_kinds_of_zero_experts(kind, zero):
    """Against a loop over tokens and choices."""
    model = tiny_model("longcat_flash", zero_expert_type=kind, zero_expert_num=zero)
    mlp = model.model.layers[0].mlp
    states = torch.randn(2, 5, 48)
    with torch.no_grad():
        output = mlp(states)
        weights, indices = mlp.route(states)
        for token, state in enumerate(states.flatten(0, 1)):
            wanted = torch.zeros(48)
            for weight, index in zip(weights[token], indices[token].tolist()):
                if index < 8:
                    gate, up = (mlp.experts.gate_up_proj[index] @ state).chunk(2)
                    wanted += weight * (mlp.experts.down_proj[index] @ (F.silu(gate) * up))
                elif kind == "identity":
                    wanted += weight * state
            assert_close("token", output.flatten(0, 1)[token], wanted, "float32")


def test_router_bias_and_normalised_weights():
    model = tiny_model("longcat_flash", router_bias=True, norm_topk_prob=True)
    router = model.model.layers[0].mlp.router
    states = torch.randn(7, 48)
    with torch.no_grad():
        logits, weights, _ = router(states)
    assert_close("logits", logits, states @ router.classifier.weight.T + router.classifier.bias, "float32")
    assert_close("sums", weights.sum(-1), torch.full((7,), 3.0), "float32")


# --- loading and saving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_shard_size", ["50GB", "60KB"])
def test_round_trip_is_bitwise(case, max_shard_size, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / case, dtype="auto")
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert_same_tensors(read_tensors(tmp_path), read_tensors(GOLDENS / case))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = load_golden(case)[0]
    assert_golden("logits", real_only(run(again, expected).logits, expected), expected["logits"], "logits")


@pytest.mark.parametrize("case", CASES)
def test_device_map_with_layers_on_disk(case, tmp_path):
    """A map by layers, as `device_map="auto"` makes it, which knows nothing of the MTP layers yet."""
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    if case == "longcat_lite_ngram":
        device_map["model.ngram_embeddings"] = "cpu"
    if load(case).config.num_layers == 2:
        del device_map["model.layers.2"]
    model = AutoModelForCausalLM.from_pretrained(
        GOLDENS / case, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "offload", dequantize=True
    ).eval()
    expected = load_golden(case)[0]
    output = run(model, expected, output_mtp_logits=True)
    assert_golden("logits", real_only(output.logits, expected), expected["logits"], "logits")
    if case in MTP_CASES:
        assert_golden("mtp", real_only(output.mtp_logits[0], expected), expected["mtp_logits"], "mtp_logits")
    model.save_pretrained(tmp_path / "saved")
    stored = decode_checkpoint(read_tensors(GOLDENS / case))
    assert_same_tensors(read_tensors(tmp_path / "saved"), {name: tensor.float() for name, tensor in stored.items()})


def test_an_equal_mtp_embedding_is_held_once_and_written_back(tmp_path):
    def equal_tables(tensors):
        tensors["model.mtp.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = edited_golden(tmp_path / "equal", "longcat_flash", equal_tables)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.model.mtp.embed_tokens is None
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(read_tensors(tmp_path / "saved"), read_tensors(folder))


def test_a_checkpoint_without_mtp(tmp_path):
    def drop(tensors):
        for name in [name for name in tensors if ".mtp." in name]:
            del tensors[name]

    folder = edited_golden(tmp_path, "longcat_flash", drop, num_nextn_predict_layers=1)
    model, expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_golden("longcat_flash")[0]
    assert model.model.mtp is None and model.config.num_nextn_predict_layers == 0
    assert_golden("logits", real_only(run(model, expected).logits, expected), expected["logits"], "logits")
    with pytest.raises(ValueError, match="has none"):
        run(model, expected, output_mtp_logits=True)


@pytest.mark.parametrize(
    "name",
    [
        "model.mtp.layers.0.transformer_layer.mlp.up_proj.weight",
        "model.mtp.norm.weight",
        "model.layers.1.mlp.experts.7.down_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(name, tmp_path):
    folder = edited_golden(tmp_path, "longcat_flash", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(folder)


def test_experts_for_zero_experts_are_refused(tmp_path):
    def add(tensors):
        for part in ("gate", "up", "down"):
            name = "model.layers.0.mlp.experts.{}." + part + "_proj.weight"
            tensors[name.format(8)] = tensors[name.format(0)].clone()

    folder = edited_golden(tmp_path, "longcat_flash", add)
    with pytest.raises(CheckpointError, match="n_routed_experts=8"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_bfloat16_router_in_the_file_is_widened(tmp_path):
    def narrow(tensors):
        for name in [name for name in tensors if ".router." in name]:
            tensors[name] = tensors[name].bfloat16()

    model = AutoModelForCausalLM.from_pretrained(edited_golden(tmp_path, "longcat_flash", narrow), dtype=torch.bfloat16)
    assert {value.dtype for name, value in model.state_dict().items() if ".router." in name} == {torch.float32}


def test_auto_classes_know_files_without_a_model_type(tmp_path):
    for case, architecture in (
        ("longcat_flash", "LongcatFlashForCausalLM"),
        ("longcat_flash", "LongcatFlashOmniForCausalLM"),
        ("longcat_lite_ngram", "LongcatFlashNgramForCausalLM"),
    ):
        config = {**read_config(GOLDENS / case), "architectures": [architecture]}
        model_type = config.pop("model_type")
        folder = write_checkpoint(tmp_path / architecture, config, read_tensors(GOLDENS / case))
        assert AutoConfig.from_pretrained(folder).model_type == model_type
        model, expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_golden(case)[0]
        assert_golden("logits", real_only(run(model, expected).logits, expected), expected["logits"], "logits")


def test_an_unknown_architecture_without_a_model_type_stays_unknown(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["SomethingElse"]}))
    with pytest.raises(ValueError, match="model_type"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_language_part_of_a_multimodal_checkpoint(prefix, tmp_path):
    """A wrapper's configuration with the text model inside, encoders beside it, and perhaps a prefix on its tensors."""
    text = read_config(GOLDENS / "longcat_flash")
    config = {"architectures": ["LongcatFlashOmniForCausalLM"], "text_config": text, "audio_config": {"width": 3}}
    tensors = {f"{prefix}{name}": tensor for name, tensor in read_tensors(GOLDENS / "longcat_flash").items()}
    tensors["audio_encoder.proj.weight"] = torch.ones(3, 3)
    folder = write_checkpoint(tmp_path, config, tensors)
    model, expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_golden("longcat_flash")[0]
    assert_golden("logits", real_only(run(model, expected).logits, expected), expected["logits"], "logits")
    logits = run(model, expected, output_mtp_logits=True).mtp_logits[0]
    assert_golden("mtp", real_only(logits, expected), expected["mtp_logits"], "mtp_logits")


@pytest.mark.parametrize("case", CASES)
def test_remote_code_in_a_process_without_hf_moe(case, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / case, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    expected = load_golden(case)[0]
    code = """
import sys, torch
sys.modules["hf_moe"] = None
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
expected = load_file(sys.argv[2])
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
ids, mask = expected["input_ids"], expected["attention_mask"]
with torch.no_grad():
    logits = model(ids, attention_mask=mask).logits
model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 3
generated = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
print((logits - expected["logits"])[mask.bool()].abs().max().item(), generated[:, ids.shape[1]:].tolist())
"""
    expected_file = GOLDENS / case / "expected.safetensors"
    printed = run_python(code, str(tmp_path / "saved"), str(expected_file), HF_HOME=str(tmp_path / "home"))
    off, _, generated = printed.splitlines()[-1].partition(" ")
    assert float(off) < 1e-4
    assert json.loads(generated) == expected["generated_ids"][:, :8].tolist()
