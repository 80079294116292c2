"""Step3's expert tensors, stacked in the files already, and the fused parameters of `Experts`; both directions.

Upstream: `moe.gate_proj.weight` (E, I, H), `moe.up_proj.weight` (E, I, H), `moe.down_proj.weight` (E, H, I).
In memory: `moe.experts.gate_up_proj` (E, 2I, H), gate rows first, and `moe.experts.down_proj` (E, H, I).
Scales of block FP8 weights, `<weight>_scale_inv` upstream, are fused in the same way under `<parameter>_scale_inv`.
"""

import re
from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from .weights_experts import SCALE_SUFFIX, Stacking

# Fused parameter to the upstream stacks that are concatenated into it, in order, along the rows of each expert.
FUSED_STACKS = {
    "moe.experts.gate_up_proj": ("moe.gate_proj.weight", "moe.up_proj.weight"),
    "moe.experts.down_proj": ("moe.down_proj.weight",),
}
# Tensor prefixes of the vision checkpoint as they stand in the file, and in the model.
VISION_PREFIXES = ("vision_model", "vit_downsampler", "vit_downsampler2", "vit_large_projector")
TEXT_PREFIXES = ("embed_tokens", "layers", "norm")


class JoinedStacks:
    """Stacks (E, rows, cols) of a file seen as one (E, sum of rows, cols), read when it is indexed.

    Tensor parallelism takes a slice of the gate rows and one of the up rows by their place in the fused parameter.
    """

    def __init__(self, parts: list[Any]):
        self.parts = parts
        self.dtype = parts[0].dtype

    def get_shape(self) -> list[int]:
        shapes = [part.get_shape() for part in self.parts]
        return [shapes[0][0], sum(shape[1] for shape in shapes), shapes[0][2]]

    def __getitem__(self, index) -> torch.Tensor:
        if index is Ellipsis:
            return torch.cat([part[...] for part in self.parts], dim=1)
        experts, rows, cols = (*index, slice(None), slice(None))[:3]
        start, stop, _ = rows.indices(self.get_shape()[1])
        output = []
        for part in self.parts:
            height = part.get_shape()[1]
            first, last = max(start, 0), min(stop, height)
            if first < last:
                output.append(part[experts, first:last, cols])
            start, stop = start - height, stop - height
        return torch.cat(output, dim=1) if output else self.parts[0][experts, :0, cols]


def join_stacks(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same tensors, each gate stack (and its scales) joined with its up stack, under the name of the gate."""
    output = dict(tensors)
    gate, up = FUSED_STACKS["moe.experts.gate_up_proj"]
    for suffix in ("", SCALE_SUFFIX):
        for name in tensors:
            other = name.removesuffix(gate + suffix) + up + suffix
            if name.endswith("." + gate + suffix) and other in tensors:
                parts = [output.pop(name), output.pop(other)]
                output[name] = JoinedStacks([getattr(part, "source", part) for part in parts])
    return output


class FuseStacks(Stacking):
    """Stacks of experts to one fused parameter, filled expert by expert."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        """`{pattern: (E, rows, cols)}` to `{target: (E, sum of rows, cols)}`."""
        parts = {}
        if len(input_dict) == 1 < len(source_patterns):  # joined beforehand, see `JoinedStacks`
            (joined,) = input_dict.values()
            return {target_patterns[0]: joined[0] if isinstance(joined, list) else joined}
        for pattern in source_patterns:
            if pattern in input_dict:
                stack = input_dict.pop(pattern)
                parts[pattern] = list((stack[0] if isinstance(stack, list) else stack).unbind(0))
        return super().convert(parts, source_patterns, target_patterns, **kwargs)

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitStacks()


class SplitStacks(ConversionOps):
    """One fused parameter to its stacks: views, so that saving needs no second copy of the model."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, model=None, **kwargs):
        """`{source: (E, sum of rows, cols)}` to `{target: (E, rows, cols)}`, rows split evenly."""
        (tensors,) = input_dict.values()
        fused = tensors[0] if isinstance(tensors, list) else tensors
        parts = fused.chunk(len(target_patterns), dim=1)
        if {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values()):
            parts = [part.contiguous() for part in parts]  # such a model is written as it comes, a shard at a time
        return dict(zip(target_patterns, parts))

    @property
    def reverse_op(self) -> ConversionOps:
        return FuseStacks()


def stack_converters() -> list[WeightConverter]:
    """The converters of the expert stacks, as Transformers' loader takes them."""
    return [WeightConverter(list(parts), target, operations=[FuseStacks()]) for target, parts in FUSED_STACKS.items()]


class TextRenaming(WeightRenaming):
    """From `model.<prefix>.` in a file to `model.language_model.<prefix>.`; back also where no head adds `model.`.

    Loading gives a model without a head its names by taking the `model.` away; saving does not put it back.
    """

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        (source,), (target,) = self._original_source_patterns, self._original_target_patterns
        tail = target.removeprefix("model.")
        output = WeightRenaming(rf"^(?:model\.)?{re.escape(tail)}", source.replace("\\", "").removeprefix("^"))
        output.scope_prefix, output.base_model_prefix = self.scope_prefix, self.base_model_prefix
        return output


def vision_renamings() -> list[WeightRenaming]:
    """From the names of the vision checkpoint to those of the model, and back on saving.

    One anchored rule a prefix, each up to its dot: `vit_downsampler` is the beginning of `vit_downsampler2`.
    """
    parts = [WeightRenaming("^" + re.escape(f"{prefix}."), f"model.{prefix}.") for prefix in VISION_PREFIXES]
    text = [(re.escape(f"model.{prefix}."), f"model.language_model.{prefix}.") for prefix in TEXT_PREFIXES]
    return parts + [TextRenaming(f"^{source}", target) for source, target in text]


def stack_parts(parameter: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Upstream stacks that make up a fused parameter of this shape, with theirs; nothing for any other parameter."""
    for target, parts in FUSED_STACKS.items():
        if parameter.endswith(target):
            stem = parameter.removesuffix(target)
            experts, rows, cols = shape
            return [(stem + part, (experts, rows // len(parts), cols)) for part in parts]
    return []


def register_step3_conversions() -> None:
    """Registers the conversions with Transformers' loader.

    By model type, not by class: the text model inside the vision model then brings its own rules, for its own part of
    the names, and a model with a head does not repeat those of the base model in it.
    """
    register_checkpoint_conversion_mapping("step3_text", stack_converters(), overwrite=True)
    register_checkpoint_conversion_mapping("step3_vl", vision_renamings(), overwrite=True)
