"""Merges a LoRA adapter into a checkpoint, tensor by tensor, without building the model.

A weight that the adapter touches is decoded where it is FP8, the product of the factors is added in float32, and the
sum is rounded or quantised to what the weight was. All others keep their bytes. Experts may stand in the files one by
one, in stacks or fused, whichever way the adapter was trained.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from ..models.op_quant import FP8, dequantize_block_fp8, quantize_block_fp8
from ..models.weights_experts import SCALE_SUFFIX
from ..models.weights_safetensors import CheckpointError
from .adapter import Adapter, Delta, deltas_of
from .families import quantization_of
from .plain import stored_quantization
from .plan import Group, Output, Plan, Tensors, copy_group
from .source import Source, SourceTensor
from .structure import Part, Structure, read_structure

_PIECE = 1 << 22  # elements that are in float32 at a time


@dataclass(frozen=True)
class Change:
    """What becomes of a matrix, or of those of a stack.

    Attributes:
        delta: what is added.
        new: what replaces it first, a tensor of the adapter.
        expert: of the delta's or the new tensor's first dimension; `None`: each matrix of a stack its own.
        begin: the first of their rows.
    """

    delta: Delta | None = None
    new: SourceTensor | None = field(default=None, repr=False)
    expert: int | None = None
    begin: int = 0


@dataclass(frozen=True)
class Merge:
    """Step that changes one weight, in place, some rows at a time."""

    name: str
    changes: tuple[Change, ...]
    block_size: tuple[int, int] | None = None
    ue8m0: bool = False
    parts: int = 1

    def __call__(self, tensors: Tensors) -> tuple[Tensors, dict[str, float]]:
        weight, scale = tensors[self.name], tensors.get(self.name + SCALE_SUFFIX)
        if weight.dim() < 2:
            self._vector(weight)
        elif weight.dim() == 2:
            self._matrix(weight, scale, 0)
        else:
            for expert in range(weight.shape[0]):
                self._matrix(weight[expert], None if scale is None else scale[expert], expert)
        return tensors, {"tensors_changed": 1}

    def _vector(self, weight: torch.Tensor) -> None:
        for change in self.changes:
            if change.new is not None:
                weight.copy_(change.new.read())
            if change.delta is not None:  # of a bias: the factor `b` is the vector itself
                weight.copy_(weight.float() + change.delta.b.read().float() * change.delta.scaling)

    def _matrix(self, weight: torch.Tensor, scale: torch.Tensor | None, index: int) -> None:
        height = weight.shape[0] // self.parts  # FP8 blocks do not reach over the border of gate and up
        block = self.block_size[0] if scale is not None else 1
        step = max(block, _PIECE // max(weight.shape[1], 1) // block * block)
        grid = -(-height // block)
        for part in range(self.parts):
            for first in range(0, height, step):
                begin, end = part * height + first, part * height + min(first + step, height)
                rows = weight[begin:end]
                if scale is None:
                    rows.copy_(self._changed(rows.float(), index, begin, end))
                    continue
                scales = scale[part * grid + first // block : part * grid + -(-(end - part * height) // block)]
                values = self._changed(dequantize_block_fp8(rows, scales, self.block_size), index, begin, end)
                # Powers of two stay what they are in scales of fewer bits than float32.
                powers = self.ue8m0 or scale.dtype != torch.float32
                quantised, new_scales = quantize_block_fp8(values, self.block_size, powers)
                rows.copy_(quantised)
                scales.copy_(new_scales)

    def _changed(self, values: torch.Tensor, index: int, begin: int, end: int) -> torch.Tensor:
        for change in self.changes:
            expert = index if change.expert is None else change.expert
            first, last = change.begin + begin, change.begin + end
            if change.new is not None:
                values = _rows_of(change.new, expert, first, last)
            if change.delta is not None:
                values = values + change.delta.rows(expert, first, last)
        if not values.isfinite().all():
            raise CheckpointError(f"Tensor {self.name}: the adapter makes values that are not finite.")
        return values


def _rows_of(entry: SourceTensor, expert: int, begin: int, end: int) -> torch.Tensor:
    if len(entry.shape) == 3:
        matrix = entry.rows(expert, expert + 1)
        entry = replace(matrix, shape=entry.shape[1:])
    return entry.read_rows(begin, end).float()


@dataclass
class _Changes:
    """Changes by tensor of the source, in the order in which they apply."""

    source: Source
    structure: Structure
    found: dict[str, list[Change]] = field(default_factory=dict)

    def add(self, parameter: str, change: Change, complain) -> None:
        """Notes a change of a model's parameter, at every tensor of the source that holds a part of it."""
        parts = self.structure.parameters.get(parameter)
        if parts is None:  # the name of a tensor in the files
            parts = (Part(parameter, tuple(self.source.entries[parameter].shape)),)
        for part in parts:
            if part.name in self.source.entries:
                begin = part.share * part.shape[-2] if part.shares > 1 else 0
                self._note(part.name, replace(change, expert=part.expert, begin=begin))
            elif f"{part.name}_packed" in self.source.entries:
                raise self.source.complain(
                    f"{part.name}_packed", "is packed INT4, and the adapter changes it: convert to bf16 or fp8 first"
                )
            else:
                break
        else:
            return
        fused = part.name[: part.name.index("experts.")] + "experts." + parameter.rpartition(".")[2]
        if fused not in self.source.entries:
            raise complain(f"belongs to {part.name}, which is not in {self.source.name}")
        self._note(fused, change)

    def _note(self, name: str, change: Change) -> None:
        self.found.setdefault(name, []).append(change)
        # Copies that belong to MTP layers change with their originals, as in the loaded model.
        for duplicate, original in self.structure.duplicates.items():
            if original == name and duplicate in self.source.entries and self._equal(duplicate, original):
                self.found.setdefault(duplicate, []).append(change)

    def _equal(self, left: str, right: str) -> bool:
        a, b = self.source.entries[left], self.source.entries[right]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        step = max(1, _PIECE // max(a.shape[-1], 1))
        return all(
            torch.equal(a.read_rows(begin, end).view(torch.uint8), b.read_rows(begin, end).view(torch.uint8))
            for begin, end in ((first, min(first + step, a.shape[0])) for first in range(0, a.shape[0], step))
        )


def plan_merge(source: Source, adapter: Adapter) -> Plan:
    """The checkpoint with the adapter merged into it, in the same format and layout.

    Raises:
        CheckpointError: for a tensor of the adapter that matches nothing in the checkpoint, or does not fit it.
    """
    structure = read_structure(source.config, {name: entry.shape for name, entry in source.entries.items()})
    changes = _Changes(source, structure)
    for name, entry in adapter.replaced.items():
        parameter, shape = _find(structure, source, name, adapter, entry)
        if shape != entry.shape:
            raise adapter.complain(entry, f"has shape {entry.shape}, but {parameter} has {shape}")
        changes.add(parameter, Change(new=entry), lambda problem, entry=entry: adapter.complain(entry, problem))
    for target in adapter.targets:
        module, parameters = _module(structure, source, target.module)
        if not parameters:
            raise adapter.complain(target.a, f"matches nothing: {source.name} has no weight {target.module}")
        for name, delta in deltas_of(adapter, target, parameters):
            changes.add(
                f"{module}.{name}",
                Change(delta=delta),
                lambda problem, entry=target.a: adapter.complain(entry, problem),
            )
        if target.bias is not None:
            parameter, shape = _find(structure, source, f"{module}.bias", adapter, target.bias)
            delta = replace(delta, b=target.bias)
            changes.add(parameter, Change(delta=delta), lambda problem, e=target.bias: adapter.complain(e, problem))
    if not changes.found:
        raise CheckpointError(f"{adapter.store.place}: the adapter holds no tensors.")
    store = adapter.store
    return Plan(
        title="LoRA adapter merged",
        groups=list(_groups(source, changes.found)),
        config=source.config,
        options={"adapter": store.name, "adapter_files": {name: _identity(adapter, name) for name in _files(adapter)}},
        notes=[
            f"{len(changes.found)} of {len(source.entries)} tensors change: {len(adapter.targets)} pairs of factors"
        ],
    )


def _files(adapter: Adapter) -> list[str]:
    return sorted(name for name in adapter.store.files() if name.startswith("adapter_"))


def _identity(adapter: Adapter, name: str) -> dict[str, int | str]:
    """What a file of the adapter is, for the manifest and for resuming: size and SHA-256."""
    size = adapter.store.files()[name]
    digest = hashlib.sha256()
    for begin in range(0, size, 1 << 24):
        block = bytearray(min(1 << 24, size - begin))
        adapter.store.read_into(name, begin, memoryview(block), "the adapter")
        digest.update(block)
    return {"size": size, "sha256": digest.hexdigest()}


def _spellings(name: str) -> Iterator[str]:
    """A name as a model with a head, the base model alone, and the text part of a vision model have it."""
    yield name
    yield f"model.{name}"
    text = name.removeprefix("model.")
    yield f"model.language_model.{text}"


def _module(structure: Structure, source: Source, module: str) -> tuple[str, dict[str, tuple[int, ...]]]:
    """A module's name in the model, and the shapes of its own weights."""
    for spelling in _spellings(module):
        stem = f"{spelling}."
        shapes = {
            name.removeprefix(stem): tuple(structure.model.state_dict()[name].shape)
            for name in structure.parameters
            if name.startswith(stem) and "." not in name.removeprefix(stem)
        }
        if shapes:
            return spelling, {name: shape for name, shape in shapes.items() if len(shape) > 1}
    for spelling in _spellings(module):  # by the name in the files: an expert's own matrix
        name = f"{spelling}.weight"
        if name in source.entries:
            return spelling, {"weight": tuple(source.entries[name].shape)}
        if f"{name}_packed" in source.entries:
            raise source.complain(
                f"{name}_packed", "is packed INT4, and the adapter changes it: convert to bf16 or fp8 first"
            )
    return module, {}


def _find(structure: Structure, source: Source, name: str, adapter: Adapter, entry) -> tuple[str, tuple[int, ...]]:
    for spelling in _spellings(name):
        if spelling in structure.parameters:
            return spelling, tuple(structure.model.state_dict()[spelling].shape)
        if spelling in source.entries:
            return spelling, tuple(source.entries[spelling].shape)
    raise adapter.complain(entry, f"matches nothing: {source.name} has no tensor {name}")


def _groups(source: Source, changes: dict[str, list[Change]]) -> Iterator[Group]:
    quantization = stored_quantization(source.config)
    stored = quantization_of(source.config) or {}
    for name, entry in source.entries.items():
        weight = name.removesuffix(SCALE_SUFFIX)
        if weight not in changes:
            yield copy_group(source, name)
        elif weight != name:
            continue  # written with its weight
        elif entry.dtype == FP8:
            scale = source.entries.get(name + SCALE_SUFFIX)
            if quantization is None or quantization["quant_method"] != "fp8" or scale is None:
                raise source.complain(name, "is FP8 without scales, or config.json does not say how it is quantised")
            parts = 2 if name.endswith("gate_up_proj") else 1
            step = Merge(
                name, tuple(changes[name]), quantization["block_size"], stored.get("scale_fmt") == "ue8m0", parts
            )
            outputs = tuple(Output(tensor.name, tensor.dtype, tensor.shape) for tensor in (entry, scale))
            yield Group((name, scale.name), outputs, step)
        else:
            yield Group((name,), (Output(name, entry.dtype, entry.shape),), Merge(name, tuple(changes[name])))
