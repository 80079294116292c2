"""Experts as one tensor a projection and layer, as Transformers names them, and back to upstream names.

Fused: `mlp.experts.gate_up_proj` (E, 2I, H), gate rows first, and `mlp.experts.down_proj` (E, H, I); Step3 has them
under `moe.experts`. Upstream: a matrix for each expert, and for Step3 three stacks a layer. Block FP8 scales go along.
"""

import re
from collections.abc import Iterator

from ..models.op_quant import FP8
from ..models.weights_experts import FUSED_EXPERTS, SCALE_SUFFIX, upstream_parts
from ..models.weights_safetensors import CheckpointError
from ..models.weights_step3 import FUSED_STACKS, stack_parts
from .plain import stored_quantization
from .plan import Copy, Group, Output, Part, Plan, copy_group
from .source import Source
from .structure import fused_parameter, read_config_class

_MATRIX = re.compile(r"(.*\.)mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight(_scale_inv)?$")
_STACK = re.compile(r"(.*\.)moe\.(gate|up|down)_proj\.weight(_scale_inv)?$")


def plan_fused(source: Source) -> Plan:
    """Upstream expert tensors to fused ones. What is fused already stays.

    Raises:
        CheckpointError: for experts that are incomplete or differ in shape or dtype, for packed INT4, and for FP8 whose
            blocks would not line up (an expert width that is no multiple of the block size).
    """
    config = read_config_class(source.config)
    experts = config.get_text_config().n_routed_experts
    _check_blocks(source, one_by_one=True)
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
        numbers = (None,) if step3 else range(experts)
        inputs = [f"{stem}{pattern.format(e=number)}{suffix}" for number in numbers for pattern in patterns]
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
        runs = tuple(inputs)  # of bytes: expert by expert, the parts of each on top of one another
        if step3:
            runs = tuple(Part(part, expert, expert + 1) for expert in range(experts) for part in inputs)
        yield Group(runs, (Output(name, first.dtype, shape),), Copy())
    behind = f"{stem}mlp.experts.{experts}."
    if any(name.startswith(behind) for name in source.entries):
        raise CheckpointError(f"{source.name}: has tensors {behind}*, but config.json says {experts} experts.")


def _check_blocks(source: Source, one_by_one: bool) -> None:
    """Refuses FP8 blocks that reach over the border of gate and up: in fused tensors, or in those to be fused."""
    quantization = stored_quantization(source.config)
    if quantization is None or quantization["quant_method"] != "fp8":
        return
    block = quantization["block_size"][0]
    for name, entry in source.entries.items():
        if entry.dtype != FP8:
            continue
        fused = fused_parameter(name) and name.endswith("gate_up_proj")
        part = one_by_one and (_MATRIX.fullmatch(name) or _STACK.fullmatch(name)) and "down_proj" not in name
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
    _check_blocks(source, one_by_one=False)
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
    experts, height, columns = entry.shape
    if parameter.endswith("gate_up_proj") and height % 2:
        raise CheckpointError(f"{entry.store.path(entry.filename)}: tensor {name} has {height} rows for gate and up.")

    def rows(expert: int, share: int, shares: int) -> Part:
        begin = expert * height + share * (height // shares)
        return Part(name, begin, begin + height // shares, flat=True)

    stacks = stack_parts(parameter, entry.shape)
    for share, (part, _) in enumerate(stacks):
        runs = tuple(rows(expert, share, len(stacks)) for expert in range(experts))
        shape = (experts, height // len(stacks), columns)
        yield Group(runs, (Output(part + suffix, entry.dtype, shape),), Copy())
    for index, (part, shares) in enumerate(upstream_parts(parameter, experts)):
        expert, share = divmod(index, shares)
        shape = (height // shares, columns)
        yield Group((rows(expert, share, shares),), (Output(part + suffix, entry.dtype, shape),), Copy())


def plan_same(source: Source) -> Plan:
    """The same tensors, in files of another size."""
    groups = [copy_group(source, name) for name in source.entries]
    return Plan(title="the same tensors in other files", groups=groups, config=source.config)
