"""What holds the tree up: imports go down the floors, and what we rely on in Transformers is as we know it."""

import ast
import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from testing import SHARED_MODELING
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

import hf_moe

register = importlib.import_module("hf_moe.register")  # the package's attribute of this name is the function
PACKAGE = Path(hf_moe.__file__).resolve().parent
MODELS = PACKAGE / "models"
MODULES = sorted(path for path in MODELS.glob("*.py") if path.name != "__init__.py")
# Floors of the bundle, from the ground up. A module may import from its own floor and from those below it.
FLOORS = {
    "triton_compat": 0,
    "kernel": 1,
    "op": 2,
    "weights": 3,
    "layer": 3,
    "generation": 4,
    "configuration": 0,
    "modeling": 5,
    "image": 0,
    "processing": 1,
}
# Beyond the order of the floors: who may not know whom.
FORBIDDEN = {
    "triton_compat": {"configuration", "op", "layer", "weights", "modeling", "generation", "kernel"},
    "kernel": {"configuration"},
    "op": {"configuration", "weights", "layer", "modeling", "generation"},
    "layer": {"configuration", "weights"},
    "weights": {"configuration", "layer"},
    "configuration": {"triton_compat"},
    "generation": {"configuration"},
    "modeling": {"kernel", "triton_compat"},
    "image": {"configuration", "triton_compat"},
    "processing": {"triton_compat", "kernel"},
}
# Modeling files of one family may subclass those of another only here.
SUBCLASSES = {
    "modeling_kimi_k2": {"modeling_deepseek_v3"},
    "modeling_deepseek_v2": {"modeling_deepseek_v3"},
    # The vision model holds the text model.
    "modeling_step3_vl": {"modeling_step3_text", "configuration_step3_text"},
    "configuration_step3_vl": {"configuration_step3_text"},
    "modeling_longcat_flash_ngram": {"modeling_longcat_flash"},
    "modeling_longcat": {"modeling_longcat_flash_ngram"},
    "modeling_longcat_next": {"modeling_longcat_flash_ngram"},
    "configuration_longcat_flash_ngram": {"configuration_longcat_flash"},
    "configuration_longcat": {"configuration_longcat_flash_ngram"},
    "configuration_longcat_next": {"configuration_longcat_flash_ngram"},
}
MAX_FILE_LINES = 700
MAX_FUNCTION_LINES = 100


def floor(module: str) -> str:
    return module if module == "triton_compat" else module.split("_", 1)[0]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def siblings(path: Path) -> list[str]:
    return [node.module for node in ast.walk(parse(path)) if isinstance(node, ast.ImportFrom) and node.level]


def absolute_imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return names


# --- layout -----------------------------------------------------------------------------------------------------------


def test_there_are_modules_to_look_at():
    assert len(MODULES) > 15
    assert {floor(path.stem) for path in MODULES} >= {"configuration", "modeling", "layer", "op", "weights"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_names_show_the_floor(path):
    assert floor(path.stem) in FLOORS, f"{path.name} has none of the prefixes {', '.join(FLOORS)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_down(path):
    own = floor(path.stem)
    for module in siblings(path):
        other = floor(module)
        assert FLOORS[other] <= FLOORS[own] and other not in FORBIDDEN[own], f"{path.stem} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_families_do_not_know_each_other(path):
    families = {module.stem.split("_", 1)[1] for module in MODULES if floor(module.stem) == "configuration"} - {"base"}
    kind, _, name = path.stem.partition("_")
    foreign = {
        module
        for module in siblings(path)
        if floor(module) in ("modeling", "configuration") and module.split("_", 1)[1] in families - {name}
    }
    if kind == "configuration":
        foreign -= {"configuration_deepseek_v3"} if name in ("deepseek_v2", "kimi_k2") else set()
    assert foreign <= SUBCLASSES.get(path.stem, set()), f"{path.stem} imports {sorted(foreign)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_bundle_imports_torch_transformers_and_the_standard_library(path):
    allowed = {"torch", "transformers", *sys.stdlib_module_names} | (
        {"triton"} if path.stem == "triton_compat" else set()
    )
    foreign = {name for name in absolute_imports(path) if name.split(".")[0] not in allowed}
    assert not foreign, f"{path.name} imports {sorted(foreign)}"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if floor(path.stem) == "configuration"], ids=lambda path: path.stem
)
def test_configurations_do_not_import_torch(path):
    assert not any(name.split(".")[0] == "torch" for name in absolute_imports(path))


def test_there_is_no_import_cycle():
    below = {path.stem: set(siblings(path)) for path in MODULES}
    while below:
        ready = {module for module, needs in below.items() if not needs & set(below)}
        assert ready, f"a cycle among {sorted(below)}"
        below = {module: needs for module, needs in below.items() if module not in ready}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_readable_in_one_sitting(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            assert not broad, f"line {node.lineno}: a broad except"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_settings_are_not_read_from_the_environment(path):
    if path.is_relative_to(MODELS):
        assert "environ" not in path.read_text(encoding="utf-8")


# --- the table of families --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", register.FAMILIES)
def test_processors_are_shipped_and_registered(model_type):
    config_class = register.load_class(register.FAMILIES[model_type])
    for auto_name, reference in getattr(config_class, "processor_code_map", {}).items():
        loaded = register.load_class(reference)
        assert loaded._auto_class == auto_name
        assert loaded.__name__ in sys.modules[loaded.__module__].__all__, reference


@pytest.mark.parametrize("model_type", register.FAMILIES)
def test_family_row(model_type):
    config_class = register.load_class(register.FAMILIES[model_type])
    assert config_class.model_type == model_type
    assert config_class.remote_code_map["AutoConfig"] == register.FAMILIES[model_type]
    for auto_name, reference in config_class.remote_code_map.items():
        loaded = register.load_class(reference)
        if auto_name != "AutoConfig":
            assert issubclass(loaded, PreTrainedModel) and loaded.config_class is config_class, reference
            assert loaded.__name__ in sys.modules[loaded.__module__].__all__, reference


def test_every_modeling_file_belongs_to_a_family():
    named = {reference.split(".")[0] for row in register.FAMILIES.values() for reference in [row]}
    for row in register.FAMILIES.values():
        named |= {reference.split(".")[0] for reference in register.load_class(row).remote_code_map.values()}
    present = {path.stem for path in MODULES if floor(path.stem) in ("configuration", "modeling")}
    modeling = {f"modeling_{name}" for name in SHARED_MODELING}
    assert present - named <= modeling | {"configuration_base"}


def test_every_module_can_be_imported():
    for module in pkgutil.walk_packages([str(PACKAGE)], prefix="hf_moe."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def test_version_is_one_string():
    parts = hf_moe.__version__.split(".")
    assert len(parts) == 3 and all(part.isdigit() for part in parts)


# --- what we rely on in Transformers ----------------------------------------------------------------------------------
# Not public, or not promised. A release that changes one of these must fail here, by name, and not in a user's hands.


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_host_loading_hook():
    hook = inspect.getattr_static(PreTrainedModel, "_load_pretrained_model")
    assert isinstance(hook, staticmethod)
    assert parameters(hook.__func__) == ["model", "state_dict", "checkpoint_files", "load_config", "expected_keys"]


def test_host_load_config_fields():
    from transformers.modeling_utils import LoadStateDictConfig

    assert set(parameters(LoadStateDictConfig)) >= {
        "pretrained_model_name_or_path",
        "device_map",
        "hf_quantizer",
        "ignore_mismatched_sizes",
        "weight_mapping",
    }


def test_host_materialises_a_tensor_by_indexing_it():
    """Our lazy tensors rest on this: `tensor[...]`, then `.to(device=, dtype=)`."""
    from transformers.core_model_loading import _materialize_copy

    seen = []

    class Probe:
        def __getitem__(self, index):
            seen.append(index)
            return self

        def to(self, **kwargs):
            seen.append(kwargs)
            return torch.ones(2)

    result = _materialize_copy(Probe(), device="cpu", dtype=torch.float32)
    assert seen == [..., {"device": "cpu", "dtype": torch.float32}] and torch.equal(result, torch.ones(2))


def test_host_key_conversion_registry():
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    assert parameters(register_checkpoint_conversion_mapping)[1:] == ["mapping", "overwrite"]
    for name in ("DeepseekV3Model", "DeepseekV3ForCausalLM", "DeepseekV2Model", "DeepseekV2ForCausalLM"):
        converters = get_checkpoint_conversion_mapping(name)
        targets = sorted(target for converter in converters for target in converter.target_patterns)
        weights = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
        assert targets == sorted(weights), name


def test_host_conversion_operations():
    from transformers.core_model_loading import ConversionOps, WeightConverter

    assert parameters(ConversionOps.convert)[:4] == ["self", "input_dict", "source_patterns", "target_patterns"]
    assert isinstance(ConversionOps.reverse_op, property)
    assert parameters(WeightConverter)[:3] == ["source_patterns", "target_patterns", "operations"]


def test_host_tensor_parallelism():
    """FP8 modules ask for plain tensors in their products; parameters and states to save pass through our hands."""
    from transformers.integrations.tensor_parallel import ColwiseParallel, RowwiseParallel

    assert parameters(PreTrainedModel.maybe_distribute_model)[:2] == ["model", "distributed_config"]
    gather = parameters(PreTrainedModel.gather_sharded_state_dict_for_save)
    assert gather == ["self", "model_to_save", "state_dict", "distributed_config", "save_on_this_rank"]
    for style in (ColwiseParallel(), RowwiseParallel()):
        module = torch.nn.Linear(2, 2)
        assert not style.should_use_local_tensors(module)
        module._hf_quantized_needs_local_tp = True
        assert style.should_use_local_tensors(module)


def test_host_experts_interface():
    from transformers.integrations import use_experts_implementation
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert parameters(PreTrainedModel.get_correct_experts_implementation) == ["self", "requested_experts"]
    assert isinstance(inspect.getattr_static(PreTrainedModel, "_can_set_experts_implementation"), classmethod)
    assert callable(use_experts_implementation)
    for backend in ("grouped_mm", "batched_mm"):
        assert parameters(ALL_EXPERTS_FUNCTIONS[backend])[:4] == [
            "self",
            "hidden_states",
            "top_k_index",
            "top_k_weights",
        ]


def test_host_dynamic_layer():
    layer = DynamicLayer()
    assert layer.is_initialized is False
    for name in ("update", "lazy_initialization", "get_seq_length", "get_mask_sizes", "reset", "offload", "crop"):
        assert callable(getattr(layer, name)), name
    assert parameters(DynamicLayer.update)[:3] == ["self", "key_states", "value_states"]
    assert parameters(DynamicLayer.lazy_initialization) == ["self", "key_states", "value_states"]
    keys, values = layer.update(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 2))
    assert layer.is_initialized and layer.keys is keys and layer.values is values and layer.get_seq_length() == 3


def test_host_caches_hold_a_list_of_layers():
    from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config

    cache = DynamicCache(config=DeepseekV3Config(num_hidden_layers=4))
    assert isinstance(cache.layers, list) and len(cache.layers) == 4
    assert {type(layer) for layer in cache.layers} == {DynamicLayer}
    assert DynamicCache().layer_class_to_replicate is DynamicLayer
    assert cache.offloading is False
    assert parameters(Cache.get_mask_sizes) == ["self", "query_length", "layer_idx"]


def test_host_mask_function():
    from transformers.masking_utils import create_causal_mask

    wanted = {"config", "inputs_embeds", "attention_mask", "past_key_values", "position_ids"}
    assert wanted <= set(parameters(create_causal_mask))


def test_host_rope_functions():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

    assert {"linear", "dynamic", "yarn", "llama3"} <= set(ROPE_INIT_FUNCTIONS)
    assert parameters(ROPE_INIT_FUNCTIONS["yarn"])[:2] == ["config", "device"]
    assert parameters(dynamic_rope_update) == ["rope_forward"]


def test_host_offload_helper():
    from transformers.integrations.accelerate import load_offloaded_parameter

    assert parameters(load_offloaded_parameter) == ["model", "param_name"]


def test_host_configuration_base():
    from transformers.configuration_utils import PreTrainedConfig

    assert {"to_dict", "to_diff_dict", "from_dict"} <= set(dir(PreTrainedConfig))
    assert callable(PreTrainedConfig.__post_init__), "configurations are no dataclasses any more"


def test_host_saves_through_the_function_that_tests_interrupt():
    from transformers import modeling_utils

    assert callable(modeling_utils.safe_save_file)


def test_host_release_is_one_that_the_package_declares():
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    assert major == 5 and minor >= 17
