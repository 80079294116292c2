"""`hf-moe route`: the choices that are kept, the numbers made of them, the pictures, and what is refused."""

import json
import math

import pytest
import torch
from test_inspect_command import PNG
from tiny import random_ids, tiny_model
from typer.testing import CliRunner

from hf_moe.cli import app
from hf_moe.inspect import route_charts
from hf_moe.inspect.explain import ROUTE
from hf_moe.inspect.routing import (
    LayerRouting,
    Routing,
    groups_per_token,
    layer_statistics,
    load_model,
    record_routing,
    statistics,
    top_pairs,
)

# 6 tokens, 2 choices, 4 experts and 2 zero experts.
CHOICES = torch.tensor([[0, 1], [0, 1], [1, 2], [0, 4], [4, 5], [0, 1]])
LAYER = LayerRouting(3, 4, 2, CHOICES, torch.tensor([[3.0, 1.0]] * 6))


def test_numbers_of_a_layer_by_hand():
    numbers = layer_statistics(LAYER, groups=2, pairs=3)
    assert numbers["tokens_per_expert"] == [4, 4, 1, 0, 2, 1]
    shares = [4 / 9, 4 / 9, 1 / 9]
    entropy = -sum(share * math.log2(share) for share in shares)
    assert numbers["entropy"] == pytest.approx(entropy) and numbers["normalised_entropy"] == pytest.approx(entropy / 2)
    assert numbers["max_over_mean"] == pytest.approx(4 / (9 / 4)) and numbers["unused_experts"] == 1
    assert numbers["group_load"] == [8, 1] and numbers["group_max_over_mean"] == pytest.approx(8 / 4.5)
    # Devices that each token reaches: 1, 1, 2, 1, 0 (zero experts alone), 1.
    assert numbers["groups_per_token"] == pytest.approx(1)
    assert numbers["real_experts_per_token"] == pytest.approx(9 / 6)
    assert numbers["tokens_by_real_experts"] == [1, 1, 4]
    assert numbers["zero_share"] == pytest.approx(3 / 12) and numbers["top_weight"] == pytest.approx(0.75)
    assert numbers["layer"] == 3 and (numbers["experts"], numbers["zero_experts"]) == (4, 2)


def test_coactivation_and_pairs():
    together = LAYER.coactivation()
    assert together.tolist() == [[4, 3, 0, 0], [3, 4, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert top_pairs(LAYER, 3) == [], "pairs of fewer than five tokens say nothing"
    often = LayerRouting(3, 4, 2, CHOICES.repeat(5, 1), LAYER.weights.repeat(5, 1))
    assert top_pairs(often, 9) == [
        {"experts": [1, 2], "tokens": 5, "lift": pytest.approx(5 * 30 / (20 * 5))},
        {"experts": [0, 1], "tokens": 15, "lift": pytest.approx(15 * 30 / (20 * 20))},
    ]


def test_an_even_layer():
    even = LayerRouting(0, 4, 0, torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2))
    numbers = layer_statistics(even, groups=4)
    assert numbers["normalised_entropy"] == pytest.approx(1)
    assert numbers["max_over_mean"] == numbers["group_max_over_mean"] == 1 and numbers["unused_experts"] == 0
    assert groups_per_token(even, 4) == 2 and numbers["zero_share"] == 0


@pytest.mark.parametrize("groups", [3, 8, 0])
def test_groups_that_do_not_divide_the_experts(groups):
    with pytest.raises(ValueError, match=f"`groups={groups}` does not divide the 4 experts"):
        statistics(Routing("x", 6, [LAYER]), groups)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "kimi_k2"])
def test_recorded_choices_are_the_routers(family):
    """Windows are run apart; every main layer with experts is there, MTP layers are not."""
    model, ids = tiny_model(family), random_ids(1, 25)[0]
    routing = record_routing(model, ids.tolist(), window=10)
    assert routing.num_tokens == 25 and [layer.layer for layer in routing.layers] == [1, 2]
    for layer in routing.layers:
        gate = model.model.layers[layer.layer].mlp.gate
        expected, expected_weights = [], []
        for start in (0, 10, 20):
            seen = []
            handle = gate.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
            with torch.no_grad():
                model(ids[None, start : start + 10])
            handle.remove()
            expected.append(seen[0][2])
            expected_weights.append(seen[0][1])
        assert torch.equal(layer.experts, torch.cat(expected)) and layer.experts.shape == (25, 3)
        assert torch.equal(layer.weights, torch.cat(expected_weights))
        assert (layer.num_experts, layer.num_zero_experts) == (8, 0)
        assert layer.tokens_per_expert().sum() == 25 * 3
    numbers = statistics(routing, groups=4)
    assert numbers["mean"]["real_experts_per_token"] == 3 and len(numbers["layers"]) == 2
    json.dumps(numbers)


def test_recording_leaves_the_model_as_it_was():
    model = tiny_model().train()
    record_routing(model, random_ids(1, 5))
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_what_cannot_be_recorded():
    with pytest.raises(ValueError, match="no tokens"):
        record_routing(tiny_model(), [])
    with pytest.raises(ValueError, match="Linear has no routers"):
        record_routing(torch.nn.Linear(2, 2), [1])


def test_demo_model_by_name():
    model, tokenizer = load_model("demo")
    assert not model.training and record_routing(model, tokenizer("import os").input_ids).layers


# --- command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.py"
    path.write_text("def add(left, right):\n    return left + right\n" * 8)
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["route", *map(str, arguments)], env={"COLUMNS": "200"})


def test_command(text, tmp_path):
    out = tmp_path / "new" / "out"
    result = run("demo", "--text", text, "--out", out, "--groups", 4, "--max-tokens", 50)
    assert result.exit_code == 0, result.output
    names = ["balance.png", "coactivation.png", "groups.png", "load.png", "routing.json", "tokens_per_expert.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(path.read_bytes().startswith(PNG) for path in out.glob("*.png"))
    numbers = json.loads((out / "routing.json").read_text())
    assert numbers["tokens"] == 50 and numbers["groups"] == 4 and len(numbers["layers"]) == 7
    assert "devices per token" in result.stdout and "50 tokens" in result.stdout
    printed = run("demo", "--text", text, "--out", out, "--groups", 4, "--max-tokens", 50, "--json")
    assert json.loads(printed.stdout) == numbers


def test_explain():
    result = run("--explain")
    assert result.exit_code == 0 and "log2" in "".join(result.stdout.split())
    explained = " ".join(names for names, _, _ in ROUTE)
    for key in set(layer_statistics(LAYER, 2)) - {"layer", "experts", "zero_experts"}:
        assert key in explained, key


@pytest.mark.parametrize(
    "options, words",
    [
        ([], "--text"),
        (["demo"], "--text"),
        (["demo", "--text", "TEXT", "--groups", "3"], "groups=3"),
        (["demo", "--text", "TEXT", "--groups", "4", "--layer", "0"], "Layer 0 has no experts"),
        (["no/such-model-anywhere", "--text", "TEXT"], "no/such-model-anywhere"),
    ],
)
def test_clear_errors(options, words, text, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("hf_moe.inspect.routing.record_routing", None)  # said before the run, which may be long
    options = [str(text) if option == "TEXT" else option for option in options]
    result = run(*options, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert words in " ".join(result.output.replace("│", " ").split())


def test_a_folder_that_cannot_be_written_to_is_said_before_the_run(text, monkeypatch):
    monkeypatch.setattr("hf_moe.inspect.routing.load_model", None)
    result = run("demo", "--text", text, "--out", text / "out")
    assert result.exit_code == 2 and f"--out {text / 'out'}: {text} is a file" in result.output


@pytest.mark.parametrize("content, words", [(b"", "no text"), (b"\xff\xfe\x00", "not UTF-8")])
def test_texts_that_are_none(content, words, tmp_path):
    (tmp_path / "text").write_bytes(content)
    result = run("demo", "--text", tmp_path / "text", "--out", tmp_path)
    assert result.exit_code == 2 and words in " ".join(result.output.replace("│", " ").split())


# --- pictures ---------------------------------------------------------------------------------------------------------


def many_layers(zero: int) -> Routing:
    generator = torch.Generator().manual_seed(0)
    layers = []
    for number in range(3, 23):
        chances = torch.rand(32 + zero, generator=generator) + 0.05
        experts = torch.multinomial(chances.expand(300, -1), 4, generator=generator)
        layers.append(LayerRouting(number, 32, zero, experts, torch.rand(300, 4, generator=generator)))
    return Routing("many", 300, layers)


@pytest.mark.parametrize("zero", [0, 8])
def test_pictures_of_many_layers(zero, tmp_path):
    routing = many_layers(zero)
    paths = route_charts.save_route_charts(routing, 8, tmp_path, layer=5)
    assert [path.stem for path in paths] == [
        "load", "balance", "tokens_per_expert", "groups", "coactivation", *(["real_experts"] if zero else [])
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(PNG) for path in paths)


def test_pictures_show_the_numbers():
    routing = many_layers(8)
    load = route_charts.plot_load(routing).axes[0]
    counts = routing.layers[4].tokens_per_expert()[:32].double()
    shown = torch.tensor(load.images[0].get_array()[4].tolist()).double()
    assert torch.allclose(shown, counts / counts.mean())
    assert (load.get_xlabel(), load.get_ylabel()) == ("expert", "layer")
    upper, lower = route_charts.plot_balance(routing, 8).axes
    rows = [layer_statistics(layer, 8) for layer in routing.layers]
    assert list(upper.lines[0].get_ydata()) == pytest.approx([row["normalised_entropy"] for row in rows])
    assert list(lower.lines[1].get_ydata()) == pytest.approx([row["group_max_over_mean"] for row in rows])
    pairs = route_charts.plot_coactivation(routing, 7).axes[0]
    together = routing.layers[4].coactivation()
    expected = together[2, 3] * 300 / (together[2, 2] * together[3, 3])
    assert pairs.images[0].get_array()[2, 3] == pytest.approx(expected.item()) and "layer 7" in pairs.get_title()
    real = route_charts.plot_real_experts(routing).axes[0]
    assert real.images[0].get_array().sum(1).tolist() == pytest.approx([100] * 20)
