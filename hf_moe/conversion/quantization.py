"""Conversions between bfloat16, block FP8 and packed INT4.

Block FP8 becomes bfloat16 as in DeepSeek's own script: the float32 product of value and scale, rounded once. The other
way, a block's scale is its largest magnitude over 448, for UE8M0 rounded up to a power of two and still stored in
float32. Weights that are quantised already are decoded to float32, not to bfloat16, before they are quantised again.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..models.op_quant import FP8, FP8_MAX, block_grid, dequantize_block_fp8, dequantize_packed_int4
from ..models.weights_lazy import read_quantization_config
from ..models.weights_safetensors import CheckpointError
from .arithmetic import changed_blocks, decode_block_rows, encode_block_rows, scratch
from .families import (
    bfloat16_config,
    find_family,
    fp8_config,
    is_exempt,
    is_float32,
    is_quantized,
    quantization_of,
    require_family,
)
from .plan import Copy, Group, Output, Plan, Tensors, copy_group
from .source import Source

BLOCK_SIZE = (128, 128)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_CHUNK = 1 << 20  # elements that are converted at once: their float32 values stay near the processor
_SAMPLED = 16


@dataclass(frozen=True)
class Weight:
    """A tensor of the model as the source holds it: plain, or in the two or three tensors of a quantised one.

    Attributes:
        name: as the model calls it.
        kind: "plain", "fp8" or "int4".
        dtype: of a plain tensor; FP8 and INT4 decode to float32.
        shape: of the tensor, decoded.
        inputs: names in the source.
        block_size, parts: of FP8 (see `dequantize_block_fp8`).
        group_size: of INT4.
    """

    name: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    block_size: tuple[int, int] = BLOCK_SIZE
    parts: int = 1
    group_size: int = 0

    def decode(self, tensors: Tensors, unit: int = 1) -> Iterator[tuple[tuple, torch.Tensor]]:
        """Float32 values of the rows in `tensors` (the inputs by name, or whole strips of them), a chunk at a time.

        Yields where in the decoded tensor the chunk belongs, and its values, which are good until the next chunk is
        asked for and may be changed. A chunk is rows of one matrix: a multiple of `unit` rows, but for the last.
        """
        problem = None if self.kind == "plain" else _problem_of_scales(self, tensors[self.inputs[1]])
        if problem:
            raise CheckpointError(f"tensor {self.inputs[1]} {problem}.")
        if self.kind == "plain":
            values = tensors[self.name]
            for index in _chunks(tuple(values.shape), unit):
                part = values[index]
                yield index, scratch("values", tuple(part.shape), torch.float32).copy_(part)
        elif self.kind == "fp8":
            yield from self._decode_fp8(*(tensors[name] for name in self.inputs), unit)
        else:
            packed, scales, shape = (tensors[name] for name in self.inputs)
            if tuple(shape.flatten().tolist()) != self.shape:
                raise CheckpointError(f"tensor {self.inputs[2]} says {shape.tolist()}, not {list(self.shape)}.")
            for index in _chunks(self.shape, unit):
                part = (index[0].stop - index[0].start, self.shape[1])
                yield index, dequantize_packed_int4(packed[index], scales[index], part, self.group_size)

    def _decode_fp8(self, codes: torch.Tensor, scales: torch.Tensor, unit: int) -> Iterator[tuple[tuple, torch.Tensor]]:
        _check_codes(self.name, codes)
        rows, columns = self.block_size
        if self.parts > 1 or unit % rows and unit != 1:
            whole = codes.shape[-2] if self.parts > 1 else math.lcm(unit, rows)
            for index in _chunks(tuple(codes.shape), whole):
                grid = grid_index(index, rows) if self.parts == 1 else index[:-1]
                yield index, dequantize_block_fp8(codes[index], scales[grid], self.block_size, self.parts)
            return
        for index in _chunks(tuple(codes.shape), max(unit, rows), most=max(unit, rows)):
            grid = scales[grid_index(index, rows)]
            if len(grid) == 1:
                yield index, decode_block_rows(codes[index], grid[0], columns)
            else:
                yield index, dequantize_block_fp8(codes[index], grid, self.block_size)

    @property
    def strip(self) -> dict[str, int] | None:
        """Rows of each input, and of the decoded tensor, that can be converted apart from the rest."""
        if self.kind == "int4" or not self.shape:
            return None
        if self.kind == "plain" or len(self.shape) > 2:
            return dict.fromkeys((*self.inputs, self.name), 1)
        if self.parts > 1:
            return None
        return {self.name: self.block_size[0], self.inputs[1]: 1}


def _chunks(shape: tuple[int, ...], unit: int, most: int | None = None) -> Iterator[tuple]:
    """Indices of runs of rows in every matrix of a tensor: whole units, about `_CHUNK` elements or `most` rows."""
    if not shape:
        yield (...,)
        return
    *leading, rows, width = shape if len(shape) > 1 else (*shape, 1)
    count = most or max(_CHUNK // max(width * unit, 1), 1) * unit
    for lead in itertools.product(*map(range, leading)):
        for begin in range(0, rows, count):
            yield (*lead, slice(begin, min(begin + count, rows)))


def grid_index(index: tuple, block: int) -> tuple:
    """Where the scales of the rows at `index`, which begin with a block, are in the grid."""
    rows = index[-1]
    return (*index[:-1], slice(rows.start // block, -(-rows.stop // block)))


def _check_codes(name: str, values: torch.Tensor) -> None:
    """Refuses e4m3's NaN, whose codes are 127 and 255."""
    if values.numel() and (values.view(torch.int8).amax() == 127 or values.view(torch.uint8).amax() == 255):
        raise CheckpointError(f"tensor {name} holds NaN. Download it again.")


@dataclass(frozen=True)
class Decode:
    """Step: a weight as `dtype`."""

    weight: Weight
    dtype: torch.dtype

    def __call__(self, tensors: Tensors) -> Tensors:
        output = torch.empty(_rows_of(self.weight, tensors), dtype=self.dtype)
        for index, values in self.weight.decode(tensors):
            output[index] = values
        return {self.weight.name: output}


@dataclass(frozen=True)
class EncodeFp8:
    """Step: a weight as block FP8, values and scales.

    Counts the blocks whose numbers change (see `changed_blocks`), and adds up what rounding does to a sample of them.
    """

    weight: Weight
    block_size: tuple[int, int]
    ue8m0: bool

    def __call__(self, tensors: Tensors) -> tuple[Tensors, dict[str, float]]:
        name, shape, block = self.weight.name, _rows_of(self.weight, tensors), self.block_size[0]
        codes = torch.empty(shape, dtype=FP8)
        scales = torch.empty(block_grid(shape, self.block_size), dtype=torch.float32)
        counts = {"blocks": scales.numel(), "changed_blocks": 0}
        counts |= {"sampled_squared_error": 0.0, "sampled_squared_weights": 0.0}
        plain = tensors[name] if self.weight.kind == "plain" else None
        for turn, (index, values) in enumerate(self.weight.decode(tensors, block)):
            # Rounding is measured in the first of every few rows of blocks: enough for a mean.
            sampled = turn % _SAMPLED == 0
            original = values.clone() if sampled or plain is None else None
            source = original if plain is None else plain[index]
            found = scales[grid_index(index, block)]
            for begin in range(0, len(found)):
                rows = slice(begin * block, (begin + 1) * block)
                half = source[rows] if source.dtype == torch.bfloat16 else None
                found[begin] = encode_block_rows(values[rows], codes[index][rows], self.block_size[1], self.ue8m0, half)
            if not found.isfinite().all():
                raise CheckpointError(f"tensor {name} holds values that are not finite: it cannot be quantised.")
            for begin in range(0, len(found)):
                rows = slice(begin * block, (begin + 1) * block)
                counts["changed_blocks"] += changed_blocks(
                    codes[index][rows], found[begin], source[rows], self.block_size[1]
                )
            if sampled:
                error = dequantize_block_fp8(codes[index], found, self.block_size).sub_(original).flatten()
                counts["sampled_squared_error"] += error.dot(error).item()
                counts["sampled_squared_weights"] += original.flatten().dot(original.flatten()).item()
        return {name: codes, f"{name}_scale_inv": scales}, counts


@dataclass(frozen=True)
class ScalesToFloat32:
    """Step: FP8 values as they are, their power-of-two scales in float32."""

    weight: Weight

    def __call__(self, tensors: Tensors) -> Tensors:
        values, scales = (tensors[name] for name in self.weight.inputs)
        return {self.weight.name: values, self.weight.inputs[1]: scales.float()}


def _rows_of(weight: Weight, tensors: Tensors) -> tuple[int, ...]:
    """Shape of the part of the decoded weight that `tensors` hold."""
    if not weight.shape:
        return ()
    return (tensors[weight.inputs[0]].shape[0], *weight.shape[1:])


# What a source holds


def read_weights(source: Source) -> dict[str, Weight]:
    """The tensors of the model by name, in the order of the source.

    Raises:
        CheckpointError: for quantised tensors that `config.json` does not account for or that miss their scales, scales
            of the wrong grid or dtype or (in a local source) with values that cannot be scales, and stray scales.
    """
    config_path = source.path("config.json")
    fields = quantization_of(source.config)
    try:
        method = read_quantization_config(fields)
    except ValueError as error:
        raise CheckpointError(f"{config_path}: {error}") from error
    if fields is not None and method is None:
        known = "'fp8' and 'compressed-tensors'"
        raise CheckpointError(
            f"{config_path}: quant_method {fields.get('quant_method')!r} is unknown; read are {known}."
        )
    if method and method["quant_method"] == "fp8" and fields.get("fmt", "e4m3") != "e4m3":
        raise CheckpointError(f"{config_path}: FP8 of fmt {fields['fmt']!r}; only 'e4m3' is read.")
    weights: dict[str, Weight] = {}
    used: set[str] = set()
    for name, entry in source.entries.items():
        if entry.dtype == FP8:
            weights[name] = _fp8_weight(source, name, method)
        elif entry.dtype in (torch.float8_e5m2, torch.float8_e8m0fnu) and not name.endswith("_scale_inv"):
            raise source.complain(name, f"has dtype {entry.dtype}, which is not read as a weight")
        elif name.endswith(".weight_packed"):
            weight = _int4_weight(source, name, method)
            weights[weight.name] = weight
        else:
            continue
        used.update((weights[name] if name in weights else weight).inputs)
    if method and not weights:
        raise CheckpointError(
            f"{config_path}: has a `quantization_config`, but no tensor is quantised. Remove it there."
        )
    ordered: dict[str, Weight] = {}
    by_input = {weight.inputs[0]: weight for weight in weights.values()}
    for name, entry in source.entries.items():
        if name in by_input:
            ordered[by_input[name].name] = by_input[name]
        elif name not in used:
            if name.endswith(("_scale_inv", ".weight_scale", ".weight_shape")):
                raise source.complain(name, "belongs to no quantised weight")
            if name in weights:
                raise source.complain(name, "is there both plain and packed")
            ordered[name] = Weight(name, "plain", entry.dtype, entry.shape, (name,))
    _check_experts(source, ordered)
    if source.local:  # elsewhere, and those of INT4, which are a ninth of the checkpoint, when they are used
        for weight in weights.values():
            if weight.kind == "fp8":
                check_scales(source, weight)
    return ordered


def _fp8_weight(source: Source, name: str, method: dict[str, Any] | None) -> Weight:
    entry, scale = source.entries[name], f"{name}_scale_inv"
    if method is None or method["quant_method"] != "fp8":
        raise source.complain(name, "is FP8, but config.json has no `quantization_config` of method 'fp8'")
    if scale not in source.entries:
        raise source.complain(name, f"has no scales: {scale} is missing")
    if len(entry.shape) < 2:
        raise source.complain(name, f"is FP8 of shape {entry.shape}; blocks need a matrix")
    parts = 2 if name.endswith("gate_up_proj") else 1
    grid = block_grid(entry.shape, method["block_size"], parts)
    found = source.entries[scale]
    if found.shape != grid:
        raise source.complain(scale, f"has shape {found.shape}, but {name} of shape {entry.shape} needs {grid}")
    if found.dtype not in (torch.float32, torch.float8_e8m0fnu):
        raise source.complain(scale, f"has dtype {found.dtype}; scales are float32 or float8_e8m0fnu")
    return Weight(name, "fp8", FP8, entry.shape, (name, scale), method["block_size"], parts)


def _int4_weight(source: Source, name: str, method: dict[str, Any] | None) -> Weight:
    stem = name.removesuffix("_packed")
    if method is None or method["quant_method"] != "int4":
        raise source.complain(name, "is packed, but config.json does not say that it is INT4")
    inputs = (name, f"{stem}_scale", f"{stem}_shape")
    for part in inputs[1:]:
        if part not in source.entries:
            raise source.complain(name, f"is incomplete: {part} is missing")
    packed, scale, sizes = (source.entries[part] for part in inputs)
    if packed.dtype != torch.int32 or len(packed.shape) != 2:
        raise source.complain(name, f"is {packed.dtype} of shape {packed.shape}, not a matrix of int32")
    if sizes.shape != (2,) or sizes.dtype not in (torch.int32, torch.int64):
        raise source.complain(inputs[2], f"is {sizes.dtype} of shape {sizes.shape}, not two integers")
    if scale.dtype not in _FLOATS:
        raise source.complain(inputs[1], f"has dtype {scale.dtype}, not that of scales")
    # The Hub is spared a request for each of tens of thousands of shapes, which follow from the packed ones where
    # no width is odd; the step compares.
    shape = tuple(sizes.read().tolist()) if source.local else (packed.shape[0], packed.shape[1] * 8)
    for part, width in ((packed, 8), (scale, method["group_size"])):
        grid = (shape[0], -(-shape[1] // width))
        if part.shape != grid:
            raise source.complain(part.name, f"has shape {part.shape}, but {inputs[2]} and the format ask for {grid}")
    return Weight(stem, "int4", torch.int32, shape, inputs, group_size=method["group_size"])


def check_scales(source: Source, weight: Weight) -> None:
    """Refuses scales that are no numbers, infinite, zero, negative, or so large that weights overflow."""
    problem = _problem_of_scales(weight, source.entries[weight.inputs[1]].read())
    if problem:
        raise source.complain(weight.inputs[1], problem)


def _problem_of_scales(weight: Weight, scales: torch.Tensor) -> str | None:
    scales = scales.float()
    if weight.kind == "int4":
        bad, rule = ~scales.isfinite(), "finite"
    else:
        bad = ~((scales > 0) & (scales * FP8_MAX <= torch.finfo(torch.bfloat16).max))
        rule = "positive, and small enough for weights to be finite"
    if not bad.any():
        return None
    where = tuple(bad.nonzero()[0].tolist())
    return f"has the scale {scales[where].item()} at {where}; scales are {rule}"


def _check_experts(source: Source, weights: dict[str, Weight]) -> None:
    """Refuses layers of which some experts are quantised and others are not."""
    kinds: dict[str, Weight] = {}
    for name, weight in weights.items():
        key = re.sub(r"\.experts\.\d+\.", ".experts.*.", name)
        known = kinds.setdefault(key, weight)
        if (known.kind, known.dtype) != (weight.kind, weight.dtype):
            theirs = f"{known.name} is {known.kind} ({known.dtype}), {name} is {weight.kind} ({weight.dtype})"
            raise source.complain(weight.inputs[0], f"differs in its format from the other experts: {theirs}")


# Plans


def plan_bf16(source: Source) -> Plan:
    """Everything in bfloat16, but for what releases keep in float32: quantised weights and wider floats are converted.

    Raises:
        CheckpointError: for a broken source, and one that is all bfloat16 already.
    """
    weights = read_weights(source)
    groups = [_plain_group(source, weight) for weight in weights.values()]
    kinds = {weight.kind for weight in weights.values()} - {"plain"}
    title = f"{' and '.join(sorted(_NAMES[kind] for kind in kinds)) or 'floats'} to bfloat16"
    return _plan(source, title, groups, bfloat16_config(source.config), {})


def plan_fp8(source: Source, ue8m0: bool = False, block_size: tuple[int, int] = BLOCK_SIZE) -> Plan:
    """Block FP8 with exactly the tensors quantised that the family's releases quantise; all else as in `plan_bf16`.

    FP8 weights whose scales are powers of two already serve both kinds of scales as they are, bit for bit.

    Raises:
        CheckpointError: for a broken source, an unknown family, stacked experts, and a source of this format.
    """
    family, weights = require_family(source.config), read_weights(source)
    groups, count = [], 0
    powers = (quantization_of(source.config) or {}).get("scale_fmt") == "ue8m0"
    for weight in weights.values():
        if _is_fused(weight.name):
            raise source.complain(weight.inputs[0], "stacks experts; convert the checkpoint `--to per-expert` first")
        wanted = is_quantized(family, weight.name) and not is_exempt(source.config, weight.name)
        if weight.kind == "fp8" and (wanted or powers == ue8m0) and weight.block_size == tuple(block_size):
            if powers or not ue8m0:
                groups.extend(_kept_groups(source, weight))
                count += 1
                continue
        if not wanted:
            groups.append(_plain_group(source, weight))
            continue
        if len(weight.shape) < 2:
            raise source.complain(weight.inputs[0], f"has shape {weight.shape}; blocks need a matrix")
        if weight.kind == "plain" and weight.dtype not in _FLOATS:
            raise source.complain(weight.name, f"has dtype {weight.dtype}, which is not that of weights")
        groups.append(_encode_group(weight, block_size, ue8m0))
        count += 1
    if not count:
        raise CheckpointError(f"{source.name}: holds none of the weights that releases of its family quantise.")
    kinds = {weight.kind for weight in weights.values()} - {"plain"}
    origin = " and ".join(sorted(_NAMES[kind] for kind in kinds)) or "bfloat16"
    title = f"{origin} to block FP8 with {'power-of-two' if ue8m0 else 'float32'} scales"
    plan = _plan(source, title, groups, fp8_config(source.config, block_size, ue8m0), {"block_size": list(block_size)})
    plan.options["ue8m0"] = ue8m0
    plan.notes.append(f"{count} weights in FP8, {len(weights) - count} tensors as they are")
    return plan


def plan_fp8_ue8m0(source: Source) -> Plan:
    """Block FP8 whose scales are powers of two, in float32."""
    return plan_fp8(source, ue8m0=True)


_NAMES = {"fp8": "block FP8", "int4": "packed INT4"}


def _is_fused(name: str) -> bool:
    """Whether the name is one of Transformers' stacked experts."""
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def _plan(source: Source, title: str, groups: list[Group], config: dict[str, Any], options: dict[str, Any]) -> Plan:
    if all(isinstance(group.step, Copy) for group in groups) and config == source.config:
        raise CheckpointError(f"{source.name}: has this format already. `--to same` only changes the shards.")
    return Plan(title, groups, config, options=options)


def _plain_group(source: Source, weight: Weight) -> Group:
    """A weight in bfloat16; what is bfloat16, no float, or kept in float32 by releases, as it is."""
    if weight.kind == "plain":
        family = find_family(source.config)
        wide = weight.dtype in _FLOATS and weight.dtype != torch.bfloat16
        if not wide or family is None or is_float32(family, weight.name):
            return copy_group(source, weight.name)
    output = Output(weight.name, torch.bfloat16, weight.shape)
    return Group(weight.inputs, (output,), Decode(weight, torch.bfloat16), weight.strip)


def _kept_groups(source: Source, weight: Weight) -> list[Group]:
    """FP8 values as they are, with float32 scales."""
    values, scales = (source.entries[name] for name in weight.inputs)
    if scales.dtype == torch.float32:
        return [copy_group(source, values.name), copy_group(source, scales.name)]
    outputs = (Output(values.name, FP8, values.shape), Output(scales.name, torch.float32, scales.shape))
    return [Group(weight.inputs, outputs, ScalesToFloat32(weight), weight.strip)]


def _encode_group(weight: Weight, block_size: tuple[int, int], ue8m0: bool) -> Group:
    scale = f"{weight.name}_scale_inv"
    grid = block_grid(weight.shape, block_size)
    outputs = (Output(weight.name, FP8, weight.shape), Output(scale, torch.float32, grid))
    strip = weight.strip
    if strip is not None:
        if len(weight.shape) == 2:
            rows = math.lcm(strip[weight.name], block_size[0])
            strip = {name: rows * count // strip[weight.name] for name, count in strip.items()}
            strip[scale] = rows // block_size[0]
        else:
            strip = {**strip, scale: 1}
    return Group(weight.inputs, outputs, EncodeFp8(weight, block_size, ue8m0), strip)
