"""What the command `hf-moe convert` does."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..hub.tokenizer import with_fast_tokenizer
from ..units import bytes_text
from .fused import plan_fused, plan_same, plan_upstream
from .inference import is_inference, open_checkpoint, plan_hub, plan_inference
from .plan import Plan
from .progress import human_seconds
from .quantization import plan_bf16, plan_fp8, plan_fp8_ue8m0
from .run import Summary, convert
from .source import Source

# What `--to` can name, and the function that plans it. Options of the command reach the functions that have a
# parameter of the same name.
TARGETS: dict[str, Callable[..., Plan]] = {
    "bf16": plan_bf16,
    "fp8": plan_fp8,
    "fp8-ue8m0": plan_fp8_ue8m0,
    "inference": plan_inference,
    "hub": plan_hub,
    "fused": plan_fused,
    "per-expert": plan_upstream,
    "same": plan_same,
}
_HUB_WORKERS = 8  # that mostly wait for answers
_LOCAL_WORKERS = 2


def run_convert(
    source: str,
    target: Path,
    to: str,
    *,
    workers: int | None = None,
    max_shard_size: str = "5GB",
    dry_run: bool = False,
    revision: str | None = None,
    progress: bool = True,
    **options: Any,
) -> Summary:
    """Converts a checkpoint and prints what was written, or would be.

    Args:
        source, target, to, max_shard_size, dry_run, revision, progress: as `open_checkpoint` and `convert` take them;
            `to` is a key of `TARGETS`.
        workers: threads; left out: 2 for a folder, 8 for a repository.
        options: of single targets, such as `world_size`; those that are `None` are not given.

    Raises:
        ValueError: for an unknown target, an option that it does not have, and whatever is wrong with the source.
    """
    if to not in TARGETS:
        raise ValueError(f"There is no format {to!r}; known are {', '.join(TARGETS)}.")
    given = {name: value for name, value in options.items() if value is not None}
    unknown = [name for name in given if name not in inspect.signature(TARGETS[to]).parameters]
    if unknown:
        raise ValueError(f"`--{unknown[0].replace('_', '-')}` is no option of `--to {to}`.")
    opened = open_checkpoint(source, revision=revision)
    if is_inference(opened) and to != "hub":
        raise ValueError(f"{source}: is in the layout of DeepSeek's inference code. Convert it with `--to hub` first.")
    plan = TARGETS[to](opened, **given)
    return carry_out(opened, plan, target, workers or default_workers(opened), max_shard_size, dry_run, progress)


def default_workers(source: Source) -> int:
    """Threads: few where a disk is read, more where they wait for answers."""
    return _LOCAL_WORKERS if source.local else _HUB_WORKERS


def carry_out(
    source: Source, plan: Plan, target: Path, workers: int, max_shard_size: str, dry_run: bool, progress: bool = True
) -> Summary:
    """Runs a plan and prints its summary. A tiktoken vocabulary gets a fast tokenizer beside it."""
    plan = with_fast_tokenizer(source, plan)
    summary = convert(
        source, plan, target, workers=workers, max_shard_size=max_shard_size, dry_run=dry_run, progress=progress
    )
    print_summary(source, summary, dry_run)
    return summary


def print_summary(source: Source, summary: Summary, dry_run: bool) -> None:
    """Prints what a conversion wrote, or would write."""
    console = Console(markup=False)  # names and paths may have brackets
    title = f"{source.name}: {summary.title}{' (nothing written)' if dry_run else ''}"
    console.print(title, highlight=False, soft_wrap=True)  # the table's own would break at its width
    table = Table()
    table.add_column("weight file")
    table.add_column("bytes", justify="right")
    shown = list(summary.shards.items())
    for name, size in shown if len(shown) <= 12 else [*shown[:5], ("...", None), *shown[-5:]]:
        table.add_row(name, "" if size is None else f"{size:,}")
    console.print(table)
    files = f"{len(shown)} {'file' if len(shown) == 1 else 'files'}"
    lines = [
        f"{summary.tensors:,} tensors, {bytes_text(summary.bytes_written)} in {files}, "
        f"from {bytes_text(summary.bytes_read)}",
        f"other files: {', '.join(summary.files)}",
        *summary.notes,
    ]
    if dry_run:
        lines.append(f"needs {bytes_text(summary.bytes_written)} on disk; tensors of {bytes_text(summary.memory)}")
        lines[-1] += " at most are in memory at once"
    else:
        rate = summary.bytes_written / max(summary.seconds, 1e-9)
        lines.append(f"written to {summary.target} in {human_seconds(summary.seconds)}, {bytes_text(rate)}/s")
        report = summary.manifest["steps"][-1].get("report", {})
        if report.get("blocks"):
            same = report["blocks"] - report["changed_blocks"]
            lines.append(f"blocks that give the source's numbers back: {same:,} of {report['blocks']:,}")
        if report.get("sampled_squared_weights"):
            error = (report["sampled_squared_error"] / report["sampled_squared_weights"]) ** 0.5
            lines.append(f"relative error of the quantised weights (root mean square): {error:.3g}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
