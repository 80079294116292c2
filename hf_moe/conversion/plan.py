"""What a conversion does, before it does it: which tensors become which, how, and in which order.

A plan is a list of groups. A group is the smallest part that is converted at once: a weight with its scales, say. Where
the rows of a group can be converted in strips, the group says so, and is never in memory as a whole.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .source import Source

Tensors = dict[str, torch.Tensor]
# Tensors of the inputs by name to tensors of the outputs by name, and, where there is something to count, numbers that
# are added up over the conversion (those whose name starts with "max_" are compared instead).
Step = Callable[[Tensors], Tensors | tuple[Tensors, dict[str, float]]]


@dataclass(frozen=True)
class Output:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Part:
    """Some rows (`dim` 0) or columns (`dim` 1) of a tensor of the source, as an input of a group.

    The step sees the part under the tensor's name, or under `alias`, by which several parts of one tensor are told
    apart. With `flat`, rows are counted through all matrices of a stack.
    """

    name: str
    begin: int
    end: int
    dim: int = 0
    alias: str | None = None
    flat: bool = False


@dataclass(frozen=True)
class Copy:
    """Step of groups of one output whose bytes are those of the inputs, one after the other: no tensor is made.

    Or of some columns of one input.
    """

    def __call__(self, tensors: Tensors) -> Tensors:
        raise AssertionError("bytes are copied by the engine")


@dataclass(frozen=True)
class Group:
    """Tensors that are converted together, and written to the same file.

    Attributes:
        inputs: names of tensors of the source, or parts of them.
        outputs: what the step returns, exactly.
        step: a function without side effects, which may run on any thread; it need not keep its inputs.
        strip: rows of the first dimension, by input and output name (every one of them), that form one strip: strip i
            is rows `i * rows` to `(i + 1) * rows` of each, cut off at its end, and the step may be given any run of
            whole strips. Left out: the step needs the whole group. Not for groups with parts.
    """

    inputs: tuple[str | Part, ...]
    outputs: tuple[Output, ...]
    step: Step
    strip: Mapping[str, int] | None = None


@dataclass
class Plan:
    """A conversion.

    Attributes:
        title: what it is, for people: "block FP8 to bfloat16".
        groups: in the order in which they are written.
        config: the new `config.json`; `None`: there is none.
        files: further small files by name.
        carried: names of files of the source that are copied; `None`: all that the source has to carry.
        options: what else decides about the result, for the manifest; JSON.
        shard_of: the file of each output, for layouts of their own, which have no index; left out: shards and index
            as on the Hub.
        notes: what the user should know, one sentence each.
        stored_name: the name of each output inside its file, where files hold tensors of the same name; left out: its
            own.
    """

    title: str
    groups: list[Group]
    config: dict[str, Any] | None
    files: dict[str, bytes] = field(default_factory=dict)
    carried: tuple[str, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    shard_of: Callable[[str], str] | None = None
    notes: list[str] = field(default_factory=list)
    stored_name: Callable[[str], str] | None = None


def copy_group(source: Source, name: str, new_name: str | None = None) -> Group:
    """A tensor as it is, under its name or another."""
    entry = source.entries[name]
    return Group((name,), (Output(new_name or name, entry.dtype, entry.shape),), Copy())
