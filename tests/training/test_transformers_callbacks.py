"""Router balance and QK-Clip under Transformers' own Trainer."""

import pytest
import torch
from testing import assert_close
from tiny import random_ids, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_moe.training.balance import BalanceOptions, RouterBalance
from hf_moe.training.muon import Muon, muon_groups
from hf_moe.training.qk_clip import QKClip
from hf_moe.training.transformers_callbacks import QKClipCallback, RouterBalanceCallback, add_callbacks

ROWS, LENGTH, STEPS = 12, 9, 3
OPTIONS = BalanceOptions(bias_update_rate=0.01, sequence_loss=0.1)


class Reporter(TrainerCallback):
    """Stands for TensorBoard and its like: keeps what is reported."""

    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(dict(logs))


def test_trainer_does_what_a_loop_does(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in random_ids(ROWS, LENGTH)]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    model = tiny_model("deepseek_v3")
    reporter, seen = Reporter(), []
    optimizer = Muon(muon_groups(model), lr=0.01)
    trainer = Trainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=rows[:4],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        callbacks=[reporter],
    )
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *a: (
        seen.append(inputs["input_ids"].clone()),
        step(model, inputs, *a),
    )[1]
    add_callbacks(trainer, RouterBalanceCallback(OPTIONS), QKClipCallback(threshold=2.0))
    trainer.train()

    plain = tiny_model("deepseek_v3").train()
    optimizer = Muon(muon_groups(plain), lr=0.01)
    balance, clip = RouterBalance(plain, OPTIONS), QKClip(plain, threshold=2.0)
    for index in range(STEPS):
        micro_batches = seen[2 * index : 2 * index + 2]
        num_items = torch.tensor(sum(batch[:, 1:].numel() for batch in micro_batches))
        for batch in micro_batches:
            plain(input_ids=batch, labels=batch, num_items_in_batch=num_items, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
        clip.step()
    for (name, ours), expected in zip(model.state_dict().items(), plain.state_dict().values()):
        assert_close(name, ours, expected, "float32_grad")
    lines = [line for line in reporter.lines if "loss" in line]
    assert len(lines) == STEPS
    for line in lines:
        assert {"router_max_over_mean", "router_entropy", "router_balance_loss", "max_attention_logit"} <= line.keys()
    assert "router_entropy" in next(line for line in trainer.state.log_history if "loss" in line)
    assert (tmp_path / "expert_load.png").stat().st_size > 1000
    assert model.auxiliary_loss is None


def test_training_again_after_an_interruption(tmp_path):
    """The one of before still watches the model, and would be in the way."""
    rows = [{"input_ids": row, "labels": row} for row in random_ids(4, LENGTH)]

    class Interrupt(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    model = tiny_model("deepseek_v3")
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[Interrupt()])
    callback = RouterBalanceCallback(OPTIONS, heat_map=None)
    add_callbacks(trainer, callback, QKClipCallback(threshold=2.0))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    first = callback.watched
    trainer.remove_callback(Interrupt)
    trainer.train()
    assert callback.watched is not first and callback.watched.load().num_tokens == 2 * 4 * LENGTH
    assert first.load().num_tokens == 4 * LENGTH and model.auxiliary_loss is None
