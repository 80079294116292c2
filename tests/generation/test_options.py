"""What `generate(use_mtp=True)` promises beyond the tokens: options, outputs, memory, and errors."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import left_padded, random_ids, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from hf_moe.demo import DEMO_MODEL

MTP = {"use_mtp": True, "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}
# Random weights over few tokens: some drafts are accepted and some are not.
VOCAB = 7
STACK = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self"


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=VOCAB, num_nextn_predict_layers=2)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(3)
    return left_padded([torch.randint(3, VOCAB, (length,), generator=generator) for length in (6, 2, 9, 4)])


def both(model, ids, mask, **options) -> tuple:
    options = {**GREEDY, "max_new_tokens": 24, **options}
    return (
        model.generate(ids, attention_mask=mask, **copy.deepcopy(options)),
        model.generate(ids, attention_mask=mask, **MTP, **copy.deepcopy(options)),
    )


# --- what ends a text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos", [3, [4, 5]])
def test_rows_end_at_their_own_eos(model, batch, eos):
    plain, ours = both(model, *batch, eos_token_id=eos)
    assert torch.equal(ours, plain)
    assert (plain[:, -1] == 2).any()  # some row ended before the others


@pytest.mark.parametrize("new", [1, 2, 3, 5])
def test_lengths_are_kept_to_the_token(model, batch, new):
    ids, mask = batch
    plain, ours = both(model, ids, mask, max_new_tokens=new)
    assert ours.shape[1] == ids.shape[1] + new and torch.equal(ours, plain)
    plain, ours = both(model, ids, mask, max_new_tokens=None, max_length=ids.shape[1] + new)
    assert ours.shape[1] == ids.shape[1] + new and torch.equal(ours, plain)


class StopAtSum(StoppingCriteria):
    """Stops a row by its last four tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -4:].sum(1) % 3 == 0


@pytest.mark.parametrize("eos", [None, 3])
def test_stopping_criteria_see_every_token(model, batch, eos):
    plain, ours = both(model, *batch, eos_token_id=eos, stopping_criteria=StoppingCriteriaList([StopAtSum()]))
    assert torch.equal(ours, plain)
    assert plain.shape[1] < batch[0].shape[1] + 24


def test_stop_strings():
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    ids = tokenizer(STACK, return_tensors="pt").input_ids
    options = {"stop_strings": ["never", "self."], "tokenizer": tokenizer, "max_new_tokens": 60, "do_sample": False}
    plain, ours = model.generate(ids, **options), model.generate(ids, **MTP, **options)
    assert torch.equal(ours, plain) and plain.shape[1] < ids.shape[1] + 60
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(ids, **MTP, stop_strings=["return"], max_new_tokens=3)


# --- what shapes the scores -------------------------------------------------------------------------------------------


def test_prefix_constraint_knows_its_row(model, batch):
    def allowed(row: int, prefix: torch.Tensor) -> list[int]:
        assert torch.equal(prefix[: batch[0].shape[1]], batch[0][row])
        return [3 + (row + len(prefix)) % 4, 3 + (row + 2 * len(prefix)) % 4]

    plain, ours = both(model, *batch, prefix_allowed_tokens_fn=allowed)
    assert torch.equal(ours, plain)


def test_processors_that_know_rows_by_their_place(model, batch):
    class PerRow:
        """Forbids another token in every row of the batch."""

        def __call__(self, input_ids, scores):
            assert len(scores) == len(batch[0])
            scores = scores.clone()
            scores[torch.arange(len(scores)), 3 + torch.arange(len(scores)) % 4] = float("-inf")
            return scores

    plain, ours = both(model, *batch, logits_processor=LogitsProcessorList([PerRow()]), eos_token_id=5)
    assert torch.equal(ours, plain)


# --- outputs ----------------------------------------------------------------------------------------------------------


class Collector(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("rows", [1, 4])
def test_streamers_get_every_token_in_order(model, batch, rows):
    ids, mask = batch[0][:rows], batch[1][:rows]
    streamer = Collector()
    out = model.generate(
        ids, attention_mask=mask, **MTP, **{**GREEDY, "eos_token_id": 4}, max_new_tokens=20, streamer=streamer
    )
    assert torch.equal(streamer.values[0], ids) and streamer.ended == 1
    assert torch.equal(torch.stack(streamer.values[1:], dim=1), out[:, ids.shape[1] :])


def test_report_adds_up(model, batch):
    ids, mask = batch
    out = model.generate(ids, attention_mask=mask, **MTP, **GREEDY, max_new_tokens=24, return_dict_in_generate=True)
    report = out.speculation
    assert report.drafted == sum(report.drafted_by_position) and len(report.acceptance_by_position) == 3
    assert report.drafted_by_position == sorted(report.drafted_by_position, reverse=True)
    assert 0 < report.accepted < report.drafted
    assert report.tokens == 4 * 23
    # A step yields a token of its own beside the accepted ones; the last one of a row may yield more than is asked for.
    assert report.tokens <= report.steps + report.accepted <= report.tokens + 4 * 3
    assert report.tokens_per_step == report.tokens / report.steps
    assert f"{report.accepted} of {report.drafted}" in str(report)


def test_returned_cache_continues(model, batch):
    """The cache that comes back holds every row's tokens in its place, also of rows that ended early."""
    ids, mask = batch
    plain, ours = both(model, ids, mask, eos_token_id=4, return_dict_in_generate=True)
    assert ours.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
    for left, right in zip(ours.past_key_values.layers, plain.past_key_values.layers):
        for row in range(len(ids)):
            ends = (plain.sequences[row, ids.shape[1] :] == 4).nonzero()
            end = ids.shape[1] + int(ends[0]) if len(ends) else plain.sequences.shape[1] - 1
            start = int((mask[row] == 0).sum())
            torch.testing.assert_close(
                left.keys[row, :, start:end], right.keys[row, :, start:end], atol=1e-5, rtol=1e-4
            )
            torch.testing.assert_close(
                left.values[row, :, start:end], right.values[row, :, start:end], atol=1e-5, rtol=1e-4
            )


@pytest.mark.parametrize("whole", [True, False], ids=["all tokens", "new tokens"])
def test_continues_from_a_cache(model, whole):
    ids = random_ids(1, 9, high=VOCAB)
    more = torch.cat((ids, random_ids(1, 4, seed=1, high=VOCAB)), dim=1)
    sequences = []
    for options in ({}, MTP):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
        inputs = more if whole else more[:, ids.shape[1] :]
        mask = torch.ones_like(more)
        out = model.generate(inputs, attention_mask=mask, past_key_values=cache, **options, **GREEDY, max_new_tokens=12)
        sequences.append(out)
        assert cache.get_seq_length() == more.shape[1] + 11
    assert torch.equal(*sequences)


def test_inputs_embeds(model, batch):
    ids, mask = batch
    embeds = model.get_input_embeddings()(ids)
    options = {**GREEDY, "max_new_tokens": 16}
    plain = model.generate(inputs_embeds=embeds, attention_mask=mask, **options)
    ours = model.generate(inputs_embeds=embeds, attention_mask=mask, **MTP, **options, return_dict_in_generate=True)
    assert torch.equal(ours.sequences, plain)
    by_ids = model.generate(ids, attention_mask=mask, **MTP, **options, return_dict_in_generate=True)
    assert by_ids.speculation == ours.speculation  # the MTP layers were given the same


def test_num_return_sequences(model, batch):
    out = model.generate(
        batch[0], attention_mask=batch[1], **MTP, do_sample=True, max_new_tokens=8, num_return_sequences=3,
        eos_token_id=None, pad_token_id=2,
    )  # fmt: skip
    assert out.shape == (12, batch[0].shape[1] + 8)
    assert torch.equal(out[:, : batch[0].shape[1]], batch[0].repeat_interleave(3, 0))


def test_asked_for_in_the_generation_config(model, batch):
    config = GenerationConfig(
        use_mtp=True, num_assistant_tokens=2, max_new_tokens=9, return_dict_in_generate=True, **GREEDY
    )
    out = model.generate(batch[0], attention_mask=batch[1], generation_config=config)
    assert out.speculation.drafted > 0 and config.use_mtp
    out = model.generate(batch[0], attention_mask=batch[1], generation_config=config, use_mtp=False)
    assert not hasattr(out, "speculation")


def test_threads_share_a_model(model):
    """Each text is what it is alone; what drafting has learned is nobody's meanwhile but one call's."""
    prompts = [random_ids(1, 4 + length, seed=length, high=VOCAB) for length in range(6)]
    options = {**GREEDY, "max_new_tokens": 30}
    expected = [model.generate(ids, **options) for ids in prompts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # as if there were many more
    try:
        with ThreadPoolExecutor(len(prompts)) as pool:
            texts = list(pool.map(lambda ids: model.generate(ids, use_mtp=True, **options), prompts * 4))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(text, wanted) for text, wanted in zip(texts, expected * 4))


# --- memory and work --------------------------------------------------------------------------------------------------


def test_rejected_slots_are_given_back(model, batch):
    ids, mask = batch
    out = model.generate(ids, attention_mask=mask, **MTP, **GREEDY, max_new_tokens=60, return_dict_in_generate=True)
    assert out.speculation.drafted - out.speculation.accepted > 60
    for layer in out.past_key_values.layers:
        assert layer.keys.shape[-2] == ids.shape[1] + 59


def test_ended_rows_cost_nothing(model, batch, monkeypatch):
    sizes = []
    forward = type(model.model).forward

    def count(self, input_ids=None, **kwargs):
        sizes.append(input_ids.shape[0])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", count)
    out = model.generate(*batch[:1], attention_mask=batch[1], **MTP, **{**GREEDY, "eos_token_id": 4}, max_new_tokens=40)
    lengths = [(row == 4).nonzero()[0].item() if (row == 4).any() else 40 for row in out[:, batch[0].shape[1] :]]
    assert len(set(lengths)) > 1 and sizes[0] == 4
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 4


def test_static_cache_of_exactly_the_needed_size(model):
    ids = random_ids(1, 5, high=VOCAB)
    plain = model.generate(ids, **GREEDY, max_new_tokens=20)
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 19)
    assert torch.equal(model.generate(ids, **MTP, **GREEDY, max_new_tokens=20, past_key_values=cache), plain)


def test_adaptive_drafting_stops_where_it_does_not_pay():
    hopeless = tiny_model(num_nextn_predict_layers=1)  # random weights, 101 tokens: drafts are wrong
    options = {**GREEDY, "do_sample": True, "max_new_tokens": 200, "return_dict_in_generate": True}
    options["assistant_confidence_threshold"] = 0.0
    report = hopeless.generate(random_ids(1, 5), use_mtp=True, **options).speculation
    assert report.acceptance_by_position[0] < 0.3
    assert report.drafted < 0.2 * report.steps


def test_adaptive_drafting_goes_on_where_it_pays():
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    ids = tokenizer("for i in range(10):\n    print(i)\nfor j in range(", return_tensors="pt").input_ids
    torch.manual_seed(0)  # when sampling, choices rest on the tokens alone
    out = model.generate(
        ids, use_mtp=True, do_sample=True, temperature=0.2, max_new_tokens=100, eos_token_id=None,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert out.speculation.tokens_per_step > 1.3


def test_confidence_threshold_ends_drafts_early():
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(DEMO_MODEL)(STACK, return_tensors="pt").input_ids
    options = {**MTP, **GREEDY, "max_new_tokens": 60, "return_dict_in_generate": True}
    every = model.generate(ids, **options)
    sure = model.generate(ids, **options, assistant_confidence_threshold=0.5)
    assert torch.equal(sure.sequences, every.sequences)
    assert 0 < sure.speculation.drafted < every.speculation.drafted
    share = [report.accepted / report.drafted for report in (sure.speculation, every.speculation)]
    assert share[0] > share[1]


# --- around the model -------------------------------------------------------------------------------------------------


def test_peft_wrapped_model(batch):
    model = tiny_model(vocab_size=VOCAB, num_nextn_predict_layers=1)
    wrapped = get_peft_model(
        model, LoraConfig(target_modules=["o_proj", "kv_b_proj", "eh_proj"], r=4, init_lora_weights=False)
    )
    wrapped.eval()
    options = {**GREEDY, "max_new_tokens": 16}
    plain = wrapped.generate(input_ids=batch[0], attention_mask=batch[1], **options)
    ours = wrapped.generate(input_ids=batch[0], attention_mask=batch[1], **MTP, **options)
    assert torch.equal(ours, plain)
    with wrapped.disable_adapter():
        assert not torch.equal(wrapped.generate(input_ids=batch[0], attention_mask=batch[1], **MTP, **options), plain)


def test_weights_are_those_in_memory(batch):
    """Changing the MTP layers changes the drafts: nothing is read from a checkpoint."""
    model = tiny_model(vocab_size=VOCAB, num_nextn_predict_layers=1)
    options = {**MTP, **GREEDY, "max_new_tokens": 24, "return_dict_in_generate": True}
    before = model.generate(batch[0], attention_mask=batch[1], **options)
    with torch.no_grad():
        model.model.mtp_layers()[0][1].eh_proj.weight.neg_()
    after = model.generate(batch[0], attention_mask=batch[1], **options)
    assert torch.equal(before.sequences, after.sequences)
    assert before.speculation.accepted != after.speculation.accepted


def test_offloaded_weights(model, batch, tmp_path):
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    count = len(model.model.layers)
    device_map |= {f"model.layers.{index}": "disk" if index >= count - 2 else "cpu" for index in range(count)}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    plain, ours = both(offloaded, *batch)
    assert torch.equal(ours, plain) and torch.equal(ours, both(model, *batch)[0])


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 2}, "beam search"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"use_cache": False}, "use_cache"),
        ({"token_healing": True}, "heal_tokens"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens"),
        ({"num_assistant_tokens_schedule": "sometimes"}, "sometimes"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"cache_implementation": "offloaded_static"}, "cache_implementation='offloaded_static'"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"synced_gpus": True}, "synced_gpus"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_go_together_is_said(model, batch, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(batch[0], attention_mask=batch[1], **{**MTP, **GREEDY, **options}, max_new_tokens=4)


def test_stateful_processors_are_refused(model, batch):
    guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model)
    with pytest.raises(ValueError, match="UnbatchedClassifierFreeGuidance"):
        model.generate(batch[0], **MTP, **GREEDY, logits_processor=LogitsProcessorList([guidance]), max_new_tokens=4)


def test_model_without_mtp_layers(batch):
    with pytest.raises(ValueError, match="has none"):
        tiny_model("kimi_k2", vocab_size=VOCAB).generate(batch[0], use_mtp=True, max_new_tokens=4)
