"""`torch.export` of whole models: one program for every batch size and length."""

import pytest
import tiny_step3
import torch
from testing import assert_close
from tiny import random_ids, tiny_model
from torch.export import Dim, export

FAMILIES = {
    "deepseek_v2": lambda: tiny_model("deepseek_v2"),
    "deepseek_v3": lambda: tiny_model("deepseek_v3"),
    "longcat_flash_ngram": lambda: tiny_model("longcat_flash_ngram"),
    "step3_text": tiny_step3.text_model,
}


@pytest.mark.parametrize("experts", ["hf_moe", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_program_for_every_length(family, experts):
    model = FAMILIES[family]().eval()
    model.set_experts_implementation(experts)
    ids = random_ids(2, 7)
    sizes = {0: Dim("batch", min=1, max=16), 1: Dim("length", min=2, max=512)}
    program = export(
        model,
        (),
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False},
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes, "use_cache": None},
    )
    for batch, length in ((1, 2), (3, 200)):  # flash attention would take the longer ones of the two
        ids = random_ids(batch, length, seed=length)
        mask = torch.ones_like(ids)
        mask[0, : length // 4] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        with torch.no_grad():
            logits, expected = program.module()(**inputs).logits, model(**inputs).logits
        assert_close("logits", logits[mask.bool()], expected[mask.bool()], "float32")
