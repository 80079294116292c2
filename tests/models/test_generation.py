"""Generation: every way to reach a token gives the token that a plain forward pass over the whole text gives."""

import copy
import os
import shutil

import pytest
import torch
from testing import assert_close
from tiny import left_padded, random_ids, tiny_model
from transformers import DynamicCache, GenerationConfig, StaticCache

FAMILIES = ["deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "kimi_k2", "longcat_flash", "longcat_flash_ngram"]
MODES = ["auto", "expanded", "absorbed"]
NEW = 12


@pytest.fixture(params=FAMILIES)
def model(request):
    return open_ended(tiny_model(request.param))


@pytest.fixture
def v3():
    return open_ended(tiny_model())


def open_ended(model):
    """The model with a generation configuration that never stops early."""
    model.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=2, max_new_tokens=NEW, do_sample=False)
    return model


@torch.no_grad()
def greedy_by_full_passes(model, ids: torch.Tensor, steps: int = NEW) -> torch.Tensor:
    """The reference: a forward pass over the whole text for each token, no cache, no generation code."""
    for _ in range(steps):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


@pytest.mark.parametrize("mode", MODES)
def test_cached_greedy(model, mode):
    ids = random_ids(2, 9)
    expected = greedy_by_full_passes(model, ids)
    assert len(set(expected[:, 9:].flatten().tolist())) > 3, "a model that repeats itself proves little"
    model.config.mla_mode = mode
    assert torch.equal(model.generate(ids), expected)
    assert torch.equal(model.generate(ids, use_cache=False), expected)


def test_one_token_prompt(model):
    ids = random_ids(2, 1)
    assert torch.equal(model.generate(ids), greedy_by_full_passes(model, ids))


@pytest.mark.parametrize("mode", MODES)
def test_left_padded_rows_are_as_alone(model, mode):
    model.config.mla_mode = mode
    rows = [random_ids(1, length, seed=length)[0] for length in (9, 4, 1)]
    ids, mask = left_padded(rows)
    together = model.generate(ids, attention_mask=mask)
    for row, generated in zip(rows, together):
        assert torch.equal(generated[9:], greedy_by_full_passes(model, row.unsqueeze(0))[0, len(row) :])


def test_beam_search_equals_uncached(model):
    ids, mask = left_padded([random_ids(1, 7)[0], random_ids(1, 4, seed=5)[0]])
    kwargs = {"attention_mask": mask, "num_beams": 4, "num_return_sequences": 2}
    kwargs |= {"output_scores": True, "return_dict_in_generate": True}
    cached = model.generate(ids, **kwargs)
    plain = model.generate(ids, use_cache=False, **kwargs)
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close("scores", cached.sequences_scores, plain.sequences_scores, "float32")


@torch.no_grad()
def test_beam_search_finds_the_best_of_an_exhaustive_search(v3):
    """Two tokens, and as many beams as there are first tokens: the best pair of all."""
    ids, vocab = random_ids(1, 5), v3.config.vocab_size
    first = v3(ids).logits[0, -1].log_softmax(-1)
    pairs = torch.cat((ids.expand(vocab, -1), torch.arange(vocab).unsqueeze(1)), dim=1)
    total = first.unsqueeze(1) + v3(pairs).logits[:, -1].log_softmax(-1)
    best = divmod(total.argmax().item(), vocab)
    generated = v3.generate(ids, num_beams=vocab, max_new_tokens=2)
    assert tuple(generated[0, 5:].tolist()) == best


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunked_prefill(model, chunk):
    ids, mask = left_padded([random_ids(1, 15)[0], random_ids(1, 6)[0]])
    expected = model.generate(ids, attention_mask=mask)
    chunked = model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk)
    assert torch.equal(chunked, expected)
    assert torch.equal(expected[:1], greedy_by_full_passes(model, ids[:1]))


@pytest.mark.parametrize("mode", MODES)
def test_static_cache(model, mode):
    model.config.mla_mode = mode
    ids, mask = left_padded([random_ids(1, 9)[0], random_ids(1, 4)[0]])
    expected = model.generate(ids, attention_mask=mask)
    static = model.generate(ids, attention_mask=mask, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)


def test_static_cache_in_pieces(v3):
    """A long piece against a static cache with empty room behind it, then single tokens."""
    ids = random_ids(2, 20)
    cache = StaticCache(config=v3.config, max_cache_len=32)
    with torch.no_grad():
        expected = v3(ids).logits
        pieces = [v3(piece, past_key_values=cache).logits for piece in ids.split([7, 11, 1, 1], dim=1)]
    assert_close("logits", torch.cat(pieces, dim=1), expected, "float32")


def test_continuation_from_a_returned_cache(model):
    ids, mask = left_padded([random_ids(1, 9)[0], random_ids(1, 5)[0]])
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=10)
    first = model.generate(ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True)
    longer_mask = torch.cat((mask, mask.new_ones(2, 4)), dim=1)
    branch = copy.deepcopy(first.past_key_values)
    rest = model.generate(
        first.sequences, attention_mask=longer_mask, past_key_values=first.past_key_values, max_new_tokens=6
    )
    assert torch.equal(rest, whole)
    again = model.generate(first.sequences, attention_mask=longer_mask, past_key_values=branch, max_new_tokens=6)
    assert torch.equal(again, whole)


def test_cropped_cache_goes_another_way(v3):
    """A cache cut back to a common prefix answers as if the rest had never been seen."""
    prefix, one, two = random_ids(1, 8), random_ids(1, 5, seed=1), random_ids(1, 6, seed=2)
    with torch.no_grad():
        cache = v3(torch.cat((prefix, one), dim=1), use_cache=True).past_key_values
        cache.crop(-5)
        after = v3(two, past_key_values=cache).logits
        expected = v3(torch.cat((prefix, two), dim=1)).logits[:, 8:]
    assert_close("logits", after, expected, "float32")


def test_several_tokens_against_a_padded_cache(model):
    """A chunk behind a left-padded cached prompt: what assisted generation and prefix caching do."""
    ids, mask = left_padded([random_ids(1, 12)[0], random_ids(1, 7)[0]])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        for mode in MODES:
            model.config.mla_mode = mode
            cache = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
            chunk = model(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
            assert_close(f"{mode} logits", chunk, expected[:, 8:], "float32")


def test_inputs_embeds(model):
    if model.config.model_type == "longcat_flash_ngram":
        pytest.skip("embeds n-grams: see test_longcat_ngram.py")
    ids, mask = left_padded([random_ids(1, 9)[0], random_ids(1, 5)[0]])
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        by_embeds = model(inputs_embeds=embeds, attention_mask=mask).logits
        assert torch.equal(by_embeds, model(ids, attention_mask=mask).logits)
    expected = model.generate(ids, attention_mask=mask)
    generated = model.generate(inputs_embeds=embeds, attention_mask=mask)
    assert torch.equal(generated, expected[:, 9:])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", MODES)
def test_packed_sequences_equal_separate_ones(mode, implementation):
    model = tiny_model(mla_mode=mode, attn_implementation=implementation)
    rows = [random_ids(1, length, seed=length) for length in (7, 1, 12, 4)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows]).unsqueeze(0)
    with torch.no_grad():
        packed = model(torch.cat(rows, dim=1), position_ids=positions, use_cache=False).logits
        separate = torch.cat([model(row).logits for row in rows], dim=1)
        one_text = model(torch.cat(rows, dim=1)).logits
    assert_close("logits", packed, separate, "float32")
    assert (packed - one_text).abs().max() > 0.1  # the sequences would otherwise see each other


def test_packed_mtp_logits_keep_sequences_apart(v3):
    """Inside a sequence the MTP logits are those of the sequence alone; its last position looks into the next one."""
    rows = [random_ids(1, 7), random_ids(1, 9, seed=3)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows]).unsqueeze(0)
    with torch.no_grad():
        packed = v3(torch.cat(rows, dim=1), position_ids=positions, use_cache=False, output_mtp_logits=True).mtp_logits[
            0
        ]
        alone = [v3(row, output_mtp_logits=True).mtp_logits[0] for row in rows]
    assert_close("first", packed[:, :6], alone[0], "float32")
    assert_close("second", packed[:, 7:], alone[1], "float32")


def test_left_padded_mtp_logits(v3):
    row = random_ids(1, 7)
    ids, mask = left_padded([random_ids(1, 11)[0], row[0]])
    with torch.no_grad():
        padded = v3(ids, attention_mask=mask, output_mtp_logits=True).mtp_logits[0]
        alone = v3(row, output_mtp_logits=True).mtp_logits[0]
    assert_close("mtp logits", padded[1:, 4:], alone, "float32")


def test_sampling_is_seeded(v3):
    ids = random_ids(2, 6)
    kwargs = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    runs = []
    for seed, cache in ((11, True), (11, True), (11, False), (12, True)):
        torch.manual_seed(seed)
        runs.append(v3.generate(ids, use_cache=cache, **kwargs))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[3])


def test_several_sequences_per_prompt(v3):
    ids, mask = left_padded([random_ids(1, 6)[0], random_ids(1, 3)[0]])
    torch.manual_seed(4)
    together = v3.generate(ids, attention_mask=mask, do_sample=True, top_k=0, num_return_sequences=3)
    assert together.shape == (6, 6 + NEW)
    torch.manual_seed(4)
    repeated = v3.generate(
        ids.repeat_interleave(3, 0), attention_mask=mask.repeat_interleave(3, 0), do_sample=True, top_k=0
    )
    assert torch.equal(together, repeated)
    assert len({tuple(row.tolist()) for row in together[:3]}) > 1


def test_assistant_model(v3):
    """A smaller draft model changes nothing but the number of steps."""
    assistant = open_ended(tiny_model("deepseek_v2_lite", seed=3, num_hidden_layers=2))
    ids = random_ids(1, 6)
    assert torch.equal(v3.generate(ids, assistant_model=assistant), greedy_by_full_passes(v3, ids))


def test_own_copy_as_assistant(v3):
    """A draft that is always right: every verification accepts several tokens at once."""
    lengths = []
    handle = v3.model.embed_tokens.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    ids = random_ids(1, 6)
    assistant = open_ended(tiny_model())
    generated = v3.generate(ids, assistant_model=assistant)
    handle.remove()
    assert torch.equal(generated, greedy_by_full_passes(v3, ids))
    assert len(lengths) < NEW and max(lengths[1:]) > 1


def test_prompt_lookup(model):
    ids = random_ids(1, 5).repeat(1, 3)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3), greedy_by_full_passes(model, ids))


def test_streamer_and_stop(v3):
    """Generation stops at the end token, and a streamer sees every token once."""
    from transformers.generation.streamers import BaseStreamer

    class Collector(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    ids = random_ids(1, 6)
    expected = greedy_by_full_passes(v3, ids)[0].tolist()
    stop = expected[6 + 4]
    first = expected.index(stop, 6)
    collector = Collector()
    generated = v3.generate(ids, eos_token_id=stop, streamer=collector)
    assert generated[0].tolist() == expected[: first + 1] == collector.tokens and collector.ended


def test_native_dynamic_cache_and_ours_agree(v3):
    """A cache object of the user, and none: the same tokens."""
    ids = random_ids(2, 6)
    assert torch.equal(v3.generate(ids, past_key_values=DynamicCache(config=v3.config)), v3.generate(ids))


def test_generation_in_bfloat16(model):
    """Cached steps in bfloat16 stay near the full pass in bfloat16, order by order."""
    model = model.to(torch.bfloat16)
    ids = random_ids(2, 10)
    with torch.no_grad():
        for mode in ("expanded", "absorbed"):
            model.config.mla_mode = mode
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            step = model(ids[:, -1:], past_key_values=cache).logits
            assert step.dtype == torch.bfloat16 and step.isfinite().all()


# --- torch.compile ----------------------------------------------------------------------------------------------------


def compiled_steps(model, backend: str, steps: int = 3):
    """Logits of single-token steps behind a prompt in a static cache, eager and compiled, and the graphs it took."""
    ids = random_ids(2, 6 + steps)
    results = {}
    for name in ("eager", "compiled"):
        cache = StaticCache(config=model.config, max_cache_len=16)
        step = model if name == "eager" else torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
        with torch.no_grad():
            model(ids[:, :6], past_key_values=cache)
            logits = []
            for index in range(6, 6 + steps):
                kwargs = {"position_ids": torch.full((2, 1), index), "past_key_values": cache}
                logits.append(step(ids[:, index : index + 1], **kwargs).logits.clone())
        results[name] = torch.cat(logits, dim=1)
    return results


needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")),
    reason="inductor needs a C++ compiler",
)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["auto", "expanded"])
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "longcat_flash", "longcat_flash_ngram"])
def test_full_graph_decode_step(family, mode, fresh_compiler):
    model = tiny_model(family, mla_mode=mode, num_hidden_layers=2, num_nextn_predict_layers=0)
    results = compiled_steps(model, "aot_eager")
    assert_close("logits", results["compiled"], results["eager"], "float32")
    assert not fresh_compiler["graph_break"]
    assert fresh_compiler["stats"]["unique_graphs"] == 1, "the step was compiled more than once"


@needs_compiler
def test_inductor_decode_step(fresh_compiler):
    model = tiny_model(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    results = compiled_steps(model, "inductor")
    assert_close("logits", results["compiled"], results["eager"], "float32")


def test_continuous_batching_is_refused(model):
    """Transformers' own classes of this kind log a shape error and return requests without tokens."""
    with pytest.raises(NotImplementedError, match="left-padded batch"):
        model.generate_batch([[5, 6, 7], [8, 9]])
