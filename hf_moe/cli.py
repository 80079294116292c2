"""Console command `hf-moe`."""

from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .demo import run_demo
from .inspect.command import run_inspect, run_route

app = typer.Typer(
    help="DeepSeek-V2/V3, Kimi-K2, Step3 and LongCat in plain Transformers.", no_args_is_help=True, add_completion=False
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"hf-moe {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """DeepSeek-V2/V3, Kimi-K2, Step3 and LongCat in plain Transformers."""


@app.command()
def demo(
    prompt: Annotated[str | None, typer.Option(help="Python source to go on with; left out: one of ours.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 160,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the sampling; 0 is greedy.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Let the small model that comes with the package complete Python source, and measure it."""
    with _clear_errors():
        run_demo(prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


class KvDtype(StrEnum):
    """Element types of a KV cache."""

    FP32, BF16, FP8 = "fp32", "bf16", "fp8"


class Precision(StrEnum):
    """Formats of weights."""

    FP32, BF16, FP8, INT4 = "fp32", "bf16", "fp8", "int4"


@app.command(epilog="Example: hf-moe inspect step3 deepseek-v3 my/config.json --kv-dtype fp8")
def inspect(
    models: Annotated[
        list[str] | None, typer.Argument(help="Folders, Hub ids, config files or shipped names (deepseek-v3, step3).")
    ] = None,
    context: Annotated[list[int], typer.Option(min=1, help="Tokens of context; may be repeated.")] = [32768],  # noqa: B006
    batch: Annotated[list[int], typer.Option(min=1, help="Sequences; may be repeated.")] = [1],  # noqa: B006
    kv_dtype: Annotated[KvDtype, typer.Option(help="Elements of the cache.")] = KvDtype.BF16,
    weights: Annotated[Precision | None, typer.Option(help="Format of the weights; left out: as published.")] = None,
    accelerator: Annotated[
        list[str] | None, typer.Option(help="Device, `all` or `none`; may be repeated; left out: h800 h20 a800 910b.")
    ] = None,
    accelerators_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="JSON with devices of your own.")
    ] = None,
    attention_on: Annotated[str | None, typer.Option(help="Device of attention, with --experts-on.")] = None,
    experts_on: Annotated[str | None, typer.Option(help="Device of the experts, with --attention-on.")] = None,
    tpot: Annotated[float, typer.Option(min=1e-6, help="Seconds per token that the two are sized for.")] = 0.05,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects, and nothing else.")] = False,
    charts: Annotated[Path | None, typer.Option(file_okay=False, help="Folder for PNG charts.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print every column's formula and source.")] = False,
) -> None:
    """Say what models cost: parameters, bytes, operations, and what they need on accelerators."""
    names, choice = list(accelerator or []), None if weights is None else weights.value
    with _clear_errors():
        run_inspect(
            list(models or []),
            context,
            batch,
            kv_dtype.value,
            choice,
            names,
            accelerators_file,
            attention_on,
            experts_on,
            tpot,
            json,
            charts,
            explain,
        )


@app.command(epilog="Example: hf-moe route demo --text README.md --groups 4")
def route(
    model: Annotated[str | None, typer.Argument(help="Folder, Hub id, or `demo`.")] = None,
    text: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="UTF-8 text to run.")] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for pictures and routing.json.")] = Path("routing"),
    groups: Annotated[int, typer.Option(min=1, help="Devices that share a layer's experts.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to run at most.")] = 8192,
    window: Annotated[int, typer.Option(min=1, help="Tokens that see one another.")] = 1024,
    layer: Annotated[int | None, typer.Option(help="Layer of the picture of pairs; left out: the clearest.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON, and nothing else.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Print every number's formula and source.")] = False,
) -> None:
    """Run text through a model and draw which experts it meets."""
    with _clear_errors():
        run_route(model, text, out, groups, max_tokens, window, layer, json, explain)


# The options are those of a dataclass, which Transformers' parser reads: see `training.arguments`.
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def finetune(context: typer.Context) -> None:
    """Fine-tune a model, with LoRA or whole, on JSONL, Parquet, text or a Hub dataset (--help for the options)."""
    from .training.command import run_finetune

    with _clear_errors():
        run_finetune(context.args)


@app.command(epilog="Example: hf-moe push FOLDER owner/name --dry-run")
def push(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub; created where it is missing.")],
    public: Annotated[
        bool, typer.Option("--public/--private", help="Who sees a repository that is created; default: you alone.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made where it is missing.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    token: Annotated[str | None, typer.Option(help="Of the Hub; left out: the one that is logged in.")] = None,
    code: Annotated[bool, typer.Option("--code/--no-code", help="Add the modules of the model and `auto_map`.")] = True,
    card: Annotated[
        bool | None, typer.Option("--card/--no-card", help="Write README.md; left out: where there is none but ours.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Release that the weights come from, as owner/name.")] = None,
    license: Annotated[str | None, typer.Option(help="In the Hub's spelling; left out: the release's.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the card.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of files to leave; may be repeated.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Verify, list what would be pushed, send nothing.")
    ] = False,
) -> None:
    """Verify a checkpoint folder and upload it to the Hub with code, card and licence. Repeat to go on."""
    from .hub.card import CardOptions
    from .hub.command import run_push
    from .hub.push import PushOptions

    about = CardOptions(base_model, license, title)
    with _clear_errors():
        options = PushOptions(public, revision, message, token, code, card, tuple(exclude or ()), about)
        run_push(folder, repo, options, dry_run)


@app.command(epilog="Example: hf-moe card FOLDER --base-model deepseek-ai/DeepSeek-R1")
def card(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    out: Annotated[Path | None, typer.Option(help="File to write, `-` to print; left out: README.md there.")] = None,
    repo: Annotated[str | None, typer.Option(help="owner/name that the card's snippets load.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Release that the weights come from, as owner/name.")] = None,
    license: Annotated[str | None, typer.Option(help="In the Hub's spelling; left out: the release's.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading; left out: the name.")] = None,
    code: Annotated[bool, typer.Option("--code/--no-code", help="Whether the code goes with the checkpoint.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a README.md that is not ours.")] = False,
) -> None:
    """Write the model card of a checkpoint folder, from its configuration and the manifest of its conversion."""
    from .hub.card import CardOptions
    from .hub.command import run_card

    with _clear_errors():
        run_card(folder, out, overwrite, repo, code, CardOptions(base_model, license, title))


@app.command(epilog="Example: hf-moe tokenizer Kimi-K2-Instruct")
def tokenizer(
    source: Annotated[Path, typer.Argument(help="Folder with tiktoken.model and tokenizer_config.json (Kimi-K2).")],
    target: Annotated[Path | None, typer.Argument(help="Folder to write to; left out: SOURCE.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a tokenizer.json that is there.")] = False,
) -> None:
    """Make a fast tokenizer out of a tiktoken vocabulary: the same ids from plain AutoTokenizer."""
    from .hub.command import run_tokenizer

    with _clear_errors():
        run_tokenizer(source, target, overwrite)


@app.command(epilog="Example: hf-moe convert deepseek-ai/DeepSeek-V3 V3-bf16 --to bf16")
def convert(
    source: Annotated[str, typer.Argument(help="Folder of a checkpoint, or Hub id, read without a download.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; it appears when everything is written.")],
    to: Annotated[
        str, typer.Option(help="bf16, fp8, fp8-ue8m0, or a layout: inference, hub, fused, per-expert, same.")
    ],
    max_shard_size: Annotated[str, typer.Option(help="Of a weight file, such as 5GB or 500MB.")] = "5GB",
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; left out: 2, for the Hub 8.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="GPUs, with --to inference.")] = None,
) -> None:
    """Write a checkpoint in another format, piece by piece; repeat the command to go on after an interruption."""
    from .conversion.command import run_convert

    with _clear_errors():
        run_convert(
            source,
            target,
            to,
            workers=workers,
            max_shard_size=max_shard_size,
            dry_run=dry_run,
            revision=revision,
            world_size=world_size,
        )


@app.command(epilog="Example: hf-moe verify V3-merged --against V3 --tolerance 0.05")
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    against: Annotated[str | None, typer.Option(help="Folder or Hub id of a checkpoint to compare with.")] = None,
    tolerance: Annotated[float | None, typer.Option(min=0.0, help="Relative error a tensor may have.")] = None,
    values: Annotated[bool, typer.Option("--values/--no-values", help="Read every value.")] = True,
    checksums: Annotated[bool, typer.Option("--checksums/--no-checksums", help="Compare with conversion.json.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print one object, and nothing else.")] = False,
) -> None:
    """Say whether a checkpoint is whole and sound, and how it differs from another; exit code 2 if it is not."""
    from .conversion.checkpoint_command import run_verify

    with _clear_errors():
        sound = run_verify(folder, against, tolerance, values, checksums, json)
    if not sound:
        raise typer.Exit(2)


@app.command("slice", epilog="Example: hf-moe slice V3 v3-tiny --first-layers 4 --last-layers 1 --experts 8")
def slice_(
    source: Annotated[str, typer.Argument(help="Folder of a checkpoint, or Hub id, read without a download.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; it appears when everything is written.")],
    first_layers: Annotated[int | None, typer.Option(min=0, help="Layers to keep from the first on.")] = None,
    last_layers: Annotated[int, typer.Option(min=0, help="Layers to keep up to the last.")] = 0,
    experts: Annotated[str | None, typer.Option(help="A number of experts, or ids: 0,3,8-11.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a weight file, such as 5GB or 500MB.")] = "5GB",
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; left out: 2, for the Hub 8.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
) -> None:
    """Write a smaller checkpoint of the same architecture: some layers and experts, for a laptop."""
    from .conversion.checkpoint_command import run_slice

    with _clear_errors():
        run_slice(source, target, first_layers, last_layers, experts, max_shard_size, workers, dry_run, revision)


@app.command(epilog="Example: hf-moe merge V3 my-lora V3-merged")
def merge(
    base: Annotated[str, typer.Argument(help="Folder of a checkpoint, or Hub id, read without a download.")],
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of a LoRA adapter that PEFT saved.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; it appears when everything is written.")],
    max_shard_size: Annotated[str, typer.Option(help="Of a weight file, such as 5GB or 500MB.")] = "5GB",
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; left out: 2, for the Hub 8.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base on the Hub.")] = None,
) -> None:
    """Merge a LoRA adapter into a checkpoint, bf16 or FP8, without loading the model."""
    from .conversion.checkpoint_command import run_merge

    with _clear_errors():
        run_merge(base, adapter, target, max_shard_size, workers, dry_run, revision)


@contextmanager
def _clear_errors():
    """Errors as one line, which logs and searches find whole: Typer would break it into a frame, under a usage."""
    try:
        yield
    except BrokenPipeError:  # of whoever read the output, and wants no more of it
        raise
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as interrupt:
        typer.echo(str(interrupt) or "Interrupted.", err=True)
        raise typer.Exit(130) from interrupt


if __name__ == "__main__":
    app()
