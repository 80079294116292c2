"""Pictures of `hf-moe route`. Every function takes a `Routing` and returns a matplotlib figure."""

from pathlib import Path

import numpy as np

from .charts import new_figure, save_figure
from .routing import LayerRouting, Routing, group_load, layer_statistics, top_pairs


def _labels(routing: Routing) -> list[str]:
    return [str(layer.layer) for layer in routing.layers]


def _height(routing: Routing) -> float:
    return min(14.0, 2.2 + 0.24 * len(routing.layers))


def _heat_map(figure, axes, values, routing: Routing, label: str, top: float) -> None:
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
    figure.colorbar(image, ax=axes, label=label, extend="max" if np.max(values) > top else "neither")
    step = max(1, len(routing.layers) // 30)
    axes.set_yticks(range(0, len(routing.layers), step), _labels(routing)[::step])
    axes.set_ylabel("layer")


def plot_load(routing: Routing):
    """Heat map: load of every expert of every layer against the mean of its layer."""
    figure = new_figure(10, _height(routing))
    axes = figure.subplots()
    width = max(layer.num_experts for layer in routing.layers)
    values = np.full((len(routing.layers), width), np.nan)
    for row, layer in enumerate(routing.layers):
        load = layer.tokens_per_expert()[: layer.num_experts].double()
        values[row, : layer.num_experts] = (load / load.mean().clamp(min=1e-12)).numpy()
    top = float(np.clip(np.nanquantile(values, 0.99), 2, None))
    _heat_map(figure, axes, values, routing, "choices / mean of the layer", top)
    axes.set(title=f"Expert load, {routing.model}, {routing.num_tokens:,} tokens", xlabel="expert")
    return figure


def plot_balance(routing: Routing, groups: int):
    """Entropy of the load, and the busiest expert and device against the mean, by layer."""
    figure = new_figure(9, 6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    rows = [layer_statistics(layer, groups, 0) for layer in routing.layers]
    places = range(len(rows))
    upper.plot(places, [row["normalised_entropy"] for row in rows], marker="o", markersize=4, color="#30638e")
    upper.set(title=f"Balance of the experts, {routing.model}", ylabel="entropy / its maximum")
    lowest = min(row["normalised_entropy"] for row in rows)
    upper.set_ylim(min(0.9, lowest - 0.02), 1.01)
    lower.plot(
        places,
        [row["max_over_mean"] for row in rows],
        marker="o",
        markersize=4,
        color="#d1495b",
        label="busiest expert",
    )
    label = f"busiest of {groups} devices"
    values = [row["group_max_over_mean"] for row in rows]
    lower.plot(places, values, marker="s", markersize=4, color="#edae49", label=label)
    lower.axhline(1, color="#888888", linewidth=1, linestyle="--")
    lower.set(xlabel="layer", ylabel="load / mean load")
    lower.set_ylim(0, 1.1 * max(max(row["max_over_mean"], row["group_max_over_mean"]) for row in rows))
    step = max(1, len(rows) // 20)
    lower.set_xticks(places[::step], _labels(routing)[::step])
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, alpha=0.25)
    return figure


def plot_tokens_per_expert(routing: Routing):
    """Experts of each layer in the order of their load, as shares of the layer's choices."""
    figure = new_figure(9, 4.8)
    axes = figure.subplots()
    import matplotlib
    import matplotlib.ticker

    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(routing.layers)))
    for layer, colour in zip(routing.layers, colours):
        load = layer.tokens_per_expert()[: layer.num_experts].double().sort(descending=True).values
        share = 100 * load / load.sum().clamp(min=1)
        places = range(1, layer.num_experts + 1)
        axes.plot(places, share.numpy(), color=colour, linewidth=1.2, label=f"layer {layer.layer}")
    first = routing.layers[0]
    axes.axhline(100 / first.num_experts, color="#888888", linewidth=1, linestyle="--")
    axes.text(first.num_experts, 100 / first.num_experts, "even ", va="bottom", ha="right", fontsize=8, color="#555555")
    title = f"Tokens per expert, {routing.model}, {routing.num_tokens:,} tokens"
    axes.set(title=title, xlabel="experts of a layer, busiest first", ylabel="share of the layer's choices (%)")
    axes.set_ylim(bottom=0)
    if len(routing.layers) <= 12:
        axes.legend(fontsize=8, frameon=False)
    else:
        numbers = [layer.layer for layer in routing.layers]
        norm = matplotlib.colors.Normalize(min(numbers), max(numbers))
        scale = matplotlib.cm.ScalarMappable(norm=norm, cmap=matplotlib.colors.ListedColormap(colours))
        figure.colorbar(scale, ax=axes, label="layer", ticks=matplotlib.ticker.MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.25)
    return figure


def plot_groups(routing: Routing, groups: int):
    """Heat map: load of every device group of every layer against the mean."""
    figure = new_figure(min(12, 4 + 0.5 * groups), _height(routing))
    axes = figure.subplots()
    values = np.stack([(load / load.mean().clamp(min=1e-12)).numpy() for load in _group_loads(routing, groups)])
    _heat_map(figure, axes, values, routing, "choices / mean of the layer", max(2.0, float(values.max())))
    axes.set_xticks(range(0, groups, max(1, groups // 16)))
    size = routing.layers[0].num_experts // groups
    axes.set(title=f"Load of {groups} devices with {size} experts each, {routing.model}", xlabel="device")
    return figure


def _group_loads(routing: Routing, groups: int):
    return [group_load(layer, groups) for layer in routing.layers]


def busiest_pair_layer(routing: Routing) -> LayerRouting:
    """The layer whose most frequent pair of experts stands out most."""
    return max(routing.layers, key=lambda layer: sum(pair["lift"] for pair in top_pairs(layer, 1)))


def plot_coactivation(routing: Routing, layer: int | None = None):
    """Heat map of one layer: how much more often than by chance two experts are chosen by one token.

    Raises:
        ValueError: for a layer without experts.
    """
    chosen = busiest_pair_layer(routing) if layer is None else None
    if layer is not None:
        chosen = next((entry for entry in routing.layers if entry.layer == layer), None)
    if chosen is None:
        raise ValueError(f"Layer {layer} has no experts; layers with experts are {', '.join(_labels(routing))}.")
    together = chosen.coactivation()
    alone = together.diagonal()
    lift = together * chosen.experts.shape[0] / (alone[:, None] * alone[None]).clamp(min=1)
    values = lift.numpy().copy()
    np.fill_diagonal(values, np.nan)
    top = float(np.clip(np.nanquantile(values, 0.995), 2, None))
    figure = new_figure(7.4, 6.2)
    axes = figure.subplots()
    image = axes.imshow(values, cmap="magma", vmin=0, vmax=top, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="chosen together / expected by chance", extend="max")
    axes.set(title=f"Pairs of experts in layer {chosen.layer}, {routing.model}", xlabel="expert", ylabel="expert")
    return figure


def plot_real_experts(routing: Routing):
    """Where there are zero experts: how many experts with weights a token meets, by layer."""
    figure = new_figure(9, _height(routing))
    axes = figure.subplots()
    most = max(layer.experts.shape[1] for layer in routing.layers)
    values = np.zeros((len(routing.layers), most + 1))
    for row, layer in enumerate(routing.layers):
        counts = np.bincount(layer.real_experts_per_token().numpy(), minlength=most + 1)
        values[row] = 100 * counts / counts.sum()
    _heat_map(figure, axes, values, routing, "tokens (%)", max(1.0, float(values.max())))
    means = [layer.real_experts_per_token().double().mean().item() for layer in routing.layers]
    axes.plot(means, range(len(means)), color="white", marker="o", markersize=4, linewidth=1, label="mean")
    axes.set_xticks(range(most + 1))
    axes.set(title=f"Real experts per token, {routing.model}; line: mean", xlabel="experts with weights")
    return figure


def save_route_charts(routing: Routing, groups: int, folder: Path, layer: int | None = None) -> list[Path]:
    """All pictures as PNG files in `folder`; returns their paths."""
    figures = {
        "load": plot_load(routing),
        "balance": plot_balance(routing, groups),
        "tokens_per_expert": plot_tokens_per_expert(routing),
        "groups": plot_groups(routing, groups),
        "coactivation": plot_coactivation(routing, layer),
    }
    if any(entry.num_zero_experts for entry in routing.layers):
        figures["real_experts"] = plot_real_experts(routing)
    folder.mkdir(parents=True, exist_ok=True)
    return [save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()]
