"""Low-rank factors (LoRA) of routed experts, as they go along with a call.

Shapes: T tokens, K choices per token, E experts, H hidden, I intermediate, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class ExpertLora:
    """Low-rank factors of each expert; a pair is `None` where its weight has none.

    Attributes:
        gate_up_a: (E, R, H).
        gate_up_b: (E, 2I, R).
        down_a: (E, R, I).
        down_b: (E, H, R).
        gate_up_scaling, down_scaling: factor of each product, such as alpha / R.
        kept_hidden: (T, H) bool, what dropout keeps of the tokens on their way into `gate_up_a`.
        kept_inner: (T * K, I) bool in the order of the slots, the same for `down_a`.
        dropout: probability with which the masks were drawn; kept values are divided by 1 - `dropout`.
    """

    gate_up_a: torch.Tensor | None = None
    gate_up_b: torch.Tensor | None = None
    down_a: torch.Tensor | None = None
    down_b: torch.Tensor | None = None
    gate_up_scaling: float = 1.0
    down_scaling: float = 1.0
    kept_hidden: torch.Tensor | None = None
    kept_inner: torch.Tensor | None = None
    dropout: float = 0.0

    @property
    def factors(self) -> tuple[torch.Tensor | None, ...]:
        return self.gate_up_a, self.gate_up_b, self.down_a, self.down_b

    @property
    def kept_factor(self) -> float:
        return 1.0 / (1.0 - self.dropout) if self.dropout < 1.0 else 0.0

    @property
    def alphas(self) -> tuple[float, float]:
        """Factor of both low-rank products, with that of dropout: applied to sums, it costs no rounding of its own."""
        masks = (self.kept_hidden, self.kept_inner)
        scalings = (self.gate_up_scaling, self.down_scaling)
        return tuple(s if kept is None else s * self.kept_factor for s, kept in zip(scalings, masks))

    def add(self, product: torch.Tensor, rows: torch.Tensor, name: str, expert: int, at: torch.Tensor) -> torch.Tensor:
        """`product`, of one expert's `rows` with its weight, and the low-rank part; `name` is `"gate_up"` or `"down"`,
        `at` the places of the rows among tokens or slots."""
        a, b = getattr(self, f"{name}_a"), getattr(self, f"{name}_b")
        if a is None:
            return product
        kept = self.kept_hidden if name == "gate_up" else self.kept_inner
        if kept is not None:
            rows = rows * kept[at] * self.kept_factor
        low = F.linear(F.linear(rows.to(a.dtype), a[expert]), b[expert])
        return product + (getattr(self, f"{name}_scaling") * low).to(product.dtype)
