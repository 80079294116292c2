"""Per-expert checkpoint tensors and the fused parameters of `Experts`: names as data, and both directions.

Upstream: `mlp.experts.{e}.gate_proj.weight` (I, H), `.up_proj.weight` (I, H), `.down_proj.weight` (H, I).
In memory: `mlp.experts.gate_up_proj` (E, 2I, H), gate rows first, and `mlp.experts.down_proj` (E, H, I).
Scales of block FP8 weights, `<weight>_scale_inv` upstream, are stacked in the same way under `<parameter>_scale_inv`.
"""

import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter, WeightTransform

from .weights_lazy import DeferredTensor

# Fused parameter to the upstream parts that are concatenated into it, in order, along the rows of each expert.
FUSED_EXPERTS = {
    "mlp.experts.gate_up_proj": ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
    "mlp.experts.down_proj": ("mlp.experts.{e}.down_proj.weight",),
}

SCALE_SUFFIX = "_scale_inv"

_EXPERT_PART = re.compile(r"mlp\.experts\.(\d+)\.(?:gate|up|down)_proj\.weight(?:_scale_inv)?$")
# All experts of a layer in one tensor, as in Step3.
_EXPERT_STACK = re.compile(r"\.moe\.(?:gate|up|down)_proj\.weight(?:_scale_inv)?$")
_inherited: set[str] = set()  # names of classes whose converters are those of a base class
_READERS = min(4, os.cpu_count() or 1)
# By its class, releases without a dispatch of tokens know that a tensor is that of one expert, to be sharded as such.
_DISPATCHES = importlib.util.find_spec("transformers.distributed.expert_parallel") is not None
_MergesExperts = ConversionOps if _DISPATCHES else MergeModulelist


class Stacking(ConversionOps):
    """Per-expert matrices to one fused parameter, filled expert by expert so that each source is freed at once."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        """`{pattern: [E tensors of (rows, cols)]}` to `{target: (E, sum of rows, cols)}`."""
        parts = [input_dict.pop(pattern) for pattern in source_patterns if pattern in input_dict]
        counts = [len(part) for part in parts]
        if len(parts) != len(source_patterns) or len(set(counts)) != 1:
            raise ValueError(f"{source_patterns} have {counts} tensors: some experts are incomplete")
        heights = [part[0].shape[0] for part in parts]
        stacked = parts[0][0].new_empty((counts[0], sum(heights), parts[0][0].shape[1]))

        def fill(expert: int) -> None:
            for part, target in zip(parts, stacked[expert].split(heights)):
                tensor, part[expert] = part[expert], None
                # By what it can do: remote code can bring a second copy of the class.
                if hasattr(tensor, "read_into"):
                    tensor.read_into(target)
                else:
                    target.copy_(tensor)

        if not stacked.is_meta:  # there is nothing to read for a model without memory
            with ThreadPoolExecutor(max_workers=_READERS) as readers:
                list(readers.map(fill, range(counts[0])))
        return {target_patterns[0]: stacked}


class StackExperts(Stacking, _MergesExperts):
    """`Stacking` of tensors that come expert by expert."""

    @property
    def reverse_op(self) -> ConversionOps:
        return UnstackExperts()


class UnstackExperts(ConversionOps):
    """One fused parameter to per-expert matrices: views, so that saving needs no second copy of the model."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        """`{source: (E, sum of rows, cols)}` to `{target with e for *: (rows, cols)}`, rows split evenly."""
        (tensors,) = input_dict.values()
        stacked = tensors[0] if isinstance(tensors, list) else tensors
        output = {}
        for target, part in zip(target_patterns, stacked.chunk(len(target_patterns), dim=1)):
            output.update({target.replace("*", str(expert)): matrix for expert, matrix in enumerate(part.unbind(0))})
        return output

    @property
    def reverse_op(self) -> ConversionOps:
        return StackExperts()


def expert_converters() -> list[WeightConverter]:
    """The converters of the experts' weights, as Transformers' loader takes them."""
    return [
        WeightConverter([part.replace("{e}", "*") for part in parts], target, operations=[StackExperts()])
        for target, parts in FUSED_EXPERTS.items()
    ]


def with_scale_converters(conversions: Iterable[WeightTransform]) -> list[WeightTransform]:
    """The same conversions and, for each that stacks weights, one that treats the scales of FP8 weights alike.

    Those of scales come first: older Transformers take a pattern for a match where it is only the beginning of a name.
    """
    output = []
    for conversion in conversions:
        if isinstance(conversion, WeightConverter):
            sources = [pattern + SCALE_SUFFIX for pattern in conversion.source_patterns]
            targets = [pattern + SCALE_SUFFIX for pattern in conversion.target_patterns]
            scales = WeightConverter(sources, targets, operations=list(conversion.operations))
            # Of a model inside of a larger one, whose rules are for its own part of the names.
            for limit in ("scope_prefix", "base_model_prefix"):
                if hasattr(conversion, limit):
                    setattr(scales, limit, getattr(conversion, limit))
            output.append(scales)
        output.append(conversion)
    return output


def register_expert_converters(*class_names: str) -> None:
    """Registers the converters for model classes, by name. Transformers skips classes that it does not know otherwise.

    A class of the same name inside Transformers is served too, with the same tensors under the same names.
    """
    for class_name in class_names:
        register_checkpoint_conversion_mapping(class_name, expert_converters(), overwrite=True)


def inherit_converters(model_class: type) -> None:
    """Registers for a class, such as a user's own, the converters of the one that it derives from.

    Transformers looks them up by the name of the class, and would leave new experts in place of those of a checkpoint.
    """
    name, *bases = (base.__name__ for base in model_class.__mro__)
    if name not in _inherited and get_checkpoint_conversion_mapping(name) is not None:
        return
    found = next(filter(None, map(get_checkpoint_conversion_mapping, bases)), None)
    if found is None and name in _inherited:  # from another class of this name
        found = get_checkpoint_conversion_mapping(model_class.config_class.model_type)
    if found is not None:
        _inherited.add(name)
        register_checkpoint_conversion_mapping(name, found, overwrite=True)


def upstream_parts(parameter: str, num_experts: int) -> Iterator[tuple[str, int]]:
    """Upstream names that make up a fused parameter, each with its number of parts; nothing for any other parameter."""
    for target, parts in FUSED_EXPERTS.items():
        if parameter.endswith(target):
            stem = parameter.removesuffix(target)
            for expert in range(num_experts):
                for part in parts:
                    yield stem + part.format(e=expert), len(parts)


def defer_experts(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same tensors, those of experts as notes that `StackExperts` reads into place."""
    return {
        name: DeferredTensor(tensor) if _EXPERT_PART.search(name) or _EXPERT_STACK.search(name) else tensor
        for name, tensor in tensors.items()
    }


def expert_index(name: str) -> int | None:
    """The expert that an upstream tensor belongs to; `None` for any other tensor."""
    match = _EXPERT_PART.search(name)
    return int(match.group(1)) if match else None
