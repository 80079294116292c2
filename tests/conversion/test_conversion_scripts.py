"""The scripts in conversions/ and the command, run as they are written."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_moe.cli import app

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
SCRIPTS = Path(__file__).resolve().parents[2] / "conversions"
CASES = {
    "deepseek_fp8_to_bf16": ("v3_fp8", "block FP8 to bfloat16"),
    "deepseek_bf16_to_fp8": ("v3_basic", "bfloat16 to block FP8 with float32 scales"),
    "deepseek_bf16_to_fp8_ue8m0": ("v3_basic", "bfloat16 to block FP8 with power-of-two scales"),
    "kimi_bf16_to_fp8": ("kimi_k2", "bfloat16 to block FP8 with float32 scales"),
    "kimi_int4_to_bf16": ("kimi_k2_int4", "packed INT4 to bfloat16"),
    "kimi_int4_to_fp8": ("kimi_k2_int4", "packed INT4 to block FP8 with float32 scales"),
    "step3_bf16_to_fp8": ("step3_vl", "bfloat16 to block FP8 with float32 scales"),
    "step3_fp8_to_bf16": ("step3_fp8", "block FP8 to bfloat16"),
    "longcat_bf16_to_fp8": ("longcat_lite_ngram", "bfloat16 to block FP8 with float32 scales"),
    "longcat_fp8_to_bf16": ("longcat_fp8", "block FP8 to bfloat16"),
}


def run_script(name, *arguments):
    """Runs a script with the arguments of a command line."""
    argv, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = argv


@pytest.mark.parametrize("name", CASES)
def test_a_script_converts(name, tmp_path):
    case, title = CASES[name]
    run_script(name, GOLDENS / case, tmp_path / "out", "--workers", 1)
    (step,) = json.loads((tmp_path / "out" / "conversion.json").read_text())["steps"]
    assert step["title"] == title


def test_kimi_there_and_back(tmp_path):
    run_script("kimi_bf16_to_fp8", GOLDENS / "kimi_k2", tmp_path / "fp8")
    run_script("kimi_fp8_to_bf16", tmp_path / "fp8", tmp_path / "bf16")
    assert len(json.loads((tmp_path / "bf16" / "conversion.json").read_text())["steps"]) == 2


@pytest.mark.parametrize("arguments", [["kimi_k2", "out"], ["v3_basic", "out"], ["nothing", "out"]])
def test_a_script_refuses_what_it_is_not_for(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_script("deepseek_fp8_to_bf16", GOLDENS / arguments[0], tmp_path / arguments[1])
    assert exit_.value.code == 2 and not any(tmp_path.iterdir())
    printed = capsys.readouterr().err
    assert any(text in printed for text in ("this script is for", "this format already", "no such folder"))


def test_a_script_says_what_to_do_with_files_of_the_inference_code(tmp_path, capsys):
    arguments = ["convert", str(GOLDENS / "v3_basic"), str(tmp_path / "mp"), "--to", "inference", "--world-size", "2"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    with pytest.raises(SystemExit):
        run_script("deepseek_bf16_to_fp8", tmp_path / "mp", tmp_path / "out")
    assert "layout of DeepSeek's inference code. Convert it with `--to hub` first." in capsys.readouterr().err


def test_the_command(tmp_path):
    runner = CliRunner()
    arguments = ["convert", str(GOLDENS / "v3_fp8"), str(tmp_path / "out"), "--to", "bf16"]
    dry = runner.invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0 and "135 tensors" in dry.output and "nothing" in dry.output
    assert not any(tmp_path.iterdir())
    done = runner.invoke(app, [*arguments, "--max-shard-size", "1MB", "--workers", "3"])
    assert done.exit_code == 0 and "model-00001-of-0000" in done.output
    again = runner.invoke(app, arguments)
    assert again.exit_code == 2 and "not empty" in " ".join(again.output.split())
