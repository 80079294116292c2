"""A family is a configuration, a model and a row of `register.FAMILIES`: everything else finds it by that row."""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import AutoConfig

from hf_moe.conversion.quantization import plan_fp8
from hf_moe.conversion.run import convert
from hf_moe.conversion.source import open_source
from hf_moe.hub.bundle import knows_model_type
from hf_moe.hub.card import CardOptions, Checkpoint, render_card
from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config
from hf_moe.register import FAMILIES, architecture_types


class FifthConfig(DeepseekV3Config):
    model_type = "fifth_moe"
    architecture_names = ("FifthForCausalLM",)
    fp8_weights = (r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight",)


@pytest.fixture
def fifth(monkeypatch):
    """The row, and its module; model classes are those of DeepSeek-V3."""
    module = types.ModuleType("hf_moe.models.configuration_fifth")
    module.FifthConfig = FifthConfig
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(FAMILIES, "fifth_moe", "configuration_fifth.FifthConfig")
    architecture_types.cache_clear()
    yield {"model_type": "fifth_moe"}
    architecture_types.cache_clear()


def test_auto_classes_know_it_by_its_architecture(fifth, tmp_path):
    AutoConfig.register("fifth_moe", FifthConfig, exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["FifthForCausalLM"], "hidden_size": 64}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is FifthConfig and config.hidden_size == 64


def test_conversion_quantises_what_its_configuration_says(fifth, tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fifth}))
    source = open_source(tmp_path / "in")
    convert(source, plan_fp8(source), tmp_path / "out", progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    quantised = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert quantised and all(".mlp.experts." in name for name in quantised)


def test_card_needs_no_row_of_its_own(fifth):
    assert knows_model_type(fifth)
    config = {**FifthConfig().to_dict(), **fifth}
    text = render_card(Checkpoint("fifth", "me/fifth", config, frozenset({"config.json"})), CardOptions())
    assert "`fifth_moe` architecture." in text and "BibTeX" not in text and "bibtex" not in text
