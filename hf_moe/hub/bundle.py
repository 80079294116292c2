"""The code that goes with a checkpoint: the modules that its classes need, and the `auto_map` that names them."""

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import models
from ..register import FAMILIES, load_class, model_type_of

MODELS = Path(models.__file__).parent
# Files beside `config.json` whose `auto_map` names a class of a processor.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def knows_model_type(config: Mapping[str, Any]) -> bool:
    """Whether the model is one of ours."""
    return model_type_of(config) is not None


def require_model_type(config: Mapping[str, Any], name: str) -> str:
    """The family of a configuration, by `model_type` or, where it has none, by class name.

    Raises:
        ValueError: for a model type that is not ours.
    """
    model_type = model_type_of(config)
    if model_type is None:
        raise ValueError(
            f"{name}: there is no code for the model type {config.get('model_type')!r} in hf_moe; known are "
            f"{', '.join(sorted(FAMILIES))}. Give --no-code to go on without."
        )
    return model_type


def code_map(model_type: str) -> dict[str, str]:
    """`auto_map` of a family, its processors included."""
    config_class = load_class(FAMILIES[model_type])
    return {**config_class.remote_code_map, **getattr(config_class, "processor_code_map", {})}


def module_closure(entries) -> list[str]:
    """File names of the given modules and all that they import from beside them."""
    found: set[str] = set()
    waiting = list(entries)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        tree = ast.parse((MODELS / f"{module}.py").read_text(encoding="utf-8"))
        waiting += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    return sorted(f"{module}.py" for module in found)


def code_bundle(files: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    """The files that make a checkpoint load with `trust_remote_code=True` where hf_moe is not installed.

    Args:
        files: `config.json` and, where there are such, `PROCESSOR_FILES`.
        name: of the folder, for messages.

    Returns:
        The modules, and those of `files` that have to name them; the others are as they should be.

    Raises:
        ValueError: for a model type that is not ours.
    """
    content = {filename: _parse(data, f"{name}/{filename}") for filename, data in files.items()}
    config = content["config.json"]
    wanted = code_map(require_model_type(config, name))
    bundle = {}
    for module in module_closure({reference.split(".")[0] for reference in wanted.values()}):
        bundle[module] = (MODELS / module).read_bytes()
    named = {"config.json": {**config, "auto_map": wanted}}
    for filename in PROCESSOR_FILES:
        if filename in files:
            named[filename] = _renamed(content[filename], wanted)
    for filename, wanted_content in named.items():
        if wanted_content != content[filename]:
            bundle[filename] = (json.dumps(wanted_content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    return bundle


def _parse(data: bytes, path: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object.")
    return content


def _renamed(content: Any, wanted: Mapping[str, str]) -> Any:
    """The same with our classes in every `auto_map` of a processor's configuration, which may be nested."""
    if not isinstance(content, dict):
        return content
    output = {key: _renamed(value, wanted) for key, value in content.items()}
    if isinstance(output.get("auto_map"), dict):
        output["auto_map"] = {key: wanted.get(key, value) for key, value in output["auto_map"].items()}
    return output
