"""What the commands `hf-moe verify`, `slice` and `merge` do."""

import json
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..units import bytes_text
from .adapter import open_adapter
from .command import carry_out, default_workers
from .compare import Comparison, compare_checkpoints
from .inference import inference_files, open_hub_layout
from .merge import plan_merge
from .run import Summary
from .slicing import plan_slice
from .source import LocalStore
from .verify import Report, verify_folder

_SHOWN = 15  # tensors and names of a comparison that are printed


def run_verify(
    folder: Path,
    against: str | None = None,
    tolerance: float | None = None,
    values: bool = True,
    checksums: bool = True,
    as_json: bool = False,
) -> bool:
    """Looks at a checkpoint, compares it with another where one is given, and prints what was found.

    Args:
        folder, values, checksums: as `verify_folder` takes them.
        against: folder or Hub id.
        tolerance: largest relative error of a tensor; names and shapes must then be equal, too.
        as_json: print one JSON object.

    Returns whether the checkpoint is sound and, with a tolerance, close enough to the other one.

    Raises:
        ValueError: for a tolerance with nothing to compare with, and for files of DeepSeek's inference code to compare.
        CheckpointError: if the other checkpoint cannot be read.
    """
    if tolerance is not None and against is None:
        raise ValueError("`--tolerance` belongs to a comparison: give `--against`, too.")
    other = None if against is None else open_hub_layout(against)  # what is wrong with it is said before the reading
    if against is not None and folder.is_dir() and inference_files(LocalStore(folder)):
        raise ValueError(
            f"{folder}: files of DeepSeek's inference code are not compared. Convert them `--to hub` first."
        )
    report = verify_folder(folder, values=values, checksums=checksums, progress=not as_json)
    comparison = None
    if other is not None and report.ok:
        comparison = compare_checkpoints(open_hub_layout(folder), other, progress=not as_json)
    close = comparison is None or tolerance is None or comparison.worst <= tolerance
    if as_json:
        content = report.to_dict() | ({} if comparison is None else {"against": against, **_json(comparison)})
        print(json.dumps(content, indent=2, allow_nan=False))
        return report.ok and close
    _print_report(report)
    if comparison is not None:
        _print_comparison(comparison, against)
        if not close:
            problem = f"differ by more than {tolerance:g}" if math.isfinite(comparison.worst) else "do not match"
            _console(stderr=True).print(f"{folder} and {against} {problem}.")
    return report.ok and close


def _json(comparison: Comparison) -> dict:
    content = comparison.to_dict()
    for tensor in content["tensors"]:
        for key in ("max_abs", "relative"):
            if not math.isfinite(tensor[key]):
                tensor[key] = None  # JSON has no infinity
    return {"comparison": content}


def _console(stderr: bool = False) -> Console:
    return Console(stderr=stderr, soft_wrap=True, highlight=False, markup=False)  # paths may have brackets


def _print_report(report: Report) -> None:
    console = _console()
    for note in report.notes:
        console.print(note)
    if report.ok:
        console.print(f"{report.folder}: sound; {report.tensors:,} tensors, {bytes_text(report.bytes)}.")
        return
    errors = _console(stderr=True)
    for problem in report.problems:
        errors.print(problem)
    count = len(report.problems)
    errors.print(f"{report.folder}: {count} {'problem' if count == 1 else 'problems'}.")


def _print_comparison(comparison: Comparison, against: str) -> None:
    console = _console()
    different = [tensor for tensor in comparison.tensors if tensor.max_abs != 0]
    if different:
        table = Table(title=f"largest differences from {against}", title_justify="left")
        for column in ("tensor", "here", "there", "largest", "relative"):
            table.add_column(column, justify="left" if column in ("tensor", "here", "there") else "right")
        for tensor in different[:_SHOWN]:
            table.add_row(tensor.name, tensor.left, tensor.right, f"{tensor.max_abs:.3g}", f"{tensor.relative:.3g}")
        console.print(table)
    for what, names in (("here", comparison.only_left), ("there", comparison.only_right)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            console.print(f"only {what}: {', '.join(names[:_SHOWN])}{more}")
    for name, (left, right) in list(comparison.shapes.items())[:_SHOWN]:
        console.print(f"{name}: shape {left} here, {right} there")
    total = len(comparison.tensors)
    console.print(f"{comparison.equal:,} of {total:,} tensors in both have equal values")


def run_slice(
    source: str,
    target: Path,
    first_layers: int | None,
    last_layers: int,
    experts: str | None,
    max_shard_size: str = "5GB",
    workers: int | None = None,
    dry_run: bool = False,
    revision: str | None = None,
    progress: bool = True,
) -> Summary:
    """Writes a slice of a checkpoint and prints what it is; arguments as `plan_slice` and `convert` take them.

    Raises:
        CheckpointError: for a bad source, and choices that cannot be made.
        ValueError: if nothing is left out.
    """
    if first_layers is None and not last_layers and experts is None:
        raise ValueError("Nothing to leave out: give --first-layers, --last-layers or --experts.")
    opened = open_hub_layout(source, revision=revision)
    plan = plan_slice(opened, first_layers, last_layers, experts)
    return carry_out(opened, plan, target, workers or default_workers(opened), max_shard_size, dry_run, progress)


def run_merge(
    base: str,
    adapter: str,
    target: Path,
    max_shard_size: str = "5GB",
    workers: int | None = None,
    dry_run: bool = False,
    revision: str | None = None,
    progress: bool = True,
) -> Summary:
    """Writes a checkpoint with an adapter merged into it; arguments as `open_adapter` and `convert` take them.

    Raises:
        CheckpointError: for a bad base or adapter, and for one that does not fit the other.
    """
    opened = open_hub_layout(base, revision=revision)
    plan = plan_merge(opened, open_adapter(adapter))
    return carry_out(opened, plan, target, workers or default_workers(opened), max_shard_size, dry_run, progress)
