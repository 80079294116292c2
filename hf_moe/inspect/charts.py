"""Pictures of `hf-moe inspect`. Every function takes records of `inspect_model` and returns a matplotlib figure."""

from pathlib import Path
from typing import Any

import numpy as np

from ..units import count_text
from . import cost
from .accelerators import Accelerator

PART_COLOURS = {
    "embedding": "#9aa5b1",
    "head": "#5f6c7b",
    "attention": "#d1495b",
    "dense": "#edae49",
    "shared": "#8d6a9f",
    "routed": "#30638e",
    "router": "#00798c",
    "norm": "#c2c5bb",
    "mtp": "#66a182",
    "vision": "#bc8034",
}
_LINES = ("#30638e", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#00798c", "#5f6c7b", "#bc8034", "#9aa5b1", "#2e4057")
_MARKERS = "osD^vPX*<>"


def new_figure(width: float, height: float):
    """A figure that belongs to no window.

    Raises:
        ImportError: without matplotlib, and says how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Charts need matplotlib: pip install 'hf-moe[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=130)


def save_figure(figure, path: Path) -> Path:
    """Writes a PNG through a temporary name."""
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png")
    part.replace(path)
    return path


def plot_parameters(records: list[dict[str, Any]]):
    """Total and activated parameters by part, one bar a model."""
    figure = new_figure(11, 1.8 + 0.42 * len(records))
    names = [record["name"] for record in records]
    shown = [part for part in cost.PARTS if any(record["parts"][part]["total"] for record in records)]
    for axes, kind, title in zip(figure.subplots(1, 2, sharey=True), ("total", "active"), ("All", "Active per token")):
        left = np.zeros(len(records))
        for part in shown:
            values = np.array([record["parts"][part][kind] / 1e9 for record in records])
            axes.barh(names, values, left=left, color=PART_COLOURS[part], label=part, height=0.7)
            left += values
        for row, value in enumerate(left):
            axes.text(value, row, f" {count_text(value * 1e9)}", va="center", fontsize=8)
        axes.set(title=title, xlabel="parameters (billions)", xlim=(0, 1.14 * left.max()))
        _clean(axes)
    axes.invert_yaxis()
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(shown), 10), fontsize=8, frameon=False)
    return figure


def plot_kv_cache(records: list[dict[str, Any]]):
    """Bytes of cache at the context of the records, and over the context."""
    figure = new_figure(12, max(4.2, 1.8 + 0.36 * len(records)))
    bars, axes = figure.subplots(1, 2, width_ratios=(1, 1.2))
    names = [f"{record['name']} ({record['attention_kind']})" for record in records]
    sequences = "1 sequence" if records[0]["batch"] == 1 else f"{records[0]['batch']} sequences"
    for index, record in enumerate(records):
        value = record["kv_cache_bytes"] / 1e9
        bars.barh(names[index], value, color=_LINES[index % 10], height=0.7)
        bars.text(value, index, f" {value:.3g}", va="center", fontsize=8)
    largest = max(record["kv_cache_bytes"] for record in records) / 1e9
    bars.set(title=f"Context {records[0]['context']:,}", xlabel="cache (GB)", xlim=(0, 1.14 * largest))
    bars.invert_yaxis()
    contexts = 2 ** np.arange(10, 18)
    for index, record in enumerate(records):
        per_token = record["kv_cache_bytes_per_token"] * record["batch"]
        axes.plot(contexts, contexts * per_token / 1e9, label=record["name"], **_line(index))
    _context_axis(axes, contexts)
    axes.set(title="Over the context", ylabel="cache (GB)")
    figure.suptitle(f"KV cache in {records[0]['kv_dtype']}, {sequences}")
    _clean(bars)
    _clean(axes)
    _legend(figure, len(records))
    return figure


def plot_attention(records: list[dict[str, Any]], accelerators: list[Accelerator]):
    """Operations against bytes of attention per decoded token; lines: where a device is balanced between the two."""
    figure = new_figure(8, 5.2)
    axes = figure.subplots()
    cache = np.array([record["kv_cache_bytes"] / record["batch"] / 1e9 for record in records])
    flops = np.array([record["attention_flops"] / 1e9 for record in records])
    low, high = cache.min() / 3, cache.max() * 3
    ends = np.array([low, high])
    for number, device in enumerate(accelerators):
        ratio = device.ratio(records[0]["kv_dtype"])
        style = {"color": "#888888", "linestyle": (0, (1 + 2 * number, 2)), "linewidth": 1}
        axes.plot(ends, ends * ratio, label=f"{device.name}: {ratio:.0f}", **style)
    for index, record in enumerate(records):
        colour, marker = _LINES[index % 10], _MARKERS[index % 10]
        label = f"{record['name']}: {record['arithmetic_intensity']:.3g}"
        axes.scatter(cache[index], flops[index], color=colour, marker=marker, s=60, zorder=3, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(
        title=f"Attention of one decoded token, context {records[0]['context']:,}, cache in {records[0]['kv_dtype']}",
        xlabel="cache read (GB)",
        ylabel="operations (GFLOPs)",
    )
    _clean(axes)
    legend = figure.legend(loc="outside right center", fontsize=8, frameon=False, title="FLOPs per byte")
    legend.get_title().set_fontsize(8)
    return figure


def plot_roofline(records: list[dict[str, Any]]):
    """Least time of a decode step on the fewest devices that hold the model, by device."""
    devices = [row["accelerator"] for row in records[0]["accelerators"]]
    figure = new_figure(min(14, 3 + 1.5 * len(devices) + 0.2 * len(records) * len(devices)), 4.8)
    axes = figure.subplots()
    width = 0.8 / len(records)
    for index, record in enumerate(records):
        rows = record["accelerators"]
        positions = np.arange(len(devices)) + (index - (len(records) - 1) / 2) * width
        values = [row["step_seconds"] * 1e3 for row in rows]
        label = f"{record['name']} ({record['weight_precision']})"
        bars = axes.bar(positions, values, width * 0.9, color=_LINES[index % 10], label=label)
        axes.bar_label(bars, [str(row["min_devices"]) for row in rows], fontsize=7, padding=1)
    axes.set_xticks(np.arange(len(devices)), devices)
    axes.set(
        title=f"A decode step, batch {records[0]['batch']}, context {records[0]['context']:,}; above the bars: devices",
        xlabel="accelerator",
        ylabel="time per step (ms)",
    )
    axes.margins(y=0.1)
    _clean(axes)
    _legend(figure, len(records))
    return figure


def plot_decode_flops(records: list[dict[str, Any]]):
    """Operations per decoded token over the context: what is constant, and what attention adds."""
    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    contexts = 2 ** np.arange(10, 18)
    for index, record in enumerate(records):
        growth = record["attention_flops_exact"] / record["context"]
        constant = record["decode_flops"] - record["attention_flops_exact"]
        axes.plot(contexts, (constant + growth * contexts) / 1e9, label=record["name"], **_line(index))
    _context_axis(axes, contexts)
    axes.set(title="Operations per decoded token, all layers", ylabel="operations (GFLOPs)")
    _clean(axes)
    _legend(figure, len(records))
    return figure


def save_charts(records: list[dict[str, Any]], accelerators: list[Accelerator], folder: Path) -> list[Path]:
    """All pictures as PNG files in `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "parameters": plot_parameters(records),
        "kv_cache": plot_kv_cache(records),
        "attention": plot_attention(records, accelerators),
        "decode_flops": plot_decode_flops(records),
    }
    if accelerators:
        figures["roofline"] = plot_roofline(records)
    return [save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()]


def _line(index: int) -> dict[str, Any]:
    return {"color": _LINES[index % 10], "marker": _MARKERS[index % 10], "markersize": 4}


def _context_axis(axes, contexts) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{context // 1024}k" for context in contexts])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("context (tokens)")


def _legend(figure, entries: int) -> None:
    figure.legend(loc="outside lower center", ncols=min(entries, 4), fontsize=8, frameon=False)


def _clean(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", alpha=0.25)
    axes.set_axisbelow(True)
