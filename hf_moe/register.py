"""The table of families, and its registration with Transformers' Auto classes."""

import functools
import importlib

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, models

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


def architecture_types() -> dict[str, str]:
    """Architecture names that published files carry without a known `model_type`, to the model type."""
    return {
        name: model_type
        for model_type, reference in FAMILIES.items()
        for name in getattr(load_class(reference), "architecture_names", ())
    }


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
        architectures = fields.get("architectures")
        if cls is PreTrainedConfig and architectures and fields.get("model_type") not in CONFIG_MAPPING:
            model_type = architecture_types().get(architectures[0])
            if model_type is not None:
                fields = {**fields, "model_type": model_type}
        return fields, unused

    get_config_dict.hf_moe_original = original
    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)
