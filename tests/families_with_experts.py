"""Every class under Transformers' `use_experts_implementation`, built tiny with random weights."""

import importlib
import inspect
from pathlib import Path

import torch
import transformers

HIDDEN, INTER, EXPERTS = 24, 16, 3


def sources() -> list[str]:
    """Names of the model families whose code uses the experts interface."""
    paths = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    return [path.parent.name for path in paths if "@use_experts_implementation" in path.read_text(encoding="utf-8")]


def classes_of(family: str) -> list[type]:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    members = inspect.getmembers(module, inspect.isclass)
    return [value for _, value in members if value.__module__ == module.__name__ and hasattr(value, "_apply_gate")]


class TinyConfig:
    """A family's default configuration, of which every size is tiny."""

    def __init__(self, defaults):
        self.__dict__["defaults"] = defaults

    def __getattr__(self, name: str):
        if "intermediate" in name or name == "expert_ffn_hidden_size":
            return INTER
        if "hidden_size" in name:
            return HIDDEN
        if "experts" in name and "per_tok" not in name:
            return EXPERTS
        if name == "swiglu_limit":
            return 0.5  # so low that it matters
        return getattr(self.defaults, name)


def configs_of(cls: type) -> list[type]:
    """Configurations that `cls` may be built from: what it is annotated with, or its family's, those of text first."""
    annotation = inspect.signature(inspect.unwrap(cls.__init__)).parameters["config"].annotation
    if annotation is not inspect.Parameter.empty:
        return [
            getattr(importlib.import_module(cls.__module__), annotation) if isinstance(annotation, str) else annotation
        ]
    configs = importlib.import_module(cls.__module__.replace("modeling_", "configuration_"))
    own = [value for _, value in inspect.getmembers(configs, inspect.isclass) if value.__module__ == configs.__name__]
    return sorted(own, key=lambda value: ("Text" not in value.__name__, value.__name__))


def build(cls: type) -> torch.nn.Module:
    configs = configs_of(cls)
    wanted = "swiglu_limit"  # the one field, beside sizes, that classes without annotation ask for
    fitting = [config for config in configs if len(configs) == 1 or wanted in vars(config)]
    module = cls(TinyConfig((fitting or configs)[0]().get_text_config()))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
    return module


def use(module: torch.nn.Module, backend: str) -> None:
    module.config._experts_implementation = backend
