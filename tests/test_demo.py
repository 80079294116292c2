"""The checkpoint that the package ships, and the command that shows it."""

import hashlib
import io
import json
import lzma
import math
import re
import sysconfig
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import hf_moe
from hf_moe.cli import app
from hf_moe.demo import DEMO_MODEL, cache_bytes, run_demo

HELD_OUT_FILE = "signal.py"  # short, and the same in Python 3.11 and 3.12
# What the shipped weights reach there, with a margin for other processors: 1.758 bits per byte, and 0.562.
BITS_PER_BYTE, AGREEMENT = 1.79, 0.52


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_weights_are_at_most_8_megabytes():
    weights = list(DEMO_MODEL.glob("*.safetensors"))
    assert weights and sum(path.stat().st_size for path in weights) <= 8_000_000


def test_checkpoint_stores_bfloat16_and_keeps_the_router_bias_in_float32():
    dtypes = {}
    for path in DEMO_MODEL.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            dtypes |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    biases = {name for name in dtypes if name.endswith("e_score_correction_bias")}
    assert len(biases) == 8  # seven layers of the main stack and the MTP layer
    assert {dtypes[name] for name in biases} == {"F32"}
    assert {dtype for name, dtype in dtypes.items() if name not in biases} == {"BF16"}


def test_loads_as_our_class_with_one_mtp_layer(model):
    config = AutoConfig.from_pretrained(DEMO_MODEL)
    assert (config.model_type, config.num_nextn_predict_layers) == ("deepseek_v3", 1)
    assert type(model).__module__ == "hf_moe.models.modeling_deepseek_v3"
    assert model.dtype == torch.bfloat16
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_shipped_code_is_the_code_of_the_package():
    shipped = {path.name: path.read_text() for path in DEMO_MODEL.glob("*.py")}
    assert {"configuration_deepseek_v3.py", "modeling_deepseek_v3.py"} <= set(shipped)
    models = Path(hf_moe.__file__).parent / "models"
    changed = [name for name, text in shipped.items() if text != (models / name).read_text()]
    assert not changed, "run examples/train_demo.py --output_dir hf_moe/demo_model --refresh"


@pytest.mark.parametrize(
    "text",
    ["", "def f():\n\treturn 1\n\n\n", "x = 'naïve – 例 🦜'\r\n", "  \n \t\n   ", "".join(map(chr, range(256)))],
    ids=["empty", "tabs", "unicode", "blanks", "latin1"],
)
def test_tokenizer_gives_text_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_special_tokens_agree_with_the_configuration(tokenizer, model):
    config = model.config
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.bos_token_id == config.bos_token_id == model.generation_config.bos_token_id
    assert tokenizer.eos_token_id == config.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.pad_token_id == config.pad_token_id


@torch.no_grad()
def test_bits_per_byte_on_a_held_out_file(model, tokenizer):
    digest = hashlib.sha256(HELD_OUT_FILE.encode()).hexdigest()
    assert int(digest, 16) % 20 == 0  # by the rule of the model card
    data = (Path(sysconfig.get_path("stdlib")) / HELD_OUT_FILE).read_bytes()
    text = data.decode()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    loss = model(input_ids=ids, labels=ids).loss.item()
    bits_per_byte = loss * (ids.shape[1] - 1) / math.log(2) / len(data)
    assert bits_per_byte < BITS_PER_BYTE
    assert bits_per_byte < 8 * len(lzma.compress(data, preset=9)) / len(data)


@torch.no_grad()
def test_mtp_layer_foresees_the_main_heads_choice(model, tokenizer):
    text = (Path(sysconfig.get_path("stdlib")) / HELD_OUT_FILE).read_text(encoding="utf-8")
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    output = model(input_ids=ids, output_mtp_logits=True)
    draft = output.mtp_logits[0].argmax(-1)  # position i: token i + 2
    choice = output.logits.argmax(-1)[:, 1:]  # position i + 1: token i + 2
    assert (draft == choice).float().mean() > AGREEMENT


def test_greedy_runs_are_equal_and_measure_the_latent_cache():
    first, second = (run_demo(max_new_tokens=12, temperature=0, console=silent()) for _ in range(2))
    assert first.completion == second.completion and first.completion
    assert 1 <= first.new_tokens <= 12
    config = AutoConfig.from_pretrained(DEMO_MODEL)
    latent = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * torch.bfloat16.itemsize
    assert first.cache_bytes_per_token == latent
    heads, per_head = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    assert first.expanded_bytes_per_token == config.num_hidden_layers * heads * per_head * torch.bfloat16.itemsize


def test_cache_bytes_count_what_a_cache_holds(model, tokenizer):
    output = model(**tokenizer("import os", return_tensors="pt"), use_cache=True)
    longer = model(**tokenizer("import os, sys, re\n\n", return_tensors="pt"), use_cache=True)
    per_token = [cache_bytes(o.past_key_values) / o.past_key_values.get_seq_length() for o in (output, longer)]
    assert per_token[0] == per_token[1] > 0


def test_completion_streams_to_the_console_and_goes_on_from_the_prompt():
    console = silent()
    result = run_demo("import os\nimport ", max_new_tokens=8, temperature=0, console=console)
    printed = console.file.getvalue()
    assert result.prompt == "import os\nimport"  # no space at the end: tokens carry it in front
    assert result.prompt + result.completion in printed
    assert "tokens a second" in printed and "bytes a token" in printed


def test_empty_prompt_starts_a_file():
    result = run_demo("", max_new_tokens=4, temperature=0, console=silent())
    assert result.prompt == "" and result.new_tokens >= 1


def test_seed_decides_the_sample():
    first, again, other = (
        run_demo(max_new_tokens=24, temperature=1.0, seed=seed, console=silent()).completion for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"prompt": "x = 1\n" * 2000}, "exceed the model's 2048 positions"),
    ],
    ids=["no tokens", "negative temperature", "nan", "long prompt"],
)
def test_bad_input_is_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_demo(console=silent(), **arguments)


def test_command_demo():
    result = CliRunner().invoke(
        app, ["demo", "--prompt", "def main(", "--max-new-tokens", "6", "--temperature", "0", "--seed", "1"]
    )
    assert result.exit_code == 0, result.output
    printed = " ".join(result.output.split())  # whatever the width of the terminal
    for text in ("def main(", "tokens a second", "bytes a token", "times as much", "Where to go next"):
        assert text in printed


def test_command_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output.strip()) == (0, f"hf-moe {hf_moe.__version__}")


@pytest.mark.parametrize("option", [["--max-new-tokens", "0"], ["--temperature", "-1"]], ids=["tokens", "temperature"])
def test_command_rejects_bad_options(option):
    assert CliRunner().invoke(app, ["demo", *option]).exit_code == 2


def test_model_card_states_what_was_measured():
    from huggingface_hub import ModelCard

    card = ModelCard.load(DEMO_MODEL / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    stated = card.data.eval_results[0].metric_value
    xz = float(re.search(r"`xz -9` \| ([0-9.]+)", card.content)[1])
    assert 0 < stated < xz and f"**{stated:.4f}**" in card.content
    for word in ("xz -9", "seed", "steps", "held out", "bits per byte"):
        assert word in card.content
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"].endswith("DeepseekV3ForCausalLM")
