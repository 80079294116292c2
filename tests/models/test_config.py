"""Configurations: upstream `config.json` in, the same keys and values out, and clear errors for what we cannot run."""

import copy
import json

import pytest
import torch
from checkpoints import CASES, golden, read_config
from transformers import AutoConfig

import hf_moe  # noqa: F401  registers the classes
from hf_moe.models.configuration_deepseek_v2 import DeepseekV2Config
from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config
from hf_moe.models.configuration_kimi_k2 import KimiK2Config

CLASSES = {"deepseek_v2": DeepseekV2Config, "deepseek_v3": DeepseekV3Config, "kimi_k2": KimiK2Config}
# Keys that a saved configuration may have beyond those of the file that was read: architecture keys that the file
# leaves to a default, and the map to the remote code. Anything else would be noise that other engines read around.
ALLOWED_ADDITIONS = {
    "auto_map",
    "num_nextn_predict_layers",
    "output_router_logits",
    "pad_token_id",
    "rope_interleave",
}
YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}


def saved(config, folder) -> dict:
    config.save_pretrained(folder)
    return read_config(folder)


def write(folder, **keys):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys), encoding="utf-8")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_golden_config_is_written_back_key_for_key(case, tmp_path):
    upstream = read_config(golden(case))
    config = AutoConfig.from_pretrained(golden(case))
    assert type(config) is CLASSES[upstream["model_type"]]
    output = saved(config, tmp_path)
    wrong = {
        key: (value, output.get(key, "absent"))
        for key, value in upstream.items()
        if key != "transformers_version" and (key not in output or output[key] != value)
    }
    assert not wrong, f"{{key: (upstream, written)}}: {wrong}"
    # 10000 and 10000.0 are equal in Python, but other readers may care.
    types = {key: (value, output[key]) for key, value in upstream.items() if type(output[key]) is not type(value)}
    assert not types, f"changed type: {types}"
    assert output["auto_map"] == {"AutoConfig": type(config).remote_code_map["AutoConfig"]}
    additions = set(output) - set(upstream)
    assert additions <= ALLOWED_ADDITIONS, f"added: {sorted(additions - ALLOWED_ADDITIONS)}"


@pytest.mark.parametrize("case", CASES)
def test_second_round_trip_changes_nothing(case, tmp_path):
    first = saved(AutoConfig.from_pretrained(golden(case)), tmp_path / "first")
    second = saved(AutoConfig.from_pretrained(tmp_path / "first"), tmp_path / "second")
    assert first == second


@pytest.mark.parametrize("model_type", CLASSES)
def test_unknown_keys_are_kept(model_type, tmp_path):
    unknown = {"ep_size": 1, "seq_aux": True, "a_vendor_key": {"nested": [1, 2.5, None]}, "another": None}
    config = AutoConfig.from_pretrained(write(tmp_path / "in", model_type=model_type, **unknown))
    assert config.a_vendor_key == unknown["a_vendor_key"]
    output = saved(config, tmp_path / "out")
    assert {key: output.get(key, "absent") for key in unknown} == unknown
    assert output["model_type"] == model_type


@pytest.mark.parametrize("name", ["yarn", "deepseek_yarn"])
@pytest.mark.parametrize("spelling", ["type", "rope_type", "both"])
def test_rope_scaling_spelling_is_kept(spelling, name, tmp_path):
    scaling = {key: value for key, value in YARN.items() if key != "type"}
    scaling |= {"type": name} if spelling != "rope_type" else {}
    scaling |= {"rope_type": name} if spelling != "type" else {}
    folder = write(tmp_path / "in", model_type="deepseek_v3", rope_theta=10000, rope_scaling=scaling)
    config = AutoConfig.from_pretrained(folder)
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["rope_theta"] == 10000
    assert config.rope_parameters["factor"] == 40
    output = saved(config, tmp_path / "out")
    assert output["rope_scaling"] == scaling
    assert output["rope_theta"] == 10000
    assert "rope_parameters" not in output


def test_v5_rope_parameters_are_read_and_written_in_that_spelling(tmp_path):
    parameters = {"rope_theta": 50000.0, "rope_type": "yarn", **{k: v for k, v in YARN.items() if k != "type"}}
    config = AutoConfig.from_pretrained(write(tmp_path / "in", model_type="kimi_k2", rope_parameters=parameters))
    assert config.rope_parameters["rope_theta"] == 50000.0 and config.rope_parameters["factor"] == 40
    output = saved(config, tmp_path / "out")
    assert output["rope_parameters"] == parameters
    assert "rope_scaling" not in output and "rope_theta" not in output
    reread = AutoConfig.from_pretrained(tmp_path / "out")
    assert reread.rope_parameters == config.rope_parameters


def test_null_rope_scaling_is_plain_rope_and_stays_null(tmp_path):
    config = AutoConfig.from_pretrained(
        write(tmp_path / "in", model_type="deepseek_v3", rope_scaling=None, rope_theta=20000)
    )
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 20000}
    output = saved(config, tmp_path / "out")
    assert output["rope_scaling"] is None
    assert output["rope_theta"] == 20000


@pytest.mark.parametrize(("model_type", "theta"), [("deepseek_v2", 10000), ("deepseek_v3", 10000), ("kimi_k2", 50000)])
def test_absent_rope_keys_take_the_default_base(model_type, theta, tmp_path):
    config = AutoConfig.from_pretrained(write(tmp_path / "in", model_type=model_type))
    assert config.rope_parameters["rope_type"] == "default"
    assert config.rope_parameters["rope_theta"] == theta
    assert saved(config, tmp_path / "out")["rope_theta"] == theta


def test_rope_changed_after_loading_is_written(tmp_path):
    config = AutoConfig.from_pretrained(golden("v3_basic"))
    config.rope_parameters["factor"] = 8
    config.rope_parameters["rope_theta"] = 77000.0
    output = saved(config, tmp_path)
    assert output["rope_scaling"]["factor"] == 8
    assert output["rope_scaling"]["type"] == "yarn"
    assert output["rope_theta"] == 77000.0
    reread = AutoConfig.from_pretrained(tmp_path)
    assert reread.rope_parameters["factor"] == 8 and reread.rope_parameters["rope_theta"] == 77000.0


def test_rope_removed_after_loading_is_written(tmp_path):
    config = AutoConfig.from_pretrained(golden("v3_basic"))
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    saved(config, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_type"] == "default"


def test_reading_a_dictionary_does_not_change_it():
    scaling = dict(YARN)
    keys = {"model_type": "deepseek_v3", "rope_scaling": scaling, "rope_theta": 10000}
    DeepseekV3Config.from_dict(keys)
    assert scaling == YARN
    DeepseekV3Config(rope_scaling=scaling)
    assert scaling == YARN


@pytest.mark.parametrize("spelling", ["torch_dtype", "dtype"])
def test_dtype_spelling_is_kept(spelling, tmp_path):
    config = AutoConfig.from_pretrained(write(tmp_path / "in", model_type="deepseek_v3", **{spelling: "bfloat16"}))
    assert config.dtype == torch.bfloat16
    output = saved(config, tmp_path / "out")
    assert output[spelling] == "bfloat16"
    assert ("dtype" in output) != ("torch_dtype" in output)


def test_new_config_writes_the_upstream_spelling(tmp_path):
    output = saved(DeepseekV3Config(rope_scaling=dict(YARN), dtype=torch.float32), tmp_path)
    assert output["torch_dtype"] == "float32" and "dtype" not in output
    assert output["rope_scaling"]["type"] == "yarn" and output["rope_scaling"]["factor"] == 40
    assert output["rope_theta"] == 10000 and "rope_parameters" not in output


def test_values_equal_to_a_default_are_written(tmp_path):
    """Other engines have other defaults, so leaving out a key that equals ours would change the model there."""
    output = saved(DeepseekV3Config(), tmp_path)
    needed = (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts "
        "n_shared_experts num_experts_per_tok n_group topk_group topk_method scoring_func norm_topk_prob "
        "routed_scaling_factor first_k_dense_replace moe_layer_freq rms_norm_eps hidden_act num_nextn_predict_layers "
        "max_position_embeddings tie_word_embeddings rope_theta rope_scaling"
    ).split()
    assert [key for key in needed if key not in output] == []


def test_mla_mode_is_written_only_when_it_is_not_auto(tmp_path):
    assert "mla_mode" not in saved(DeepseekV3Config(), tmp_path / "auto")
    assert saved(DeepseekV3Config(mla_mode="absorbed"), tmp_path / "absorbed")["mla_mode"] == "absorbed"
    assert AutoConfig.from_pretrained(tmp_path / "absorbed").mla_mode == "absorbed"


def test_private_notes_are_not_written(tmp_path):
    text = json.dumps(saved(AutoConfig.from_pretrained(golden("v3_basic")), tmp_path))
    assert "_upstream" not in text and "load_options" not in text and "_name_or_path" not in text


def test_upstream_auto_map_is_dropped(tmp_path):
    foreign = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    config = AutoConfig.from_pretrained(
        write(tmp_path / "in", model_type="deepseek_v3", auto_map=foreign), trust_remote_code=False
    )
    assert type(config) is DeepseekV3Config
    assert saved(config, tmp_path / "out").get("auto_map") != foreign


# --- published sizes --------------------------------------------------------------------------------------------------

COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "moe_layer_freq": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "tie_word_embeddings": False,
    "use_cache": True,
    "rms_norm_eps": 1e-6,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "n_shared_experts": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
}
PUBLISHED = {
    "deepseek_v3": {
        **COMMON,
        "vocab_size": 129280,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 163840,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "deepseek_v2": {
        **COMMON,
        "vocab_size": 102400,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "first_k_dense_replace": 1,
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
        "max_position_embeddings": 163840,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "num_nextn_predict_layers": 0,
    },
    "kimi_k2": {
        **COMMON,
        "vocab_size": 163840,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "first_k_dense_replace": 1,
        "n_routed_experts": 384,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "max_position_embeddings": 131072,
        "bos_token_id": 163584,
        "eos_token_id": 163586,
        "num_nextn_predict_layers": 0,
    },
}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_defaults_are_the_published_sizes(model_type):
    config = CLASSES[model_type]()
    wrong = {
        key: (value, getattr(config, key))
        for key, value in PUBLISHED[model_type].items()
        if getattr(config, key) != value
    }
    assert not wrong, f"{{key: (published, default)}}: {wrong}"
    assert config.qk_head_dim == 192


def test_v2_lite_has_no_query_latent(tmp_path):
    config = AutoConfig.from_pretrained(
        write(tmp_path / "in", model_type="deepseek_v2", q_lora_rank=None, n_routed_experts=64, n_group=1, topk_group=1)
    )
    assert config.q_lora_rank is None
    output = saved(config, tmp_path / "out")
    assert "q_lora_rank" in output and output["q_lora_rank"] is None


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"rope_scaling": {**YARN, "type": "spiral"}}, ["rope_scaling", "spiral", "yarn"]),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2}}, ["rope_scaling", "spiral"]),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, ["rope", "spiral"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling", "yarn", "factor"]),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, ["rope_scaling", "llama3", "low_freq_factor"]),
        ({"rope_scaling": {"type": "yarn", "factor": "40"}}, ["rope_scaling", "factor", "'40'"]),
        ({"topk_method": "noaux"}, ["topk_method", "noaux", "noaux_tc", "greedy"]),
        ({"scoring_func": "tanh"}, ["scoring_func", "tanh", "sigmoid", "softmax"]),
        ({"n_routed_experts": 256, "n_group": 7}, ["n_group=7", "n_routed_experts=256"]),
        ({"n_group": 4, "topk_group": 5}, ["topk_group=5", "n_group=4"]),
        (
            {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 9},
            ["num_experts_per_tok=9", "8"],
        ),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok=0"]),
        ({"index_n_heads": 64, "index_topk": 2048}, ["index_n_heads", "index_topk", "V3.2"]),
        ({"text_config": {"model_type": "kimi_k2"}}, ["text_config"]),
        ({"mla_mode": "fast"}, ["mla_mode", "fast", "absorbed", "expanded"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("source", ["constructor", "file"])
def test_bad_option_is_one_clear_error(keys, named, source, tmp_path):
    with pytest.raises(ValueError) as caught:
        if source == "constructor":
            DeepseekV3Config(**keys)
        else:
            AutoConfig.from_pretrained(write(tmp_path / "in", model_type="deepseek_v3", **keys))
    for word in named:
        assert word in str(caught.value), f"the message does not name {word}: {caught.value}"


@pytest.mark.parametrize("topk_method", ["greedy", "group_limited_greedy", "noaux_tc"])
def test_choice_may_take_more_experts_than_the_kept_groups_hold(topk_method):
    """As in native Transformers, where the remaining choices fall on masked experts."""
    config = DeepseekV2Config(
        topk_method=topk_method, n_routed_experts=16, n_group=4, topk_group=1, num_experts_per_tok=6
    )
    assert config.num_experts_per_tok == 6


# --- arguments of `from_pretrained` beside the file -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "option", "named"),
    [
        ("deepseek_v3", {"mla_mode": "absorbd"}, ["mla_mode", "absorbd"]),
        ("deepseek_v3", {"mtp_loss_weight": -1}, ["mtp_loss_weight=-1"]),
        ("deepseek_v2", {"topk_group": 99}, ["topk_group=99"]),
        ("kimi_k2", {"rope_scaling": {"type": "spiral", "factor": 2.0}}, ["rope_scaling", "spiral"]),
        ("longcat_flash", {"moe_topk": 2000}, ["moe_topk=2000"]),
        ("longcat_flash_ngram", {"ngram_tables": "dsk"}, ["ngram_tables", "dsk", "disk"]),
        ("step3_text", {"num_experts_per_tok": 99}, ["moe_top_k=99"]),
        ("step3_text", {"moe_layers_enum": "4,five"}, ["moe_layers_enum", "4,five"]),
    ],
)
def test_a_bad_argument_beside_the_file_is_one_clear_error(model_type, option, named, tmp_path):
    folder = write(tmp_path / "in", model_type=model_type)
    with pytest.raises(ValueError) as caught:
        AutoConfig.from_pretrained(folder, **option)
    assert all(word in str(caught.value) for word in named), caught.value


def test_a_list_of_moe_layers_beside_the_file_is_written_as_a_string(tmp_path):
    config = AutoConfig.from_pretrained(write(tmp_path / "in", model_type="step3_text"), moe_layers_enum=[4, 5])
    assert saved(config, tmp_path / "out")["moe_layers_enum"] == "4,5"


LINEAR = {"type": "linear", "factor": 2.0}
FLAT = {"rope_theta": 20000.0, "rope_scaling": YARN}
NESTED = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 20000.0, "factor": 40}}


@pytest.mark.parametrize(
    ("option", "rope_type", "factor", "theta"),
    [
        ({"rope_scaling": LINEAR}, "linear", 2.0, 20000.0),
        ({"rope_scaling": None}, "default", None, 20000.0),
        ({"rope_theta": 77.0}, "yarn", 40, 77.0),
        ({"rope_theta": 77.0, "rope_scaling": LINEAR}, "linear", 2.0, 77.0),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "linear", 2.0, 20000.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}, "default", None, 3.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("stored", [FLAT, NESTED], ids=["flat", "nested"])
def test_rope_beside_the_file_takes_the_place_of_what_is_in_it(stored, option, rope_type, factor, theta, tmp_path):
    given = copy.deepcopy(option)
    folder = write(tmp_path / "in", model_type="deepseek_v3", **stored)
    config, unused = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **given)
    assert not unused and given == option
    spelled = saved(config, tmp_path / "out")
    for rope in (config.rope_parameters, AutoConfig.from_pretrained(tmp_path / "out").rope_parameters):
        assert (rope["rope_type"], rope.get("factor"), rope["rope_theta"]) == (rope_type, factor, theta)
    assert ("rope_parameters" in spelled) == (stored is NESTED)
    if stored is FLAT and rope_type == "default":
        assert spelled["rope_scaling"] is None
