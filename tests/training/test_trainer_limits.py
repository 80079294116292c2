"""The training loop where something is not as it should be: what it refuses, and what it must not lose."""

import pytest
from accelerate import Accelerator
from tiny import tiny_model
from trainer_cases import options, some_rows, trained

from hf_moe.training import FinetuneTrainer
from hf_moe.training.callbacks import Callback
from hf_moe.training.checkpoints import list_checkpoints

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


def test_a_gradient_that_is_no_number_ends_the_run_before_the_good_checkpoint_is_gone(tmp_path):
    """The loss of its step is still a number: the next one, of lost weights, is not."""

    class Break(Callback):
        def before_optimizer_step(self, trainer):
            if trainer.step == 2:
                next(p for p in trainer.unwrapped.parameters() if p.grad is not None).grad.fill_(float("inf"))

    with pytest.raises(FloatingPointError, match="norm of the gradient is (inf|nan) at step 3"):
        trained(tmp_path, some_rows(), callbacks=[Break()], save_strategy="steps", save_steps=1, save_total_limit=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
