"""`hf-moe inspect`: what it reads, prints, draws and refuses."""

import json

import pytest
from huggingface_hub import constants
from testing import GOLDENS
from typer.testing import CliRunner

from hf_moe.cli import app
from hf_moe.inspect.command import run_inspect
from hf_moe.inspect.explain import INSPECT
from hf_moe.inspect.report import inspect_model
from hf_moe.inspect.sources import bytes_on_disk, read_source, shipped_names, stored_precision
from hf_moe.units import bytes_text, count_text

PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments: str):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "200"})


def test_json_of_two_models():
    result = run("step3", "deepseek-v3", "--context", 32768, "--kv-dtype", "fp8", "--json")
    assert result.exit_code == 0, result.output
    step3, deepseek = json.loads(result.stdout)
    assert (step3["name"], deepseek["name"]) == ("step3", "deepseek-v3")
    assert step3["total_params"] == 316_294_538_240 and step3["all_params"] == 320_969_912_832
    assert deepseek["total_params"] == 671_026_404_352
    assert step3["kv_cache_bytes"] == 32768 * 61 * 512 and deepseek["kv_cache_bytes"] == 32768 * 61 * 576
    assert step3["attention_flops"] == 4 * 32768 * 61 * 64 * 256
    assert (step3["arithmetic_intensity"], deepseek["arithmetic_intensity"]) == (128, 512)
    assert deepseek["counted_from"] == "meta-device model"
    for record in (step3, deepseek):
        main = ("embedding", "head", "attention", "dense", "shared", "routed", "router", "norm")
        assert sum(record["parts"][part]["total"] for part in main) == record["total_params"]
        assert sum(record["parts"][part]["active"] for part in main) == pytest.approx(record["active_params"], abs=8)
        assert [row["accelerator"] for row in record["accelerators"]] == ["h800", "h20", "a800", "910b"]


def test_every_point_of_contexts_and_batches():
    options = ["--context", 1024, "--context", 2048, "--batch", 1, "--batch", 4, "--json", "--accelerator", "none"]
    [record] = json.loads(run("deepseek-v2-lite", *options).stdout)
    assert [(point["context"], point["batch"]) for point in record["points"]] == [
        (1024, 1),
        (1024, 4),
        (2048, 1),
        (2048, 4),
    ]
    caches = [point["kv_cache_bytes"] for point in record["points"]]
    assert caches == [caches[0], 4 * caches[0], 2 * caches[0], 8 * caches[0]]
    assert caches[0] == 1024 * 27 * 576 * 2 and record["kv_cache_bytes"] == caches[0] and record["accelerators"] == []
    assert record["points"][1]["attention_flops"] == record["attention_flops"], "per token, whatever the batch"


@pytest.mark.parametrize("name", shipped_names())
def test_table_of_every_shipped_name(name):
    result = run(name.upper(), "--attention-on", "h20", "--experts-on", "h800")
    assert result.exit_code == 0, result.output
    for words in (name, "main model", "KV cache", "attention FLOPs per token", "network bytes / token"):
        assert words in result.stdout


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_console(width):
    """Nothing is cut off, however many models there are: they go on below one another."""
    arguments = ["inspect", *shipped_names(), "--attention-on", "h20", "--experts-on", "h800"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": str(width)})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= width and "…" not in result.stdout
    assert result.stdout.count("in bf16: a decode step") + result.stdout.count("in fp8: a decode step") == 10


def test_folder_and_file(tmp_path):
    folder, file = GOLDENS / "v3_basic", tmp_path / "other.json"
    file.write_text((folder / "config.json").read_text())
    first, second, third = json.loads(run(folder, folder / "config.json", file, "--json").stdout)
    assert [first["name"], second["name"], third["name"]] == ["v3_basic", "v3_basic", "other"]
    assert first["total_params"] == second["total_params"] == third["total_params"]
    assert first["checkpoint_bytes_on_disk"] == (folder / "model.safetensors").stat().st_size
    assert second["checkpoint_bytes_on_disk"] is None
    assert bytes_on_disk(tmp_path) is None


def test_precision_of_the_files_is_the_default():
    assert {name: stored_precision(read_source(name).config) for name in ("deepseek-v3", "step3")} == {
        "deepseek-v3": "fp8",
        "step3": "bf16",
    }
    assert stored_precision({"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}}) == "int4"
    assert stored_precision({"dtype": "float32"}) == "fp32"
    assert inspect_model("step3", [1], [1], "bf16", "fp8", [])["weight_precision"] == "fp8"


def test_charts(tmp_path):
    result = run("step3", "deepseek-v3", "qwen3-32b", "--charts", tmp_path / "new" / "charts")
    assert result.exit_code == 0, result.output
    files = sorted(path.name for path in (tmp_path / "new" / "charts").iterdir())
    assert files == ["attention.png", "decode_flops.png", "kv_cache.png", "parameters.png", "roofline.png"]
    for path in (tmp_path / "new" / "charts").iterdir():
        assert path.read_bytes().startswith(PNG) and path.name in result.stdout
    quiet = run("step3", "--charts", tmp_path, "--json", "--accelerator", "none")
    assert (
        json.loads(quiet.stdout) and (tmp_path / "kv_cache.png").exists() and not (tmp_path / "roofline.png").exists()
    )


def test_charts_have_axes_with_units_and_texts_that_do_not_overlap():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from hf_moe.inspect import charts
    from hf_moe.inspect.accelerators import load_accelerators

    devices = [load_accelerators()[name] for name in ("h800", "h20", "a800", "910b")]
    records = [inspect_model(name, [32768], [8], "fp8", None, devices) for name in shipped_names()]
    figures = [
        charts.plot_parameters(records),
        charts.plot_kv_cache(records),
        charts.plot_attention(records, devices),
        charts.plot_decode_flops(records),
        charts.plot_roofline(records),
    ]
    for figure in figures:
        FigureCanvasAgg(figure).draw()
        renderer = figure.canvas.get_renderer()
        for axes in figure.axes:
            assert "(" in axes.get_xlabel() or "(" in axes.get_ylabel(), "no unit"
            assert axes.get_title()
            texts = [*axes.texts, *_shown(axes.xaxis), *_shown(axes.yaxis)]
            boxes = [text.get_window_extent(renderer) for text in texts if text.get_visible() and text.get_text()]
            for index, box in enumerate(boxes):
                assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 and box.x0 >= 0 and box.y0 >= 0
                for other in boxes[:index]:
                    assert not _overlap(box, other), (figure, texts[index])


def _shown(axis) -> list:
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def _overlap(left, right) -> bool:
    return min(left.x1, right.x1) - max(left.x0, right.x0) > 1 and min(left.y1, right.y1) - max(left.y0, right.y0) > 1


def test_explain():
    result = run("--explain")
    assert result.exit_code == 0
    squeezed = "".join(result.stdout.split())
    for words in ("kv_cache_bytes", "2507.19427", "NL2gd", "min_active_share"):
        assert words in squeezed
    record = inspect_model("step3", [1], [1], "bf16", None, [])
    explained = " ".join(columns for columns, _, _ in INSPECT)
    for key in record:
        if any(word in key for word in ("params", "flops", "kv_cache_bytes", "intensity")):
            assert key.removesuffix("_per_token") in explained or key in explained, key


def test_accelerators_of_a_user(tmp_path):
    entry = {"memory": 1e12, "bandwidth": 1e12, "network": 1e11, "flops": {"bf16": 1e15}}
    (tmp_path / "a.json").write_text(json.dumps({"mine": entry}))
    options = ["--accelerators-file", tmp_path / "a.json", "--accelerator", "mine", "--accelerator", "h20", "--json"]
    [record] = json.loads(run("step3", *options).stdout)
    assert [row["accelerator"] for row in record["accelerators"]] == ["mine", "h20"]
    assert len(json.loads(run("step3", "--accelerator", "all", "--json").stdout)[0]["accelerators"]) > 8


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "Name a model"),
        (["step3", "--accelerator", "abacus"], "abacus"),
        (["step3", "--attention-on", "h20"], "--experts-on"),
        (["step3", "--kv-dtype", "int2"], "int2"),
        (["step3", "--context", "0"], "context"),
        ([str(GOLDENS)], "config.json"),
    ],
)
def test_clear_errors(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2 and words in result.output and "Traceback" not in result.output


def test_a_folder_for_charts_that_cannot_be_made_is_said_first(tmp_path):
    (tmp_path / "file").write_text("kept")
    result = run("step3", "--charts", str(tmp_path / "file" / "charts"))
    assert result.exit_code == 2 and result.stdout == "" and "is a file, not a folder" in result.output


def test_unknown_name_without_a_network(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'deepseek-v9'.*deepseek-v3"):
        read_source("deepseek-v9")


def test_files_that_are_no_configuration(tmp_path):
    for text, words in (("{", "not JSON"), ("[1]", "list"), ('{"model_type": "gpt2"}', "gpt2")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            run_inspect([str(tmp_path)], [1], [1], "bf16")


def test_numbers_as_text():
    assert [count_text(value) for value in (576, 1234, 999.6e6, 37.56e9, 1.0264e12)] == [
        "576",
        "1.23k",
        "1000M",
        "37.6B",
        "1.03T",
    ]
    assert [bytes_text(value) for value in (12, 62464, 1.023e9)] == ["12 B", "62.5 kB", "1.02 GB"]
