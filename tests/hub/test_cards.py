"""Model cards: their metadata, their numbers, whose they are, and snippets that run as they stand."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import ModelCard
from kimi_release import write_release
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM
from transformers.pipelines import SUPPORTED_TASKS
from typer.testing import CliRunner

from hf_moe.cli import app
from hf_moe.hub.card import CardOptions, Checkpoint, is_ours, read_checkpoint, render_card
from hf_moe.hub.families import FAMILIES, RELEASES, licence_of
from hf_moe.hub.push import PushOptions, plan_push, push
from hf_moe.hub.tokenizer import convert_tokenizer
from hf_moe.inspect.report import inspect_model
from hf_moe.units import bytes_text

REPOSITORY = Path(__file__).resolve().parents[2]
CARDS = REPOSITORY / "model_cards"
SLUGS = ["deepseek-v2", "deepseek-v3", "kimi-k2", "step3", "longcat-flash"]
sys.path += [str(CARDS), str(REPOSITORY / "tests" / "models")]

import render  # noqa: E402
from test_remote_code import interpreter  # noqa: E402, F401  a fixture


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def tiny_checkpoint(**changes) -> Checkpoint:
    values = {"name": "tiny", "address": "someone/tiny", "config": tiny_config("deepseek_v3").to_dict()}
    return Checkpoint(**{**values, "files": frozenset({"config.json"}), **changes})


# --- the cards in model_cards/ ----------------------------------------------------------------------------------------


def test_the_cards_are_current():
    """Run `python model_cards/render.py` where this fails."""
    rendered = render.render_all()
    assert set(rendered) == {f"{slug}.md" for slug in SLUGS} | {"converted.md"}
    assert set(rendered) | {"demo.md", "README.md"} == {path.name for path in CARDS.glob("*.md")}
    for name, text in rendered.items():
        kept = (CARDS / name).read_text(encoding="utf-8")
        assert is_ours(kept), name
        if name == "converted.md":  # words of the step are the conversion's, and its version's
            text, kept = (re.sub(r"\| 1\. .*|<!-- .*", "", card) for card in (text, kept))
        assert kept == text, name


@pytest.mark.parametrize("slug", SLUGS)
def test_metadata(slug):
    text = (CARDS / f"{slug}.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    data = card.data
    family = next(family for family in FAMILIES.values() if family.slug == slug)
    assert data.library_name == "transformers" and data.pipeline_tag in SUPPORTED_TASKS
    assert data.pipeline_tag == ("image-text-to-text" if slug == "step3" else "text-generation")
    assert data.base_model == family.release and re.fullmatch(r"[\w.-]+/[\w.-]+", data.base_model)
    assert data.language == ["en", "zh"] and "custom_code" in data.tags and "mixture-of-experts" in data.tags
    licence = licence_of(family.release)
    assert data.license == licence.id in ("mit", "apache-2.0", "other")
    if data.license == "other":
        assert re.fullmatch(r"[a-z0-9-]+", data.license_name) and data.license_link.startswith("https://")
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()
    assert family.citation in text and "[" + family.release + "](https://huggingface.co/" in text


def test_licences():
    assert {licence.text for _, licence in RELEASES} == {path.name for path in licence_folder().glob("*.txt")}
    assert licence_of("deepseek-ai/DeepSeek-V3").name == "deepseek" == licence_of("deepseek-ai/DeepSeek-V2-Lite").name
    assert {licence_of(f"deepseek-ai/DeepSeek-{name}").id for name in ("R1", "R1-0528", "V3-0324", "V3.1")} == {"mit"}
    assert licence_of("moonshotai/Kimi-K2-Thinking").name == "modified-mit"
    assert licence_of("someone/DeepSeek-V3") is None and licence_of(None) is None
    assert b"100 million monthly active users" in licence_of("moonshotai/Kimi-K2-Base").read()
    assert licence_of("meituan-longcat/LongCat-Flash-Chat").read().startswith(b"MIT License")
    assert b"Apache License" in licence_of("stepfun-ai/step3").read()[:200]


def licence_folder() -> Path:
    from hf_moe.hub.families import LICENCES

    return LICENCES


@pytest.mark.parametrize("slug", SLUGS)
def test_numbers_are_those_of_inspect(slug):
    text = (CARDS / f"{slug}.md").read_text(encoding="utf-8")
    record = inspect_model(next(f.example for f in FAMILIES.values() if f.slug == slug), [32768], [1], "bf16", None, [])
    for wanted in (record["total_params"], record["active_params"], record["mtp_params"], record["vision_params"]):
        assert not wanted or f"({wanted:,})" in text
    assert bytes_text(record["checkpoint_bytes"]["fp8"]) in text


def test_parameters_are_those_of_the_model(tmp_path):
    model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path)
    text = render_card(read_checkpoint(tmp_path))
    counts = dict(re.findall(r"\| (main model|MTP layers) \| \S+ \(([\d,]+)\) \|", text))
    assert sum(int(count.replace(",", "")) for count in counts.values()) == model.num_parameters()


# --- what a card says of its folder -----------------------------------------------------------------------------------


def test_steps_versions_and_checksums_come_from_the_manifest():
    read = {"model.safetensors": {"size": 7, "sha256": "b" * 64}}
    first = {"name": "deepseek-ai/DeepSeek-V3@0123abcd", "files": read}
    second = {"name": "my|folder", "files": {"model.safetensors": {"size": 9, "header_sha256": "c" * 64}}}
    manifest = {
        "steps": [
            {"title": "block FP8 to bfloat16", "options": {}, "hf_moe": "0.1.0", "torch": "2.13.0", "source": first},
            {"title": "slice", "options": {"experts": 8}, "hf_moe": "0.2.0", "torch": "2.14.0", "source": second},
        ],
        "files": {
            "model-1.safetensors": {"size": 1234567, "sha256": "a" * 64},
            "README.md": {"size": 1, "sha256": "d" * 64},
        },
    }
    text = render_card(tiny_checkpoint(manifest=manifest))
    data = ModelCard(text).data
    assert data.base_model == "deepseek-ai/DeepSeek-V3" and data.license_name == "deepseek"
    assert (
        "| 1. block FP8 to bfloat16 |" in text
        and "commit `0123abcd`" in text
        and "| hf_moe 0.1.0, torch 2.13.0 |" in text
    )
    assert "| 2. slice | experts 8 | local folder `my\\|folder` | hf_moe 0.2.0, torch 2.14.0 |" in text
    assert f"| `model-1.safetensors` | 1,234,567 | `{'a' * 64}` |" in text and "README.md" not in text
    assert f"`{'b' * 64}`" in text and f"`{'c' * 64}` (of the header)" in text


def test_licence_and_base_model_as_told_or_as_an_older_readme_says(tmp_path):
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    assert "license" not in ModelCard(render_card(read_checkpoint(tmp_path))).data.to_dict()
    told = ModelCard(render_card(read_checkpoint(tmp_path), CardOptions("deepseek-ai/DeepSeek-R1", None, "Mine"))).data
    assert told.license == "mit" and told.base_model == "deepseek-ai/DeepSeek-R1"
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\nbase_model:\n- someone/model\n---\n# Upstream\n")
    stated = ModelCard(render_card(read_checkpoint(tmp_path))).data
    assert stated.license == "cc-by-4.0" and stated.base_model == "someone/model"
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    (tmp_path / "LICENSE.txt").write_text("mine")
    own = ModelCard(render_card(read_checkpoint(tmp_path))).data
    assert own.license == "other" and own.license_link == "LICENSE.txt"


UPSTREAM = {"source": {"name": "deepseek-ai/DeepSeek-V3@0123abcd"}}
LOCAL = {"source": {"name": "model"}}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    "titles, fp8, relation, words",
    [
        (["block FP8 to bfloat16"], False, None, "Weights of [{}]"),
        (["block FP8 to bfloat16", "bfloat16 to block FP8 with float32 scales"], True, "quantized", "Weights of [{}]"),
        (["the same tensors in other files"], True, None, "Weights of [{}]"),
        (["slice: 2 of 61 layers, 8 of 256 experts"], True, None, "Only some of its layers or experts"),
        (["LoRA adapter merged"], True, "finetune", "[{}](https://huggingface.co/{}) with a LoRA adapter merged"),
    ],
)
def test_what_the_conversions_made_of_the_base(titles, fp8, relation, words):
    config = {**tiny_config("deepseek_v3").to_dict(), **({"quantization_config": FP8} if fp8 else {})}
    steps = [{"title": title, **(LOCAL if number else UPSTREAM)} for number, title in enumerate(titles)]
    text = render_card(tiny_checkpoint(config=config, manifest={"steps": steps}))
    data = ModelCard(text).data
    assert data.base_model == "deepseek-ai/DeepSeek-V3" and data.get("base_model_relation") == relation
    assert words.replace("{}", data.base_model) in text


def test_the_base_that_a_release_names_is_not_the_release(tmp_path):
    # DeepSeek-V3.1's own README says that it was made from DeepSeek-V3.1-Base, whose weights these are not.
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\nbase_model: deepseek-ai/DeepSeek-V3-Base\n---\n")
    text = render_card(read_checkpoint(tmp_path))
    data = ModelCard(text).data
    assert "Weights of" not in text and "made from [deepseek-ai/DeepSeek-V3-Base]" in text
    assert data.license == "cc-by-4.0" and "base_model_relation" not in data.to_dict()
    plan = plan_push(tmp_path, "me/it", PushOptions(card=True))
    assert "LICENSE" not in [upload.name for upload in plan.uploads]
    ours = render_card(read_checkpoint(tmp_path), CardOptions("deepseek-ai/DeepSeek-V3"))
    (tmp_path / "README.md").write_text(ours)
    assert render_card(read_checkpoint(tmp_path)) == ours


def test_files_of_the_inference_code_are_not_promised_to_transformers(tmp_path):
    config = {**tiny_config("deepseek_v3").to_dict(), "num_nextn_predict_layers": 1}
    files = frozenset({"config.json", "inference_config.json", "model0-mp2.safetensors", "model1-mp2.safetensors"})
    text = render_card(tiny_checkpoint(config=config, files=files))
    data = ModelCard(text).data.to_dict()
    assert "library_name" not in data and not {"custom_code", "multi-token-prediction"} & set(data["tags"])
    assert "from_pretrained" not in text and "on 2 processes" in text and "MTP" not in text


def test_mtp_layers_are_counted_where_the_files_hold_more(tmp_path):
    layers = tiny_config("deepseek_v3").num_hidden_layers
    names = {f"model.layers.{layer}.eh_proj.weight" for layer in (layers, layers + 1)}
    counts = []
    for tensors in (set(), names):
        text = render_card(tiny_checkpoint(tensors=frozenset({"model.layers.0.mlp.up_proj.weight", *tensors})))
        counts.append(re.findall(r"\| MTP layers \| \S+ \(([\d,]+)\) \|", text))
    model = tiny_model("deepseek_v3", num_nextn_predict_layers=2)
    main = tiny_model("deepseek_v3", num_nextn_predict_layers=0).num_parameters()
    assert counts == [[], [f"{model.num_parameters() - main:,}"]]


def test_mtp_is_promised_where_its_tensors_are():
    layers = tiny_config("deepseek_v3").num_hidden_layers
    with_mtp = frozenset({"model.embed_tokens.weight", f"model.layers.{layers}.eh_proj.weight"})
    for tensors, expected in ((with_mtp, True), (frozenset({"model.layers.0.mlp.up_proj.weight"}), False)):
        text = render_card(tiny_checkpoint(tensors=tensors))
        assert ("use_mtp=True" in text) is expected is ("multi-token-prediction" in ModelCard(text).data.tags)


def test_an_edited_card_is_not_ours():
    text = render_card(tiny_checkpoint())
    assert is_ours(text) and is_ours(text.replace("\n", "\r\n"))
    assert not is_ours(text.replace("# tiny", "# Tiny")) and not is_ours(text + "More.\n") and not is_ours("# Mine\n")
    assert text == render_card(tiny_checkpoint()), "no times, no order of sets"


def test_command(tmp_path):
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "model")

    def run(*arguments):
        result = CliRunner().invoke(app, ["card", str(tmp_path / "model"), *arguments], env={"COLUMNS": "200"})
        return result.exit_code, result.output

    readme = tmp_path / "model" / "README.md"
    assert run("--out", "-")[1].startswith("---\n") and not readme.exists()
    assert run("--repo", "me/it", "--title", "It")[0] == 0
    assert 'name = "me/it"' in readme.read_text() and "# It\n" in readme.read_text()
    assert run()[0] == 0, "ours is written anew"
    readme.write_text("# Mine")
    code, output = run()
    assert code == 2 and "--overwrite" in output and readme.read_text() == "# Mine"
    assert run("--overwrite")[0] == 0 and is_ours(readme.read_text())
    assert run("--license", "GPL!")[0] == 2
    result = CliRunner().invoke(app, ["card", str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and "nowhere" in result.output


def test_a_card_in_a_converted_folder_keeps_its_record_true(tmp_path):
    from hf_moe.conversion.quantization import plan_bf16
    from hf_moe.conversion.run import convert
    from hf_moe.conversion.source import open_source
    from hf_moe.conversion.verify import verify_folder

    source = REPOSITORY / "tests" / "goldens" / "v3_fp8"
    (tmp_path / "source").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "source" / name).write_bytes((source / name).read_bytes())
    (tmp_path / "source" / "README.md").write_text("# Upstream\n")
    opened = open_source(tmp_path / "source")
    convert(opened, plan_bf16(opened), tmp_path / "target", progress=False)
    arguments = ["card", str(tmp_path / "target"), "--overwrite"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    listed = json.loads((tmp_path / "target" / "conversion.json").read_text())["files"]["README.md"]
    assert listed["sha256"] == hashlib.sha256((tmp_path / "target" / "README.md").read_bytes()).hexdigest()
    assert not verify_folder(tmp_path / "target").problems


# --- snippets ---------------------------------------------------------------------------------------------------------

CHAT = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<im_patch>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}{% endfor %}"
)

RUN = """
import contextlib, io, json, os, re, sys
from pathlib import Path
from huggingface_hub import hf_hub_download
from PIL import Image
Image.new("RGB", (90, 40), (200, 10, 60)).save("photo.jpg")
seen = {}
for repo in sys.argv[1:]:
    text = Path(hf_hub_download(repo, "README.md")).read_text(encoding="utf-8")
    names, printed = {}, io.StringIO()
    blocks = re.findall(r"```python\\n(.*?)```", text, flags=re.DOTALL)
    for block in blocks:
        assert repo in text
        with contextlib.redirect_stdout(printed):
            exec(block, names)
    seen[repo] = [type(names["model"]).__module__, len(blocks), len(names["output"][0]), bool(printed.getvalue())]
assert "hf_moe" not in sys.modules
print(json.dumps(seen))
"""


def save_family(family: str, folder: Path) -> None:
    """A tiny checkpoint with a tokenizer and a chat template, as a release of the family would have them."""
    import tiny_step3

    if family == "step3_vl":
        tiny_step3.vl_model().save_pretrained(folder)
        processor = tiny_step3.processor()
        processor.save_pretrained(folder)
    elif family == "kimi_k2":
        convert_tokenizer(write_release(folder / "release"), folder)
        for path in (folder / "release").iterdir():
            path.unlink()
        (folder / "release").rmdir()
        tiny_model(family, vocab_size=1800).save_pretrained(folder)
    else:
        tiny_model(family, vocab_size=120).save_pretrained(folder)
        tokenizer = tiny_step3.tokenizer()
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder)
    for path in folder.glob("*.py"):  # the push brings the code
        path.unlink()


def test_snippets_of_pushed_cards_run_without_hf_moe(interpreter, monkeypatch, tmp_path):  # noqa: F811
    """The README.md that arrived is read, and its programs run as they stand, in a process that has no hf_moe."""
    families = ("deepseek_v2", "deepseek_v3", "kimi_k2", "step3_vl", "longcat_flash")
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home")
        for family in families:
            save_family(family, tmp_path / family)
            push(tmp_path / family, f"someone/{family}")
        monkeypatch.undo()
        (tmp_path / "work").mkdir()
        result = subprocess.run(
            [interpreter, "-c", RUN, *(f"someone/{family}" for family in families)],
            env={**server.environment(tmp_path / "other"), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
            cwd=tmp_path / "work",
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr[-3000:]
    seen = json.loads(result.stdout.splitlines()[-1])
    for family in families:
        module, count, length, printed = seen[f"someone/{family}"]
        assert module.startswith("transformers_modules.") and printed and length > 5
        assert count == (2 if family in ("deepseek_v3", "longcat_flash") else 1), family


def test_snippet_without_a_tokenizer_runs(tmp_path):
    tiny_model("deepseek_v2").save_pretrained(tmp_path)
    (code,) = blocks(render_card(read_checkpoint(tmp_path)))
    names: dict = {}
    exec(code, names)
    assert names["output"].shape[1] > 3
    assert isinstance(names["model"], type(AutoModelForCausalLM.from_pretrained(tmp_path)))
