"""Where PEFT meets our modules: the one place that changes something in PEFT.

PEFT makes the layer around a target in `LoraModel._create_new_module`. Once PEFT is imported, that function asks us
first: targets inside of our experts, and linear layers with FP8 weights, get the layers of `lora_layers`; everything
else is made as before. So does `get_tp_plan_and_mesh`, which says how tensor parallelism cuts factors. Nothing here
imports PEFT; a finder on `sys.meta_path` waits until somebody else does.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
import warnings
from types import ModuleType

PEFT_MODULE = "peft.tuners.lora.model"


def install() -> None:
    """Makes PEFT's LoRA know our modules, now or as soon as it is imported. Repeating it is harmless."""
    module = sys.modules.get(PEFT_MODULE)
    if module is not None and hasattr(module, "LoraModel"):
        extend(module)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds nothing itself; adds `extend` behind the execution of one module."""

    searching = False

    def find_spec(self, name, path=None, target=None):
        if name != PEFT_MODULE or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            extend(module)

        spec.loader.exec_module = exec_module
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        return spec


def extend(module: ModuleType) -> None:
    """Puts our question before `LoraModel._create_new_module` of PEFT's module."""
    model_class = getattr(module, "LoraModel", None)
    original = vars(model_class).get("_create_new_module") if model_class is not None else None
    if not isinstance(original, staticmethod) or not hasattr(module, "ParamWrapper"):
        warnings.warn(
            "hf_moe knows PEFT from 0.18 to 0.21; in this one LoRA on experts goes PEFT's own way, which adds it to "
            "the weights of all experts.",
            stacklevel=2,
        )
        return
    original = original.__func__
    if hasattr(original, "hf_moe_original"):
        return

    @functools.wraps(original)
    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        from .lora_layers import create_layer

        layer = create_layer(lora_config, adapter_name, target, **kwargs)
        return original(lora_config, adapter_name, target, **kwargs) if layer is None else layer

    _create_new_module.hf_moe_original = original
    model_class._create_new_module = staticmethod(_create_new_module)
    _keep_factors_whole(module)


def _keep_factors_whole(module: ModuleType) -> None:
    """Under tensor parallelism PEFT cuts factors as their weight is cut. It cannot do that for parameters, and our
    experts' factors stay whole (`lora_parallel`): nothing is planned for them."""
    original = getattr(module, "get_tp_plan_and_mesh", None)
    if original is None:
        return

    @functools.wraps(original)
    def get_tp_plan_and_mesh(model, current_key: str):
        from .lora_layers import is_expert_weight

        owner, _, name = current_key.rpartition(".")
        ours = is_expert_weight(dict(model.named_modules()).get(owner), name)
        return (None, None) if ours else original(model, current_key)

    module.get_tp_plan_and_mesh = get_tp_plan_and_mesh
