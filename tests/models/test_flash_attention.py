"""`attn_implementation="flash_attention_2"`: Transformers' own code around kernels that are written out here.

The kernels take rows without padding, causal from the end, queries, keys and values of one width. Everything else, the
unpadding and the bounds of packed sequences, is what runs on a GPU.
"""

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from checkpoints import golden, max_difference
from testing import load_golden
from tiny import random_ids
from tiny_step3 import PIXELS
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DataCollatorWithFlattening,
    PreTrainedModel,
)

import hf_moe  # noqa: F401  (registers the models)

CASES = ["v3_mtp2", "v2_lite_greedy", "kimi_k2", "v3_fp8", "step3_text", "longcat_flash", "longcat_lite_ngram"]
WITH_MTP = ["v3_mtp2", "v3_fp8", "longcat_flash", "longcat_lite_ngram"]
PACKED = [5, 7]  # lengths of the sequences in a row


def flash(query, key, value, dropout_p=0.0, softmax_scale=None, causal=False):
    """(B, S, h, d) queries, (B, T, g, d) keys and values."""
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    seq, context = query.shape[2], key.shape[2]
    mask = torch.ones(seq, context, dtype=torch.bool).tril(context - seq) if causal else None
    options = {"attn_mask": mask, "dropout_p": dropout_p, "scale": softmax_scale, "enable_gqa": True}
    return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)


def flash_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    """(N, h, d) queries of several sequences after one another, their first places and the end."""
    bounds = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist()))
    assert bounds[-1] == (len(q), len(k)) and max_seqlen_q > 0 and max_seqlen_k > 0
    parts = []
    for (q_start, k_start), (q_stop, k_stop) in zip(bounds, bounds[1:]):
        own = (q[None, q_start:q_stop], k[None, k_start:k_stop], v[None, k_start:k_stop])
        parts.append(flash(*own, dropout_p, softmax_scale, causal)[0])
    return torch.cat(parts)


@pytest.fixture
def both(monkeypatch):
    """A golden's model under `"sdpa"` and under the kernels."""
    kernels = (flash, flash_varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: kernels)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)

    def load(case: str, auto_class=AutoModelForCausalLM):
        names = ("sdpa", "flash_attention_2")
        options = {"dtype": torch.float32}
        return [auto_class.from_pretrained(golden(case), attn_implementation=name, **options) for name in names]

    return load


def batch(model, side: str | None) -> dict[str, torch.Tensor]:
    """Two rows of 12 tokens, the first with 4 of padding."""
    ids = torch.randint(3, model.config.vocab_size - 3, (2, 12))
    mask = torch.ones_like(ids)
    if side is not None:
        mask[0, slice(0, 4) if side == "left" else slice(8, 12)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def packed(model) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, model.config.vocab_size - 3, (1, sum(PACKED)))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(length) for length in PACKED])[None]}


def gradients(model) -> torch.Tensor:
    return torch.cat([tensor.grad.flatten() for tensor in model.parameters() if tensor.grad is not None])


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_logits_of_padded_batches(case, side, both):
    plain, flashed = both(case)
    inputs = batch(plain, side)
    with torch.no_grad():
        want, got = (model.eval()(**inputs).logits for model in (plain, flashed))
    real = inputs["attention_mask"].bool()
    assert max_difference(got[real], want[real]) < 1e-4


def test_logits_of_pictures_and_text(both):
    """The tower, whose attention looks both ways, and a padded prompt behind it."""
    expected = load_golden("step3_vl")[0]
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask", *PIXELS)}
    real = expected["attention_mask"].bool()
    for model in both("step3_vl", AutoModelForImageTextToText):
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
        assert max_difference(logits[real], expected["logits"][real]) < 1e-4


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("case", CASES)
def test_packed_rows_told_by_their_bounds(case, implementation, both):
    """What `DataCollatorWithFlattening` gives with and without positions."""
    model = dict(zip(("sdpa", "flash_attention_2"), both(case)))[implementation].train()
    rows = [{"input_ids": random_ids(1, length, seed=length)[0].tolist()} for length in PACKED]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    inputs = collate([{**row, "labels": row["input_ids"]} for row in rows])
    want = model(**inputs)
    position_ids = inputs.pop("position_ids")
    got = model(**inputs)
    assert position_ids.tolist() == [[*range(PACKED[0]), *range(PACKED[1])]]
    assert torch.equal(got.logits, want.logits) and got.loss.item() == want.loss.item()


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case, padded, both):
    losses, grads = [], []
    models = both(case)
    inputs = batch(models[0], "right") if padded else packed(models[0])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100) if padded else inputs["input_ids"]
    for model in models:
        output = model.train()(**inputs, labels=labels)
        output.loss.backward()
        losses.append(output.loss.item())
        grads.append(gradients(model))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert (grads[1] - grads[0]).norm() <= 1e-4 * grads[0].norm()


@pytest.mark.parametrize("mode", ["auto", "expanded", "absorbed"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_of_a_padded_batch(case, mode, both):
    if mode != "auto" and case == "step3_text":
        pytest.skip("Step3 has one order")
    models = both(case)
    inputs = batch(models[0], "left")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = []
    for model in models:
        model.config.mla_mode = mode
        tokens += [model.eval().generate(**inputs, **options)]
        if case in WITH_MTP:
            tokens += [model.generate(**inputs, use_mtp=True, **options)]
    assert all(torch.equal(tokens[0], other) for other in tokens)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_packed_rows_with_the_default_cache(case, implementation):
    """A new cache, which is what a call makes that says nothing about it, does not join what positions hold apart."""
    model = AutoModelForCausalLM.from_pretrained(
        golden(case), dtype=torch.float32, attn_implementation=implementation
    ).eval()
    inputs = packed(model)
    assert model.config.use_cache is not False
    with torch.no_grad():
        got = model(**inputs).logits.split(PACKED, dim=1)
        for logits, ids in zip(got, inputs["input_ids"].split(PACKED, dim=1)):
            assert max_difference(logits, model(ids).logits) < 1e-4
