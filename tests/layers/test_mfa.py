"""Multi-matrix factorisation attention against its definition in float64, and what it reads and writes."""

import math

import pytest
import torch
from testing import assert_close
from tiny import left_padded, random_ids
from tiny_step3 import seeded, text_config, text_model
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, StaticCache

from hf_moe.models import layer_mask, layer_mfa
from hf_moe.models.layer_cache import GrowingLayer, adopt_growing_layers
from hf_moe.models.layer_mfa import MultiMatrixAttention, shared_head_attention
from hf_moe.models.layer_rope import RotaryEmbedding

DTYPES = [torch.float32, torch.float64]


def attention(implementation: str, **overrides) -> MultiMatrixAttention:
    model = text_model(implementation, **overrides)
    return model.model.layers[1].self_attn.double()


def by_hand(layer: MultiMatrixAttention, states: torch.Tensor, eps: float) -> torch.Tensor:
    """The attention of one sequence (S, hidden), token by token and head by head, with complex rotations."""
    heads, dim = layer.wq.weight.shape[0] // layer.head_dim, layer.head_dim
    theta = layer.config.rope_parameters["rope_theta"]

    def rotate(vector: torch.Tensor, position: int) -> torch.Tensor:
        half = dim // 2
        angles = torch.tensor([position * theta ** (-2 * i / dim) for i in range(half)], dtype=torch.float64)
        turned = torch.complex(vector[:half], vector[half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag))

    outputs = []
    for t, x in enumerate(states):
        low = layer.q_proj.weight @ x
        low = low * (low.pow(2).mean() + eps).rsqrt() * layer.inter_norm.weight
        queries = (layer.wq.weight @ low).view(heads, dim)
        attended = []
        for query in queries:
            query = rotate(query, t)
            scores = torch.stack(
                [query @ rotate(layer.k_proj.weight @ states[s], s) / math.sqrt(dim) for s in range(t + 1)]
            )
            values = torch.stack([layer.v_proj.weight @ states[s] for s in range(t + 1)])
            attended.append(scores.softmax(0) @ values)
        outputs.append(layer.o_proj.weight @ torch.cat(attended))
    return torch.stack(outputs)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("eps", [1e-5, 1e-1])
@torch.no_grad()
def test_against_the_definition(implementation, eps):
    layer = attention(implementation, rms_norm_eps=eps)
    layer.inter_norm.variance_epsilon = eps
    states = torch.randn(1, 7, 48, dtype=torch.float64)
    mask = torch.full((7, 7), -1e30, dtype=torch.float64).triu(1).view(1, 1, 7, 7)
    positions = torch.arange(7).unsqueeze(0)
    embeddings = RotaryEmbedding(layer.config)(states, positions)
    output, _ = layer(states, embeddings, mask)
    # Angles are float32 by design: they bound the agreement.
    assert_close("output", output[0], by_hand(layer, states[0], eps), "float32")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask_form", ["boolean", "additive", "per_head", "none"])
@pytest.mark.parametrize("batch, seq, context, heads", [(1, 1, 9, 5), (2, 1, 9, 64), (3, 4, 11, 1), (2, 6, 6, 3)])
def test_rows_order_is_attention(batch, seq, context, heads, mask_form, dtype):
    query = torch.randn(batch, seq, heads, 8, dtype=dtype)
    key, value = torch.randn(2, batch, 1, context, 8, dtype=dtype)
    allowed = torch.rand(batch, heads if mask_form == "per_head" else 1, seq, context) > 0.4
    allowed[..., 0] = True
    bias = torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, -1e30)
    mask = {"boolean": allowed, "none": None}.get(mask_form, bias)
    output, weights = shared_head_attention(query, key, value, mask, 0.3)
    scores = torch.einsum("bshd,btd->bhst", query.double(), key[:, 0].double()) * 0.3
    expected = (scores if mask is None else scores + bias.double()).softmax(-1)
    fmt = "float32" if dtype == torch.float32 else "float64"
    assert_close("weights", weights, expected, fmt)
    assert_close("output", output, torch.einsum("bhst,btd->bshd", expected, value[:, 0].double()), fmt)


def test_gradients_are_those_of_repeated_heads():
    query = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 1, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    output, _ = shared_head_attention(query, key, value, None, 0.3)
    direction = torch.randn_like(output)
    got = torch.autograd.grad((output * direction).sum(), (query, key, value))
    repeated = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.repeat_interleave(5, 1), value.repeat_interleave(5, 1), scale=0.3
    )
    wanted = torch.autograd.grad((repeated.transpose(1, 2) * direction).sum(), (query, key, value))
    for name, one, other in zip(("query", "key", "value"), got, wanted):
        assert_close(name, one, other, "float64")


@pytest.mark.parametrize("length", [1, 3, 16, 17])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_pieces_against_a_cache(implementation, length):
    """Every number of new tokens, on both sides of where the order changes."""
    model = text_model(implementation)
    ids = torch.randint(3, 101, (2, 24))
    expected = model(ids).logits
    cache = model(ids[:, :-length], use_cache=True).past_key_values
    step = model(ids[:, -length:], past_key_values=cache).logits
    assert_close("logits", step, expected[:, -length:], "float32")


# --- no copy of keys and values per head ------------------------------------------------------------------------------


def largest_allocation(run) -> int:
    """Bytes of the largest net allocation of any single operation, kernels' own scratch memory included."""
    run()  # what is made once is not counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    return max(event.self_cpu_memory_usage for event in recorded.events())


@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("new_tokens", [1, 3, 24], ids=["decode", "short", "prompt"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "left_padded"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_no_copy_per_head(implementation, padded, batch, new_tokens, cache_kind):
    """No operation makes a tensor of the size that keys have when they are repeated for every head.

    The context is longer than the new part: without a past, the queries themselves would be as large.
    """
    heads, dim, past = 16, 64, 112
    config = text_config(num_attention_heads=heads, head_dim=dim, num_hidden_layers=1, moe_layers_enum="9")
    model = seeded(type(text_model()), config, attn_implementation=implementation).model
    context = past + new_tokens
    ids = torch.randint(3, 101, (batch, context))
    mask = torch.ones_like(ids)
    if padded:
        mask[:, :2] = 0

    def prepared():
        static = {"max_cache_len": context} if cache_kind == "static" else {}
        cache = (StaticCache if static else DynamicCache)(config=config, **static)
        model(ids[:, :past], attention_mask=mask[:, :past], past_key_values=cache)
        return lambda: model(ids[:, past:], attention_mask=mask, past_key_values=cache)

    repeated = batch * heads * context * dim * 4
    steps = [prepared(), prepared()]
    used = largest_allocation(lambda: steps.pop()())
    assert used < repeated / 2, f"an operation took {used} bytes; repeated keys would take {repeated}"


def test_gradients_through_padding_that_sees_nothing(monkeypatch):
    """The last padding token predicts the first real one. The reference is the other order, whose softmax is written
    out; eager attention hands on gradients of scores that its mask swallowed."""
    ids, mask = left_padded([random_ids(1, 40)[0], random_ids(1, 33, seed=1)[0]])
    model = text_model("sdpa").double().train()

    def gradients() -> torch.Tensor:
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        return torch.cat([tensor.grad.flatten() for tensor in model.parameters() if tensor.grad is not None])

    got = gradients()
    monkeypatch.setattr(layer_mfa, "_ROWS_MAX_TOKENS", 64)
    want = gradients()
    assert (got - want).norm() <= 1e-9 * want.norm()


def test_the_measure_sees_a_repeated_copy():
    """The test above can fail: the plain form, and broadcasting that PyTorch resolves by copying, are both seen."""
    query, key = torch.randn(2, 16, 1, 64), torch.randn(2, 1, 112, 64)
    repeated = 2 * 16 * 112 * 64 * 4
    assert largest_allocation(lambda: key.repeat_interleave(16, 1)) >= repeated
    assert largest_allocation(lambda: query @ key.expand(-1, 16, -1, -1).transpose(2, 3)) >= repeated


def test_cache_holds_one_head():
    model = text_model()
    with torch.no_grad():
        cache = model(torch.randint(3, 101, (2, 9)), use_cache=True).past_key_values
    for layer in cache.layers:
        assert isinstance(layer, GrowingLayer)
        assert tuple(layer.keys.shape) == tuple(layer.values.shape) == (2, 1, 9, 16)


def test_published_cache_size():
    """31,232 values a token: 61 layers, keys and values of 256."""
    config = text_config(num_hidden_layers=61, head_dim=256)
    cache = DynamicCache(config=config)
    adopt_growing_layers(cache, 61)
    for layer in range(61):
        cache.update(torch.zeros(1, 1, 1, 256), torch.zeros(1, 1, 1, 256), layer)
    assert sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) == 31232


@torch.no_grad()
def test_dropout_in_training_only():
    model = text_model("eager", attention_dropout=0.5)
    ids = torch.randint(3, 101, (2, 9))
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left_padded"])
@torch.no_grad()
def test_long_prompts_never_have_a_whole_mask(padded, monkeypatch):
    """At once, in parts against a cache of either kind, and a step: what eager attention gives, padding included."""
    monkeypatch.setattr(layer_mask, "LONG_CONTEXT", 32)
    monkeypatch.setattr(layer_mfa, "_MASK_ENTRIES", 1)
    model, eager = text_model("sdpa", max_seq_len=512), text_model("eager", max_seq_len=512)
    ids, mask = random_ids(2, 300), None
    if padded:
        ids, mask = left_padded([random_ids(1, 130)[0], random_ids(1, 300)[0]])
    registry, sizes = layer_mfa.ALL_ATTENTION_FUNCTIONS, []
    plain = registry["sdpa"]

    def recorded(module, query, key, value, attention_mask, **kwargs):
        sizes.append(0 if attention_mask is None else attention_mask.numel())
        return plain(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(registry._local_mapping, "sdpa", recorded)
    expected = eager(ids, attention_mask=mask).logits
    assert not sizes
    assert_close("logits", model(ids, attention_mask=mask).logits, expected, "float32")
    assert max(sizes) == (2 * 64 * 256 if padded else 0)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=400)):
        logits = []
        for start, stop in ((0, 150), (150, 280), (280, 299), (299, 300)):
            part = None if mask is None else mask[:, :stop]
            logits.append(model(ids[:, start:stop], attention_mask=part, past_key_values=cache).logits)
        real = torch.ones(2, 300).bool() if mask is None else mask.bool()
        assert_close("logits", torch.cat(logits, dim=1)[real], expected[real], "float32")
    assert 0 < max(sizes) <= 2 * 64 * 300
