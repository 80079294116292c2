"""What conversions do with tokenizers, and repositories as sources: with the engine and the stand-in for the Hub."""

import json
import shutil
from pathlib import Path

import pytest
from hub_server import HubServer
from kimi_release import TEMPLATE, encoding, write_release
from test_fast_tokenizer import fuzzed
from transformers import AutoTokenizer
from typer.testing import CliRunner

import hf_moe  # noqa: F401  registers the families
from hf_moe.cli import app
from hf_moe.conversion.verify import verify_folder
from hf_moe.hub.push import PushOptions, plan_push, push

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
FAMILIES = {
    "deepseek_v2": ("v2_group_limited", "fp8"),
    "deepseek_v3": ("v3_fp8", "bf16"),
    "step3": ("step3_fp8", "bf16"),
    "longcat_flash": ("longcat_fp8", "bf16"),
}
CARRIED = {
    "tokenizer.json": b'{"made": "up"}  \n',
    "tokenizer_config.json": '{"chat_template": "{{ bos }}…", "tokenizer_class": "LlamaTokenizerFast"}\r\n'.encode(),
    "chat_template.jinja": "{% for m in messages %}\n<｜User｜>{{ m }}\n\n{% endfor %}".encode(),
    "special_tokens_map.json": b"{}",
    "generation_config.json": b'{"temperature": 0.6}',
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}\n",
    "LICENSE": b"as it is\n",
}


def convert(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def golden(case: str, folder: Path) -> Path:
    folder.mkdir()
    for path in (GOLDENS / case).iterdir():
        if path.name == "config.json" or path.name.startswith("model"):
            shutil.copy(path, folder / path.name)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizers_and_templates_are_carried_byte_for_byte(tmp_path, family):
    case, to = FAMILIES[family]
    source = golden(case, tmp_path / "source")
    for name, data in CARRIED.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(data)
    code, output = convert(source, tmp_path / "target", "--to", to)
    assert code == 0, output
    for name, data in CARRIED.items():
        assert (tmp_path / "target" / name).read_bytes() == data, name


@pytest.fixture
def kimi(tmp_path) -> Path:
    source = golden("kimi_k2", tmp_path / "source")
    for path in write_release(tmp_path / "release").iterdir():
        shutil.copy(path, source / path.name)
    return source


def test_a_conversion_gives_kimi_a_fast_tokenizer(kimi, tmp_path):
    target = tmp_path / "target"
    code, output = convert(kimi, target, "--to", "fp8")
    assert code == 0 and "tokenizer.json is made from tiktoken.model" in output, output
    assert (target / "tiktoken.model").read_bytes() == (kimi / "tiktoken.model").read_bytes()
    assert not list(target.glob("*.py")), "no remote code of the tokenizer is left"
    loaded, reference, texts = AutoTokenizer.from_pretrained(target), encoding(), fuzzed(300, seed=3)
    assert loaded(texts)["input_ids"] == [reference.encode(text, allowed_special="all") for text in texts]
    assert loaded.chat_template == TEMPLATE
    assert not verify_folder(target).problems
    code, output = convert(target, tmp_path / "again", "--to", "bf16")
    assert code == 0 and "made from" not in output, output
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (target / name).read_bytes()


def test_a_vocabulary_that_cannot_be_converted_stops_no_conversion(kimi, tmp_path):
    (kimi / "tiktoken.model").write_bytes(b"not a vocabulary\n")
    code, output = convert(kimi, tmp_path / "target", "--to", "fp8")
    assert code == 0 and "No fast tokenizer: tiktoken.model, line 1" in output, output
    for name in ("tiktoken.model", "tokenizer_config.json", "tokenization_kimi.py"):
        assert (tmp_path / "target" / name).read_bytes() == (kimi / name).read_bytes()


def test_from_repository_to_repository(kimi, tmp_path, monkeypatch):
    """A release on the Hub, read by ranges, converted, pushed with the record of it, downloaded and verified."""
    from huggingface_hub import snapshot_download

    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home")
        commit = server.add_folder("moonshotai/Kimi-K2-Instruct", kimi)
        code, output = convert("moonshotai/Kimi-K2-Instruct", tmp_path / "target", "--to", "fp8")
        assert code == 0, output
        reads = server.asked("GET", r"/resolve/.*\.safetensors$")
        assert reads and all(request.range and request.status == 206 for request in reads)
        assert not list((tmp_path / "home").rglob("*.safetensors")), "nothing was downloaded"
        push(tmp_path / "target", "someone/kimi-fp8")
        card = server.files("someone/kimi-fp8")["README.md"].decode()
        assert "base_model: moonshotai/Kimi-K2-Instruct\n" in card and "base_model_relation: quantized" in card
        assert "license_name: modified-mit" in card and f"commit `{commit}`" in card
        assert server.files("someone/kimi-fp8")["LICENSE"].startswith(b"Modified MIT")
        record = json.loads(server.files("someone/kimi-fp8")["conversion.json"])
        for name, entry in record["files"].items():
            assert entry["size"] == len(server.files("someone/kimi-fp8")[name]), name
        downloaded = Path(snapshot_download("someone/kimi-fp8"))
        assert "auto_map" in json.loads((downloaded / "config.json").read_text())
        assert not verify_folder(downloaded).problems, "the record speaks of the files as they were pushed"
        plan = plan_push(downloaded, "someone/again", PushOptions())
        assert not [note for note in plan.notes if "differ" in note]


def test_the_example(tmp_path, monkeypatch, capsys):
    import runpy

    script = Path(__file__).resolve().parents[2] / "examples" / "publish.py"
    source = str(golden("v3_fp8", tmp_path / "source"))
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home")
        for arguments in ([], ["--push"]):
            target = str(tmp_path / "target")
            monkeypatch.setattr("sys.argv", ["publish.py", source, target, "someone/v3", *arguments])
            runpy.run_path(str(script), run_name="__main__")
            assert ("someone/v3" in server.repositories) is bool(arguments)
        assert "conversion.json" in server.files("someone/v3")
    assert "README.md  (made by hf_moe)" in capsys.readouterr().out
