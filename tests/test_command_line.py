"""What every command of `hf-moe` has in common: errors, readers that want no more, and Ctrl-C."""

import pytest
from typer.testing import CliRunner

from hf_moe.cli import app


def run(*arguments, **environment):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def test_an_error_is_one_line_whatever_the_width(tmp_path):
    source = tmp_path / ("a_long_name_" * 12)
    result = run("convert", source, tmp_path / "target", "--to", "bf16", COLUMNS="40")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.output == f"Error: {source}: there is no such folder.\n"


def test_a_reader_that_goes_away_is_no_error(monkeypatch):
    """As `hf-moe inspect ... | head`: neither a message nor the exit code of a checkpoint that is not sound."""

    def gone(*arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("hf_moe.cli.run_inspect", gone)
    result = run("inspect", "step3")
    assert result.output == "" and result.exit_code == 1


@pytest.mark.parametrize("command", ["demo", "inspect"])
def test_ctrl_c(command, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"hf_moe.cli.run_{command}", stop)
    result = run(command)
    assert (result.exit_code, result.output) == (130, "Interrupted.\n")
