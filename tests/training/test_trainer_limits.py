"""The training loop where something is not as it should be: what it refuses, and what it must not lose."""

import json
import warnings

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_model
from trainer_cases import losses, options, some_rows, trained

from hf_moe.training import FinetuneTrainer
from hf_moe.training import trainer as trainer_module
from hf_moe.training.callbacks import Callback
from hf_moe.training.checkpoints import MANIFEST, STATE, check_checkpoint, list_checkpoints
from hf_moe.training.router_callbacks import balance_callbacks
from hf_moe.training.trainer import make_accelerator

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


def test_the_lowest_loss_is_the_best_one_also_where_it_is_no_progress(tmp_path):
    """`early_stopping_threshold` says what counts for stopping, not which weights are the best."""
    held_out = some_rows(5, seed=3)
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "validation_split": 0.1, "early_stopping_threshold": 10.0}
    more = {"save_strategy": "steps", "early_stopping_patience": 3, "load_best_model_at_end": True, "max_steps": 9}
    run = trained(tmp_path, some_rows(), held_out=held_out, **evaluation, **more)
    found = {line["step"]: line["eval_loss"] for line in run.log_lines if "eval_loss" in line}
    assert run.result.stopped_early and list(found) == [1, 2, 3, 4]  # the first one, and three without progress
    assert run.state.best_step == min(found, key=found.get) != 1
    assert run.evaluate()["eval_loss"] == min(found.values())


@pytest.mark.parametrize("why", ["not saved", "another folder"])
def test_a_best_model_that_was_not_kept_does_not_end_a_resumed_run_in_an_error(tmp_path, why):
    """It was known only when the last step was done, and the result never written."""
    held_out = some_rows(5, seed=3)
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "validation_split": 0.1, "save_strategy": "steps"}
    more = {"save_steps": 3, "max_steps": 3, "load_best_model_at_end": why == "another folder"}
    first = trained(tmp_path / "a", some_rows(), held_out=held_out, **evaluation, **more)
    checkpoint = tmp_path / "a" / "checkpoint-3"
    # The step that was the best one before the last checkpoint.
    state = json.loads((checkpoint / STATE).read_text())
    state["state"] |= {"best_step": 2, "best_loss": 0.5}
    text = json.dumps(state)
    (checkpoint / STATE).write_text(text)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][STATE] = len(text)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    more = {"save_steps": 50, "max_steps": 5, "load_best_model_at_end": True, "resume_from_checkpoint": str(checkpoint)}
    folder = tmp_path / ("a" if why == "not saved" else "b")
    with pytest.warns(UserWarning, match="of step 2 .* was not kept"):
        run = trained(folder, some_rows(), held_out=held_out, **evaluation, **more)
    assert first.step == 3 and run.state.best_step in (4, 5)
    assert run.evaluate()["eval_loss"] == run.state.best_loss


def test_loss_scaling_goes_on_where_it_was_and_skipped_steps_keep_their_rate(tmp_path):
    """float16 under `accelerate launch --mixed_precision fp16`, with its scaler on the CPU."""

    def run(name: str, **more):
        args = options(tmp_path / name, max_grad_norm=0, save_strategy="steps", save_steps=3, max_steps=6, **more)
        accelerator = make_accelerator(args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # too much at first: steps are skipped
        trainer = FinetuneTrainer(tiny_model(), args, some_rows(), accelerator=accelerator)
        trainer.train()
        return trainer

    straight = run("straight")
    scale, rates = straight.accelerator.scaler.get_scale(), [line["learning_rate"] for line in straight.log_lines]
    assert 1 < scale < 2.0**127 and rates[0] == 1e-3 and rates[-1] > 0
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert resumed.accelerator.scaler.get_scale() == scale
    assert losses(resumed)[-3:] == losses(straight)[-3:]
    for first, second in zip(straight.unwrapped.parameters(), resumed.unwrapped.parameters()):
        assert torch.equal(first, second)


def test_a_checkpoint_of_fewer_processes_is_taken_up(tmp_path):
    """The others keep the random state of their seed: what is optimised is the same but for dropout."""
    straight = trained(tmp_path / "a", some_rows(), save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    (checkpoint / "rng_state_0.pt").unlink()
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["files"]["rng_state_0.pt"]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="checkpoint-2 is of fewer processes: rng_state_0.pt is missing"):
        resumed = trained(tmp_path / "b", some_rows(), resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(straight)[2:]


def test_what_a_write_that_was_cut_off_left_does_not_stay_on_the_disk(tmp_path):
    for name in ("checkpoint-3.tmp", "checkpoint-2", "checkpoint-2.old"):  # a run that went on from step 1
        (tmp_path / name).mkdir()
        (tmp_path / name / "optimizer.pt").write_bytes(b"x")
    trained(tmp_path, some_rows(), save_strategy="steps", save_steps=2, max_steps=2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoint-2"]
    check_checkpoint(tmp_path / "checkpoint-2")


def test_frozen_mtp_layers_are_left_alone_by_balance_and_qk_clip(tmp_path):
    """Neither correction biases nor clipped projections are moved by a gradient that could be frozen."""
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    more = {"mtp": "freeze", "optim": "muonclip", "qk_clip_threshold": 1e-3, "router_bias_update_rate": 0.1}
    callbacks = balance_callbacks(model, options(tmp_path, **more))
    run = trained(tmp_path, some_rows(), model, callbacks=callbacks, **more)
    assert run.log_lines[0]["clipped_heads"] == 1  # so that there was something to clip
    (index, _), *_ = model.model.mtp_layers()
    for name, tensor in model.state_dict().items():
        moves = ("e_score_correction_bias", "kv_b_proj.weight", "gate_up_proj")
        if f"layers.{index}." in name:
            assert torch.equal(tensor, before[name]), name
        elif name.endswith(moves):
            assert not torch.equal(tensor, before[name]), name


def test_tokens_a_second_are_those_of_training(tmp_path, monkeypatch):
    now = [0.0]

    class Clock(Callback):
        def on_step_end(self, trainer):
            now[0] += 2.0

        def on_evaluate(self, trainer, metrics):
            now[0] += 1000.0

    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: now[0])
    more = {"eval_strategy": "steps", "eval_steps": 1, "validation_split": 0.1}
    run = trained(tmp_path, some_rows(), held_out=some_rows(2), callbacks=[Clock()], max_steps=3, **more)
    lines = [line for line in run.log_lines if "tokens_per_second" in line]
    tokens = [0, *(line["tokens"] for line in lines)]
    assert [line["tokens_per_second"] for line in lines] == [(b - a) / 2 for a, b in zip(tokens, tokens[1:])]


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_resumed_run_takes_the_learning_rate_that_it_is_given(tmp_path, optim):
    """At the same step of the schedule; left out, that of the checkpoint stays, whatever the default."""

    def rates(learning_rate, **more):
        shared = {"optim": optim, "lr_scheduler_type": "linear", "max_steps": 4, "learning_rate": learning_rate}
        trainer = trained(tmp_path, some_rows(), **shared, **more)
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.0}  # the schedule has ended
        assert trainer.args.learning_rate == (learning_rate or 1e-3)
        return [line["learning_rate"] for line in trainer.log_lines if "learning_rate" in line]

    assert rates(1e-3, save_strategy="steps", save_steps=2) == pytest.approx([7.5e-4, 5e-4, 2.5e-4, 0])
    again = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    with pytest.warns(UserWarning, match="trained with --learning_rate 0.001; it goes on with 0.0001"):
        assert rates(1e-4, **again) == pytest.approx([7.5e-4, 5e-4, 2.5e-5, 0])
    for same in (None, 1e-3):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*--learning_rate.*")
            assert rates(same, **again) == pytest.approx([7.5e-4, 5e-4, 2.5e-4, 0])
