"""The training loop where something is not as it should be: what it refuses, and what it must not lose."""

import pytest
from accelerate import Accelerator
from tiny import tiny_model
from trainer_cases import options, some_rows

from hf_moe.training import FinetuneTrainer

pytest.importorskip("peft")


@pytest.mark.parametrize("by", ["accelerator", "environment"])
def test_accumulation_of_another_length_is_refused(tmp_path, monkeypatch, by):
    """`accelerate launch` with DeepSpeed sets one of its own: steps would end in the middle of what is divided."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2) if by == "accelerator" else None
    if accelerator is None:
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    args = options(tmp_path, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="--gradient_accumulation_steps 4, but the accelerator .* has 2"):
        FinetuneTrainer(tiny_model(), args, some_rows(), accelerator=accelerator)
