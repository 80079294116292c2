"""The curve of a run's losses, as PNG."""

from pathlib import Path
from typing import Any


def draw_losses(log: list[dict[str, float]], path: Path, title: str = "Fine-tuning") -> Path:
    """Draws training and held-out losses over steps; the file appears when it is complete.

    Args:
        log: lines of the training log.
        path: of the PNG.
        title: above the curves.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a log without any loss.
    """
    from matplotlib.figure import Figure

    series = {
        "training": ("main_loss", "-"),
        "held out": ("eval_loss", "o-"),
        **{f"MTP layer {depth}": (f"mtp_loss_{depth}", ":") for depth in range(1, 5)},
    }
    if not any("main_loss" in line for line in log):
        series["training"] = ("loss", "-")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    drawn = 0
    for label, (name, style) in series.items():
        points = [(line["step"], line[name]) for line in log if name in line]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=4, linewidth=1.5)
            drawn += 1
    if not drawn:
        raise ValueError("the log holds no loss to draw")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
    return path
