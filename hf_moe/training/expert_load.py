"""How evenly a router loads its experts: numbers for a log, and a heat map, layer by expert."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class LayerLoad:
    """Choices of one layer.

    Attributes:
        layer: index of the decoder layer.
        counts: (E,) choices of each expert, zero experts behind the `num_experts` real ones.
        num_experts: experts with weights.
    """

    layer: int
    counts: torch.Tensor
    num_experts: int

    def tokens_per_expert(self) -> torch.Tensor:
        return self.counts

    @property
    def real(self) -> torch.Tensor:
        """(N,) choices of the experts with weights, float64."""
        return self.counts[: self.num_experts].double()

    def max_over_mean(self) -> float:
        """Load of the busiest expert over the mean: 1 if even, NaN without tokens."""
        return (self.real.max() / self.real.mean()).item()

    def entropy(self) -> float:
        """Entropy of the load over its maximum: 1 if even, 0 if one expert gets everything, NaN without tokens."""
        if self.num_experts == 1:
            return 1.0
        share = self.real / self.real.sum()
        return -torch.special.xlogy(share, share).sum().item() / math.log(self.num_experts)

    def dead_experts(self) -> int:
        """Experts that nothing chose."""
        return int((self.real == 0).sum())


@dataclass(frozen=True)
class Load:
    """Choices of every layer with experts; what the pictures of `hf_moe.inspect` read of a routing.

    Attributes:
        model: its name, for titles.
        layers: one entry a layer.
        num_tokens: tokens that a layer routed.
    """

    model: str
    layers: list[LayerLoad]
    num_tokens: int

    def metrics(self, prefix: str = "router_") -> dict[str, float]:
        """Numbers for a log, over the layers that routed anything: the mean and the largest `max_over_mean`, the mean
        `entropy`, the share of `dead_experts`, and with zero experts the real experts that a token got.
        """
        layers = [layer for layer in self.layers if layer.counts.sum() > 0]
        if not layers:
            return {}
        ratios = [layer.max_over_mean() for layer in layers if layer.real.sum() > 0] or [math.nan]
        experts = sum(layer.num_experts for layer in layers)
        values = {
            "max_over_mean": sum(ratios) / len(ratios),
            "max_over_mean_worst": max(ratios),
            "entropy": sum(layer.entropy() for layer in layers if layer.real.sum() > 0) / len(ratios),
            "dead_experts": sum(layer.dead_experts() for layer in layers) / experts,
        }
        if any(layer.counts.numel() > layer.num_experts for layer in layers) and self.num_tokens:
            per_layer = sum(layer.real.sum().item() for layer in layers) / len(layers)
            values["real_experts_per_token"] = per_layer / self.num_tokens
        return {prefix + name: value for name, value in values.items()}

    def save_heat_map(self, path: str | Path) -> Path:
        """Load of each expert over the mean of its layer as a PNG, layer by expert.

        Raises:
            ValueError: before any token was counted.
            ImportError: without matplotlib.
        """
        from hf_moe.inspect.charts import save_figure
        from hf_moe.inspect.route_charts import plot_load

        if not any(layer.counts.sum() > 0 for layer in self.layers):
            raise ValueError("No tokens were routed yet: train a step before drawing the load of the experts.")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return save_figure(plot_load(self), path)
