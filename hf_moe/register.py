"""The table of families, and its registration with Transformers' Auto classes."""

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, models
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

# Model type to configuration class, whose `remote_code_map` names the model classes. A new family is a configuration
# file, a modeling file and a row here.
FAMILIES = {
    "deepseek_v2": "configuration_deepseek_v2.DeepseekV2Config",
    "deepseek_v3": "configuration_deepseek_v3.DeepseekV3Config",
    "kimi_k2": "configuration_kimi_k2.KimiK2Config",
    "step3_text": "configuration_step3_text.Step3TextConfig",
    "step3_vl": "configuration_step3_vl.Step3VLConfig",
    "longcat": "configuration_longcat.LongcatConfig",
    "longcat_flash": "configuration_longcat_flash.LongcatFlashConfig",
    "longcat_flash_ngram": "configuration_longcat_flash_ngram.LongcatFlashNgramConfig",
    "longcat_next": "configuration_longcat_next.LongcatNextConfig",
}


def load_class(reference: str) -> type:
    """The class that `"module.Class"`, as written in an `auto_map`, names among our models."""
    module, name = reference.rsplit(".", 1)
    return getattr(importlib.import_module(f"hf_moe.models.{module}"), name)


def register() -> None:
    """Registers every family with the Auto classes, over Transformers' own classes of the same model type.

    Also marks the classes as remote code, so that saving a model ships its source, and lets the Auto classes know a
    configuration by its `architectures` where `model_type` is missing. Repeating it is harmless.
    """
    _name_missing_model_types()
    _read_tokenizers_as_stored()
    for model_type, reference in FAMILIES.items():
        config_class = load_class(reference)
        AutoConfig.register(model_type, config_class, exist_ok=True)
        config_class.register_for_auto_class("AutoConfig")
        for auto_name, class_reference in config_class.remote_code_map.items():
            if auto_name == "AutoConfig":
                continue
            model_class = load_class(class_reference)
            getattr(models.auto, auto_name).register(config_class, model_class, exist_ok=True)
            model_class.register_for_auto_class(auto_name)
        for auto_name, class_reference in getattr(config_class, "processor_code_map", {}).items():
            processor_class = load_class(class_reference)
            processor_class.register_for_auto_class(auto_name)
            try:
                getattr(models.auto, auto_name).register(config_class, processor_class, exist_ok=True)
            except ImportError:  # AutoImageProcessor without Pillow; before Transformers 5.20 without torchvision
                continue


@functools.cache
def architecture_types() -> dict[str, str]:
    """Class names of whole models, as in `architectures`, to the model type of the first family with such a class."""
    types: dict[str, str] = {}
    for model_type, reference in FAMILIES.items():
        config_class = load_class(reference)
        for auto_name in ("AutoModelForImageTextToText", "AutoModelForCausalLM"):
            if auto_name in config_class.remote_code_map:
                types.setdefault(config_class.remote_code_map[auto_name].rpartition(".")[2], model_type)
        for name in getattr(config_class, "architecture_names", ()):
            types.setdefault(name, model_type)
    return types


def model_type_of(config: Mapping[str, Any]) -> str | None:
    """The row of `FAMILIES` that a `config.json` belongs to; `None` for a model that is not ours.

    It goes by `model_type`, or by `architectures` where that is missing or says nothing to Transformers, as in several
    LongCat releases.
    """
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return model_type
    architectures = config.get("architectures")
    if model_type in CONFIG_MAPPING or not architectures:
        return None
    return architecture_types().get(architectures[0])


def _name_missing_model_types() -> None:
    """Fills in `model_type` as the Auto classes read a `config.json` (several LongCat releases have none).

    Transformers has no hook for this: `AutoConfig` asks `PreTrainedConfig.get_config_dict`, which is wrapped here. Only
    the Auto classes call it on the base class itself; files with a known model type pass through untouched.
    """
    original = PreTrainedConfig.get_config_dict.__func__
    if hasattr(original, "hf_moe_original"):
        return

    @functools.wraps(original)
    def get_config_dict(cls, *args, **kwargs):
        fields, unused = original(cls, *args, **kwargs)
        model_type = model_type_of(fields) if cls is PreTrainedConfig else None
        if model_type is not None:
            fields = {**fields, "model_type": model_type}
        return fields, unused

    get_config_dict.hf_moe_original = original
    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)


def _read_tokenizers_as_stored() -> None:
    """Makes `AutoTokenizer` take `tokenizer.json` for what it is, as it does for its own DeepSeek models.

    Releases name `LlamaTokenizerFast` beside byte-level files. Older Transformers believes the name, and gives a
    tokenizer that splits text otherwise and drops what it cannot spell.
    """
    for model_type in FAMILIES:
        TOKENIZER_MAPPING_NAMES.setdefault(model_type, "TokenizersBackend")
