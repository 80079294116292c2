"""Latent attention: the two evaluation orders against each other and against a loop over heads and queries."""

import copy
import sys

import pytest
import torch
from testing import assert_close
from tiny import left_padded, random_ids, tiny_config, tiny_model
from transformers import DynamicCache, StaticCache

from hf_moe.models import layer_mla
from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config
from hf_moe.models.configuration_kimi_k2 import KimiK2Config
from hf_moe.models.layer_mla import LatentAttention, absorbed_is_cheaper
from hf_moe.models.layer_rope import RotaryEmbedding

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float64, id="float64")]
FORMAT = {torch.float32: "float32", torch.float64: "float64"}


def make_attention(dtype=torch.float64, **overrides) -> LatentAttention:
    config = tiny_config(**overrides)
    config._attn_implementation = "eager"
    attention = LatentAttention(config, layer_idx=0).eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (1.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1)
            )
    return attention.to(dtype)


def tables(attention, positions, dtype):
    """cos and sin in the dtype of the test. Computed in float32, as the model does."""
    cos, sin = RotaryEmbedding(attention.config)(torch.zeros(1), positions)
    return cos.to(dtype), sin.to(dtype)


def causal(batch: int, queries: int, context: int) -> torch.Tensor:
    """Boolean (B, 1, S, T): the queries are the last of the context."""
    mask = torch.ones(queries, context, dtype=torch.bool).tril(context - queries)
    return mask.expand(batch, 1, queries, context).clone()


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def by_definition(attention, hidden_states, positions, mask) -> torch.Tensor:
    """The equations of the DeepSeek-V2 report, one head and one query at a time; rotation by complex multiplication."""
    a, config = attention, attention.config
    norm = lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w  # noqa: E731
    nope, rope, wide = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    cos, sin = tables(a, positions, hidden_states.dtype)
    turn = torch.complex(cos, sin)

    def rotate(x):  # (B, S, p)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    if config.q_lora_rank is None:
        query = hidden_states @ a.q_proj.weight.t()
    else:
        query = norm(hidden_states @ a.q_a_proj.weight.t(), a.q_a_layernorm.weight) @ a.q_b_proj.weight.t()
    compressed = hidden_states @ a.kv_a_proj_with_mqa.weight.t()
    latent = norm(compressed[..., : config.kv_lora_rank], a.kv_a_layernorm.weight)
    key_rope = rotate(compressed[..., config.kv_lora_rank :])
    expanded = latent @ a.kv_b_proj.weight.t()
    batch, seq, _ = hidden_states.shape
    outputs = []
    for head in range(a.num_heads):
        q = query[..., head * (nope + rope) : (head + 1) * (nope + rope)]
        q = torch.cat((q[..., :nope], rotate(q[..., nope:])), -1)
        kv = expanded[..., head * (nope + wide) : (head + 1) * (nope + wide)]
        k, v = torch.cat((kv[..., :nope], key_rope), -1), kv[..., nope:]
        output = torch.zeros(batch, seq, wide, dtype=hidden_states.dtype)
        for b in range(batch):
            for s in range(seq):
                seen = mask[b, 0, s]
                weights = ((k[b, seen] @ q[b, s]) * a.scaling).softmax(-1)
                output[b, s] = weights @ v[b, seen]
        outputs.append(output)
    return torch.cat(outputs, -1) @ a.o_proj.weight.t()


@pytest.mark.parametrize("absorbed", [False, True], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("q_lora_rank", [28, None], ids=["q_lora", "no_q_lora"])
def test_against_the_definition(q_lora_rank, absorbed):
    attention = make_attention(q_lora_rank=q_lora_rank)
    hidden_states, positions = torch.randn(2, 7, 48, dtype=torch.float64), torch.arange(7).expand(2, 7) + 3
    mask = causal(2, 7, 7)
    expected = by_definition(attention, hidden_states, positions, mask)
    form = mask if absorbed else additive(mask, torch.float64)
    output, weights = attention(hidden_states, tables(attention, positions, torch.float64), form, absorbed=absorbed)
    # The softmax runs in float32 by design.
    assert_close("output", output, expected, "float32")
    assert weights.shape == (2, 3, 7, 7)
    assert_close("weights sum to one", weights.sum(-1), torch.ones(2, 3, 7), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_form", ["boolean", "additive", "per_head_additive", "none"])
@pytest.mark.parametrize("past", [0, 9], ids=["no_past", "past"])
def test_orders_agree(past, mask_form, dtype):
    """Outputs, weights and all gradients, with random masks, against a cache or without."""
    attention = make_attention(dtype)
    queries = 1 if mask_form == "none" else 5
    context = past + queries
    mask = causal(2, queries, context)
    if mask_form != "none":
        mask &= torch.rand(mask.shape) < 0.7
        mask[..., 0] = True
    results = {}
    cache = DynamicCache()
    if past:
        cache.update(torch.randn(2, 1, past, 24).to(dtype), torch.randn(2, 1, past, 4).to(dtype), 0)
    states = torch.randn(2, queries, 48).to(dtype)
    positions = torch.arange(past, context).expand(2, queries)
    seed_grad = torch.randn(2, queries, 48).to(dtype)
    for absorbed in (False, True):
        form = mask if mask_form == "boolean" and absorbed else additive(mask, dtype)
        if mask_form == "per_head_additive":
            form = form + torch.linspace(-1, 1, 3 * context).view(1, 3, 1, context).to(dtype)
        if mask_form == "none":
            form = None if past else form
        leaf = states.clone().requires_grad_()
        attention.zero_grad()
        kwargs = {"past_key_values": copy.deepcopy(cache)} if past else {}
        output, weights = attention(leaf, tables(attention, positions, dtype), form, absorbed=absorbed, **kwargs)
        output.backward(seed_grad)
        gradients = {name: parameter.grad.clone() for name, parameter in attention.named_parameters()}
        results[absorbed] = {"output": output, "weights": weights, "states": leaf.grad, **gradients}
    for name, expected in results[False].items():
        # float64 inputs still pass a float32 softmax.
        assert_close(name, results[True][name], expected, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_absorbed_is_exact_apart_from_the_softmax(dtype):
    """With one visible token the softmax is 1, and the orders agree to the precision of the dtype."""
    attention = make_attention(dtype)
    states, positions = torch.randn(2, 6, 48).to(dtype), torch.arange(6).expand(2, 6)
    mask = torch.eye(6, dtype=torch.bool).expand(2, 1, 6, 6)
    with torch.no_grad():
        tables_ = tables(attention, positions, dtype)
        expanded, _ = attention(states, tables_, additive(mask, dtype), absorbed=False)
        absorbed, _ = attention(states, tables_, mask, absorbed=True)
    assert_close("output", absorbed, expanded, FORMAT[dtype])


def test_half_split_checkpoints():
    """`rope_interleave: false` with rows permuted accordingly is the same function."""
    attention = make_attention()
    other = make_attention(rope_interleave=False)
    other.load_state_dict(attention.state_dict())
    order = torch.tensor([0, 2, 1, 3])  # pairs (0, 1), (2, 3) to halves
    with torch.no_grad():
        rows = other.q_b_proj.weight.view(3, 12, -1)
        rows[:, 8:] = rows[:, 8:][:, order].clone()
        other.kv_a_proj_with_mqa.weight[24:] = other.kv_a_proj_with_mqa.weight[24:][order].clone()
    states, positions = torch.randn(1, 6, 48, dtype=torch.float64), torch.arange(6).unsqueeze(0)
    mask = additive(causal(1, 6, 6), torch.float64)
    expected, _ = attention(states, tables(attention, positions, torch.float64), mask)
    output, _ = other(states, tables(other, positions, torch.float64), mask)
    assert_close("output", output, expected, "float64")


def test_inner_norms_keep_their_own_epsilon():
    attention = make_attention(rms_norm_eps=0.5)
    assert attention.q_a_layernorm.variance_epsilon == attention.kv_a_layernorm.variance_epsilon == 1e-6


def test_attention_bias():
    """`attention_bias` adds biases to q_a_proj, kv_a_proj_with_mqa and o_proj, and the orders still agree."""
    attention = make_attention(attention_bias=True)
    assert sorted(name for name, _ in attention.named_parameters() if name.endswith("bias")) == [
        "kv_a_proj_with_mqa.bias",
        "o_proj.bias",
        "q_a_proj.bias",
    ]
    states, positions = torch.randn(1, 5, 48, dtype=torch.float64), torch.arange(5).unsqueeze(0)
    mask = causal(1, 5, 5)
    cos_sin = tables(attention, positions, torch.float64)
    expanded, _ = attention(states, cos_sin, additive(mask, torch.float64))
    absorbed, _ = attention(states, cos_sin, mask, absorbed=True)
    assert_close("output", absorbed, expanded, "float32")


# --- whole models -----------------------------------------------------------------------------------------------------


def forced(model, mode, **inputs):
    model.config.mla_mode = mode
    try:
        with torch.no_grad():
            return model(**inputs)
    finally:
        model.config.mla_mode = "auto"


MASKS = ["none", "left_padding", "right_padding", "prepared_4d_boolean", "prepared_4d_additive", "packed"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2_lite", "longcat_flash"])
def test_models_agree_under_every_mask(family, kind, implementation, dtype):
    model = tiny_model(family, dtype=dtype, attn_implementation=implementation)
    inputs = {"input_ids": random_ids(2, 11)}
    real = torch.ones(2, 11, dtype=torch.bool)
    if kind == "left_padding":
        inputs["input_ids"], inputs["attention_mask"] = left_padded([random_ids(1, 11)[0], random_ids(1, 6)[0]])
        real = inputs["attention_mask"].bool()
    elif kind == "right_padding":
        inputs["attention_mask"] = torch.tensor([[1] * 11, [1] * 6 + [0] * 5])
        real = inputs["attention_mask"].bool()
    elif kind.startswith("prepared_4d"):
        mask = causal(2, 11, 11) & (torch.rand(2, 1, 11, 11) < 0.6)
        mask |= torch.eye(11, dtype=torch.bool)
        inputs["attention_mask"] = (
            mask if kind.endswith("boolean") and implementation == "sdpa" else additive(mask, dtype)
        )
    elif kind == "packed":
        inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8]])
    expanded = forced(model, "expanded", **inputs).logits
    absorbed = forced(model, "absorbed", **inputs).logits
    assert_close("logits", absorbed[real], expanded[real], "float32")
    if kind != "none":  # the mask matters
        plain = forced(model, "expanded", input_ids=inputs["input_ids"]).logits
        unmasked = 1 if kind in ("left_padding",) else None
        if kind != "right_padding":
            assert (plain - expanded)[unmasked:][real[unmasked:]].abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["expanded", "absorbed"])
def test_mode_decides_which_order_runs(mode, monkeypatch):
    calls = []
    original = layer_mla.absorbed_attention
    monkeypatch.setattr(layer_mla, "absorbed_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    model = tiny_model(mla_mode=mode)
    with torch.no_grad():
        cache = model(random_ids(1, 9), use_cache=True).past_key_values
        assert len(calls) == (3 if mode == "absorbed" else 0)
        model(random_ids(1, 1), past_key_values=cache)
    assert len(calls) == (6 if mode == "absorbed" else 0)


def test_auto_runs_prefill_expanded_and_decode_absorbed(monkeypatch):
    monkeypatch.setattr(layer_mla, "_ABSORBED_EXTRA_CALLS", 0)
    calls = []
    original = layer_mla.absorbed_attention
    monkeypatch.setattr(layer_mla, "absorbed_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    model = tiny_model()
    with torch.no_grad():
        model(random_ids(1, 60))
        assert not calls, "without a cache there is nothing to spare"
        cache = model(random_ids(1, 60), use_cache=True).past_key_values
        assert not calls
        model(random_ids(1, 1), past_key_values=cache)
    assert len(calls) == 3


def test_very_small_models_decode_expanded():
    config = tiny_config()
    assert not absorbed_is_cheaper(config, 1, 100)
    assert absorbed_is_cheaper(config, 1, 100_000)


@pytest.mark.parametrize("config", [DeepseekV3Config(), KimiK2Config()], ids=["deepseek_v3", "kimi_k2"])
@pytest.mark.parametrize("context", [256, 4096, 131072])
def test_choice_at_real_sizes(config, context):
    """Decode and short drafts go absorbed; prefill, and long chunks against a cache, go expanded."""
    assert absorbed_is_cheaper(config, 1, context)
    assert absorbed_is_cheaper(config, 4, context)
    assert not absorbed_is_cheaper(config, context, context)
    assert not absorbed_is_cheaper(config, 2048, 2048 + context)


def test_choice_is_the_smaller_product_count():
    """Multiplications counted one matrix product at a time, for one head."""
    config = DeepseekV3Config()
    r, n, p, v = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    for queries in (1, 8, 64, 100, 150, 200, 512):
        for context in (512, 1000, 8192):
            expand, scores, values = context * r * (n + v), queries * context * (n + p), queries * context * v
            into, latent_scores, rope_scores = queries * n * r, queries * context * r, queries * context * p
            latent_values, out = queries * context * r, queries * r * v
            fewer = into + latent_scores + rope_scores + latent_values + out < expand + scores + values
            assert absorbed_is_cheaper(config, queries, context) == fewer


# --- a long context, some heads at a time -----------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_heads_are_expanded_some_at_a_time(implementation, monkeypatch):
    """The same result, without the keys and values of all heads at once."""
    model = tiny_model(num_attention_heads=7, num_key_value_heads=7, attn_implementation=implementation)
    model.config.mla_mode = "expanded"
    ids, mask = left_padded([random_ids(1, 9)[0], random_ids(1, 14)[0]])
    attend, held = LatentAttention._attend_heads, []

    def record(self, query, expanded, *args, **kwargs):
        held.append(expanded.numel() + query.shape[1] * expanded.shape[1] * expanded.shape[0] * self.qk_head_dim)
        return attend(self, query, expanded, *args, **kwargs)

    monkeypatch.setattr(LatentAttention, "_attend_heads", record)
    flags = {"attention_mask": mask, "output_attentions": implementation == "eager"}
    with torch.no_grad():
        whole = model(ids, **flags)
        calls, whole_size = len(held), max(held)
        held.clear()
        monkeypatch.setattr(layer_mla, "_EXPANDED_ELEMENTS", whole_size // 3)
        parts = model(ids, **flags)
    assert len(held) == 4 * calls and max(held) <= whole_size // 3  # two heads at a time, of seven
    real = mask.bool()
    assert_close("logits", parts.logits[real], whole.logits[real], "float32")
    if implementation == "eager":
        for one, other in zip(parts.attentions, whole.attentions):
            assert_close("attention", one, other, "float32")
    held.clear()
    model(ids, attention_mask=mask)  # with gradients, which keep everything anyway
    assert len(held) == calls


def test_a_cached_context_is_expanded_some_heads_at_a_time(monkeypatch):
    monkeypatch.setattr(layer_mla, "_EXPANDED_ELEMENTS", 1)
    model = tiny_model()
    model.config.mla_mode = "expanded"
    ids = random_ids(2, 11)
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
        step = model(ids[:, 6:], past_key_values=cache).logits
    monkeypatch.undo()
    with torch.no_grad():
        assert_close("logits", step, model(ids).logits[:, 6:], "float32")


# --- a long context, piece by piece -----------------------------------------------------------------------------------


@pytest.fixture
def short_is_long(monkeypatch):
    """A context of 32 tokens counts as long, and its pieces are as small as they get. Yields the shapes attended to."""
    from hf_moe.models import layer_mask, op_prefill

    attend, shapes = op_prefill.attend_piece, []
    for module in (layer_mla, layer_mask):
        monkeypatch.setattr(module, "LONG_CONTEXT", 32)
    monkeypatch.setattr(op_prefill, "_PIECE_ELEMENTS", (1, 1))
    monkeypatch.setattr(op_prefill, "attend_piece", lambda *args: shapes.append(args[2].shape) or attend(*args))
    return shapes


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left_padded"])
@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_k2", "longcat_flash"])
def test_long_prompts_go_piece_by_piece(family, padded, short_is_long, monkeypatch):
    """At once, in two parts against a cache of either kind, and the steps that follow: as in one piece."""
    model = tiny_model(family, attn_implementation="sdpa", mla_mode="expanded", max_position_embeddings=1024)
    ids, mask = left_padded([random_ids(1, 290)[0], random_ids(1, 560)[0]])
    if not padded:
        ids, mask = random_ids(2, 560), None
    real = torch.ones(2, 560, dtype=torch.bool) if mask is None else mask.bool()
    with torch.no_grad(), monkeypatch.context() as short:
        for module in (layer_mla, sys.modules["hf_moe.models.layer_mask"]):
            short.setattr(module, "LONG_CONTEXT", 1 << 20)
        expected = model(ids, attention_mask=mask).logits
        assert not short_is_long
    part = lambda stop: None if mask is None else mask[:, :stop]  # noqa: E731
    with torch.no_grad():
        assert_close("logits", model(ids, attention_mask=mask).logits[real], expected[real], "float32")
        assert max(shape[1] for shape in short_is_long) <= 256 and {shape[2] for shape in short_is_long} == {18}
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=700)):
            short_is_long.clear()
            parts = [
                model(ids[:, start:stop], attention_mask=part(stop), past_key_values=cache).logits
                for start, stop in ((0, 300), (300, 556), (556, 560))
            ]
            assert_close("logits", torch.cat(parts, dim=1)[real], expected[real], "float32")
            assert len(short_is_long) >= 3 * 3 * model.config.num_hidden_layers  # pieces, heads


def test_long_prompts_in_bfloat16(short_is_long):
    attention = make_attention(torch.bfloat16)
    attention.config._attn_implementation = "sdpa"
    states, positions = torch.randn(1, 700, 48).bfloat16(), torch.arange(700).unsqueeze(0)
    cos_sin = tables(attention, positions, torch.bfloat16)
    with torch.no_grad():
        pieces, _ = attention(states, cos_sin, None)
        assert len(short_is_long) == 9
        wide = copy.deepcopy(attention).double()
        wide.config._attn_implementation = "eager"
        mask = additive(causal(1, 700, 700), torch.float64)
        expected, _ = wide(states.double(), [table.double() for table in cos_sin], mask)
    assert_close("output", pieces, expected, "bfloat16")


def test_long_prompts_under_autocast(short_is_long):
    """Rotated parts are float32 then, projected ones bfloat16."""
    attention = make_attention(torch.float32)
    states, cos_sin = torch.randn(1, 300, 48), tables(attention, torch.arange(300).unsqueeze(0), torch.float32)
    with torch.no_grad():
        expected, _ = attention(states, cos_sin, additive(causal(1, 300, 300), torch.float32))
        attention.config._attn_implementation = "sdpa"
        with torch.autocast("cpu", torch.bfloat16):
            pieces, _ = attention(states, cos_sin, None)
    assert short_is_long and pieces.dtype == torch.bfloat16
    assert_close("output", pieces, expected, "bfloat16_grad")  # every projection is rounded, too


@pytest.mark.parametrize("case", ["gradients", "eager", "prepared mask", "packed", "not causal"])
def test_what_pieces_cannot_do_goes_through_the_interface(case, short_is_long):
    model = tiny_model(attn_implementation="eager" if case == "eager" else "sdpa", mla_mode="expanded")
    inputs = {"input_ids": random_ids(2, 40), "attention_mask": torch.ones(2, 40, dtype=torch.long)}
    inputs["attention_mask"][0, :9] = 0
    if case == "prepared mask":
        inputs["attention_mask"] = causal(2, 40, 40)
    elif case == "packed":
        positions = torch.arange(20).repeat(2).expand(2, -1)
        inputs = {"input_ids": inputs["input_ids"], "position_ids": positions, "use_cache": False}
    elif case == "not causal":
        model.config.is_causal = False
    with torch.set_grad_enabled(case == "gradients"):
        output = model(**inputs).logits
        assert not short_is_long and output.isfinite().all()


@pytest.mark.parametrize("kind", ["adapted", "hooked", "fp8"])
def test_pieces_of_other_projections(kind, short_is_long, monkeypatch):
    """A wrapped `kv_b_proj` gives all heads at once; an FP8 one whole rows of blocks."""
    model = tiny_model(attn_implementation="sdpa", mla_mode="expanded")
    wrapped = []
    if kind == "adapted":

        class Wrapped(torch.nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, states):
                wrapped.append(states.shape)
                return 1.5 * self.inner(states)

        for layer in model.model.layers:
            layer.self_attn.kv_b_proj = Wrapped(layer.self_attn.kv_b_proj)
    elif kind == "hooked":
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.register_forward_hook(lambda module, inputs, output: wrapped.append(output.shape))
    else:
        monkeypatch.setattr(LatentAttention, "_head_step", lambda self: 2)
    ids = random_ids(1, 300)
    with torch.no_grad():
        pieces = model(ids).logits
        widths = [shape[2] for shape in short_is_long]
        assert set(widths) == ({36, 18} if kind == "fp8" else {54}) and bool(wrapped) == (kind != "fp8")
        assert not wrapped or max(shape[1] for shape in wrapped) == 256
        model.config.mla_mode = "absorbed"
        assert_close("logits", pieces, model(ids).logits, "float32")


def test_values_wider_and_narrower_than_keys_on_the_cpu():
    """From 128 queries on, flash attention takes prompts of any length; it knows one width."""
    for value in (6, 12, 15):
        model = tiny_model(attn_implementation="sdpa", mla_mode="expanded", v_head_dim=value)
        eager = tiny_model(attn_implementation="eager", mla_mode="expanded", v_head_dim=value)
        ids = random_ids(2, 150)
        with torch.no_grad():
            assert_close("logits", model(ids).logits, eager(ids).logits, "float32")


@pytest.mark.parametrize("mask_form", ["boolean", "one for all queries", "per_head_additive", "none"])
def test_absorbed_scores_of_many_queries_come_in_blocks(mask_form, monkeypatch):
    attention = make_attention(torch.float32)
    attention.config._attn_implementation = "sdpa"
    mask = causal(2, 11, 11)
    if mask_form == "one for all queries":
        mask = mask[:, :, -1:]
    elif mask_form == "per_head_additive":
        mask = additive(mask, torch.float32) + torch.linspace(-1, 1, 33).view(1, 3, 1, 11)
    elif mask_form == "none":
        mask = None
    states, cos_sin = torch.randn(2, 11, 48), tables(attention, torch.arange(11).expand(2, 11), torch.float32)
    original, sizes = layer_mla.absorbed_attention, []
    monkeypatch.setattr(
        layer_mla, "absorbed_attention", lambda query, *a: sizes.append(query.shape[1]) or original(query, *a)
    )
    with torch.no_grad():
        whole, weights = attention(states, cos_sin, mask, absorbed=True)
        monkeypatch.setattr(layer_mla, "_ABSORBED_SCORES", 4 * 2 * 3 * 11)
        blocks, none = attention(states, cos_sin, mask, absorbed=True)
    assert sizes == [11, 4, 4, 3] and weights.shape == (2, 3, 11, 11) and none is None
    assert_close("output", blocks, whole, "float32")
