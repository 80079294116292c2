"""Greedy speculation gives the tokens of plain greedy search, which does not know of it, for whatever is asked for."""

import random
from pathlib import Path

import pytest
import torch
from tiny import left_padded, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe.demo import DEMO_MODEL

GOLDENS = Path(__file__).parent.parent / "goldens"
GROUPS, PER_GROUP = 25, 20
FAMILIES = ["deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "kimi_k2"]
TEXTS = [
    "Permission is hereby granted, free of charge, to any person",
    "import os\nimport sys\n\n\ndef read_lines(path):\n    with open(",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self",
    "The GNU General Public License is",
    "for i in range(10):\n    print(i)\nfor j in range(",
]


def random_options(rng: random.Random, model, has_eos: bool) -> dict:
    """Arguments of `generate` that both runs get."""
    options = {"max_new_tokens": rng.choice([1, 2, 7, 20]), "do_sample": False, "pad_token_id": 2}
    options["eos_token_id"] = rng.choice([[3], [3, 4], 5]) if has_eos else None
    if rng.random() < 0.3:
        options["cache_implementation"] = "static"
    if rng.random() < 0.3:
        options["prefill_chunk_size"] = rng.randint(1, 5)
    if rng.random() < 0.25:
        options["repetition_penalty"] = 1.3
    if rng.random() < 0.15:
        options["no_repeat_ngram_size"] = 2
    if rng.random() < 0.15:
        options["min_new_tokens"] = 1
    return options


def random_speculation(rng: random.Random) -> dict:
    return {
        "num_assistant_tokens": rng.randint(1, 5),
        "num_assistant_tokens_schedule": rng.choice(["adaptive", "constant", "constant", "heuristic"]),
        "assistant_confidence_threshold": rng.choice([0.0, 0.0, 0.3]),
    }


def assert_identical(model, ids, mask, options: dict, speculation: dict):
    """Sequences, scores, logits and cache length of plain and speculative search are the same. Returns the report."""
    returned = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain = model.generate(ids, attention_mask=mask, **options, **returned)
    ours = model.generate(ids, attention_mask=mask, use_mtp=True, **options, **speculation, **returned)
    assert torch.equal(ours.sequences, plain.sequences), (options, speculation)
    assert len(ours.scores) == len(plain.scores) == ours.sequences.shape[1] - ids.shape[1]
    ends = options["eos_token_id"]
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    for row, tokens in enumerate(ours.sequences[:, ids.shape[1] :].tolist()):
        for position, token in enumerate(tokens):
            for name in ("scores", "logits"):
                actual, wanted = getattr(ours, name)[position][row], getattr(plain, name)[position][row]
                finite = wanted.isfinite()
                assert torch.equal(actual.isfinite(), finite), (name, options, speculation)
                assert torch.allclose(actual[finite], wanted[finite], atol=1e-3), (name, options, speculation)
            if token in ends:
                break
    assert int(ours.past_key_values.get_seq_length()) == int(plain.past_key_values.get_seq_length())
    return ours.speculation


@pytest.fixture(scope="module")
def tiny_models():
    """One model per shape, built when first asked for."""
    models = {}

    def get(family: str, depths: int, vocab_size: int, mla_mode: str):
        key = (family, depths, vocab_size, mla_mode)
        if key not in models:
            sizes = {"num_nextn_predict_layers": depths, "vocab_size": vocab_size, "mla_mode": mla_mode}
            models[key] = tiny_model(family, **sizes)
        return models[key]

    return get


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_combinations(group, tiny_models):
    # Vocabularies so small that drafts of random weights are accepted now and then.
    accepted = 0
    for number in range(PER_GROUP):
        rng = random.Random(1000 * group + number)
        vocab = rng.choice([5, 9, 101])
        family, depths, mode = rng.choice(FAMILIES), rng.choice([1, 1, 2, 3]), rng.choice(["auto", "absorbed"])
        model = tiny_models(family, depths, vocab, mode)
        generator = torch.Generator().manual_seed(1000 * group + number)
        lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 8))]
        ids, mask = left_padded([torch.randint(3, vocab, (length,), generator=generator) for length in lengths])
        report = assert_identical(
            model, ids, mask, random_options(rng, model, rng.random() < 0.6), random_speculation(rng)
        )
        accepted += report.accepted
    assert accepted > 0


@pytest.fixture(scope="module")
def demo():
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(DEMO_MODEL, padding_side="left")


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_trained_model(demo, batch, count):
    model, tokenizer = demo
    inputs = tokenizer(TEXTS[:batch], return_tensors="pt", padding=True)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    speculation = {"num_assistant_tokens": count, "num_assistant_tokens_schedule": "constant"}
    report = assert_identical(model, inputs.input_ids, inputs.attention_mask, options, speculation)
    assert report.acceptance_by_position[0] > 0.6  # a trained MTP layer that is fed wrong states guesses like chance
    assert report.tokens_per_step > 1.5
    assert report.drafted_by_position[0] >= report.drafted_by_position[-1] > 0


@pytest.mark.parametrize("case", ["v3_basic", "v3_mtp2", "v3_fp8", "longcat_flash", "longcat_fp8"])
def test_golden_checkpoints(case):

    model = AutoModelForCausalLM.from_pretrained(GOLDENS / case, dtype=torch.float32).eval()
    ids = torch.randint(3, model.config.vocab_size, (3, 7), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    speculation = {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}
    report = assert_identical(model, ids, torch.ones_like(ids), options, speculation)
    assert report.drafted > 0


def test_drafts_are_those_of_the_teacher_forced_mtp_head(demo):
    """A draft is the argmax of `output_mtp_logits` at the position before: caches and shifts feed what they should."""
    model, tokenizer = demo
    ids = tokenizer(TEXTS[:1], return_tensors="pt").input_ids
    out = model.generate(
        ids, use_mtp=True, num_assistant_tokens=1, num_assistant_tokens_schedule="constant", max_new_tokens=60,
        do_sample=False, eos_token_id=None, return_dict_in_generate=True,
    )  # fmt: skip
    with torch.no_grad():
        logits = model(out.sequences, output_mtp_logits=True).mtp_logits[0]
    # Walk the steps: each drafts the token behind the newest one, and advances by one or two.
    prompt, end, newest, hits, steps = ids.shape[1], out.sequences.shape[1], ids.shape[1], 0, 0
    assert prompt < end
    while newest < end - 2:
        agrees = logits[0, newest - 1].argmax() == out.sequences[0, newest + 1]
        hits, steps, newest = hits + int(agrees), steps + 1, newest + 1 + int(agrees)
    assert abs(hits - out.speculation.accepted) <= 1 and abs(steps - out.speculation.drafted) <= 1
