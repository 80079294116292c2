"""Console command `hf-moe`."""

from typing import Annotated

import typer

from . import __version__
from .demo import run_demo

app = typer.Typer(
    help="DeepSeek-V2, DeepSeek-V3 and Kimi-K2 in plain Transformers.", no_args_is_help=True, add_completion=False
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
    """DeepSeek-V2, DeepSeek-V3 and Kimi-K2 in plain Transformers."""


@app.command()
def demo(
    prompt: Annotated[str | None, typer.Option(help="Python source to go on with; left out: one of ours.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 160,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the sampling; 0 is greedy.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Let the small model that comes with the package complete Python source, and measure it."""
    try:
        run_demo(prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    app()
