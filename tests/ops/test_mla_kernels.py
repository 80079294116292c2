"""The kernels of absorbed attention (in Triton's interpreter without a GPU) against the definition in float64."""

import pytest
import torch
from testing import assert_close, can_run_kernels
from tiny import left_padded, random_ids, tiny_model

from hf_moe.models import kernel_mla, layer_mla
from hf_moe.models.kernel_mla import mla_decode, mla_tile, split_count
from hf_moe.models.layer_mla import absorbed_attention
from hf_moe.models.op_mla import latent_decode

pytestmark = [pytest.mark.skipif(not can_run_kernels(), reason="kernels cannot run here")]
if torch.cuda.is_available():  # there they are part of the GPU queue
    pytestmark.append(pytest.mark.gpu)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMAT = {torch.float32: "float32", torch.bfloat16: "bfloat16_kernel"}
DTYPES = [pytest.param(torch.bfloat16, id="bfloat16")]
if DEVICE == "cpu":  # the interpreter has the registers for it
    DTYPES.append(pytest.param(torch.float32, id="float32"))


def inputs(batch, queries, heads, context, latent_width, rope_width, dtype):
    make = lambda *shape: torch.randn(shape).to(dtype).to(DEVICE)  # noqa: E731
    return (
        make(batch, queries, heads, latent_width),
        make(batch, queries, heads, rope_width),
        make(batch, context, latent_width),
        make(batch, context, rope_width),
    )


def by_definition(query, query_rope, latent, key_rope, mask, scaling):
    tensors = [tensor.double() for tensor in (query, query_rope, latent.unsqueeze(1), key_rope.unsqueeze(1))]
    return absorbed_attention(*tensors, None if mask is None else mask.unsqueeze(1), scaling)[0]


# Batch, queries, heads, context, latent width, rotary width.
SIZES = [(1, 1, 3, 5, 24, 4), (2, 1, 16, 200, 128, 16), (1, 3, 20, 330, 64, 8), (2, 2, 70, 97, 32, 16)]


FORMS = ["none", "causal", "padded", "static", "scattered", "one for all queries", "one with holes"]


def masks(batch, queries, context):
    last = torch.ones(queries, context, dtype=torch.bool).tril(context - queries)
    padded = last.expand(batch, -1, -1).clone()
    padded[-1, :, : context // 2] = False  # a shorter sequence, padded on the left
    free = torch.zeros(batch, queries, context, dtype=torch.bool)
    free[:, :, : context // 3 + 1] = True  # a static cache, of which two thirds are free
    scattered = torch.rand(batch, queries, context) > 0.6
    scattered[..., -1] = True
    forms = {"none": None, "causal": last.unsqueeze(0), "padded": padded, "static": free, "scattered": scattered}
    forms["one for all queries"] = padded[:, -1:]
    forms["one with holes"] = scattered[:, -1:]
    return {name: mask if mask is None else mask.to(DEVICE) for name, mask in forms.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "form", ["none", "causal", "padded", "static", "scattered", "one for all queries", "one with holes"]
)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_decode_against_float64(sizes, form, dtype, poisoned):
    batch, queries, _, context, *_ = sizes
    tensors, mask = inputs(*sizes, dtype), masks(batch, queries, context)[form]
    output = mla_decode(*tensors, mask, 0.17)
    assert output.dtype == dtype
    assert_close("attended", output, by_definition(*tensors, mask, 0.17), FORMAT[dtype])
    assert torch.equal(output, mla_decode(*tensors, mask, 0.17)), "the same inputs gave other bits"


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_any_number_of_splits(splits, monkeypatch, poisoned):
    monkeypatch.setattr(kernel_mla, "split_count", lambda *_: splits)
    tensors = inputs(2, 1, 4, 230, 32, 16, DTYPES[-1].values[0])
    mask = masks(2, 1, 230)["padded"]  # the first parts of the second sequence are empty
    wanted = by_definition(*tensors, mask, 0.2)
    assert_close("attended", mla_decode(*tensors, mask, 0.2), wanted, FORMAT[tensors[0].dtype])


def test_front_of_a_longer_buffer_and_large_scores():
    query, query_rope, latent, key_rope = inputs(2, 1, 5, 300, 32, 16, DTYPES[-1].values[0])
    latent, key_rope = latent[:, :201], key_rope[:, :201]
    tensors = query * 30, query_rope * 30, latent, key_rope  # weights of one token, next to nothing for the rest
    assert_close("attended", mla_decode(*tensors, None, 1.0), by_definition(*tensors, None, 1.0), FORMAT[query.dtype])


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("heads", [4, 70])
def test_a_query_that_attends_to_nothing_gets_zeros(heads, splits, monkeypatch, poisoned):
    monkeypatch.setattr(kernel_mla, "split_count", lambda *_: splits)
    tensors = inputs(2, 1, heads, 150, 24, 16, torch.bfloat16)
    mask = torch.ones(2, 1, 150, dtype=torch.bool, device=DEVICE)
    mask[0, :, 3:60] = mask[1] = False
    output = mla_decode(*tensors, mask, 0.2)
    assert output[1].eq(0).all()
    assert_close("attended", output[:1], by_definition(*(t[:1] for t in tensors), mask[:1], 0.2), "bfloat16")


@pytest.mark.parametrize(
    ("context", "programs", "wanted"), [(32768, 2, 64), (1024, 2, 16), (33, 2, 1), (4096, 132, 1), (4096, 80, 3)]
)
def test_split_count(context, programs, wanted):
    assert split_count(context, programs, 132, 32) == wanted


def test_tiles_are_chosen_by_rows_and_capability():
    assert [mla_tile(rows, (9, 0)).block_m for rows in (1, 16, 20, 64, 128)] == [16, 16, 32, 64, 64]
    assert mla_tile(128, (8, 9)).block_m == 32


@pytest.mark.parametrize("batch", ["plain", "left padded"])
def test_cached_steps_of_a_model_on_the_kernel(batch, monkeypatch):
    model = tiny_model(mla_mode="absorbed", attn_implementation="sdpa").to(DEVICE)
    ids, mask = left_padded([random_ids(1, 9)[0], random_ids(1, 14)[0]])
    if batch == "plain":
        ids, mask = random_ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    ids, mask = ids.to(DEVICE), mask.to(DEVICE)
    calls = []
    monkeypatch.setattr(layer_mla, "decodes_on_kernels", lambda query, latent, mask: True)
    monkeypatch.setattr(layer_mla, "latent_decode", lambda *args: calls.append(1) or latent_decode(*args))
    with torch.no_grad():
        cache = model(ids[:, :12], attention_mask=mask[:, :12], use_cache=True).past_key_values
        first = model(ids[:, 12:13], attention_mask=mask[:, :13], past_key_values=cache).logits
        second = model(ids[:, 13:], attention_mask=mask, past_key_values=cache).logits
        assert len(calls) == 3 * 3
        monkeypatch.undo()
        whole = model(ids, attention_mask=mask).logits
    assert_close("logits", torch.cat((first, second), dim=1), whole[:, 12:], "float32")
