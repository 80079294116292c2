"""QK-Clip against the scores that eager attention really takes the softmax of."""

import pytest
import torch
from testing import assert_close
from tiny import left_padded, random_ids, tiny_model
from tiny_step3 import text_model

from hf_moe.models import layer_mla
from hf_moe.training import qk_clip
from hf_moe.training.qk_clip import QKClip, max_logits

FAMILIES = ("deepseek_v3", "deepseek_v2_lite", "longcat_flash")  # with MTP, without low-rank queries, scaled latents


@pytest.fixture
def scores(monkeypatch):
    """Scores (B, h, S, T) of every attention that ran eagerly, -inf where the mask forbids, with its layer."""
    seen, eager = [], layer_mla.eager_attention

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        values = query.detach().double() @ key.detach().double().transpose(2, 3) * scaling
        ahead = torch.ones(values.shape[-2:], dtype=torch.bool).triu(1)
        values = values.masked_fill(ahead, -torch.inf)
        if attention_mask is not None:
            values = values.masked_fill(attention_mask < -1e4, -torch.inf)
        seen.append((module, values))
        return eager(module, query, key, value, attention_mask, scaling, **kwargs)

    monkeypatch.setattr(layer_mla, "eager_attention", attention)
    return seen


def _inputs(kind: str) -> dict[str, torch.Tensor]:
    if kind == "plain":
        return {"input_ids": random_ids(2, 13)}
    if kind == "packed":
        positions = torch.cat((torch.arange(7), torch.arange(6))).unsqueeze(0)
        return {"input_ids": random_ids(1, 13), "position_ids": positions}
    ids, mask = left_padded([random_ids(1, length)[0] for length in (11, 5)])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_largest_logits_and_what_clipping_does_to_them(family, kind, scores, monkeypatch):
    monkeypatch.setattr(qk_clip, "_BLOCK_ELEMENTS", 200)  # a few queries at a time
    model = tiny_model(family, attn_implementation="eager").train()
    inputs = [_inputs(kind), {**_inputs(kind), "input_ids": _inputs(kind)["input_ids"].flip(1)}]
    clip = QKClip(model, threshold=1.0)
    for batch in inputs:  # two micro-batches
        model(**batch, labels=batch["input_ids"])
    before = {name: [v for m, v in scores if m is layer] for name, layer in clip.layers.items()}
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    clip.step()
    factors = {}
    for row, (name, layer) in zip(clip.last, clip.layers.items()):
        largest = torch.stack([part.amax((0, 2, 3)) for part in before[name]]).amax(0)
        assert_close(name, row[: layer.num_heads].double(), largest, "float32")
        factors[name] = 1 / largest.clamp(min=1)
    assert any((factor < 0.9).any() for factor in factors.values())
    assert clip.metrics()["max_attention_logit"] == pytest.approx(clip.last.max().item())
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, values[n])]
    assert changed and all(n.endswith(("q_b_proj.weight", "q_proj.weight", "kv_b_proj.weight")) for n in changed)

    # The first layer sees the same input again: each of its logits shrank by its head's factor.
    name, layer = next(iter(clip.layers.items()))
    scores.clear()
    model(**inputs[0], labels=inputs[0]["input_ids"])
    after = next(v for m, v in scores if m is layer)
    expected = before[name][0] * factors[name].view(1, -1, 1, 1)
    finite = expected.isfinite()
    assert_close("scores", after[finite], expected[finite], "float32")
    rows = layer.kv_b_proj.weight.view(layer.num_heads, -1, layer.kv_lora_rank)[:, layer.qk_nope_head_dim :]
    old = values[name + ".kv_b_proj.weight"].view_as(layer.kv_b_proj.weight).view(layer.num_heads, -1, rows.shape[-1])
    assert torch.equal(rows, old[:, layer.qk_nope_head_dim :])  # values stay


@pytest.mark.parametrize("cached", [False, True])  # with a cache, restarting positions do not separate sequences
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_fused_attention_measures_the_same(kind, cached):
    found = []
    for name in ("eager", "sdpa"):
        model = tiny_model("deepseek_v3", attn_implementation=name, num_nextn_predict_layers=0).train()
        clip = QKClip(model)
        batch = _inputs(kind)
        model(**batch, labels=batch["input_ids"], use_cache=cached)
        clip.step()
        found.append(clip.last)
        assert clip.metrics()["clipped_heads"] == 0
    assert_close("largest", found[1], found[0], "float32")


@pytest.mark.parametrize("by", ["position_ids", "cu_seq_lens_q"])
def test_packed_sequences_without_a_mask(by):
    """As flash and flex attention have it: what is packed is read from the arguments."""
    model = tiny_model("deepseek_v3").train()
    clip = QKClip(model)
    layer = model.model.layers[0].self_attn
    layer.config._attn_implementation = "flash_attention_2"
    query, key = torch.randn(1, 3, 5, 12), torch.randn(1, 3, 5, 12)
    packed = {"position_ids": torch.tensor([[0, 1, 0, 1, 2]]), "cu_seq_lens_q": torch.tensor([0, 2, 5])}
    layer.observe_logits(layer, query, key, None, 0, {by: packed[by]})
    clip.step()
    allowed = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).tril().bool()
    expected = (query @ key.transpose(2, 3) * layer.scaling).masked_fill(~allowed, -torch.inf).amax((0, 2, 3))
    assert_close("largest", clip.last[0], expected, "float32")


def test_two_dimensional_mask():
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    allowed = torch.ones(5, 5, dtype=torch.bool).tril() & (mask[:, None, None, :] * mask[:, None, :, None]).bool()
    expected = (query @ key.transpose(2, 3) * 0.5).masked_fill(~allowed, -torch.inf).amax((0, 2, 3))
    assert_close("largest", max_logits(query, key, mask, 0.5), expected, "float32")


def test_interval_checkpointing_and_evaluation():
    batch = _inputs("plain")
    model = tiny_model("deepseek_v3", num_nextn_predict_layers=0).train()
    clip = QKClip(model, threshold=1.0, interval=2)
    start = model.model.layers[0].self_attn.kv_b_proj.weight.clone()
    model(**batch, labels=batch["input_ids"])
    clip.step()
    assert clip.last is None and torch.equal(model.model.layers[0].self_attn.kv_b_proj.weight, start)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    clip.step()
    assert not torch.equal(model.model.layers[0].self_attn.kv_b_proj.weight, start)
    clip.step()
    model.eval()(**batch)
    clip.step()  # nothing was seen: nothing to clip
    assert clip.metrics() == {}
    clip.detach()
    assert model.model.layers[0].self_attn.observe_logits is None


def test_wrong_models():
    with pytest.raises(ValueError, match="no latent attention"):
        QKClip(text_model())
    with pytest.raises(ValueError, match="absorbed"):
        QKClip(tiny_model("deepseek_v3", mla_mode="absorbed"))
    model = tiny_model("deepseek_v3")
    with pytest.raises(ValueError, match="threshold"):
        QKClip(model, threshold=0)
    model.model.layers[1].self_attn.q_b_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="layers.1.self_attn"):
        QKClip(model)
