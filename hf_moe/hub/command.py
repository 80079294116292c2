"""What `hf-moe push`, `hf-moe card` and `hf-moe tokenizer` do."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..units import bytes_text
from .card import CardOptions, is_ours, read_checkpoint, render_card
from .manifest import with_manifest
from .push import README, Plan, PushError, PushOptions, plan_push, push, verify_before_push
from .tokenizer import convert_tokenizer, write_whole


def run_push(folder: Path, repo: str, options: PushOptions, dry_run: bool) -> None:
    """Pushes, or with `dry_run` verifies the folder and lists what would be pushed."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    plan = plan_push(folder, repo, options)
    for note in plan.notes:
        console.print(note)
    if dry_run:
        verify_before_push(folder, progress=True)
        print_plan(plan, options, console)
        return
    done = push(folder, repo, options, report=console.print, plan=plan, progress=True)
    for name in plan.left:
        console.print(f"left behind: {name}")
    console.print(f"{done.url}: {done.files} files, {bytes_text(done.size)}, commit {done.commit}")


def print_plan(plan: Plan, options: PushOptions, console: Console) -> None:
    """What would be pushed: every file with its size and where it comes from."""
    visible = "public" if options.public else "private"
    table = Table(title=f"{plan.repo}, {options.revision or 'main'}, {visible} if new", title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    table.add_column("from")
    for upload in plan.uploads:
        table.add_row(upload.name, bytes_text(upload.size), "folder" if isinstance(upload.content, Path) else "hf-moe")
    console.print(table)
    for name in plan.left:
        console.print(f"left behind: {name}")
    console.print(f"{len(plan.uploads)} files, {bytes_text(plan.size)}; nothing was sent.")


def run_card(folder: Path, out: Path | None, overwrite: bool, repo: str | None, code: bool, about: CardOptions) -> None:
    """Writes the card of a folder, into it or to `out`; `-` prints it.

    Raises:
        ValueError: for a README.md that is not ours, without `overwrite`.
    """
    text = render_card(read_checkpoint(folder, repo, code), about)
    if out is not None and str(out) == "-":
        print(text, end="")
        return
    path = out or folder / README
    if path.is_file() and not overwrite and not is_ours(path.read_text(encoding="utf-8", errors="replace")):
        raise PushError(f"{path} exists and is not a card of ours: give --overwrite to replace it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    replaced = {README: text.encode("utf-8")}
    if path.resolve() == (folder / README).resolve():
        replaced = with_manifest(folder, replaced)
    for name, data in replaced.items():
        write_whole(path.with_name(name) if name != README else path, data)
    print(f"wrote {path}")


def run_tokenizer(source: Path, target: Path | None, overwrite: bool) -> None:
    """Writes the fast tokenizer of a tiktoken vocabulary."""
    for path in convert_tokenizer(source, target or source, overwrite):
        print(f"wrote {path}")
