"""The growing cache layer against Transformers' dynamic layer, its size and its growth."""

import copy
import random

import pytest
import torch
from testing import assert_close
from tiny import random_ids, tiny_model
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from hf_moe.models.layer_cache import GrowingLayer, adopt_growing_layers

FAMILIES = ["deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "kimi_k2", "longcat_flash"]


def states(batch: int, length: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and rotary keys: different widths, as MLA caches them."""
    return torch.randn(batch, 1, length, 6).to(dtype), torch.randn(batch, 1, length, 4).to(dtype)


def same(growing: DynamicLayer, reference: DynamicLayer) -> bool:
    return torch.equal(growing.keys, reference.keys) and torch.equal(growing.values, reference.values)


@pytest.mark.parametrize("seed", range(20))
@torch.no_grad()
def test_random_operations(seed, poisoned):
    """Any sequence of cache operations leaves what a dynamic layer holds, bit for bit."""
    dice = random.Random(seed)
    growing, reference = GrowingLayer(), DynamicLayer()
    batch = dice.randint(1, 3)
    trail = []
    for _ in range(60):
        length = reference.get_seq_length()
        operation = dice.choice(["step", "step", "step", "chunk", "crop", "reorder", "select", "repeat", "copy"])
        if length == 0 and operation not in ("step", "chunk"):
            continue
        if operation in ("step", "chunk"):
            new = states(batch, 1 if operation == "step" else dice.randint(2, 90))
            keys, values = growing.update(*new)
            expected_keys, expected_values = reference.update(*new)
            assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values), trail
        elif operation == "crop":
            argument = -dice.randint(1, max(1, length // 2))
            growing.crop(argument)
            reference.crop(argument)
        elif operation == "reorder":
            order = torch.tensor([dice.randrange(batch) for _ in range(batch)])
            growing.reorder_cache(order)
            reference.reorder_cache(order)
        elif operation == "select":
            kept = torch.tensor(sorted(dice.sample(range(batch), dice.randint(1, batch))))
            growing.batch_select_indices(kept)
            reference.batch_select_indices(kept)
            batch = len(kept)
        elif operation == "repeat" and batch <= 4:
            growing.batch_repeat_interleave(2)
            reference.batch_repeat_interleave(2)
            batch *= 2
        elif operation == "copy":  # both branches of a copied cache go on independently
            branch = copy.deepcopy(growing)
            branch.update(*states(batch, 1))
        trail.append(operation)
        assert growing.get_seq_length() == reference.get_seq_length(), trail
        assert growing.get_mask_sizes(3) == reference.get_mask_sizes(3), trail
        assert same(growing, reference), trail
    growing.reset()
    reference.reset()  # forgets everything, or keeps zeros, as the release does
    new = states(batch, 3)
    assert torch.equal(growing.update(*new)[0], reference.update(*new)[0]) and same(growing, reference)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_updating_a_copy_leaves_the_original(copied):
    growing = GrowingLayer()
    growing.update(*states(1, 5))
    branch, before = copied(growing), growing.keys.clone()
    for layer in (branch, growing):
        new = states(1, 2)
        layer.update(*new)
        assert torch.equal(layer.keys, torch.cat((before, new[0]), dim=2)) and layer.get_seq_length() == 7
    assert torch.equal(branch.keys[:, :, :5], before) and not torch.equal(branch.keys, growing.keys)
    branch.crop(-3)
    assert branch._buffers is not None, "nobody else holds them: the slots are written again"
    other = copied(growing)
    kept = other.keys.clone()
    growing.crop(-6)
    growing.update(*states(1, 4))
    assert torch.equal(other.keys, kept)


@torch.no_grad()
def test_a_snapshot_outlives_a_crop():
    """Tensors that a user took out of a cache, to come back to them, keep what they held, as with a dynamic cache."""
    model = tiny_model()
    cache = model(random_ids(2, 20), use_cache=True).past_key_values
    snapshot = [(layer.keys, layer.values) for layer in cache.layers]
    held = copy.deepcopy(snapshot)
    cache.crop(-8)
    continued = model(random_ids(2, 6, seed=5), past_key_values=cache).logits
    prompt = torch.cat((random_ids(2, 20)[:, :12], random_ids(2, 6, seed=5)), dim=1)
    assert_close("after the crop", continued, model(prompt).logits[:, 12:], "float32")
    for pair, expected in zip(snapshot, held):
        assert all(torch.equal(now, then) for now, then in zip(pair, expected))


@torch.no_grad()
def test_a_cropped_cache_refuses_or_follows_another_batch_size():
    """After a crop to nothing, states of another batch size must not be broadcast into the old room."""
    growing = GrowingLayer()
    growing.update(*states(2, 5))
    growing.crop(-5)
    assert growing.get_seq_length() == 0
    new = states(1, 3)
    try:
        keys, values = growing.update(*new)
    except RuntimeError:
        return  # as the dynamic layer does
    assert torch.equal(keys, new[0]) and torch.equal(values, new[1])


@torch.no_grad()
def test_growth_is_amortised():
    """2000 single tokens move the context a handful of times, and spare room stays a small share of it."""
    growing, places = GrowingLayer(), []
    growing.update(*states(1, 100))
    for _ in range(2000):
        growing.update(*states(1, 1))
        if not places or places[-1] != growing._buffers[0].data_ptr():
            places.append(growing._buffers[0].data_ptr())
    capacity = growing._buffers[0].shape[-2]
    assert growing.get_seq_length() == 2100
    assert len(places) <= 25, f"{len(places)} reallocations for 2000 tokens"
    assert capacity <= 2100 * 1.25 + 128, f"room for {capacity} tokens"


@torch.no_grad()
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_states_of_another_dtype_widen_the_context(dtypes):
    """As concatenation does: what was cached under autocast goes on without it."""
    growing, reference = GrowingLayer(), DynamicLayer()
    for keys, values in (dtypes, (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        new = states(1, 2)[0].to(keys), states(1, 2)[1].to(values)
        growing.update(*new)
        reference.update(*new)
        assert torch.equal(growing.keys.float(), reference.keys.float())
        assert torch.equal(growing.values.float(), reference.values.float())
    assert growing.keys.dtype == growing.values.dtype == torch.float32


def test_gradients_reach_cached_states():
    """With gradients on nothing is written in place: prefix tuning differentiates through the cache."""
    key, value = (tensor.requires_grad_() for tensor in states(1, 4))
    growing = GrowingLayer()
    first, _ = growing.update(key, value)
    squared = (first**2).sum()
    second, _ = growing.update(key * 2, value)
    (squared + (second**2).sum()).backward()
    assert_close("gradient", key.grad, 2 * key.detach() * (1 + 1 + 4), "float32")


def test_context_that_has_no_gradient_itself_may_be_needed_for_one():
    """A frozen key is saved to differentiate by the query: later tokens must not be written beside it."""
    query, (key, value) = torch.randn(1, 1, 2, 6, requires_grad=True), states(1, 4)
    growing = GrowingLayer()
    first, _ = growing.update(key, value)
    scores = query @ first.transpose(2, 3)
    second, _ = growing.update(*states(1, 2))
    (scores.sum() + (query @ second.transpose(2, 3)).sum()).backward()
    expected = (first.sum(2, keepdim=True) + second.sum(2, keepdim=True)).expand_as(query)
    assert_close("gradient", query.grad, expected, "float32")


def test_a_cache_made_without_gradients_goes_on_with_them():
    growing = GrowingLayer()
    with torch.inference_mode():
        growing.update(*states(1, 4))
    with torch.no_grad():
        growing.update(*states(1, 1))
    key, value = (tensor.requires_grad_() for tensor in states(1, 2))
    keys, _ = growing.update(key, value)
    keys.sum().backward()
    assert torch.equal(key.grad, torch.ones_like(key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_per_token(family, dtype):
    """A token costs kv_lora_rank + qk_rope_head_dim values a layer and nothing more."""
    model = tiny_model(family, dtype=dtype)
    with torch.no_grad():
        cache = model(random_ids(2, 7), use_cache=True).past_key_values
        model(random_ids(2, 1), past_key_values=cache)
    assert len(cache.layers) == model.config.num_hidden_layers
    per_token = (model.config.kv_lora_rank + model.config.qk_rope_head_dim) * dtype.itemsize
    for layer in cache.layers:
        tensors = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        assert {id(tensor) for tensor in tensors} == {id(layer.keys), id(layer.values)}
        assert (
            layer.keys.numel() * layer.keys.itemsize + layer.values.numel() * layer.values.itemsize == 2 * 8 * per_token
        )
        room = sum(buffer.numel() * buffer.itemsize for buffer in layer._buffers)
        assert room == 2 * layer._buffers[0].shape[-2] * per_token


def test_static_cache_holds_the_latent_only():
    model = tiny_model()
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(random_ids(2, 7), past_key_values=cache)
    for layer in cache.layers[:3]:
        assert isinstance(layer, StaticLayer)
        assert layer.keys.shape == (2, 1, 32, 24) and layer.values.shape == (2, 1, 32, 4)


def test_the_rope_part_is_the_second_tensor():
    """Layout of the cache: the normed latent in `keys`, the rotated shared key in `values`."""
    model = tiny_model()
    attention = model.model.layers[0].self_attn
    seen = {}
    attention.kv_a_layernorm.register_forward_hook(lambda module, args, output: seen.update(latent=output))
    with torch.no_grad():
        cache = model(random_ids(2, 7), use_cache=True).past_key_values
    assert torch.equal(cache.layers[0].keys[:, 0], seen["latent"])


def test_adoption_leaves_other_layers_alone():
    filled = DynamicCache()
    filled.update(*states(1, 3), 0)
    adopt_growing_layers(filled, 2)
    assert type(filled.layers[0]) is DynamicLayer and [type(layer) for layer in filled.layers[1:]] == [GrowingLayer]
    model = tiny_model()
    static = StaticCache(config=model.config, max_cache_len=8)
    kinds = [type(layer) for layer in static.layers]
    adopt_growing_layers(static, 3)
    assert [type(layer) for layer in static.layers] == kinds


def test_a_plain_dynamic_cache_of_the_user_grows_in_place():
    model, cache = tiny_model(), DynamicCache()
    with torch.no_grad():
        model(random_ids(1, 5), past_key_values=cache)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer] * 3
