"""What is said about a call of routed experts beside its tensors."""

from __future__ import annotations

from typing import NamedTuple

from .kernel_tiles import SCALE_BLOCK

SCALE_BLOCKS = (SCALE_BLOCK, SCALE_BLOCK)  # rows and columns that share a scale in FP8 releases


class ExpertOptions(NamedTuple):
    """Numbers and names that a call of routed experts is traced with.

    Attributes:
        quantize: FP8 weights are multiplied with rows that were quantised, too; `None` where that is faster.
        ue8m0: the scales of quantised rows are powers of two.
        activation: of the gate, a form of `op_activation`.
        limit: the gate goes into the activation up to it, and its factor from minus to plus it; 0: as they are.
        block_size: rows and columns of FP8 weights that share a scale.
    """

    quantize: bool | None = False
    ue8m0: bool = False
    activation: str = "silu"
    limit: float = 0.0
    block_size: tuple[int, int] = SCALE_BLOCKS
