"""The life of adapters: files, several of them, switching, merging, the native class, Transformers' own integration."""

import copy
import inspect
import json
import subprocess
import sys

import peft
import pytest
import torch
from lora_cases import (
    EXPERTS,
    PEFT_RELEASE,
    adapted,
    attention_of,
    factors_of,
    ids_of,
    model_of,
    randomize_adapter,
    stock_peft,
    wrappers,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from peft.tuners.lora.model import LoraModel
from safetensors.torch import load_file, save_file
from testing import GOLDENS, assert_close
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v2 import DeepseekV2ForCausalLM
from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM

from hf_moe.training.lora import check_targets, mtp_targets, trained_kinds, trained_table

needs_layout = pytest.mark.skipif(
    PEFT_RELEASE < (0, 19), reason="PEFT 0.18 keeps adapters of stacked weights in another layout"
)
# Not LongCat, whose native class stacks rows for zero experts and can load no published checkpoint.
NATIVE = {
    "v3_basic": DeepseekV3ForCausalLM,
    "v2_group_limited": DeepseekV2ForCausalLM,
    "v2_lite_greedy": DeepseekV2ForCausalLM,
}


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


# --- the hook ---------------------------------------------------------------------------------------------------------

IMPORTS = """
import sys
{first}
import hf_moe
assert ("peft" in sys.modules) == {early}, "hf_moe must not import peft"
from peft.tuners.lora.model import LoraModel
assert hasattr(LoraModel._create_new_module, "hf_moe_original")
import hf_moe.training.lora_hook as hook
assert not any(type(finder) is hook._Waiting for finder in sys.meta_path)
hook.install()
assert not hasattr(LoraModel._create_new_module.hf_moe_original, "hf_moe_original")
"""


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("first", ["", "import peft"], ids=["hf_moe-first", "peft-first"])
def test_peft_is_told_whoever_is_imported_first(first):
    run(IMPORTS.format(first=first, early=bool(first)))


def test_nothing_needs_peft():
    run(
        "import sys; sys.modules['peft'] = None\n"
        "import hf_moe\nfrom hf_moe.training.lora import trained_table\n"
        "import torch; print(trained_table(torch.nn.Linear(2, 3)))"
    )


def test_what_we_rely_on_in_peft():
    """Fails where PEFT's internals change; `lora_hook` and `lora_layers` are what to look at then."""
    original = LoraModel._create_new_module.hf_moe_original
    assert list(inspect.signature(original).parameters) == ["lora_config", "adapter_name", "target", "kwargs"]
    assert "self._create_new_module(" in inspect.getsource(LoraModel._create_and_replace)
    assert '__class__.__name__ == "ParamWrapper"' in inspect.getsource(peft.tuners.tuners_utils) or PEFT_RELEASE < (
        0,
        19,
    )
    for name in ("update_layer", "merge", "unmerge", "_move_adapter_to_device_of_base_layer", "get_delta_weight"):
        assert callable(getattr(PeftParamWrapper, name)), name
    assert callable(PeftParamWrapper.unload_and_optionally_merge_module)
    for name in ("adapter_layer_names", "other_param_names", "resolve_lora_variant", "_check_forward_args"):
        assert hasattr(PeftParamWrapper, name), name


def test_other_models_get_pefts_own_layers():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 20}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2))
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], target_parameters=EXPERTS))
    assert {type(layer) for layer in wrappers(model)} == {PeftParamWrapper}
    with pytest.raises(ValueError, match="lora_dropout"):
        get_peft_model(model.unload(), LoraConfig(target_parameters=EXPERTS, target_modules=[], lora_dropout=0.1))


# --- files ------------------------------------------------------------------------------------------------------------


@needs_layout
@pytest.mark.parametrize("case", NATIVE)
def test_adapters_pass_to_and_from_the_native_class(case, tmp_path):
    """Ours saved and loaded by PEFT on Transformers' class, and the other way round: the same logits."""
    folder = GOLDENS / case
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    native = NATIVE[case].from_pretrained(folder, dtype=torch.float32)
    assert type(native).__module__.startswith("transformers.models.")
    ids, ends = ids_of(ours), ("q_proj", "q_b_proj", "kv_b_proj", "o_proj")
    # Those of the native model: MTP layers, which it has not, are left alone.
    modules = [name for name, _ in native.named_modules() if name.endswith(ends)]
    parameters = [name for name, _ in native.named_parameters() if name.endswith(tuple(EXPERTS))]
    options = {"modules": modules, "parameters": parameters, "r": 4, "use_rslora": True}
    mine = adapted(copy.deepcopy(ours), seed=1, **options)
    theirs = adapted(copy.deepcopy(native), seed=2, **options)
    assert {type(layer) for layer in wrappers(theirs)} == {PeftParamWrapper}
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    names = [set(load_file(tmp_path / name / "adapter_model.safetensors")) for name in ("mine", "theirs")]
    assert names[0] == names[1]
    loaded = PeftModel.from_pretrained(native, tmp_path / "mine")
    wanted = logits(mine, ids)
    assert (logits(loaded, ids) - wanted).abs().max() < 2e-5 * max(1.0, wanted.abs().max())
    loaded = PeftModel.from_pretrained(ours, tmp_path / "theirs")
    assert {type(layer) for layer in wrappers(loaded)} != {PeftParamWrapper}
    wanted = logits(theirs, ids)
    assert (logits(loaded, ids) - wanted).abs().max() < 2e-5 * max(1.0, wanted.abs().max())
    base = logits(loaded.unload(), ids)
    assert (base - wanted).abs().max() > 0.1


@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash", "step3_vl"])
def test_saved_and_loaded_again(family, tmp_path):
    model = model_of(family)
    ids = ids_of(model)
    wrapped = adapted(copy.deepcopy(model), lora_dropout=0.1, modules_to_save=["lm_head"])
    with torch.no_grad():
        wrapped.get_output_embeddings().weight.mul_(1.5)
    wrapped.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.1 and sorted(config["target_parameters"]) == sorted(EXPERTS)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert torch.equal(logits(loaded, ids), logits(wrapped, ids))
    trained = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path, is_trainable=True).train()
    trained(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in factors_of(trained).values())
    empty = PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(empty, ids), logits(wrapped, ids))


@pytest.mark.skipif(PEFT_RELEASE < (0, 20), reason="Transformers' integration asks for PEFT 0.20")
@pytest.mark.parametrize("family", ["deepseek_v3", "step3_text"])
def test_transformers_own_integration(family, tmp_path):
    model = model_of(family)
    ids = ids_of(model)
    plain = logits(model, ids)
    other = copy.deepcopy(model)
    config = LoraConfig(r=3, target_modules=attention_of(model), target_parameters=EXPERTS, lora_dropout=0.1)
    model.add_adapter(config, adapter_name="first")
    assert {type(layer).__module__ for layer in wrappers(model)} == {"hf_moe.training.lora_layers"}
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".lora_" not in name)
    assert_close("before training", logits(model, ids), plain, "float32")
    randomize_adapter(model, adapter="first")
    wanted = logits(model, ids)
    model.disable_adapters()
    assert torch.equal(logits(model, ids), plain)
    model.enable_adapters()
    assert torch.equal(logits(model, ids), wanted) and (wanted - plain).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]
    third = copy.deepcopy(other)
    other.load_adapter(str(tmp_path), adapter_name="again")
    assert torch.equal(logits(other, ids), wanted)
    assert torch.equal(logits(PeftModel.from_pretrained(third, tmp_path), ids), wanted)
    assert len(other.model.layers) == len(model.model.layers)  # MTP layers, which the adapter's file does not name
    other.delete_adapter("again")


# --- several of them --------------------------------------------------------------------------------------------------


def second(model, adapter="other", seed=7, **kwargs):
    config = copy.deepcopy(model.peft_config["default"])
    for name, value in kwargs.items():
        setattr(config, name, value)
    model.add_adapter(adapter, config)
    randomize_adapter(model, seed, adapter)
    return model


@needs_layout
def test_switching_disabling_deleting():
    model = model_of("deepseek_v3")
    ids = ids_of(model)
    plain = logits(model, ids)
    alone = logits(adapted(copy.deepcopy(model)), ids)
    model = second(adapted(model), r=5, lora_alpha=5)
    assert torch.equal(logits(model, ids), alone)
    model.set_adapter("other")
    other = logits(model, ids)
    assert (other - alone).abs().max() > 0.1 and (other - plain).abs().max() > 0.1
    assert all(parameter.requires_grad == (".other." in name) for name, parameter in factors_of(model).items())
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)
    assert torch.equal(logits(model, ids), other)
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), alone)
    model.delete_adapter("other")
    assert not any(".other." in name for name in factors_of(model))
    assert torch.equal(logits(model, ids), alone)


@needs_layout
def test_two_adapters_at_once():
    """Their products add up, in values and in gradients, also where PEFT adds them to the weights."""
    base = model_of("longcat_flash")
    ids, results = ids_of(base), []
    for stock in (False, True):
        model = copy.deepcopy(base)
        if stock:
            with stock_peft():
                model = second(adapted(model), r=5, use_rslora=True)
        else:
            model = second(adapted(model), r=5, use_rslora=True)
        model.base_model.set_adapter(["default", "other"])
        results.append({"logits": logits(model, ids)})
        model.train()(ids, labels=ids).loss.backward()
        results[-1] |= {name: parameter.grad for name, parameter in factors_of(model).items()}
    assert len(results[0]) > 30
    for name, expected in results[1].items():
        assert_close(name, results[0][name], expected, "float32_grad" if "lora" in name else "float32")


@needs_layout
def test_merging_some_and_unmerging():
    model = model_of("kimi_k2")
    ids = ids_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = second(adapted(model))
    first = logits(model, ids)
    model.merge_adapter()
    assert_close("merged", logits(model, ids), first, "float32")
    model.merge_adapter(["other"])
    model.unmerge_adapter()
    assert_close("unmerged", logits(model, ids), first, "float32")
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, ids)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert_close("both", logits(merged, ids), both, "float32")
    model.merge_adapter()
    with model.disable_adapter():  # takes out what was merged
        logits(model, ids)
    plain = model.unload()
    for name, tensor in plain.state_dict().items():
        assert_close(name, tensor, before[name], "float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_changes_nothing_where_a_sum_is_not_finite(value):
    model = adapted(model_of("deepseek_v3"))
    layer = model.base_model.model.model.layers[1].mlp.experts
    with torch.no_grad():  # of gate_up_proj, which is merged after down_proj
        layer.base_layer.lora_B["default"].weight[3, 5] = value
    before = {name: parameter.detach().clone() for name, parameter in layer.get_base_layer().named_parameters()}
    with pytest.raises(ValueError, match="default seems to be broken"):
        layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    for name, parameter in layer.get_base_layer().named_parameters():
        assert torch.equal(parameter, before[name])


def test_rank_and_alpha_patterns_and_rslora():
    model = model_of("deepseek_v3")
    ids = ids_of(model)
    patterns = {
        "rank_pattern": {"layers.1.mlp.experts.gate_up_proj": 5, "o_proj": 2},
        "alpha_pattern": {"experts.down_proj": 11},
        "use_rslora": True,
    }
    with stock_peft():
        expected = adapted(copy.deepcopy(model), **patterns)
    ours = adapted(model, **patterns)
    layer = ours.base_model.model.model.layers[1].mlp.experts
    assert layer.base_layer.r["default"] == 5 and layer.r["default"] == 3
    assert layer.scaling["default"] == pytest.approx(11 / 3**0.5)
    assert_close("logits", logits(ours, ids), logits(expected, ids), "float32")


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initialisations(init):
    model = model_of("deepseek_v3")
    with stock_peft():
        torch.manual_seed(1)
        config = LoraConfig(target_modules=[], target_parameters=EXPERTS, init_lora_weights=init)
        expected = get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(1)
    ours = get_peft_model(model, config)
    for (name, actual), wanted in zip(factors_of(ours).items(), factors_of(expected).values()):
        assert torch.equal(actual, wanted), name


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"init_lora_weights": "pissa"}, "pissa.*does not work on the weights of experts"),
        ({"init_lora_weights": "olora"}, "olora.*does not work"),
        ({"init_lora_weights": "eva"}, "eva.*does not work"),
        ({"use_dora": True}, "DoRA|use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"r": 0}, "positive"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_experts_cannot_have_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        get_peft_model(model_of("deepseek_v3"), LoraConfig(target_modules=[], target_parameters=EXPERTS, **options))


def test_generation_with_an_adapter_and_after_merging():
    model = adapted(model_of("deepseek_v3"))
    ids = ids_of(model, 1, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    plain = model.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(input_ids=ids, use_mtp=True, **options), plain)
    assert torch.equal(model.merge_and_unload().generate(input_ids=ids, **options), plain)


# --- targets and the table --------------------------------------------------------------------------------------------


def test_targets_that_match_nothing_are_an_error():
    model = model_of("step3_text")
    config = LoraConfig(
        target_modules=["o_proj", "kv_b_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "experts.down_proj"],
        modules_to_save=["head"],
        rank_pattern={"q_proj": 4},
        layers_to_transform=[1, 9],
    )
    with pytest.raises(ValueError) as error:
        check_targets(model, config)
    text = str(error.value)
    for part in (
        "target_modules: 'kv_b_proj'",
        "target_parameters: 'mlp.experts.gate_up_proj' matches no parameter (did you mean 'moe.experts.gate_up_proj'?)",
        "modules_to_save: 'head'",
        "rank_pattern: 'q_proj'",
        "no layer 9",
    ):
        assert part in text, text
    assert "'o_proj'" not in text and "experts.down_proj'" not in text
    for targets in (r".*\.nothing", ["o_projection"]):
        with pytest.raises(ValueError, match="matches no module"):
            check_targets(model, LoraConfig(target_modules=targets))
    good = LoraConfig(target_modules=r".*\.o_proj", target_parameters=EXPERTS)
    check_targets(model, good)
    check_targets(get_peft_model(model, good), good)
    check_targets(model, LoraConfig(target_modules="all-linear"))


def test_table_of_what_is_trained():
    model = adapted(model_of("deepseek_v3"), modules=["o_proj"], rank_pattern={"layers.1.mlp.experts.down_proj": 5})
    kinds = {kind.kind: kind for kind in trained_kinds(model)}
    assert list(kinds) == [
        "model.layers.*.self_attn.o_proj",
        "model.layers.*.mlp.experts.gate_up_proj",
        "model.layers.*.mlp.experts.down_proj",
        "model.layers.*.self_attn.o_proj (MTP)",
        "model.layers.*.mlp.experts.gate_up_proj (MTP)",
        "model.layers.*.mlp.experts.down_proj (MTP)",
    ]
    experts = kinds["model.layers.*.mlp.experts.down_proj"]
    assert (experts.targets, experts.tensors, experts.rank, experts.adapter) == (2, 4, (3, 5), "default")
    assert experts.parameters == 8 * (3 + 5) * (16 + 48)
    trained, everything = model.get_nb_trainable_parameters()
    assert sum(kind.parameters for kind in kinds.values()) == trained
    table = trained_table(model)
    assert f"{trained:,}" in table and f"{everything:,} parameters" in table and "(3, 5)" in table
    full = trained_kinds(model_of("longcat_flash"))
    assert all(kind.rank is None and kind.adapter == "" for kind in full)
    assert sum(kind.parameters for kind in full) == sum(p.numel() for p in model_of("longcat_flash").parameters())


@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash"])
def test_mtp_layers_alone(family):
    model = model_of(family)
    modules, parameters = mtp_targets(model)
    assert any(name.endswith("eh_proj") for name in modules) and bool(parameters) == (family == "deepseek_v3")
    config = LoraConfig(r=2, target_modules=modules, target_parameters=parameters or None)
    check_targets(model, config)
    ids = ids_of(model)
    model = get_peft_model(model, config).train()
    assert all(kind.kind.endswith("(MTP)") for kind in trained_kinds(model))
    model(ids, labels=ids).loss.backward()
    for name, parameter in factors_of(model).items():
        if "lora_B" in name:
            assert parameter.grad.abs().max() > 0, name


def test_a_model_without_mtp_layers_has_no_such_targets():
    with pytest.raises(ValueError, match="no MTP layers"):
        mtp_targets(model_of("kimi_k2"))


# --- remote code ------------------------------------------------------------------------------------------------------

REMOTE = """
import sys
import hf_moe, torch
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
cls = get_class_from_dynamic_module("modeling_deepseek_v3.DeepseekV3ForCausalLM", sys.argv[1])
assert cls.__module__.startswith("transformers_modules")
model = cls.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
from peft import PeftModel
model = PeftModel.from_pretrained(model, sys.argv[2])
kinds = {type(m).__module__ for m in model.modules() if type(m).__name__ == "ParamWrapper"}
assert kinds == {"hf_moe.training.lora_layers"}, kinds
ids = torch.arange(3, 12).view(1, -1)
with torch.no_grad():
    torch.save({"logits": model(ids).logits, "merged": model.merge_and_unload()(ids).logits}, sys.argv[3])
"""


def test_models_of_remote_code_are_ours_too(tmp_path):
    """Their classes are copies of ours, in modules of their own."""
    model = model_of("deepseek_v3")
    model.save_pretrained(tmp_path / "model")
    wrapped = adapted(model, lora_dropout=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    arguments = [tmp_path / "model", tmp_path / "adapter", tmp_path / "out.pt"]
    result = subprocess.run(
        [sys.executable, "-c", REMOTE, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found, wanted = torch.load(tmp_path / "out.pt"), logits(wrapped, torch.arange(3, 12).view(1, -1))
    assert_close("logits", found["logits"], wanted, "float32")
    assert_close("merged", found["merged"], wanted, "float32")


def test_an_adapter_file_of_another_shape_is_refused(tmp_path):
    model = model_of("deepseek_v3")
    adapted(copy.deepcopy(model)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if "experts.lora_A" in name)
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(model, tmp_path)
