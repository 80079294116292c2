"""The table of families, and its registration with Transformers' Auto classes."""

import importlib

from transformers import AutoConfig, models

# Model type to configuration class, whose `remote_code_map` names the model classes. A new family is a configuration
# file, a modeling file and a row here.
FAMILIES = {
    "deepseek_v2": "configuration_deepseek_v2.DeepseekV2Config",
    "deepseek_v3": "configuration_deepseek_v3.DeepseekV3Config",
    "kimi_k2": "configuration_kimi_k2.KimiK2Config",
    "step3_text": "configuration_step3_text.Step3TextConfig",
    "step3_vl": "configuration_step3_vl.Step3VLConfig",
}


def load_class(reference: str) -> type:
    """The class that `"module.Class"`, as written in an `auto_map`, names among our models."""
    module, name = reference.rsplit(".", 1)
    return getattr(importlib.import_module(f"hf_moe.models.{module}"), name)


def register() -> None:
    """Registers every family with the Auto classes, over Transformers' own classes of the same model type.

    Also marks the classes as remote code, so that saving a model ships its source. Repeating it is harmless.
    """
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
