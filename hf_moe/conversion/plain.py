"""A checkpoint seen as plain matrices under upstream names, whatever its format and its layout of experts.

FP8 and INT4 weights are decoded when they are read, and fused parameters of experts are seen as the matrices or stacks
that upstream files have, so that two checkpoints of one model can be compared tensor by tensor.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..models.op_quant import FP8, dequantize_block_fp8, dequantize_packed_int4
from ..models.weights_experts import upstream_parts
from ..models.weights_lazy import read_quantization_config
from ..models.weights_safetensors import CheckpointError
from ..models.weights_step3 import stack_parts
from .families import quantization_of
from .source import SourceTensor


@dataclass(frozen=True)
class Plain:
    """A weight of any format, read as float32 by runs of its first dimension.

    Attributes:
        name: upstream.
        shape: of the decoded weight: (rows, cols), (experts, rows, cols), or that of a tensor that is no matrix.
        values: the entry that holds the values, plain, FP8 or packed.
        scale: the entry of its scales.
        block_size: of FP8 weights.
        group_size: of INT4 weights.
        expert: index into the first dimension of `values`, where this is one matrix of a stack.
        rows: the first row inside each matrix of `values`, where this is a part of a fused parameter.
        height: rows of each matrix of `values`.
    """

    name: str
    shape: tuple[int, ...]
    values: SourceTensor
    scale: SourceTensor | None = None
    block_size: tuple[int, int] = (128, 128)
    group_size: int = 0
    expert: int | None = None
    rows: int = 0
    height: int = 0

    @property
    def kind(self) -> str:
        """`fp8`, `int4`, or the dtype of a plain tensor."""
        return "int4" if self.group_size else "fp8" if self.scale is not None else str(self.values.dtype)[6:]

    def read(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Runs `begin` to `end` of the first dimension, in float32 (float64 where stored so, integers as float64)."""
        end = self.shape[0] if end is None and self.shape else end
        if not self.shape:
            return self.values.read().float()
        if self.expert is not None or self.rows or self.height:
            return self._part(begin, end)
        if self.group_size:
            packed, scale = self.values.read_rows(begin, end), self.scale.read_rows(begin, end)
            return dequantize_packed_int4(packed, scale, (end - begin, self.shape[1]), self.group_size)
        if self.scale is None:
            return _wide(self.values.read_rows(begin, end))
        if len(self.shape) > 2:
            weight, scale = self.values.read_rows(begin, end), self.scale.read_rows(begin, end)
            return dequantize_block_fp8(weight, scale, self.block_size)
        block = self.block_size[0]
        aligned = begin // block * block
        weight = self.values.read_rows(aligned, end)
        scale = self.scale.read_rows(aligned // block, -(-end // block))
        return dequantize_block_fp8(weight, scale, self.block_size)[begin - aligned :]

    def _part(self, begin: int, end: int) -> torch.Tensor:
        """Of a fused parameter: its matrices are read whole, one or several."""
        first, last = (self.expert, self.expert + 1) if self.expert is not None else (begin, end)
        weight = self.values.read_rows(first, last)
        parts = self.values.shape[1] // self.height
        if self.scale is None:
            weight = _wide(weight)
        else:
            weight = dequantize_block_fp8(weight, self.scale.read_rows(first, last), self.block_size, parts)
        weight = weight[:, self.rows : self.rows + self.height]
        return weight if self.expert is None else weight[0, begin:end]

    def runs(self, elements: int = 1 << 24) -> Iterator[tuple[int, int]]:
        """Bounds of pieces of about so many elements, which depend on the shape alone."""
        count = 1
        for size in self.shape[1:]:
            count *= size
        step = max(1, elements // max(count, 1))
        if len(self.shape) == 2 and step > 128:
            step -= step % 128
        for begin in range(0, self.shape[0] if self.shape else 1, step):
            yield begin, min(self.shape[0], begin + step) if self.shape else 1


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.dtype == torch.float64 or not tensor.dtype.is_floating_point else tensor.float()


def stored_quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` of a `config.json`, of the whole or of its text part, as decoding needs it.

    Raises:
        ValueError: for a format that is not read.
    """
    return read_quantization_config(quantization_of(config))


def plain_view(entries: Mapping[str, SourceTensor], config: dict[str, Any]) -> dict[str, Plain]:
    """All weights of a checkpoint by upstream name; scales and packing are gone, fused experts taken apart.

    Raises:
        CheckpointError: for quantised tensors without their scales, or in a checkpoint that does not say so.
    """
    quantization = stored_quantization(config)
    method = quantization["quant_method"] if quantization else None
    output: dict[str, Plain] = {}
    for name, entry in entries.items():
        if entry.dtype == FP8:
            scale = entries.get(f"{name}_scale_inv")
            if method != "fp8" or scale is None:
                problem = "has no scales" if method == "fp8" else "is FP8, but config.json does not say so"
                raise CheckpointError(f"{entry.store.path(entry.filename)}: tensor {name} {problem}.")
            output |= _take_apart(Plain(name, tuple(entry.shape), entry, scale, quantization["block_size"]))
        elif name.endswith(".weight_packed"):
            stem = name.removesuffix("_packed")
            absent = next((part for part in ("_scale", "_shape") if f"{stem}{part}" not in entries), None)
            if method != "int4" or absent:
                problem = f"is incomplete: {stem}{absent} is missing" if absent else "is packed: config.json is silent"
                raise CheckpointError(f"{entry.store.path(entry.filename)}: tensor {name} {problem}.")
            shape = tuple(entries[f"{stem}_shape"].read().tolist())
            output[stem] = Plain(stem, shape, entry, entries[f"{stem}_scale"], group_size=quantization["group_size"])
        elif not name.endswith(("_scale_inv", ".weight_scale", ".weight_shape")):
            output |= _take_apart(Plain(name, tuple(entry.shape), entry))
    return output


def _take_apart(weight: Plain) -> dict[str, Plain]:
    name, shape = weight.name, weight.shape
    if len(shape) != 3:
        return {name: weight}
    output: dict[str, Plain] = {}
    for part, (experts, rows, cols) in stack_parts(name, shape):  # Step3: stacks stay stacks
        start = rows if part.endswith("up_proj.weight") else 0
        output[part] = replace(weight, name=part, shape=(experts, rows, cols), rows=start, height=rows)
    for index, (part, shares) in enumerate(upstream_parts(name, shape[0])):
        rows = shape[1] // shares
        changes = {"expert": index // shares, "rows": index % shares * rows, "height": rows}
        output[part] = replace(weight, name=part, shape=(rows, shape[2]), **changes)
    return output or {name: weight}
