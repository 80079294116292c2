"""Experts as one tensor a projection and layer, as Transformers names them, and back to upstream names.

Fused: `mlp.experts.gate_up_proj` (E, 2I, H), gate rows first, and `mlp.experts.down_proj` (E, H, I); Step3 has them
under `moe.experts`. Upstream: a matrix for each expert, and for Step3 three stacks a layer. Block FP8 scales go along.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..models.op_quant import FP8
from ..models.weights_experts import FUSED_EXPERTS, SCALE_SUFFIX, upstream_parts
from ..models.weights_safetensors import CheckpointError
from ..models.weights_step3 import FUSED_STACKS, stack_parts
from .plain import stored_quantization
from .plan import Copy, Group, Output, Part, Plan, Tensors, copy_group
from .source import Source
from .structure import fused_parameter, read_config_class

_MATRIX = re.compile(r"(.*\.)mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight(_scale_inv)?$")
_STACK = re.compile(r"(.*\.)moe\.(gate|up|down)_proj\.weight(_scale_inv)?$")


@dataclass(frozen=True)
class Fuse:
    """Step that makes one (E, rows, cols) of parts: `parts[e]` stand on top of one another in expert e.

    A part is a matrix, or for `expert` of a stack the matrix of that number.
    """

    parts: tuple[tuple[str, ...], ...]
    name: str
    stacks: bool = False

    def __call__(self, tensors: Tensors) -> Tensors:
        if self.stacks:
            return {self.name: torch.cat([tensors[part] for part in self.parts[0]], dim=1)}
        first = [tensors[part] for part in self.parts[0]]
        output = first[0].new_empty((len(self.parts), sum(part.shape[0] for part in first), first[0].shape[1]))
        for expert, parts in enumerate(self.parts):
            start = 0
            for part in parts:
                matrix = tensors.pop(part)  # freed as soon as it is in its place
                output[expert, start : start + matrix.shape[0]] = matrix
                start += matrix.shape[0]
        return {self.name: output}


@dataclass(frozen=True)
class Split:
    """Step that takes (E, rows, cols), or one expert's part of it, apart: rows split evenly over `names`."""

    alias: str
    names: tuple[str, ...]
    squeeze: bool

    def __call__(self, tensors: Tensors) -> Tensors:
        parts = tensors[self.alias].chunk(len(self.names), dim=1)
        return {name: (part[0] if self.squeeze else part).contiguous() for name, part in zip(self.names, parts)}


def plan_fused(source: Source) -> Plan:
    """Upstream expert tensors to fused ones. What is fused already stays.

    Raises:
        CheckpointError: for experts that are incomplete or differ in shape or dtype, for packed INT4, and for FP8 whose
            blocks would not line up (an expert width that is no multiple of the block size).
    """
    config = read_config_class(source.config)
    experts = config.get_text_config().n_routed_experts
    _check_blocks(source)
    layers: dict[tuple[str, str], dict[str, list[str]]] = {}
    groups: list[Group] = []
    places: dict[tuple[str, str], int] = {}
    for name in source.entries:
        if name.endswith((".weight_packed", ".weight_shape")) and ".experts." in name:
            raise source.complain(name, "is packed INT4, which has no fused form: convert to bf16 or fp8 first")
        found = _MATRIX.fullmatch(name) or _STACK.fullmatch(name)
        if found is None:
            groups.append(copy_group(source, name))
            continue
        place = (found[1], found[found.re.groups] or "")
        if place not in places:
            places[place] = len(groups)
            groups.append(None)  # filled below, where the layer's first expert stood
            layers[place] = {}
    output: list[Group] = []
    slots = {index: place for place, index in places.items()}
    for index, group in enumerate(groups):
        output += [group] if group is not None else _fused_groups(source, *slots[index], experts)
    return Plan(
        title="upstream to fused experts",
        groups=output,
        config=source.config,
        notes=[] if layers else ["the checkpoint has no experts in upstream names: everything is copied"],
    )


def _fused_groups(source: Source, stem: str, suffix: str, experts: int) -> Iterator[Group]:
    step3 = f"{stem}moe.down_proj.weight{suffix}" in source.entries
    for target, patterns in (FUSED_STACKS if step3 else FUSED_EXPERTS).items():
        name = f"{stem}{target}{suffix}"
        if step3:
            parts = (tuple(f"{stem}{pattern}{suffix}" for pattern in patterns),)
        else:
            parts = tuple(
                tuple(f"{stem}{pattern.format(e=expert)}{suffix}" for pattern in patterns) for expert in range(experts)
            )
        inputs = [part for expert in parts for part in expert]
        absent = [part for part in inputs if part not in source.entries]
        if absent:
            more = f" and {len(absent) - 1} more are" if len(absent) > 1 else " is"
            raise CheckpointError(
                f"{source.name}: tensor {absent[0]}{more} missing; config.json says {experts} experts."
            )
        first = source.entries[inputs[0]]
        for part in inputs:
            entry = source.entries[part]
            if (entry.dtype, entry.shape) != (first.dtype, first.shape):
                raise source.complain(
                    part,
                    f"has shape {entry.shape} and dtype {entry.dtype}, but {first.name} {first.shape}, {first.dtype}",
                )
        rows = first.shape[-2] * len(patterns)
        shape = (experts, rows, first.shape[-1])
        if step3 and first.shape[0] != experts:
            raise source.complain(first.name, f"has {first.shape[0]} experts, but config.json says {experts}")
        if step3 and len(patterns) == 1:
            yield copy_group(source, inputs[0], name)
        else:
            yield Group(tuple(inputs), (Output(name, first.dtype, shape),), Fuse(parts, name, step3))
    behind = f"{stem}mlp.experts.{experts}."
    if any(name.startswith(behind) for name in source.entries):
        raise CheckpointError(f"{source.name}: has tensors {behind}*, but config.json says {experts} experts.")


def _check_blocks(source: Source) -> None:
    quantization = stored_quantization(source.config)
    if quantization is None or quantization["quant_method"] != "fp8":
        return
    block = quantization["block_size"][0]
    for name, entry in source.entries.items():
        if entry.dtype != FP8:
            continue
        fused = fused_parameter(name) and name.endswith("gate_up_proj")
        part = (_MATRIX.fullmatch(name) or _STACK.fullmatch(name)) and "down_proj" not in name
        rows = entry.shape[-2] // 2 if fused else entry.shape[-2]
        if (fused or part) and rows % block:
            raise source.complain(
                name,
                f"has {rows} rows an expert, which blocks of {block} do not divide: gate and up would share blocks "
                "when fused. Convert to bf16 first (--to bf16), then to this layout",
            )


def plan_upstream(source: Source) -> Plan:
    """Fused expert tensors to upstream names. What has upstream names already stays.

    Raises:
        CheckpointError: for fused tensors of another number of experts than config.json says.
    """
    experts = read_config_class(source.config).get_text_config().n_routed_experts
    _check_blocks(source)
    groups: list[Group] = []
    found = 0
    for name, entry in source.entries.items():
        suffix = SCALE_SUFFIX if name.endswith(SCALE_SUFFIX) else ""
        parameter = name.removesuffix(SCALE_SUFFIX)
        if not fused_parameter(parameter):
            groups.append(copy_group(source, name))
            continue
        found += 1
        if len(entry.shape) != 3 or entry.shape[0] != experts:
            raise source.complain(name, f"has shape {entry.shape}, but config.json says {experts} experts")
        groups += _upstream_groups(name, parameter, suffix, entry)
    return Plan(
        title="fused to upstream experts",
        groups=groups,
        config=source.config,
        notes=[] if found else ["the checkpoint has no fused experts: everything is copied"],
    )


def _upstream_groups(name: str, parameter: str, suffix: str, entry) -> Iterator[Group]:
    stacks = stack_parts(parameter, entry.shape)
    if stacks:
        names = tuple(part + suffix for part, _ in stacks)
        outputs = tuple(Output(part + suffix, entry.dtype, shape) for part, shape in stacks)
        yield Group((name,), outputs, Copy() if len(names) == 1 else Split(name, names, squeeze=False))
        return
    parts = list(upstream_parts(parameter, entry.shape[0]))
    shares = parts[0][1]
    shape = (entry.shape[1] // shares, entry.shape[2])
    for expert in range(entry.shape[0]):
        names = tuple(part + suffix for part, _ in parts[expert * shares : (expert + 1) * shares])
        alias = f"{name}[{expert}]"
        outputs = tuple(Output(part, entry.dtype, shape) for part in names)
        step = Copy() if shares == 1 else Split(alias, names, squeeze=True)
        yield Group((Part(name, expert, expert + 1, alias=alias),), outputs, step)


def plan_same(source: Source) -> Plan:
    """The same tensors, in files of another size."""
    groups = [copy_group(source, name) for name in source.entries]
    return Plan(title="the same tensors in other files", groups=groups, config=source.config)
