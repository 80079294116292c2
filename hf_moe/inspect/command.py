"""What the commands `hf-moe inspect` and `hf-moe route` do."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..folders import why_not_writable
from .accelerators import DEFAULT, Accelerator, load_accelerators
from .charts import new_figure
from .explain import INSPECT, ROUTE, print_explanations
from .report import inspect_model, print_report, write_json


def run_inspect(
    models: list[str],
    contexts: list[int],
    batches: list[int],
    kv_dtype: str,
    precision: str | None = None,
    accelerators: list[str] | None = None,
    accelerators_file: Path | None = None,
    attention_on: str | None = None,
    experts_on: str | None = None,
    tpot: float = 0.05,
    as_json: bool = False,
    charts: Path | None = None,
    explain: bool = False,
) -> list[dict[str, Any]]:
    """Prints tables, or JSON alone; writes charts; returns the records.

    Raises:
        ValueError: for an unknown accelerator, half a disaggregation, a folder for charts that cannot be written to,
            and what `inspect_model` refuses.
    """
    console = Console(markup=False)
    if explain:
        print_explanations(INSPECT, console)
        if not models:
            return []
    if not models:
        raise ValueError("Name a model: a folder, a Hub id, a config file or a shipped name.")
    if (attention_on is None) != (experts_on is None):
        raise ValueError("`--attention-on` and `--experts-on` go together: name both devices.")
    if charts is not None:
        _check_pictures("--charts", charts)
    known = load_accelerators(accelerators_file)
    names = accelerators or list(DEFAULT)
    devices = list(known.values()) if "all" in names else [_pick(known, name) for name in names if name != "none"]
    apart = [_pick(known, name) for name in (attention_on, experts_on) if name is not None]
    options = (contexts, batches, kv_dtype, precision, devices, *(apart or (None, None)), tpot)
    records = [inspect_model(model, *options) for model in models]
    if as_json:
        print(json.dumps(records, indent=1))
    else:
        print_report(records, console)
    if charts is not None:
        from .charts import save_charts

        _tell(save_charts(records, devices, charts), console, as_json)
    return records


def _check_pictures(option: str, folder: Path) -> None:
    """Says before the work that its pictures cannot be drawn or written."""
    new_figure(1, 1)
    problem = why_not_writable(folder)
    if problem is not None:
        raise ValueError(f"{option} {folder}: {problem}")


def _pick(known: dict[str, Accelerator], name: str) -> Accelerator:
    if name not in known:
        raise ValueError(f"There is no accelerator {name!r}; known are {', '.join(known)}.")
    return known[name]


def _tell(paths: list[Path], console: Console, quiet: bool) -> None:
    if not quiet:
        for path in paths:
            console.print(f"written: {path}", highlight=False, soft_wrap=True)


def run_route(
    model: str | None,
    text: Path | None,
    out: Path,
    groups: int = 8,
    max_tokens: int = 8192,
    window: int = 1024,
    layer: int | None = None,
    as_json: bool = False,
    explain: bool = False,
) -> dict[str, Any] | None:
    """Runs the model over the text, writes pictures and `routing.json` into `out`, prints a table or the JSON.

    Raises:
        ValueError, FileNotFoundError: for what is no model, no text or no such layer, and for a folder that cannot be
            written to.
    """
    from .route_charts import save_route_charts
    from .routing import route_text, statistics

    console = Console(markup=False)
    if explain:
        print_explanations(ROUTE, console)
        if model is None:
            return None
    if model is None or text is None:
        raise ValueError("Name a model and a text: hf-moe route MODEL --text FILE.")
    _check_pictures("--out", out)
    routing = route_text(model, text, max_tokens, window, groups, layer)
    result = statistics(routing, groups)
    paths = save_route_charts(routing, groups, out, layer)
    write_json(result, out / "routing.json")
    if as_json:
        print(json.dumps(result))
    else:
        _print_routing(result, console)
    _tell([*paths, out / "routing.json"], console, as_json)
    return result


def _print_routing(result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{result['model']}, {result['tokens']:,} tokens", title_justify="left")
    columns = {
        "layer": ("layer", "d"),
        "entropy": ("normalised_entropy", ".3f"),
        "busiest / mean": ("max_over_mean", ".2f"),
        "unused": ("unused_experts", "d"),
        f"busiest of {result['groups']} devices / mean": ("group_max_over_mean", ".2f"),
        "devices per token": ("groups_per_token", ".2f"),
        "real experts per token": ("real_experts_per_token", ".2f"),
        "top weight": ("top_weight", ".2f"),
    }
    for column in columns:
        table.add_column(column, justify="right")
    for layer in result["layers"]:
        table.add_row(*(format(layer[key], form) for key, form in columns.values()))
    console.print(table)
