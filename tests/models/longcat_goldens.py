"""LongCat's goldens as models and as errors against their values, for the tests beside this one."""

import functools

import torch
from testing import GOLDENS
from transformers import AutoModelForCausalLM, GenerationConfig

CASES = ["longcat_flash", "longcat_fp8", "longcat_lite_ngram"]
MTP_CASES = ["longcat_flash", "longcat_fp8"]
MODES = ["auto", "expanded", "absorbed"]


@functools.cache
def load(case: str):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / case, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("hf_moe.")
    model.generation_config = GenerationConfig(pad_token_id=3)  # the goldens were generated without stopping
    return model


def fresh(case: str):
    """A model of one's own, to break, without FP8 weights."""
    return AutoModelForCausalLM.from_pretrained(GOLDENS / case, dtype=torch.float32, dequantize=True).eval()


@torch.no_grad()
def run(model, expected, **kwargs):
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask", "position_ids", "labels")}
    return model(**inputs | kwargs)


def real_only(values: torch.Tensor, expected) -> torch.Tensor:
    """Zero where the batch is padded, as in the goldens."""
    mask = expected["attention_mask"][:, : values.shape[1]].bool()
    return values.masked_fill(~mask.unsqueeze(-1), 0.0)


def error(values: torch.Tensor, wanted: torch.Tensor, expected) -> float:
    return (real_only(values, expected) - wanted).abs().max().item()
