"""What the command `hf-moe finetune` does."""

import dataclasses

from rich.console import Console
from rich.table import Table

from .arguments import FinetuneArguments, parse_arguments


def run_finetune(argv: list[str]) -> None:
    """Parses options and trains.

    Raises:
        ValueError: for options and data that cannot be used.
        SystemExit: with a message, when memory is not enough or the loss is no longer a number.
    """
    if not argv or "--help" in argv or "-h" in argv:
        print_options()
        return
    args = parse_arguments(argv)
    from .adapters import memory_hint
    from .run import finetune, torch

    try:
        finetune(args)
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"hf-moe finetune: {memory_hint(error)}") from error
    except FloatingPointError as error:
        raise SystemExit(f"hf-moe finetune: {error}") from error


def print_options(console: Console | None = None) -> None:
    """Prints all options with their defaults."""
    console = console or Console()
    console.print("Usage: hf-moe finetune --model_name_or_path MODEL --dataset_name DATA --output_dir FOLDER [OPTIONS]")
    console.print("Options may be spelled with hyphens; --config FILE (JSON or YAML) holds more of them.\n")
    table = Table(box=None, pad_edge=False)
    for heading in ("option", "default", "meaning"):
        table.add_column(heading, overflow="fold")
    for entry in dataclasses.fields(FinetuneArguments):
        factory = entry.default_factory
        default = entry.default if factory is dataclasses.MISSING else factory()
        shown = "" if default in (None, "", []) else str(default).lower() if isinstance(default, bool) else str(default)
        name = f"--{'no_' if default is True else ''}{entry.name}"
        text, choices = entry.metadata["help"], entry.metadata.get("choices")
        table.add_row(name, shown, f"{text} ({' | '.join(choices)})" if choices else text)
    console.print(table)
