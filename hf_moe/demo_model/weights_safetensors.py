"""Safetensors files read by header: names, shapes and bytes, checked before any of them is used.

The format is an 8-byte little-endian header length, a JSON header and the tensor bytes. Reading it here rather than
through the library lets every complaint name the file and the tensor, and lets a tensor be decoded while it is loaded.
"""

import ctypes
import json
import mmap
import os
import platform
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_PIECE_BYTES = 1 << 24  # of rows that are read at a time where only some columns are kept
# Python names it from 3.13 on. Elsewhere its number is another one, or nothing is set aside anyway.
_LINUX_NORESERVE = 0x4000 if platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64") else 0
_NORESERVE = getattr(mmap, "MAP_NORESERVE", _LINUX_NORESERVE)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(OSError, ValueError):
    """A checkpoint that cannot be loaded as it is. The message names the file or tensor and what to do."""


class ShapeError(CheckpointError, RuntimeError):
    """A tensor whose shape is not what the configuration asks for; a `RuntimeError` too, as in Transformers."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its dtype, shape and byte range behind the header."""

    file: "SafetensorsFile"
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> torch.Tensor:
        """Reads the tensor into fresh memory."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")  # whatever the default device is
        self.read_into(tensor)
        return tensor

    def read_into(self, target: torch.Tensor) -> None:
        """Reads the tensor into `target`: contiguous, on the CPU, of this dtype and shape.

        Plain reads rather than a memory map: mapped pages would stay resident beside the parameters made from them.
        """
        assert target.is_contiguous() and target.dtype == self.dtype and tuple(target.shape) == self.shape
        size = self.end - self.begin
        buffer = memoryview((ctypes.c_char * size).from_address(target.data_ptr())).cast("B") if size else b""
        with open(self.file.path, "rb", buffering=0) as stream:
            stream.seek(self.file.data_offset + self.begin)
            done = 0
            while done < size:
                count = stream.readinto(buffer[done:])
                if not count:
                    raise CheckpointError(f"{self.file.path}: ended inside tensor {self.name}. Download it again.")
                done += count

    def read_part(self, index) -> torch.Tensor:
        """What `read()[index]` is, in memory of its own size. Slices of whole rows are all that is read of the file."""
        ranges = slice_ranges(index, self.shape)
        if ranges is None:
            return self.read()[index].clone()
        (start, stop), *inner = ranges
        rows = self.rows(start, stop)
        if all(span == (0, size) for span, size in zip(inner, self.shape[1:])):
            return rows.read()
        output = torch.empty([stop - start for start, stop in ranges], dtype=self.dtype, device="cpu")
        inner = tuple(slice(*span) for span in inner)
        if len(self.shape) > 2:
            for target, entry in zip(output, rows.unbind()):
                target.copy_(entry.read_part(inner))
            return output
        step = max(1, _PIECE_BYTES // max(1, self.shape[1] * self.dtype.itemsize))
        for first in range(0, len(output), step):
            last = min(first + step, len(output))
            output[first:last] = rows.rows(first, last).read()[:, inner[0]]
        return output

    def rows(self, start: int, stop: int) -> "TensorEntry":
        """The entry of `[start:stop]` along the first dimension."""
        size = (self.end - self.begin) // max(self.shape[0], 1)
        begin = self.begin + start * size
        return replace(self, shape=(stop - start, *self.shape[1:]), begin=begin, end=begin + (stop - start) * size)

    def unbind(self) -> list["TensorEntry"]:
        """The entries of the slices along the first dimension."""
        size = (self.end - self.begin) // max(self.shape[0], 1)
        begins = [self.begin + index * size for index in range(self.shape[0])]
        return [replace(self, shape=self.shape[1:], begin=begin, end=begin + size) for begin in begins]

    def map(self) -> torch.Tensor:
        """The tensor as a view of the file: read where and when it is used, never written back."""
        with open(self.file.path, "rb") as stream:
            mapped = _map_privately(stream.fileno())
        count = (self.end - self.begin) // self.dtype.itemsize
        offset = self.file.data_offset + self.begin
        return torch.frombuffer(mapped, dtype=self.dtype, count=count, offset=offset).view(self.shape)

    def same_bytes(self, other: "TensorEntry", chunk: int = 1 << 24) -> bool:
        """Whether two tensors are equal in dtype, shape and every byte, read in pieces."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        with open(self.file.path, "rb") as left, open(other.file.path, "rb") as right:
            left.seek(self.file.data_offset + self.begin)
            right.seek(other.file.data_offset + other.begin)
            for start in range(0, self.end - self.begin, chunk):
                count = min(chunk, self.end - self.begin - start)
                if left.read(count) != right.read(count):
                    return False
        return True


class SafetensorsFile:
    """Header of one safetensors file.

    Raises:
        CheckpointError: if the file is missing, is no safetensors file, or is shorter than its header says.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise CheckpointError(f"{self.path}: this shard is missing. Download it again.")
        self.size = os.path.getsize(self.path)
        with open(self.path, "rb") as stream:
            prefix = stream.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
            if header_bytes > min(_MAX_HEADER_BYTES, self.size):
                raise CheckpointError(f"{self.path}: not a safetensors file, or cut off inside its header.")
            try:
                header = json.loads(stream.read(header_bytes))
            except ValueError as error:
                raise CheckpointError(f"{self.path}: the safetensors header is damaged ({error}).") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path}: the safetensors header is damaged (it is no JSON object).")
        self.data_offset = 8 + header_bytes
        header.pop("__metadata__", None)
        self.entries = {name: self._entry(name, fields) for name, fields in header.items()}
        expected = self.data_offset + max((entry.end for entry in self.entries.values()), default=0)
        if self.size < expected:
            raise CheckpointError(
                f"{self.path}: truncated, {self.size:,} bytes where its header promises {expected:,}. "
                "Download it again."
            )

    def _entry(self, name: str, fields: dict) -> TensorEntry:
        try:
            dtype_name, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
            damaged = not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end))
        except (TypeError, KeyError, ValueError):
            damaged = True
        if damaged:
            raise CheckpointError(f"{self.path}: the safetensors header is damaged at tensor {name}.")
        dtype = DTYPES.get(dtype_name)
        if dtype is None:
            raise CheckpointError(f"{self.path}: tensor {name} has the unknown dtype {dtype_name}.")
        count = 1
        for size in shape:
            count *= size
        if end - begin != count * dtype.itemsize:
            raise CheckpointError(f"{self.path}: tensor {name} has {end - begin} bytes, not what its shape needs.")
        return TensorEntry(self, name, dtype, tuple(shape), begin, end)


def _map_privately(descriptor: int) -> mmap.mmap:
    """A file as writable memory whose changes stay here.

    No memory is set aside for those changes: the kernel refuses to do so for a file that is larger than the memory.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def slice_ranges(index, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...] | None:
    """First and last place, exclusive, of a slice or tuple of slices in each dimension; `None` for any other index."""
    parts = index if isinstance(index, tuple) else (index,)
    if not shape or len(parts) > len(shape) or not all(isinstance(part, slice) for part in parts):
        return None
    spans = [part.indices(size) for part, size in zip(parts, shape)]
    if any(step != 1 for _, _, step in spans):
        return None
    whole = [(0, size) for size in shape[len(parts) :]]
    return (*((start, max(start, stop)) for start, stop, _ in spans), *whole)


def open_files(paths: list[str], weight_map: dict[str, str] | None = None) -> dict[str, TensorEntry]:
    """Reads the headers of `paths` and returns all tensors by name.

    `weight_map`, the index of a sharded checkpoint, is checked against what the shards hold.

    Raises:
        CheckpointError: for an unreadable file, a tensor in two files, or an index that disagrees with its shards.
    """
    entries: dict[str, TensorEntry] = {}
    for path in paths:
        if not path.endswith(".safetensors"):
            raise CheckpointError(f"{path}: only safetensors files are read. Convert this checkpoint first.")
        for name, entry in SafetensorsFile(path).entries.items():
            if name in entries:
                raise CheckpointError(f"Tensor {name} is in both {entries[name].file.path} and {path}.")
            entries[name] = entry
    for name, filename in (weight_map or {}).items():
        entry = entries.get(name)
        if entry is None or os.path.basename(entry.file.path) != os.path.basename(filename):
            raise CheckpointError(f"The index says that {filename} holds {name}, but it does not.")
    return entries


def variant_names(variant: str | None = None) -> tuple[str, str]:
    """Names of the single weight file and of the index; a variant stands before the last suffix, as in Transformers."""
    names = (SINGLE_NAME, INDEX_NAME)
    if not variant:
        return names
    return tuple(f"{stem}.{variant}.{suffix}" for stem, _, suffix in (name.rpartition(".") for name in names))


def check_folder(folder: str | os.PathLike, variant: str | None = None) -> None:
    """Checks the weight files of a local checkpoint folder: index, paths, presence, headers and lengths.

    Raises:
        CheckpointError: that names the file and what is wrong with it.
    """
    folder = Path(folder)
    single, index_path = (folder / name for name in variant_names(variant))
    if single.is_file():
        SafetensorsFile(single)
    elif index_path.is_file():
        _check_index(folder, index_path)
    else:
        pickles = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix))
        if pickles:
            raise CheckpointError(
                f"{folder} holds its weights as pickles ({', '.join(pickles[:3])}), which can run code when they are "
                "read, and hf_moe does not read them. Convert them to safetensors first."
            )


def _check_index(folder: Path, index_path: Path) -> None:
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        filenames = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index_path}: not a checkpoint index ({error!r}).") from error
    if not filenames:
        raise CheckpointError(f"{index_path}: the index names no tensor.")
    for filename in filenames:
        if Path(filename).name != filename or filename in ("", ".", ".."):
            raise CheckpointError(f"{index_path}: names {filename!r}, which is not a file of this folder.")
        if not (folder / filename).is_file():
            raise CheckpointError(
                f"{folder / filename}: this shard of {index_path.name} is missing. Download it again."
            )
    open_files([str(folder / filename) for filename in filenames], weight_map)


def raise_caught(conversion_errors: dict[str, str]) -> None:
    """Raises the first `CheckpointError` that Transformers caught, as the text of a traceback, in a conversion."""
    for text in conversion_errors.values():
        found = re.search(r"CheckpointError: (.+)", text)
        if found:
            raise CheckpointError(found.group(1))
