"""Files of a conversion: which tensors go where, decided from names, dtypes and shapes before any of them is made.

So that headers can be written first, bytes can come in any order and from several threads, and every file has the same
bytes whoever writes it.
"""

import hashlib
import json
import math
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..models.weights_safetensors import DTYPES, SINGLE_NAME, CheckpointError
from .plan import Copy, Group, Output, Part, Plan
from .source import Source, SourceTensor

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE_BYTES = 8 << 20  # read and written at once
HASH_BYTES = 1 << 20
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as `5GB` (10^9), `500MiB` (2^20) or a plain number.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{size!r} is no size; write 5GB, 500MB, 2GiB or a number of bytes.")
    unit = match[2].upper()
    count = int(float(match[1]) * (_BINARY_UNITS[unit] if match[3] else _UNITS[unit]))
    if count < 1:
        raise ValueError(f"A size of {size!r} is too small.")
    return count


@dataclass(frozen=True)
class Piece:
    """What one worker does at a time: a whole group, a run of its strips, or some bytes of a copy.

    `begin` and `end` count bytes of the output for copies and strips otherwise; `memory` is that of inputs and outputs.
    The bytes of a copy are those of one input, `source`, whose first one stands at byte `start` of the output.
    """

    shard: "Shard"
    group: Group
    begin: int
    end: int
    memory: int
    source: str | Part | None = None
    start: int = 0


@dataclass(eq=False)
class Shard:
    """A file to be written: its groups, its header, and where each tensor's bytes begin."""

    filename: str
    groups: list[Group]
    header: bytes
    offsets: dict[str, int]
    size: int

    @property
    def outputs(self) -> Iterator[Output]:
        return (output for group in self.groups for output in group.outputs)


def lay_out(plan: Plan, max_shard_size: int) -> list[Shard]:
    """The files of a plan, in the order in which they are written.

    Raises:
        ValueError: if two outputs have the same name, or a group's outputs shall go to different files.
    """
    names = [output.name for group in plan.groups for output in group.outputs]
    if not names:
        raise CheckpointError("Nothing would be written: the conversion leaves no tensor.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"The conversion would write tensor {twice} twice: two tensors of the source become it.")
    parts: dict[str, list[Group]] = {}
    if plan.shard_of is not None:
        for group in plan.groups:
            filenames = {plan.shard_of(output.name) for output in group.outputs}
            if len(filenames) != 1:
                raise ValueError(f"a group's outputs belong to {len(filenames)} files: {sorted(filenames)}")
            parts.setdefault(filenames.pop(), []).append(group)
    else:
        runs = _runs(plan.groups, max_shard_size)
        for index, run in enumerate(runs):
            many = f"model-{index + 1:05d}-of-{len(runs):05d}.safetensors"
            parts[many if len(runs) > 1 else SINGLE_NAME] = run
    return [_shard(filename, groups, plan.stored_name or str) for filename, groups in parts.items()]


def _runs(groups: list[Group], max_shard_size: int) -> list[list[Group]]:
    runs: list[list[Group]] = [[]]
    used = 0
    for group in groups:
        size = sum(output.nbytes for output in group.outputs)
        if runs[-1] and used + size > max_shard_size:
            runs.append([])
            used = 0
        runs[-1].append(group)
        used += size
    return runs


def _shard(filename: str, groups: list[Group], stored_name: Callable[[str], str]) -> Shard:
    outputs = [output for group in groups for output in group.outputs]
    # Readers view bytes as numbers, for which a tensor must begin at a multiple of its element size. In the order of
    # the groups, in which bytes are made and checksums taken along, this holds for the sizes of real models.
    position = 0
    for output in outputs:
        if position % output.dtype.itemsize:
            outputs.sort(key=lambda output: -output.dtype.itemsize)
            break
        position += output.nbytes
    begins, position = {}, 0
    for output in outputs:
        begins[output.name] = position
        position += output.nbytes
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for output in outputs:
        begin = begins[output.name]
        header[stored_name(output.name)] = {
            "dtype": DTYPE_NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [begin, begin + output.nbytes],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + begin for name, begin in begins.items()}
    return Shard(filename, groups, struct.pack("<Q", len(text)) + text, offsets, start + position)


def source_part(source: Source, part: str | Part) -> SourceTensor:
    """The unread tensor that an input names; of a part by columns the tensor of all its columns."""
    if isinstance(part, str):
        return source.entries[part]
    entry = source.entries[part.name]
    if part.flat:
        entry = replace(entry, shape=(math.prod(entry.shape[:-1]), entry.shape[-1]))
    return entry.rows(part.begin, part.end) if part.dim == 0 else entry


def by_rows(group: Group) -> bool:
    """Whether the group copies columns, which do not lie together in the source."""
    return isinstance(group.step, Copy) and isinstance(group.inputs[0], Part) and group.inputs[0].dim == 1


def pieces_of(source: Source, shard: Shard, group: Group) -> list[Piece]:
    """The pieces of a group, which together make all bytes of its outputs."""
    read = sum(source_part(source, part).nbytes for part in group.inputs)
    written = sum(output.nbytes for output in group.outputs)
    if isinstance(group.step, Copy) and not by_rows(group):
        if read != written:
            raise ValueError(f"{group.outputs[0].name} has {written} bytes, but what is copied there {read}")
        return list(_copies(source, shard, group))
    count = strips_of(source, group)
    if count is None:
        return [Piece(shard, group, 0, 1, read + written)]
    run = max(1, int(PIECE_BYTES * count / max(read + written, 1)))
    memory = -(-(read + written) * run // max(count, 1))
    return [Piece(shard, group, begin, min(begin + run, count), memory) for begin in range(0, count, run)]


def _copies(source: Source, shard: Shard, group: Group) -> Iterator[Piece]:
    chunk, start = PIECE_BYTES // 2, 0
    for part in group.inputs:
        stop = start + source_part(source, part).nbytes
        for begin in range(start, stop, chunk):
            end = min(begin + chunk, stop)
            yield Piece(shard, group, begin, end, end - begin, part, start)
        start = stop


def strips_of(source: Source, group: Group) -> int | None:
    """How many strips a group has; `None` if it has none.

    Raises:
        ValueError: if its tensors disagree.
    """
    if by_rows(group):
        return group.outputs[0].shape[0]
    if group.strip is None:
        return None
    rows = {part: source.entries[part].shape[0] for part in group.inputs if isinstance(part, str)}
    rows |= {output.name: output.shape[0] for output in group.outputs}
    counts = {-(-count // group.strip[name]) for name, count in rows.items()}
    if len(counts) != 1 or any(isinstance(part, Part) for part in group.inputs):
        raise ValueError(f"the strips of {group.outputs[0].name} disagree: {rows} rows in strips of {group.strip}")
    return counts.pop()


class ShardWriter:
    """A shard under way: takes bytes from any thread, and knows how far it is complete from its beginning."""

    def __init__(self, path: Path, shard: Shard):
        self.path, self.shard = path, shard
        self.stream = open(path, "w+b", buffering=0)
        self.done: dict[int, int] = {}  # begin to end of what is written beyond `complete`
        self.complete = 0
        self.changed = threading.Condition()
        self.report: dict[int, dict[str, float]] = {}
        os.truncate(self.stream.fileno(), shard.size)
        self.write(0, memoryview(shard.header))

    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes at a place of their own."""
        if not len(data):
            return
        end, begin = offset + len(data), offset
        while len(data):
            count = os.pwrite(self.stream.fileno(), data, offset)
            offset, data = offset + count, data[count:]
        with self.changed:
            self.done[begin] = end
            while self.complete in self.done:
                self.complete = self.done.pop(self.complete)
            self.changed.notify_all()

    def hash(self, stop: threading.Event) -> str | None:
        """SHA-256 of the file, read back as it grows; `None` if `stop` was set before it was complete."""
        digest, position, buffer = hashlib.sha256(), 0, bytearray(HASH_BYTES)
        while position < self.shard.size:
            with self.changed:
                while self.complete == position and not stop.is_set():
                    self.changed.wait(0.2)
                available = self.complete
            if stop.is_set():
                return None
            while position < available:
                view = memoryview(buffer)[: min(HASH_BYTES, available - position)]
                count = os.preadv(self.stream.fileno(), [view], position)
                if not count:
                    raise CheckpointError(f"{self.path}: became shorter while it was written.")
                digest.update(view[:count])
                position += count
        return digest.hexdigest()


def file_hash(path: Path, stop: threading.Event | None = None) -> str | None:
    """SHA-256 of a file; `None` if `stop` was set meanwhile."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(HASH_BYTES):
            if stop is not None and stop.is_set():
                return None
            digest.update(block)
    return digest.hexdigest()
