"""Rows of tokens: whole samples, one to a row or packed, whose tokens lie in an Arrow file.

The file is mapped into memory by `datasets`: what a process holds of a sample is its place, whatever its length, and
processes of one machine share what the system keeps of the file.
"""

import bisect
import functools
import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

IGNORE_INDEX = -100
# Tokens that are written, or hashed, at once.
_BATCH_TOKENS = 1 << 18


@dataclass
class TokenRows(Dataset):
    """Rows of samples: row i has the samples `order[row_starts[i] : row_starts[i + 1]]`.

    Attributes:
        samples: `datasets.Dataset` of `input_ids`, `labels` and `targets`, how many of the labels are learnt.
        order: (samples,) int64, indices of `samples`, of which these rows may have a part.
        row_starts: (rows + 1,) int64.
    """

    samples: Any
    order: np.ndarray
    row_starts: np.ndarray
    packed: bool = False
    dropped: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self._tables = self.samples.with_format("arrow")

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def __getitem__(self, index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(ids, labels) of every sample of a row, (length,) int64 each."""
        found = self._tables[self.order[self.row_starts[index] : self.row_starts[index + 1]].tolist()]
        ids, labels = (_pieces(found, name) for name in ("input_ids", "labels"))
        return [tuple(torch.from_numpy(piece.astype(np.int64)) for piece in pair) for pair in zip(ids, labels)]

    @property
    def num_samples(self) -> int:
        return len(self.order)

    @property
    def num_tokens(self) -> int:
        return int(sample_lengths(self.samples)[self.order].sum())

    @functools.cached_property
    def num_targets(self) -> int:
        return int(self._tables[:]["targets"].to_numpy()[self.order].sum())

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short name of the content and its order."""
        digest, chosen = hashlib.sha256(), np.sort(self.order)
        lengths = sample_lengths(self.samples)[chosen]
        size = max(1, _BATCH_TOKENS // max(1, int(lengths.max(initial=1))))
        for name in ("input_ids", "labels"):
            for start in range(0, len(chosen), size):
                for piece in _pieces(self._tables[chosen[start : start + size].tolist()], name):
                    digest.update(np.ascontiguousarray(piece))
        digest.update(np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).tobytes())
        digest.update(np.diff(self.row_starts).tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def from_samples(cls, samples: Iterable[tuple[list[int], list[int]]], max_length: int, packed: bool) -> "TokenRows":
        """Rows of samples that stay in memory."""
        import pyarrow
        from datasets import Dataset as Samples

        return cls.from_dataset(Samples(pyarrow.Table.from_batches(_batches(samples), _schema())), max_length, packed)

    @classmethod
    def from_dataset(cls, samples, max_length: int, packed: bool, chosen: np.ndarray | None = None) -> "TokenRows":
        """Rows of one sample, or packed ones of at most `max_length` tokens, of the `chosen` samples or all."""
        chosen = np.arange(len(samples)) if chosen is None else chosen
        if not packed:
            return cls(samples, chosen, np.arange(len(chosen) + 1), packed)
        rows = pack(sample_lengths(samples)[chosen].tolist(), max_length)
        order = np.fromiter((sample for row in rows for sample in row), np.int64, len(chosen))
        row_starts = np.cumsum([0, *map(len, rows)])
        return cls(samples, chosen[order], row_starts, packed)


def pack(lengths: list[int], size: int) -> list[list[int]]:
    """Best fit, the longest first: rows of sample indices whose lengths add up to at most `size`."""
    rows: list[list[int]] = []
    waiting: dict[int, list[int]] = {}  # rows by the room that they have; heaps
    rooms: list[int] = []  # the keys of `waiting`, sorted
    for sample in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        at = bisect.bisect_left(rooms, lengths[sample])
        if at == len(rooms):
            room, row = size, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = heapq.heappop(waiting[room])
            if not waiting[room]:
                del waiting[room], rooms[at]
        rows[row].append(sample)
        room -= lengths[sample]
        if room not in waiting:
            waiting[room] = []
            bisect.insort(rooms, room)
        heapq.heappush(waiting[room], row)
    return rows


def write_samples(path: Path, samples: Iterable[tuple[list[int], list[int]]]) -> int:
    """Writes (ids, labels) to an Arrow file, which appears when it is complete; returns how many there are."""
    import pyarrow

    count, temporary = 0, path.with_name(path.name + ".tmp")
    with pyarrow.OSFile(str(temporary), "wb") as file, pyarrow.ipc.new_stream(file, _schema()) as writer:
        for batch in _batches(samples):
            writer.write_batch(batch)
            count += batch.num_rows
    temporary.replace(path)
    return count


def sample_lengths(samples) -> np.ndarray:
    """(samples,) tokens of each."""
    from pyarrow import compute

    return compute.list_value_length(samples.with_format("arrow")[:]["input_ids"]).to_numpy()


def _schema():
    import pyarrow

    tokens = pyarrow.list_(pyarrow.int32())
    return pyarrow.schema([("input_ids", tokens), ("labels", tokens), ("targets", pyarrow.int32())])


def _batches(samples: Iterable[tuple[list[int], list[int]]]) -> Iterator[Any]:
    """Record batches of samples, some at a time."""
    ids, labels, tokens = [], [], 0
    for sample_ids, sample_labels in samples:
        ids.append(np.asarray(sample_ids, dtype=np.int32))
        labels.append(np.asarray(sample_labels, dtype=np.int32))
        tokens += len(sample_ids)
        if tokens >= _BATCH_TOKENS:
            yield _batch(ids, labels)
            ids, labels, tokens = [], [], 0
    if ids:
        yield _batch(ids, labels)


def _batch(ids: list[np.ndarray], labels: list[np.ndarray]):
    import pyarrow

    starts = pyarrow.array(np.cumsum([0, *map(len, ids)]), pyarrow.int32())
    columns = [pyarrow.ListArray.from_arrays(starts, pyarrow.array(np.concatenate(rows))) for rows in (ids, labels)]
    targets = [int((row != IGNORE_INDEX).sum()) for row in labels]
    return pyarrow.record_batch([*columns, pyarrow.array(targets, pyarrow.int32())], schema=_schema())


def _pieces(table, name: str) -> list[np.ndarray]:
    """The lists of a column, one after the other; views of its memory."""
    pieces = []
    for chunk in table[name].chunks:
        starts = chunk.offsets.to_numpy()
        pieces += np.split(chunk.flatten().to_numpy(), (starts[1:-1] - starts[0]))
    return pieces
