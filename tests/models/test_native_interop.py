"""Beside Transformers' own DeepSeek classes: checkpoints pass both ways, and importing hf_moe changes none of them."""

import json

import pytest
import torch
from checkpoints import (
    assert_same_bits,
    assert_same_tensors,
    expected,
    golden,
    max_difference,
    read_config,
    read_tensors,
    run_python,
    stored_dtype,
)
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.deepseek_v2 import DeepseekV2ForCausalLM as NativeV2
from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM as NativeV3

import hf_moe  # noqa: F401  registers the classes

# On logits with a deviation of about 1.7. Weights are compared bit for bit; here two orders of float32 sums meet. The
# goldens' own notes have native and an independent oracle 1.35e-5 apart for v2_group_limited, 1.1e-5 for the others.
NATIVE_ATOL = 2e-5
NATIVE = {
    "v3_basic": NativeV3,
    "v3_qlora_none": NativeV3,
    "v3_mtp2": NativeV3,
    "v2_group_limited": NativeV2,
    "v2_lite_greedy": NativeV2,
}


def ours(folder, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()
    assert type(model).__module__.startswith("hf_moe.")
    return model


def native(case, folder, **kwargs):
    model = NATIVE[case].from_pretrained(folder, dtype=torch.float32, **kwargs)
    assert type(model).__module__.startswith("transformers.models.")
    return model.eval()


@torch.no_grad()
def logits_of(model, case):
    return model(expected(case)["input_ids"]).logits


@pytest.mark.parametrize("max_shard_size", ["1GB", "200KB"])
@pytest.mark.parametrize("case", NATIVE)
def test_our_checkpoint_loads_in_the_native_class(case, max_shard_size, tmp_path):
    model = ours(golden(case))
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded = native(case, tmp_path)
    assert max_difference(logits_of(loaded, case), logits_of(model, case)) < NATIVE_ATOL
    names = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    state = model.state_dict()
    for name, tensor in names.items():
        if not name.endswith("inv_freq"):
            assert_same_bits(name, tensor, state[name])


@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
@pytest.mark.parametrize("case", NATIVE)
def test_native_checkpoint_loads_in_our_class(case, fused, tmp_path):
    model = native(case, golden(case))
    model.save_pretrained(tmp_path, save_original_format=not fused)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert type(loaded).__module__.startswith("hf_moe.")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert max_difference(logits_of(loaded.eval(), case), logits_of(model, case)) < NATIVE_ATOL


@pytest.mark.parametrize("case", ["v3_basic", "v2_group_limited"])
def test_greedy_text_is_that_of_the_native_class(case, tmp_path):
    model = ours(golden(case))
    model.save_pretrained(tmp_path)
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = expected(case)["input_ids"]
    assert torch.equal(model.generate(ids, **options), native(case, tmp_path).generate(ids, **options))


def test_kimi_k2_loads_in_the_native_v3_class(tmp_path):
    """Engines without a kimi_k2 class read such files as DeepSeek-V3 after a change of the model type."""
    model = ours(golden("kimi_k2"))
    model.save_pretrained(tmp_path)
    config = {**read_config(tmp_path), "model_type": "deepseek_v3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = NativeV3.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert max_difference(logits_of(loaded, "kimi_k2"), logits_of(model, "kimi_k2")) < NATIVE_ATOL


NATIVE_ALONE = """
import hashlib, json, sys
if sys.argv[1] == "with":
    import hf_moe
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers.models.deepseek_v2 import DeepseekV2Config, DeepseekV2ForCausalLM
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV3Model

def digest(tensors):
    result = {}
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().contiguous().view(torch.uint8).flatten().numpy().tobytes()
        result[name] = [str(tensor.dtype), list(tensor.shape), hashlib.sha256(data).hexdigest()]
    return result

v3, v2, fp8, root = (Path(argument) for argument in sys.argv[2:6])
seen = {}
for key, cls, folder in (("v3", DeepseekV3ForCausalLM, v3), ("v2", DeepseekV2ForCausalLM, v2)):
    model, info = cls.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    seen[key + " loaded"] = digest(model.state_dict())
    seen[key + " info"] = {name: sorted(map(str, value)) for name, value in info.items()}
    seen[key + " classes"] = [type(model).__module__, type(model.config).__module__, type(model.model).__module__]
    for fused in (True, False):
        target = root / f"{key}-{fused}"
        model.save_pretrained(target, save_original_format=not fused)
        seen[f"{key} saved {fused}"] = digest(load_file(target / "model.safetensors"))
        seen[f"{key} files {fused}"] = sorted(path.name for path in target.iterdir())
        seen[f"{key} config {fused}"] = json.loads((target / "config.json").read_text())
    seen[key + " experts"] = model.config._experts_implementation
base = DeepseekV3Model.from_pretrained(v3, dtype=torch.bfloat16)
seen["base"] = digest(base.state_dict())
torch.manual_seed(0)
scratch = DeepseekV3ForCausalLM(model_config := DeepseekV3Config.from_pretrained(v3))
scratch.save_pretrained(root / "scratch")
seen["scratch"] = digest(load_file(root / "scratch" / "model.safetensors"))
seen["config class"] = DeepseekV3Config.__module__
print(json.dumps(seen))
"""


def test_native_classes_load_and_save_alike_with_and_without_hf_moe(tmp_path):
    seen = {}
    for mode in ("with", "without"):
        output = run_python(
            NATIVE_ALONE, mode, golden("v3_basic"), golden("v2_group_limited"), golden("v3_fp8"), tmp_path / mode
        )
        seen[mode] = json.loads(output.splitlines()[-1])
    assert set(seen["with"]) == set(seen["without"])
    for key, value in seen["without"].items():
        if isinstance(value, dict):
            assert list(seen["with"][key]) == list(value), f"{key}: other names or another order"
            different = [name for name in value if seen["with"][key][name] != value[name]]
            assert not different, f"{key}: {different[:5]} differ"
        else:
            assert seen["with"][key] == value, key
    assert not any("hf_moe" in module for module in seen["with"]["v3 classes"])
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in seen["with"]["v3 saved False"]


SNAPSHOT = """
import json, sys
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import activations, cache_utils, conversion_mapping, core_model_loading
from transformers import modeling_rope_utils, modeling_utils
from transformers.models import auto
from transformers.models.deepseek_v2 import modeling_deepseek_v2, configuration_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3, configuration_deepseek_v3
from transformers.models.llama import modeling_llama
from transformers.integrations import moe

modules = [
    modeling_utils, core_model_loading, conversion_mapping, modeling_rope_utils, cache_utils, activations, moe,
    modeling_deepseek_v2, configuration_deepseek_v2, modeling_deepseek_v3, configuration_deepseek_v3, modeling_llama,
    transformers.configuration_utils, transformers.dynamic_module_utils, transformers.generation.utils,
    transformers.masking_utils, transformers.modeling_layers, torch.nn.functional, torch.nn.modules.linear,
]

def snapshot():
    seen = {}
    for module in modules:
        for name, value in vars(module).items():
            seen[f"{module.__name__}.{name}"] = id(value)
            if isinstance(value, type) and value.__module__ == module.__name__:
                for attribute, member in vars(value).items():
                    if not attribute.startswith("_abc"):
                        seen[f"{module.__name__}.{name}.{attribute}"] = id(member)
    return seen

llama = AutoConfig.for_model("llama")
mappings = {name: getattr(auto.modeling_auto, name) for name in dir(auto.modeling_auto) if name.startswith("MODEL_")}
def auto_snapshot():
    seen = {}
    for name, mapping in mappings.items():
        try:
            seen[name] = str(mapping[type(llama)])
        except (KeyError, TypeError, AttributeError):
            seen[name] = None
    for model_type in ("llama", "qwen3_moe", "glm4_moe", "mixtral", "deepseek_v32", "bert"):
        try:
            config = type(AutoConfig.for_model(model_type))
        except ValueError:
            continue
        seen[model_type] = config.__module__
        for auto_class in (AutoModel, AutoModelForCausalLM):
            seen[model_type + auto_class.__name__] = str(auto_class._model_mapping.get(config, None))
    return seen

before, auto_before = snapshot(), auto_snapshot()
backends = set(moe.ALL_EXPERTS_FUNCTIONS.valid_keys())
rope = set(modeling_rope_utils.ROPE_INIT_FUNCTIONS)
attention = set(modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys())
defaults = [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()]
import hf_moe
hf_moe.register()  # repeating it is harmless
after, auto_after = snapshot(), auto_snapshot()
out = {
    "changed": sorted(name for name in before if before[name] != after.get(name)),
    "added": sorted(set(after) - set(before)),
    "auto": sorted(name for name in auto_before if auto_before[name] != auto_after[name]),
    "backends": sorted(set(moe.ALL_EXPERTS_FUNCTIONS.valid_keys()) - backends),
    "lost backends": sorted(backends - set(moe.ALL_EXPERTS_FUNCTIONS.valid_keys())),
    "rope": sorted(set(modeling_rope_utils.ROPE_INIT_FUNCTIONS) ^ rope),
    "attention": sorted(set(modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys()) ^ attention),
    "defaults": defaults == [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()],
    "ours": [
        AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(name))].__module__
        for name in ("deepseek_v2", "deepseek_v3", "kimi_k2")
    ],
}
print(json.dumps(out))
"""


def test_importing_hf_moe_registers_and_patches_nothing_else():
    seen = json.loads(run_python(SNAPSHOT).splitlines()[-1])
    # The loader's table of key conversions is built on first use, here by our registration in it.
    table = ["transformers.conversion_mapping._checkpoint_conversion_mapping_cache"]
    # Files without a `model_type` are recognised here (see `register.py`); others pass through.
    wrapped = "transformers.configuration_utils.PreTrainedConfig.get_config_dict"
    changed = {name for name in seen["changed"] if name not in table}
    assert wrapped in changed
    # One attribute, under both spellings of the class.
    assert changed <= {wrapped, wrapped.replace("PreTrained", "Pretrained")}
    assert seen["added"] == [] and seen["auto"] == []
    assert seen["backends"] == ["hf_moe", "hf_moe_triton"] and seen["lost backends"] == []
    assert seen["rope"] == [] and seen["attention"] == [] and seen["defaults"] is True
    assert all(module.startswith("hf_moe.models.modeling_") for module in seen["ours"])


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "kimi_k2"])
def test_auto_classes_resolve_to_ours(model_type):
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

    config = AutoConfig.for_model(model_type)
    assert type(config).__module__ == f"hf_moe.models.configuration_{model_type}"
    for auto_class in (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    ):
        model_class = auto_class._model_mapping[type(config)]
        assert model_class.__module__ == f"hf_moe.models.modeling_{model_type}", auto_class.__name__
        assert model_class.config_class is type(config)


def test_round_trip_through_the_native_class_keeps_every_tensor_but_the_mtp_layers(tmp_path):
    """Native drops MTP layers; everything else comes back bit for bit."""
    dtype = stored_dtype("v3_basic")
    AutoModelForCausalLM.from_pretrained(golden("v3_basic"), dtype=dtype).save_pretrained(tmp_path / "ours")
    NativeV3.from_pretrained(tmp_path / "ours", dtype=dtype).save_pretrained(tmp_path / "native")
    AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=dtype).save_pretrained(tmp_path / "again")
    stored = {
        name: tensor
        for name, tensor in read_tensors(golden("v3_basic")).items()
        if not name.startswith("model.layers.4.")
    }
    again = {
        name: tensor
        for name, tensor in read_tensors(tmp_path / "again").items()
        if not name.startswith("model.layers.4.")
    }
    assert_same_tensors(again, stored)
