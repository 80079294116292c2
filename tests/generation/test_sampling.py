"""Speculative sampling draws from the model's own distribution, which is counted out token by token."""

import math

import pytest
import torch
from tiny import left_padded, tiny_model
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_moe.models import generation_decoding
from hf_moe.models.generation_sampling import accept_sampled

VOCAB, NEW = 5, 4
DRAWS = 12_000  # of each prompt
PROMPTS = [torch.tensor([3, 4, 4, 3]), torch.tensor([4])]
SETTINGS = {
    "top_p": {"temperature": 1.4, "top_p": 0.9, "top_k": 0},
    "top_k_min": {"temperature": 0.8, "top_k": 4, "top_p": 1.0},
    "repetition": {"temperature": 1.5, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.8},
}


def processors(settings: dict) -> LogitsProcessorList:
    """The processors that Transformers makes of the settings, in its order."""
    chosen = LogitsProcessorList()
    if "repetition_penalty" in settings:
        chosen.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    chosen.append(TemperatureLogitsWarper(settings["temperature"]))
    if settings["top_k"]:
        chosen.append(TopKLogitsWarper(settings["top_k"]))
    if settings["top_p"] < 1:
        chosen.append(TopPLogitsWarper(settings["top_p"]))
    return chosen


@torch.no_grad()
def exact_probabilities(model, prompt: torch.Tensor, settings: dict) -> torch.Tensor:
    """Probability of every continuation of `NEW` tokens, (VOCAB ** NEW,), by plain forward passes."""
    prefixes, probabilities = prompt.unsqueeze(0), torch.ones(1, dtype=torch.float64)
    for _ in range(NEW):
        scores = processors(settings)(prefixes, model(prefixes, use_cache=False).logits[:, -1].float())
        step = scores.double().softmax(-1)
        probabilities = (probabilities.unsqueeze(1) * step).flatten()
        tokens = torch.arange(VOCAB).repeat(len(prefixes)).unsqueeze(1)
        prefixes = torch.cat((prefixes.repeat_interleave(VOCAB, 0), tokens), dim=1)
    return probabilities


def draw(model, settings: dict) -> list[torch.Tensor]:
    """Counts of every continuation, per prompt, over `DRAWS` draws from batches of both prompts, left-padded."""
    counts = [torch.zeros(VOCAB**NEW) for _ in PROMPTS]
    half = 3000
    ids, mask = left_padded([prompt for prompt in PROMPTS for _ in range(half)])
    # Older versions of Transformers penalise padding as they do the prompt: here it is a token that the prompt has.
    ids = ids.where(mask.bool(), ids[:, -1:])
    for _ in range(DRAWS // half):
        out = model.generate(
            ids, attention_mask=mask, use_mtp=True, num_assistant_tokens=2, num_assistant_tokens_schedule="constant",
            max_new_tokens=NEW, do_sample=True, eos_token_id=None, pad_token_id=2, **settings,
        )  # fmt: skip
        codes = (out[:, ids.shape[1] :] * torch.tensor([VOCAB ** (NEW - 1 - i) for i in range(NEW)])).sum(1)
        for index in range(len(PROMPTS)):
            own = codes[index * half : (index + 1) * half]
            counts[index] += torch.bincount(own, minlength=VOCAB**NEW)
    return counts


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-squared p-value, rare outcomes pooled; 0 where something impossible was drawn."""
    if counts[probabilities < 1e-12].sum() > 0:
        return 0.0
    expected = probabilities * counts.sum()
    rare = expected < 8
    observed, expected = (torch.cat((x[~rare].double(), x[rare].double().sum().view(1))) for x in (counts, expected))
    keep = expected > 8
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    degrees = int(keep.sum()) - 1
    return float(torch.special.gammaincc(torch.tensor(degrees / 2, dtype=torch.float64), statistic / 2))


@pytest.fixture(scope="module")
def model():
    """As small as it gets: what is counted is many draws, and not what a forward pass computes."""
    sizes = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "hidden_size": 24}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    return tiny_model(vocab_size=VOCAB, num_nextn_predict_layers=1, **sizes, **experts)


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_exact_distribution(model, name):
    settings = SETTINGS[name]
    torch.manual_seed(1)
    for prompt, counts in zip(PROMPTS, draw(model, settings)):
        exact = exact_probabilities(model, prompt, settings)
        assert math.isclose(exact.sum(), 1, abs_tol=1e-6) and counts.sum() == DRAWS
        assert p_value(counts, exact) > 1e-3


def accept_everything(scores, drafts, draft_probs):
    accepted, following = accept_sampled(scores, drafts, draft_probs)
    everything = torch.full_like(accepted, drafts.shape[1])
    return everything, torch.multinomial(scores[:, -1].softmax(-1), 1).squeeze(1)


def resample_from_p(scores, drafts, draft_probs):
    """Takes the replacement of a rejected draft from p and not from what p has beyond q."""
    accepted, _ = accept_sampled(scores, drafts, draft_probs)
    p = scores.softmax(-1)[torch.arange(len(scores)), accepted]
    return accepted, torch.multinomial(p, 1).squeeze(1)


def accept_by_equality(scores, drafts, draft_probs):
    """Samples from p and accepts a draft that happens to be equal, but judges all positions by the first draft."""
    samples = torch.multinomial(scores.softmax(-1).flatten(0, 1), 1).view(scores.shape[:2])
    equal = (samples[:, :-1] == drafts).long()
    accepted = equal[:, :1].expand_as(equal).cumprod(1).sum(1)
    return accepted, samples.gather(1, accepted.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("rule", [accept_everything, resample_from_p, accept_by_equality])
def test_the_test_notices_a_wrong_rule(model, monkeypatch, rule):
    monkeypatch.setattr(generation_decoding, "accept_sampled", rule)
    settings = SETTINGS["top_p"]
    torch.manual_seed(1)
    values = [p_value(c, exact_probabilities(model, p, settings)) for p, c in zip(PROMPTS, draw(model, settings))]
    assert min(values) < 1e-6


def test_the_rule_alone():
    """Marginals of one step with a draft distribution that is far from the model's."""
    torch.manual_seed(0)
    rows = 200_000
    p, q = torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0]), torch.tensor([0.1, 0.1, 0.2, 0.3, 0.3])
    drafts = torch.multinomial(q, rows, replacement=True).unsqueeze(1)
    scores = p.log().expand(rows, 2, -1)
    accepted, following = accept_sampled(scores, drafts, q.expand(rows, 1, -1))
    first = torch.where(accepted == 1, drafts[:, 0], following)
    assert torch.allclose(torch.bincount(first, minlength=5) / rows, p, atol=0.005)
    # The chance to accept is the overlap of the two.
    assert abs(accepted.float().mean() - torch.minimum(p, q).sum()) < 0.005


def test_seed_gives_the_same_text_again(model):
    options = {"use_mtp": True, "do_sample": True, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 2}
    texts = []
    for _ in range(2):
        torch.manual_seed(7)
        texts.append(model.generate(torch.tensor([[3, 4], [4, 3]]), **options))
    assert torch.equal(*texts)
