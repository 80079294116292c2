"""Checkpoint tensors as the loader sees them: plain ones, read and decoded when they are needed.

A quantised matrix is two or three tensors in the file. `plain_tensors` shows it under the name of the weight, as an
object with the interface of a safetensors slice, so that loading, sharding and casting go on as for a plain file.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from .op_quant import FP8, block_grid, dequantize_block_fp8, dequantize_packed_int4, quantize_block_fp8
from .weights_safetensors import CheckpointError, TensorEntry, slice_ranges


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file; indexing reads it, or the part that is asked for."""

    entry: TensorEntry

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.dtype

    def get_shape(self) -> list[int]:
        return list(self.entry.shape)

    def __getitem__(self, index) -> torch.Tensor:
        return self.entry.read() if index is Ellipsis else self.entry.read_part(index)

    def unbind(self, dim: int = 0) -> list["LazyTensor"]:
        """The slices along the first dimension, unread."""
        assert dim == 0
        return [LazyTensor(entry) for entry in self.entry.unbind()]

    def read_into(self, target: torch.Tensor) -> None:
        """Fills `target`, of the same shape; directly where dtype and device allow."""
        if target.dtype == self.entry.dtype and target.device.type == "cpu" and target.is_contiguous():
            self.entry.read_into(target)
        else:
            target.copy_(self.entry.read())


@dataclass(frozen=True)
class LazyScales(LazyTensor):
    """Scales of a file; reading them raises `CheckpointError` unless they are finite."""

    def __getitem__(self, index) -> torch.Tensor:
        scales = super().__getitem__(index)
        _require(scales.float().isfinite().all().item(), self.entry, "holds scales that are not finite")
        return scales

    def unbind(self, dim: int = 0) -> list["LazyScales"]:
        """The slices along the first dimension, unread."""
        return [LazyScales(tensor.entry) for tensor in super().unbind(dim)]

    def read_into(self, target: torch.Tensor) -> None:
        """Fills `target`, of the same shape."""
        target.copy_(self[...])


class DecodedTensor:
    """Base of tensors that are made from others of the file: float32 unless said otherwise, `decode()` makes them."""

    dtype = torch.float32
    shape: tuple[int, ...]

    def decode(self) -> torch.Tensor:
        raise NotImplementedError

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index) -> torch.Tensor:
        return self.decode() if index is Ellipsis else self.decode()[index].clone()  # lets go of the rest

    def read_into(self, target: torch.Tensor) -> None:
        """Decodes into `target`, of the same shape."""
        target.copy_(self.decode())


@dataclass(frozen=True)
class Fp8Weight(DecodedTensor):
    """A block FP8 matrix or stack and its scales, which decode to float32; or both as they are, from `stored`."""

    weight: TensorEntry
    weight_scale_inv: TensorEntry
    block_size: tuple[int, int]
    parts: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def decode(self) -> torch.Tensor:
        scales = LazyScales(self.weight_scale_inv)[...]
        return dequantize_block_fp8(self.weight.read(), scales, self.block_size, self.parts)

    def __getitem__(self, index) -> torch.Tensor:
        ranges = slice_ranges(index, self.shape)
        if ranges is None or (self.parts > 1 and len(self.shape) == 2):
            return super().__getitem__(index)
        output = torch.empty([stop - start for start, stop in ranges], dtype=self.dtype, device="cpu")
        if output.numel() == 0:
            return output
        if len(self.shape) > 2:
            (start, stop), *inner = ranges
            for target, matrix in zip(output, self.unbind()[start:stop]):
                target.copy_(matrix[tuple(slice(*span) for span in inner)])
            return output
        grid = [(start // size, -(-stop // size)) for (start, stop), size in zip(ranges, self.block_size)]
        firsts = [start * size for (start, _), size in zip(grid, self.block_size)]
        weight = self.weight.read_part(tuple(slice(first, stop) for first, (_, stop) in zip(firsts, ranges)))
        scale = LazyScales(self.weight_scale_inv)[tuple(slice(*span) for span in grid)]
        decoded = dequantize_block_fp8(weight, scale, self.block_size)
        top, left = (start - first for first, (start, _) in zip(firsts, ranges))
        return output.copy_(decoded[top:, left:])

    def unbind(self, dim: int = 0) -> list["Fp8Weight"]:
        """The matrices of a stack, unread."""
        assert dim == 0
        pairs = zip(self.weight.unbind(), self.weight_scale_inv.unbind())
        return [Fp8Weight(weight, scale, self.block_size, self.parts) for weight, scale in pairs]

    def stored(self) -> tuple[LazyTensor, LazyTensor]:
        """The FP8 values and the scales."""
        return LazyTensor(self.weight), LazyScales(self.weight_scale_inv)


@dataclass(frozen=True)
class Int4Weight(DecodedTensor):
    """A packed INT4 matrix with its scales."""

    weight_packed: TensorEntry
    weight_scale: TensorEntry
    shape: tuple[int, int]
    group_size: int

    def decode(self) -> torch.Tensor:
        scales = LazyScales(self.weight_scale)[...]
        return dequantize_packed_int4(self.weight_packed.read(), scales, self.shape, self.group_size)


@dataclass(frozen=True)
class QuantizedOnLoad:
    """A plain tensor that shall become block FP8 while it is read."""

    name: str
    source: Any
    block_size: tuple[int, int]
    ue8m0: bool
    parts: int = 1

    def get_shape(self) -> list[int]:
        return self.source.get_shape()

    def stored(self) -> tuple["QuantizedPart", "QuantizedPart"]:
        """The FP8 values and the scales."""
        shape = tuple(self.source.get_shape())
        grid = block_grid(shape, self.block_size, self.parts)
        return QuantizedPart(self, 0, shape, FP8), QuantizedPart(self, 1, grid, torch.float32)

    def quantize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads the tensor and returns its FP8 values and float32 scales."""
        tensor = self.source[...].to("cpu")
        if not tensor.isfinite().all():
            raise CheckpointError(f"Tensor {self.name} holds values that are not finite: it cannot be quantised.")
        pairs = [quantize_block_fp8(part, self.block_size, self.ue8m0) for part in tensor.chunk(self.parts, dim=-2)]
        return tuple(torch.cat(parts, dim=-2) if self.parts > 1 else parts[0] for parts in zip(*pairs))


@dataclass(frozen=True)
class QuantizedPart(DecodedTensor):
    """Values (index 0) or scales (index 1) of a tensor that is quantised while it is read."""

    owner: QuantizedOnLoad
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def decode(self) -> torch.Tensor:
        return self.owner.quantize()[self.index]

    def unbind(self, dim: int = 0) -> list["QuantizedPart"]:
        """The parts of the matrices of a stack, each quantised when it is read."""
        return [
            QuantizedPart(replace(self.owner, source=source), self.index, self.shape[1:], self.dtype)
            for source in self.owner.source.unbind(dim)
        ]


@dataclass(frozen=True)
class SlicedTensor:
    """A part of a lazy tensor, unread: first and last place, exclusive, in each dimension."""

    whole: Any
    ranges: tuple[tuple[int, int], ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def get_shape(self) -> list[int]:
        return [stop - start for start, stop in self.ranges]

    def unbind(self, dim: int = 0) -> list["SlicedTensor"]:
        """The same part of each slice along the first dimension."""
        (start, stop), *inner = self.ranges
        return [SlicedTensor(part, tuple(inner)) for part in self.whole.unbind(dim)[start:stop]]

    def read_into(self, target: torch.Tensor) -> None:
        """Reads the part into `target`, of its shape."""
        target.copy_(self.whole[tuple(slice(*span) for span in self.ranges)])


class DeferredTensor:
    """A lazy tensor that only notes where it shall go; the converter that stacks it reads it into its place.

    Transformers' loader reads ahead of its conversions, so that tensors would pile up beside the parameter that is
    made from them. `[...]`, slices, as tensor parallelism takes them, and `.to()` therefore give another note.
    """

    def __init__(self, source, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        self.source, self.device, self.dtype = source, device, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.get_shape())

    def get_shape(self) -> list[int]:
        return self.source.get_shape()

    def __getitem__(self, index):
        ranges = None if index is Ellipsis else slice_ranges(index, self.shape)
        if ranges is None:
            return self if index is Ellipsis else self.source[index]
        return DeferredTensor(SlicedTensor(self.source, ranges), self.device, self.dtype)

    def to(self, device=None, dtype: torch.dtype | None = None) -> "DeferredTensor":
        return DeferredTensor(self.source, device or self.device, dtype or self.dtype)

    def unbind(self, dim: int = 0) -> list["DeferredTensor"]:
        """Notes of the slices along the first dimension."""
        return [DeferredTensor(source, self.device, self.dtype) for source in self.source.unbind(dim)]

    def new_empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialised tensor where this one shall go."""
        return torch.empty(shape, dtype=self.dtype or self.source.dtype, device=self.device)

    def read_into(self, target: torch.Tensor) -> None:
        """Reads and decodes the tensor into `target`."""
        self.source.read_into(target)


def read_quantization_config(quantization_config: Any) -> dict[str, Any] | None:
    """The part of a `quantization_config` that decoding needs, or `None` for a method that is not ours to decode.

    Returns `{"quant_method": "fp8", "block_size": (rows, cols)}` or `{"quant_method": "int4", "group_size": n}`.

    Raises:
        ValueError: for FP8 without blocks, and for compressed-tensors formats other than packed symmetric INT4.
    """
    if quantization_config is None:
        return None
    fields = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
    method = fields.get("quant_method")
    if method == "fp8":
        block_size = fields.get("weight_block_size")
        if not is_block_size(block_size):
            raise ValueError(
                f"quantization_config of method 'fp8' has weight_block_size {block_size!r}; only block FP8, such as "
                "[128, 128], is read."
            )
        return {"quant_method": "fp8", "block_size": tuple(block_size)}
    if method == "compressed-tensors":
        groups = fields.get("config_groups") or {}
        weights = [group.get("weights") or {} for group in groups.values()]
        wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
        packed = fields.get("format") == "pack-quantized"
        if not packed or len(weights) != 1 or any(weights[0].get(key) != value for key, value in wanted.items()):
            raise ValueError(
                "quantization_config of method 'compressed-tensors' is not packed symmetric INT4 with groups "
                f"(format {fields.get('format')!r}, weights {weights}); only that form is read."
            )
        group_size = weights[0].get("group_size")
        if not _positive_integers([group_size], 1):
            raise ValueError(f"quantization_config of INT4 weights has group_size {group_size!r}; it must be positive.")
        return {"quant_method": "int4", "group_size": group_size}
    return None


def is_block_size(value: Any) -> bool:
    """Whether `value` is a pair of positive integers."""
    return _positive_integers(value, 2)


def _positive_integers(values: Any, count: int) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) == count
        and all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values)
    )


def plain_tensors(entries: dict[str, TensorEntry], quantization: dict[str, Any] | None) -> dict[str, Any]:
    """Tensors by name as the loader sees them: quantised weights under the name of the weight, scales gone.

    Raises:
        CheckpointError: for a quantised weight without its scales, scales without a weight, scales of the wrong grid,
            and quantised tensors in a checkpoint whose configuration does not say how they are quantised.
    """
    method = quantization["quant_method"] if quantization else None
    tensors: dict[str, Any] = {}
    used: set[str] = set()
    for name, entry in entries.items():
        if entry.dtype == FP8:
            scale = f"{name}_scale_inv"
            parts = 2 if name.endswith("gate_up_proj") else 1
            _require(method == "fp8", entry, "is FP8, but config.json has no `quantization_config` of method 'fp8'")
            _require(scale in entries, entry, f"has no scales: {scale} is missing")
            grid = block_grid(entry.shape, quantization["block_size"], parts)
            _require(entries[scale].shape == grid, entries[scale], f"has shape {entries[scale].shape}, not {grid}")
            tensors[name] = Fp8Weight(entry, entries[scale], quantization["block_size"], parts)
            used.update((name, scale))
        elif name.endswith(".weight_packed"):
            stem = name.removesuffix("_packed")
            _require(method == "int4", entry, "is packed, but config.json does not say that it is INT4")
            for part in (f"{stem}_scale", f"{stem}_shape"):
                _require(part in entries, entry, f"is incomplete: {part} is missing")
            tensors[stem] = _int4_weight(entry, entries[f"{stem}_scale"], entries[f"{stem}_shape"], quantization)
            used.update((name, f"{stem}_scale", f"{stem}_shape"))
    for name, entry in entries.items():
        if name not in used:
            stray = name.endswith("_scale_inv")
            _require(not stray, entry, f"belongs to no FP8 weight {name.removesuffix('_scale_inv')}")
            tensors[name] = LazyTensor(entry)
    return tensors


def _int4_weight(packed: TensorEntry, scale: TensorEntry, shape: TensorEntry, quantization) -> Int4Weight:
    group_size = quantization["group_size"]
    sizes = tuple(int(size) for size in shape.read().flatten())
    _require(_positive_integers(sizes, 2), shape, f"holds {sizes}, not the rows and columns of a matrix")
    for entry, width in ((packed, 8), (scale, group_size)):
        grid = (sizes[0], -(-sizes[1] // width))
        _require(entry.shape == grid, entry, f"has shape {entry.shape}, but {shape.name} and the format ask for {grid}")
    _require(packed.dtype == torch.int32, packed, f"has dtype {packed.dtype}, not int32")
    return Int4Weight(packed, scale, sizes, group_size)


def _require(condition: bool, entry: TensorEntry, problem: str) -> None:
    if not condition:
        raise CheckpointError(f"{entry.file.path}: tensor {entry.name} {problem}.")
