"""Which tensors a configuration asks for: names, shapes and what belongs together, from our own model classes.

The model is built on the meta device, so that nothing is loaded; what it says is what `from_pretrained` would check.
"""

import copy
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..models.modeling_base import MoePreTrainedModel
from ..models.weights_experts import FUSED_EXPERTS
from ..models.weights_safetensors import CheckpointError
from ..models.weights_step3 import FUSED_STACKS, VISION_PREFIXES
from ..register import FAMILIES, load_class, model_type_of
from .families import quantization_of

# Prefixes under which multimodal wrappers keep the tensors of a language model that we read.
_WRAPPERS = (("model.language_model.", "model."), ("language_model.", ""))


@dataclass(frozen=True)
class Part:
    """Where a slice of a model's parameter stands in the files: whole, or one expert's or one stack's part of it.

    Attributes:
        name: upstream tensor.
        shape: of that tensor.
        expert: index along the parameter's first dimension; `None` for all of it.
        share: which of `shares` equal runs of the parameter's rows (gate is 0 of 2, up is 1 of 2).
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    share: int = 0
    shares: int = 1


@dataclass(frozen=True)
class Structure:
    """What a configuration asks for.

    Attributes:
        config: the configuration.
        model: the empty model, on the meta device.
        parameters: the model's names to their upstream parts.
        duplicates: upstream tensors that files may repeat, `{duplicate: original}`.
    """

    config: PreTrainedConfig
    model: MoePreTrainedModel
    parameters: dict[str, tuple[Part, ...]]
    duplicates: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every upstream tensor that must be there, by name."""
        return {part.name: part.shape for parts in self.parameters.values() for part in parts}


def family_of(config: dict[str, Any]) -> str:
    """The model type of a `config.json`, by `model_type` or, where that is missing, `architectures`.

    Raises:
        CheckpointError: for one that is none of ours.
    """
    model_type = model_type_of(config)
    if model_type is None:
        raise CheckpointError(
            f"config.json: model_type {config.get('model_type')!r} (architectures {config.get('architectures')!r}) is "
            f"none of the families that hf_moe knows: {', '.join(FAMILIES)}."
        )
    return model_type


def read_config_class(config: dict[str, Any]) -> PreTrainedConfig:
    """The configuration object of a `config.json`.

    Raises:
        CheckpointError: that says which key is wrong.
    """
    config_class = load_class(FAMILIES[family_of(config)])
    quantization_of(config)  # refuses what is no object
    try:
        result = config_class.from_dict(copy.deepcopy(config))
        text = result.get_text_config()
        layers = getattr(text, "num_layers", None) or text.num_hidden_layers
        if not isinstance(layers, int):
            raise TypeError(f"the number of layers must be a whole number, got {layers!r}")
        return result
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"config.json: {error}") from error


def model_class_of(config: dict[str, Any], config_object: PreTrainedConfig) -> type[MoePreTrainedModel]:
    """The class that a checkpoint's files are written for: that of `architectures`, else the language model.

    A vision checkpoint always means the whole of it, not the text model that can be read from it.
    """
    classes = [
        load_class(reference) for name, reference in config_object.remote_code_map.items() if name != "AutoConfig"
    ]
    named = {model_class.__name__: model_class for model_class in classes}
    architecture = (config.get("architectures") or [None])[0]
    if architecture in named:
        return named[architecture]
    whole = config_object.remote_code_map.get("AutoModelForImageTextToText")
    return load_class(whole or config_object.remote_code_map["AutoModelForCausalLM"])


def wrapper_prefix(names: Collection[str]) -> tuple[str, str] | None:
    """The prefix of a language model's tensors inside a multimodal checkpoint, and what replaces it; else `None`."""
    for prefix, own in _WRAPPERS:
        if any(name.startswith(prefix) for name in names):
            return prefix, own
    return None


def read_structure(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Structure:
    """What `config` asks for, with the MTP layers and padded tables that a checkpoint of these upstream `shapes` has.

    Raises:
        CheckpointError: for a configuration that is none of ours, or wrong in itself.
    """
    config_object = read_config_class(config)
    model_class = model_class_of(config, config_object)
    if hasattr(config_object, "quantization_config"):
        del config_object.quantization_config  # the structure is that of plain weights
    if getattr(config_object, "ngram_tables", "model") != "model":
        config_object.ngram_tables = "model"
    try:
        with torch.device("meta"):
            model = model_class(config_object)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json does not describe a model: {error}") from error
    stems = {upstream_stem(name): shape for name, shape in shapes.items()}
    model.adapt_to_checkpoint(stems)
    model.resize_mtp_layers(model.count_mtp_layers(set(stems)))
    parameters = {name: _parts(model, name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    duplicates = dict(model.mtp_duplicates())
    if getattr(config_object, "tie_word_embeddings", False) and parameters.pop("lm_head.weight", None):
        table = next(parts[0].name for name, parts in parameters.items() if name.endswith("embed_tokens.weight"))
        duplicates = {
            name: table if original == "lm_head.weight" else original for name, original in duplicates.items()
        }
        duplicates["lm_head.weight"] = table
    return Structure(config_object, model, parameters, duplicates)


def upstream_stem(name: str) -> str:
    """An upstream tensor's name without the `model.` of models with a head."""
    return name.removeprefix("model.")


def upstream_name(model: MoePreTrainedModel, parameter: str) -> str:
    """The name in the files of a parameter that is not made of parts."""
    if model.config.model_type != "step3_vl":
        return parameter
    text = parameter.removeprefix("model.")
    if text.startswith("language_model."):
        return ("model." if parameter.startswith("model.") else "") + text.removeprefix("language_model.")
    return text if text.startswith(tuple(f"{prefix}." for prefix in VISION_PREFIXES)) else parameter


def fused_parameter(name: str) -> bool:
    """Whether a tensor's name is that of a fused parameter of experts."""
    return name.endswith((*(f".{key}" for key in FUSED_EXPERTS), *(f".{key}" for key in FUSED_STACKS)))


_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def _parts(model: MoePreTrainedModel, parameter: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    name = upstream_name(model, parameter)
    parts = model.upstream_parts(name, shape)
    if not parts:
        return (Part(name, shape),)
    output = []
    for part, part_shape in parts:
        expert = _EXPERT.search(part)
        shares = shape[1] // part_shape[-2]
        output.append(Part(part, part_shape, int(expert[1]) if expert else None, int(".up_proj." in part), shares))
    return tuple(output)
