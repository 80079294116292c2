"""What differs between two checkpoints of one model: names, shapes, and the error of every tensor's values.

FP8 and INT4 weights are compared decoded, and fused experts with the upstream matrices that they are made of.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .plain import Plain, plain_view
from .progress import ProgressDisplay
from .source import Source

_PIECE = 1 << 18  # elements that are compared at a time: they stay in the processor's cache


@dataclass(frozen=True)
class Difference:
    """One tensor that both checkpoints have.

    Attributes:
        name: upstream.
        left, right: how each checkpoint stores it: `bfloat16`, `fp8`, `int4`, ...
        max_abs: largest difference of two values.
        relative: norm of the difference over the norm of the right-hand tensor.
    """

    name: str
    left: str
    right: str
    max_abs: float
    relative: float


@dataclass
class Comparison:
    """The whole report; tensors are those of both, in order of the error, the largest first."""

    tensors: list[Difference] = field(default_factory=list)
    only_left: list[str] = field(default_factory=list)
    only_right: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def equal(self) -> int:
        """How many tensors have equal values."""
        return sum(tensor.max_abs == 0 for tensor in self.tensors)

    @property
    def worst(self) -> float:
        """The largest relative error; infinite where names or shapes differ."""
        if self.only_left or self.only_right or self.shapes:
            return math.inf
        return self.tensors[0].relative if self.tensors else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As `hf-moe verify --json` prints it."""
        return {
            "equal": self.equal,
            "worst": None if math.isinf(self.worst) else self.worst,
            "only_left": self.only_left,
            "only_right": self.only_right,
            "shapes": {name: [list(left), list(right)] for name, (left, right) in self.shapes.items()},
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }


def compare_checkpoints(left: Source, right: Source, progress: bool = False) -> Comparison:
    """Compares the tensors of two checkpoints piece by piece; `progress` says on standard error how far it is.

    Raises:
        CheckpointError: for quantised tensors that cannot be decoded.
    """
    mine, theirs = plain_view(left.entries, left.config), plain_view(right.entries, right.config)
    output = Comparison(
        only_left=sorted(set(mine) - set(theirs)),
        only_right=sorted(set(theirs) - set(mine)),
    )
    output.shapes = {
        name: (mine[name].shape, theirs[name].shape)
        for name in sorted(set(mine) & set(theirs))
        if mine[name].shape != theirs[name].shape
    }
    sizes = {name: 2 * math.prod(mine[name].shape) for name in sorted(set(mine) & set(theirs) - set(output.shapes))}
    with ProgressDisplay(f"{left.name} and {right.name}, as bfloat16", sum(sizes.values()), progress) as display:
        for name, size in sizes.items():
            output.tensors.append(_difference(mine[name], theirs[name]))
            display.advance(size)
    output.tensors.sort(key=lambda tensor: (-tensor.relative, tensor.name))
    return output


def _difference(left: Plain, right: Plain) -> Difference:
    largest, error, norm = 0.0, 0.0, 0.0
    for begin, end in left.runs():
        for a, b in zip(left.read(begin, end).flatten().split(_PIECE), right.read(begin, end).flatten().split(_PIECE)):
            a, b = a.double(), b.double()
            a -= b
            low, high = (bound.item() for bound in a.aminmax())
            # NaN in both is no difference that a number could say: it stays NaN and comes first.
            largest = math.nan if math.isnan(low) else max(largest, -low, high)
            error += torch.dot(a, a).item()
            norm += torch.dot(b, b).item()
    relative = math.sqrt(error / norm) if norm else (0.0 if error == 0 else math.inf)
    if not (math.isfinite(error) and math.isfinite(largest)):  # infinite values on one side or both, too
        largest = relative = math.inf
    return Difference(left.name, left.kind, right.kind, largest, relative)
