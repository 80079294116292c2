"""The training loop: what a step optimises, resuming, evaluation, the files it leaves."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from testing import assert_close
from tiny import tiny_config, tiny_model
from torch.utils.checkpoint import CheckpointError as RecomputationError
from trainer_cases import VOCABULARY, losses, options, some_rows, trained

from hf_moe.demo import DEMO_MODEL
from hf_moe.training import FinetuneArguments, FinetuneTrainer, finetune
from hf_moe.training import trainer as trainer_module
from hf_moe.training.callbacks import Callback
from hf_moe.training.checkpoints import CheckpointError, check_checkpoint, find_checkpoint, list_checkpoints
from hf_moe.training.data import IGNORE_INDEX, Collator
from hf_moe.training.replay import enable_gradient_checkpointing, replay_contexts, replay_routes
from hf_moe.training.router_callbacks import balance_callbacks
from hf_moe.training.trainer import mtp_parameters, read_log

pytest.importorskip("peft")

# --- what a step optimises --------------------------------------------------------------------------------------------


def test_every_mtp_layer_runs_on_the_shortest_rows(tmp_path):
    """Processes whose rows are longer would wait for those that left one out."""
    model, ran = tiny_model(num_nextn_predict_layers=2), []
    for index, layer in model.model.mtp_layers():
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    trainer = trained(tmp_path, some_rows(low=2, high=3), model, max_steps=1)
    assert len(set(ran)) == 2 and trainer.log_lines[0]["mtp_loss_2"] == 0


def test_processes_wait_for_one_that_reads_a_large_model(tmp_path, monkeypatch):
    handlers = {}
    monkeypatch.setattr(trainer_module, "check_launch", lambda accelerator: None)
    monkeypatch.setattr(trainer_module, "Accelerator", lambda **given: handlers.update(given))
    for given, seconds in (({}, 7200), ({"ddp_timeout": 60}, 60)):
        trainer_module.make_accelerator(options(tmp_path, **given))
        (handler,) = handlers["kwargs_handlers"]
        assert handler.to_kwargs() == {"timeout": timedelta(seconds=seconds)}


def test_a_step_descends_the_mean_over_all_targets_of_all_micro_batches(tmp_path):
    """Against the definition: the sum of the token losses of all six rows, over their number, in one batch."""
    data = some_rows(6)
    model, reference = tiny_model(), tiny_model()
    seen = {}

    class Spy(Callback):
        def before_optimizer_step(self, trainer):
            seen.update({n: p.grad.clone() for n, p in trainer.unwrapped.named_parameters() if p.grad is not None})

    trained(tmp_path, data, model, callbacks=[Spy()], max_steps=1, gradient_accumulation_steps=3, max_grad_norm=0)
    batch = Collator(0)([data[index] for index in range(6)])
    reference.train()
    main_count = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    # The sums of the MTP depths are divided by the targets of the main head, too.
    reference(**batch, use_cache=False, num_items_in_batch=main_count).loss.backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert set(seen) == set(expected)
    for name, gradient in expected.items():
        if gradient.norm() > 1e-7:
            assert_close(name, seen[name], gradient, "float32_grad")


def test_accumulation_does_not_change_what_is_learnt(tmp_path):
    data = some_rows(16)
    whole = trained(tmp_path / "a", data, per_device_train_batch_size=4, max_steps=3)
    parts = trained(tmp_path / "b", data, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=3)
    for first, second in zip(losses(whole), losses(parts)):
        assert first[1:5] == pytest.approx(second[1:5], rel=1e-4)
    for (name, one), other in zip(whole.unwrapped.named_parameters(), parts.unwrapped.parameters()):
        assert_close(name, other, one, "float32_grad")


def test_extra_losses_add_up_by_share(tmp_path):
    """A constant that every micro-batch adds by its share is there once a step."""

    class Constant(Callback):
        def extra_loss(self, trainer, outputs, batch):
            return 7.0 * trainer.micro_batch_share

    data = some_rows(8)
    plain = trained(tmp_path / "a", data, max_steps=2, gradient_accumulation_steps=2)
    more = trained(tmp_path / "b", data, max_steps=2, gradient_accumulation_steps=2, callbacks=[Constant()])
    for first, second in zip(plain.log_lines, more.log_lines):
        assert second["loss"] - first["loss"] == pytest.approx(7.0, rel=1e-5)
        assert second["main_loss"] == first["main_loss"]


def test_clipping_bounds_the_gradient(tmp_path):
    norms = []

    class Spy(Callback):
        def on_step_end(self, trainer):
            return {"seen": 1.0}

        def before_optimizer_step(self, trainer):
            norms.append(
                torch.stack([p.grad.norm() for p in trainer.unwrapped.parameters() if p.grad is not None]).norm()
            )

    data, limit = some_rows(), 1e-3
    run = trained(tmp_path, data, callbacks=[Spy()], max_grad_norm=limit, max_steps=2, optim="adamw_torch")
    assert min(norms) > limit  # so that there was something to clip
    assert [line["grad_norm"] for line in run.log_lines] == pytest.approx([norm.item() for norm in norms], rel=1e-5)
    assert all(line["seen"] == 1.0 for line in run.log_lines)


@pytest.mark.parametrize("mtp", ["train", "freeze", "skip"])
def test_mtp_is_trained_frozen_or_skipped(tmp_path, mtp):
    model = tiny_model()
    before = [parameter.detach().clone() for parameter in mtp_parameters(model)]
    run = trained(tmp_path, some_rows(), model, mtp=mtp, max_steps=2)
    moved = [not torch.equal(old, new) for old, new in zip(before, mtp_parameters(model))]
    assert len(before) > 5 and (all(moved) if mtp == "train" else not any(moved))
    line = run.log_lines[0]
    assert model.config.mtp_loss_weight == 0.3  # what is saved: skipped now does not mean for ever
    if mtp == "skip":
        assert "mtp_loss_1" not in line and line["loss"] == line["main_loss"]
    else:
        assert line["loss"] == pytest.approx(line["main_loss"] + 0.3 * line["mtp_loss_1"], rel=1e-6)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    model = tiny_model()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="at step 1"):
        trained(tmp_path, some_rows(), model)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(tmp_path):
    kinds = set()

    class Spy(Callback):
        def model_kwargs(self, trainer):
            return {"output_hidden_states": True}

        def on_micro_batch(self, trainer, outputs, batch):
            kinds.add(outputs.hidden_states[-1].dtype)
            assert outputs.logits is None  # nobody pays for them

    model = tiny_model()
    rows = []
    model.model.layers[1].self_attn.o_proj.register_forward_hook(
        lambda module, inputs, output: rows.append(output.dtype)
    )
    run = trained(tmp_path, some_rows(), model, bf16=True, max_steps=2, callbacks=[Spy()])
    assert set(rows) == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(np.isfinite(line["loss"]) for line in run.log_lines)


# --- gradient checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash"])
def test_gradient_checkpointing_learns_the_same(tmp_path, family):
    data = some_rows()
    runs = [
        trained(tmp_path / str(on), data, tiny_model(family), gradient_checkpointing=on, max_steps=3)
        for on in (False, True)
    ]
    for first, second in zip(losses(runs[0]), losses(runs[1])):
        assert first[1:5] == pytest.approx(second[1:5], rel=1e-5)


def test_recomputation_takes_the_routes_of_the_forward_pass():
    """Biases that move between the forward pass and the recomputation stand for kernels that are not repeatable."""

    def gradients(replay: bool, disturb: bool) -> dict[str, torch.Tensor]:
        model = tiny_model().train()
        if replay:
            enable_gradient_checkpointing(model)
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        data = some_rows()
        loss = model(**Collator(0)([data[0], data[1]]), use_cache=False).loss
        if disturb:
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.copy_(-buffer)
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected = gradients(replay=False, disturb=False)
    for name, gradient in gradients(replay=True, disturb=True).items():
        assert torch.equal(gradient, expected[name]), name
    with pytest.raises(RecomputationError):  # torch notices, where the numbers of tokens differ
        gradients(replay=False, disturb=True)


def test_routes_are_replayed_as_often_as_asked():
    router = next(module for module in tiny_model().modules() if hasattr(module, "e_score_correction_bias"))
    assert replay_routes(router) == 1
    states = torch.randn(5, router.hidden_size)
    forward, recomputation = replay_contexts()
    with forward:
        chosen = router(states)[2]
    for _ in range(2):
        with recomputation:
            assert torch.equal(router(-states)[2], chosen)
    assert not torch.equal(router(-states)[2], chosen)


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Crash(Callback):
    """Ends a run as a kill would: nothing behind step `at` is written."""

    def __init__(self, at: int):
        self.at = at

    def on_step_end(self, trainer):
        if trainer.step == self.at:
            raise KeyboardInterrupt


def lora(model, dropout: float = 0.1):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=4, lora_dropout=dropout, target_modules=["o_proj", "kv_b_proj"]))


@pytest.mark.parametrize("kind", ["lora", "full", "balanced"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path, kind):
    """20 steps; or 10, a kill at step 13, and the rest: dropout, accumulation, packing, schedule and evaluation.

    With Muon, moving biases and balance losses, too.
    """

    def model():
        return lora(tiny_model()) if kind == "lora" else tiny_model()

    data, held_out = some_rows(14, packed=True), some_rows(5, seed=9)
    more = dict(
        max_steps=20, save_strategy="steps", save_steps=5, gradient_accumulation_steps=2, warmup_steps=3,
        lr_scheduler_type="cosine", logging_steps=3, eval_strategy="steps", eval_steps=4, validation_split=0.5,
        weight_decay=0.1, optim="muon" if kind == "balanced" else "adamw_torch",
    )  # fmt: skip

    def run(folder: str, *callbacks, **extra):
        tiny = model()
        if kind == "balanced":
            callbacks = (*balance_callbacks(tiny, options(tmp_path, router_bias_update_rate=0.05, **more)), *callbacks)
        return trained(tmp_path / folder, data, tiny, held_out, callbacks, **more, **extra)

    straight = run("straight")
    with pytest.raises(KeyboardInterrupt):
        run("killed", Crash(13))
    torch.manual_seed(123), random.seed(5), np.random.seed(7)  # another process would have other numbers
    resumed = run("killed", resume_from_checkpoint="latest")
    assert [path.name for path in list_checkpoints(tmp_path / "killed")][0] == "checkpoint-20"
    assert losses(resumed) == losses(straight) and len(losses(straight)) == 7 + 5
    for (name, one), other in zip(straight.unwrapped.state_dict().items(), resumed.unwrapped.state_dict().values()):
        assert torch.equal(one, other), name
    files = [load_state(tmp_path / folder / "checkpoint-20") for folder in ("straight", "killed")]
    assert files[0] == files[1]
    assert [line["step"] for line in read_log(tmp_path / "killed" / "training_log.jsonl")] == [
        line["step"] for line in straight.log_lines
    ]


def load_state(folder: Path) -> dict:
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    return {key: {name: float(value.double().sum()) for name, value in entry.items()} for key, entry in state.items()}


def test_a_killed_process_leaves_a_checkpoint_to_go_on_from(tmp_path):
    """`kill -9` of the command itself, as soon as its second checkpoint is there."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"Line {n} says {n * n}."}) + "\n" for n in range(40)))
    argv = [
        "finetune", "--model_name_or_path", str(DEMO_MODEL), "--dataset_name", str(data), "--max-steps", "400",
        "--save-steps", "2", "--use_peft", "--lora_target_modules", "o_proj", "--per-device-train-batch-size", "1",
        "--disable_tqdm", "--logging_steps", "1", "--dtype", "float32", "--use_cpu", "--save_total_limit", "2",
    ]  # fmt: skip
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_moe.cli", *argv, "--output_dir", str(killed)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint-4").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    found = find_checkpoint(killed, "latest")
    step = int(found.name.split("-")[1])
    for other in list_checkpoints(killed):
        if other != found:
            shutil.rmtree(other)
    common = dict(
        model_name_or_path=str(DEMO_MODEL), dataset_name=str(data), save_steps=2, use_peft=True,
        lora_target_modules=["o_proj"], per_device_train_batch_size=1, disable_tqdm=True, logging_steps=1,
        dtype="float32", use_cpu=True, save_total_limit=2, lr_scheduler_type="constant", max_steps=step + 2,
    )  # fmt: skip
    assert step >= 4
    with pytest.raises(ValueError, match="holds a run"):
        finetune(FinetuneArguments(output_dir=str(killed), **common))
    resumed = finetune(FinetuneArguments(output_dir=str(killed), resume_from_checkpoint="latest", **common))
    assert resumed.training.step == step + 2
    assert [line["step"] for line in read_log(killed / "training_log.jsonl")] == list(range(1, step + 3))


def test_broken_checkpoints_are_named_and_passed_over(tmp_path):
    data = some_rows()
    more = dict(save_strategy="steps", save_steps=2, max_steps=6)
    trained(tmp_path, data, lora(tiny_model()), **more)
    torn = tmp_path / "checkpoint-6" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:-100])
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-9.tmp")  # a write that was cut off
    with pytest.warns(UserWarning, match="checkpoint-6 is broken: optimizer.pt has"):
        assert find_checkpoint(tmp_path, "latest").name == "checkpoint-4"
    with pytest.raises(CheckpointError, match="checkpoint-6 is broken"):
        trained(tmp_path, data, lora(tiny_model()), resume_from_checkpoint=str(tmp_path / "checkpoint-6"), **more)
    with pytest.raises(CheckpointError, match="its data_seed is 42, that of this run is 1"):
        trained(
            tmp_path,
            data,
            lora(tiny_model()),
            data_seed=1,
            resume_from_checkpoint=str(tmp_path / "checkpoint-4"),
            **more,
        )
    with pytest.raises(CheckpointError, match="its data is"):
        other = some_rows(12, seed=3)
        trained(tmp_path, other, lora(tiny_model()), resume_from_checkpoint=str(tmp_path / "checkpoint-4"), **more)
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest.json is missing"):
        check_checkpoint(tmp_path / "checkpoint-4")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_checkpoint(tmp_path, "checkpoint-77")


def test_old_checkpoints_are_deleted_but_the_best(tmp_path):
    held_out = some_rows(5, seed=9)
    run = trained(
        tmp_path, some_rows(4), tiny_model(), held_out, max_steps=12, learning_rate=0.03, lr_scheduler_type="constant",
        save_strategy="steps", save_steps=2, save_total_limit=2, eval_strategy="steps", eval_steps=2,
        validation_split=0.5, load_best_model_at_end=True,
    )  # fmt: skip
    evaluated = {line["step"]: line["eval_loss"] for line in run.log_lines if "eval_loss" in line}
    best = min(evaluated, key=evaluated.get)
    assert best < 8  # it overfits, or this test shows nothing
    kept = {int(path.name.split("-")[1]) for path in list_checkpoints(tmp_path)}
    assert kept == {best, 10, 12}
    # The best weights are in the model again.
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluated[best], rel=1e-6)


def test_a_run_that_went_back_keeps_what_it_saves(tmp_path):
    """Checkpoints of the run before, behind the one that was taken up, are the first to go."""

    class Kill(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 5:
                raise KeyboardInterrupt

    data, more = some_rows(), dict(save_strategy="steps", save_steps=2, max_steps=8)
    trained(tmp_path, data, **more)
    more |= dict(save_total_limit=1, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, data, callbacks=[Kill()], **more)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4"]


@pytest.mark.parametrize(
    "rows, batch, epochs, expected",
    [(3, 2, 4, [2, 3, 5, 6]), (4, 2, 2, [2, 4]), (5, 2, 2, [3, 5]), (2, 3, 4, [1, 2, 3]), (12, 5, 1.5, [3, 4])],
)
def test_epochs_end_where_all_rows_were_seen(tmp_path, rows, batch, epochs, expected):
    """Steps go on into the next epoch: they do not begin anew at its first row."""
    more = dict(max_steps=-1, num_train_epochs=epochs, per_device_train_batch_size=batch, save_strategy="epoch")
    run = trained(tmp_path, some_rows(rows), **more)
    assert [int(path.name.partition("-")[2]) for path in list_checkpoints(tmp_path)][::-1] == expected
    assert run.step == expected[-1]


def test_what_a_killed_run_left_half_deleted_is_in_nobodys_way(tmp_path):
    (tmp_path / "checkpoint-2.old").mkdir()
    (tmp_path / "checkpoint-2.old" / "optimizer.pt").write_bytes(b"x")
    trained(tmp_path, some_rows(), save_strategy="steps", save_steps=2, save_total_limit=1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_file_of_the_right_size_that_cannot_be_read_is_named(tmp_path):
    trained(tmp_path, some_rows(), save_strategy="steps")
    path = tmp_path / "checkpoint-4" / "optimizer.pt"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CheckpointError, match="checkpoint-4 is broken: optimizer.pt cannot be read"):
        trained(tmp_path, some_rows(), max_steps=6, resume_from_checkpoint="latest")


def test_early_stopping(tmp_path):
    run = trained(
        tmp_path, some_rows(4), tiny_model(), some_rows(5, seed=9), max_steps=60, learning_rate=0.03,
        lr_scheduler_type="constant", eval_strategy="steps", eval_steps=2, validation_split=0.5,
        early_stopping_patience=3,
    )  # fmt: skip
    evaluated = [line["eval_loss"] for line in run.log_lines if "eval_loss" in line]
    assert run.result.stopped_early and run.step < 60
    assert min(range(len(evaluated)), key=evaluated.__getitem__) == len(evaluated) - 4


# --- evaluation and log -----------------------------------------------------------------------------------------------


def test_evaluation_is_the_mean_over_targets_without_mtp(tmp_path):
    data = some_rows(7)
    model = tiny_model()
    trainer = FinetuneTrainer(model, options(tmp_path, per_device_eval_batch_size=3), data)
    model.train()
    tmp_path.mkdir(exist_ok=True)
    ran = []
    model.model.layers[-1].register_forward_hook(lambda *args: ran.append(1))
    metrics = trainer.evaluate(data)
    assert model.training and model.config.mtp_loss_weight == 0.3 and not ran
    model.eval()
    total = count = 0.0
    for index in range(7):
        ids, labels = data[index][0]
        logits = model(ids[None]).logits[0].double().log_softmax(-1)
        for at in range(1, len(ids)):
            if labels[at] != IGNORE_INDEX:
                total, count = total - logits[at - 1, labels[at]].item(), count + 1
    assert metrics["eval_targets"] == count
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_trackers_and_schedule(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained(tmp_path, some_rows(), report_to=["tensorboard"], max_steps=4, warmup_steps=2, learning_rate=1e-3)
    assert [line["learning_rate"] for line in run.log_lines] == pytest.approx([5e-4, 1e-3, 5e-4, 0.0])
    events = next((tmp_path / "runs").rglob("events.out*"))
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    logged = [event.value for event in accumulator.Scalars("main_loss")]
    assert logged == pytest.approx([line["main_loss"] for line in run.log_lines], rel=1e-6)


def test_weights_and_biases_are_reported_through_accelerate(tmp_path, monkeypatch):
    """With a stand-in for the tracker of Accelerate, which needs an account."""
    from accelerate.tracking import GeneralTracker

    lines = []

    class Recorder(GeneralTracker):
        name, requires_logging_directory, main_process_only = "wandb", False, True
        tracker = None

        def __init__(self, run_name, **kwargs):
            super().__init__()
            lines.append((run_name, kwargs))

        def store_init_configuration(self, values):
            lines.append(values)

        def log(self, values, step=None, **kwargs):
            lines.append((step, values))

    import accelerate.accelerator as host
    import accelerate.tracking as tracking

    import hf_moe.training.trainer as ours

    monkeypatch.setattr(ours, "get_available_trackers", lambda: ["wandb"])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    monkeypatch.setattr(host, "filter_trackers", lambda names, *more: list(names))
    trained(tmp_path, some_rows(), report_to=["wandb"], run_name="first", max_steps=2)
    assert lines[0] == ("hf-moe", {"name": "first"}) and lines[1]["max_steps"] == 2
    assert [step for step, _ in lines[2:]] == [1, 2] and "main_loss" in lines[2][1]


def test_trackers_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match="--report_to nothing: no such tracker, or not installed"):
        trained(tmp_path, some_rows(), report_to=["nothing"])


def test_every_family_trains(tmp_path):
    for family in ("deepseek_v2", "kimi_k2", "longcat_flash", "longcat_flash_ngram"):
        run = trained(
            tmp_path / family, some_rows(packed=True), tiny_model(family), max_steps=8, learning_rate=5e-3,
            lr_scheduler_type="constant",
        )  # fmt: skip
        values = [line["main_loss"] for line in run.log_lines]
        assert values[-1] < values[0], family


def test_seeds_decide(tmp_path):
    def run(seed: int, folder: str):
        return losses(trained(tmp_path / folder, some_rows(), lora(tiny_model(), 0.3), seed=seed, max_steps=3))

    assert run(1, "a") == run(1, "b") != run(2, "c")


def test_tiny_models_have_room_for_the_rows():
    assert tiny_config().vocab_size >= VOCABULARY and os.path.exists(DEMO_MODEL)
