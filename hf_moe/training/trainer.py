"""The training loop, on Accelerate.

A step takes `gradient_accumulation_steps` micro-batches per process. Token losses are summed and divided by the number
of targets of the whole step, on all processes, so that neither accumulation nor the number of processes changes what
is optimised. Which rows a step sees follows from the seed and the step's number alone: see `data.RowOrder`.
"""

import contextlib
import inspect
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from .arguments import FinetuneArguments
from .callbacks import Callback
from .checkpoints import CheckpointError, check_checkpoint, find_checkpoint, load_checkpoint, rotate, save_checkpoint
from .data import IGNORE_INDEX, Collator, RowOrder, TokenRows
from .distributed import forward_context, prepare
from .optimizers import MUON, build_optimizer
from .replay import enable_gradient_checkpointing

LOG_FILE = "training_log.jsonl"


@dataclass
class TrainResult:
    """What a run did: `log` has the lines of the log, `stopped_early` says whether evaluation ended it."""

    step: int
    train_loss: float
    metrics: dict[str, float] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)
    stopped_early: bool = False


@dataclass
class TrainerState:
    """What a checkpoint keeps besides tensors."""

    step: int = 0
    tokens: int = 0
    best_loss: float | None = None  # the lowest one
    best_step: int | None = None
    progress_loss: float | None = None  # of the last evaluation that was progress
    bad_evaluations: int = 0
    stopped_early: bool = False
    sums: dict[str, float] = field(default_factory=dict)  # of the steps since the last line of the log
    counted: int = 0


class FinetuneTrainer:
    """Trains `model` on rows of tokens.

    Args:
        model: one of ours, or a PEFT model around it; parameters that require a gradient are trained.
        args: see `FinetuneArguments`.
        train_dataset, eval_dataset: rows of tokens, from `data.load_rows`.
        tokenizer: saved with the result; its padding token fills rows.
        callbacks: see `callbacks.Callback`.
        accelerator: to run on; left out: one is made by `make_accelerator(args)`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: FinetuneArguments,
        train_dataset: TokenRows,
        eval_dataset: TokenRows | None = None,
        tokenizer=None,
        callbacks: Sequence[Callback] = (),
        accelerator: Accelerator | None = None,
    ):
        self.args, self.train_dataset, self.eval_dataset = args, train_dataset, eval_dataset
        self.tokenizer, self.callbacks = tokenizer, list(callbacks)
        self.accelerator = accelerator or make_accelerator(args)
        check_accumulation(self.accelerator, args)
        self.output_dir = Path(args.output_dir)
        self.state = TrainerState()
        self.micro_batch_share = 1.0
        self.log_lines: list[dict[str, float]] = []
        self._mtp_weight = set_mtp(model, args)
        if args.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        fill_deepspeed_config(self.accelerator, args)
        optimizer = build_optimizer(model, args)
        self.unwrapped = model
        self.model, self.optimizer = prepare(self.accelerator, model, optimizer)
        self.order = RowOrder(len(train_dataset), args.seed if args.data_seed is None else args.data_seed)
        self.rows_per_step = (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        )
        epochs_steps = math.ceil(args.num_train_epochs * len(train_dataset) / self.rows_per_step)
        self.total_steps = args.max_steps if args.max_steps > 0 else max(1, epochs_steps)
        # Not prepared by Accelerate, which would step it once for every process.
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=args.warmup(self.total_steps),
            num_training_steps=self.total_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs or {},
        )
        parameters = inspect.signature(forward_of(model)).parameters
        self.loss_arguments = {"use_cache": False}
        if "skip_logits" in parameters:
            self.loss_arguments["skip_logits"] = True
        flat = train_dataset.packed and "flash" in str(getattr(model.config, "_attn_implementation", ""))
        depths = base_model(model).num_mtp_depths() if hasattr(base_model(model), "num_mtp_depths") else 0
        self.collate = Collator(self._pad_id(), packed=train_dataset.packed, flatten=flat, shortest=depths + 1)

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.state.step

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def _pad_id(self) -> int:
        for holder in (self.tokenizer, self.unwrapped.config):
            for name in ("pad_token_id", "eos_token_id"):
                value = getattr(holder, name, None)
                if isinstance(value, int) and value >= 0:
                    return value
        return 0

    # --- training ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | None = None) -> TrainResult:
        """Trains to the last step, or until evaluation stops it.

        Raises:
            FloatingPointError: when the loss is no longer a number.
            CheckpointError: when the checkpoint to go on from is broken or of another run.
        """
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        self._start_log(resume)
        set_seed(self.args.seed, device_specific=True)
        if resume:
            self.state = load_checkpoint(
                self, find_checkpoint(self.output_dir, resume, self.accelerator.is_main_process)
            )
            self._truncate_log()
            self._forget_missing_best()
        for callback in self.callbacks:
            callback.on_train_begin(self)
        self.model.train()
        if self.args.eval_on_start and self.eval_dataset is not None and self.step == 0:
            self.evaluate()
        progress = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc="fine-tuning",
            disable=self.args.disable_tqdm or not self.accelerator.is_main_process,
        )
        batches = self._batches()
        self._clock = (time.perf_counter(), self.state.tokens)
        while self.step < self.total_steps and not self.state.stopped_early:
            self._train_step([next(batches) for _ in range(self.args.gradient_accumulation_steps)])
            progress.update()
            self._after_step(progress)
        progress.close()
        if self.args.load_best_model_at_end and self.state.best_step is not None:
            load_checkpoint(self, self._best_folder(), weights_only=True)
        if self.args.mtp == "skip" and self._mtp_weight is not None:
            base_model(self.unwrapped).config.mtp_loss_weight = self._mtp_weight  # of the next training, not of this
        for callback in self.callbacks:
            callback.on_train_end(self)
        for tracker in getattr(self.accelerator, "trackers", ()):
            tracker.finish()  # not `end_training`, which leaves the process group: the result is still to be written
        losses = [line["loss"] for line in self.log_lines if "loss" in line]
        evaluated = [line for line in self.log_lines if "eval_loss" in line]
        return TrainResult(
            step=self.step,
            train_loss=losses[-1] if losses else math.nan,
            metrics=dict(evaluated[-1]) if evaluated else {},
            log=self.log_lines,
            stopped_early=self.state.stopped_early,
        )

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """This process's micro-batches, from the first one of the next step."""
        args, world, rank = self.args, self.accelerator.num_processes, self.accelerator.process_index
        indices = self.order.micro_batches(
            self.step, self.total_steps, args.gradient_accumulation_steps, args.per_device_train_batch_size, world, rank
        )
        # A generator of its own: the loader draws a seed for its workers, which must not depend on when it starts.
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=indices,
            collate_fn=self.collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(args.seed),
        )
        return iter(loader)

    def _train_step(self, micro_batches: list[dict[str, torch.Tensor]]) -> None:
        micro_batches = [
            {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            for batch in micro_batches
        ]
        counts = torch.stack([count_targets(batch["labels"]) for batch in micro_batches])
        num_items = self.accelerator.reduce(counts.sum(), reduction="sum").clamp(min=1)
        kwargs = dict(self.loss_arguments)
        for callback in self.callbacks:
            kwargs.update(callback.model_kwargs(self))
        sums: dict[str, torch.Tensor] = {}
        for batch, count in zip(micro_batches, counts):
            self.micro_batch_share = count / num_items
            with self.accelerator.accumulate(self.model):
                with forward_context(self.accelerator, self.unwrapped):
                    outputs = self.model(**batch, **kwargs, num_items_in_batch=num_items)
                loss = outputs.loss
                for callback in self.callbacks:
                    more = callback.extra_loss(self, outputs, batch)
                    loss = loss if more is None else loss + more.to(loss.device)
                # Processes average their gradients, and Accelerate divides by the micro-batches: both undone here.
                scale = self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps
                self.accelerator.backward(loss * scale)
                for name, value in parts_of_loss(loss, outputs).items():
                    sums[name] = sums[name] + value if name in sums else value
                for callback in self.callbacks:
                    callback.on_micro_batch(self, outputs, batch)
                if self.accelerator.sync_gradients:
                    self._optimizer_step(sums)
        self._add_to_log(sums, micro_batches)

    def _optimizer_step(self, sums: dict[str, torch.Tensor]) -> None:
        for callback in self.callbacks:
            callback.before_optimizer_step(self)
        if self.args.max_grad_norm:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            if norm is not None:
                norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
                sums["grad_norm"] = norm.detach() / self.accelerator.num_processes  # summed over processes below
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:  # by loss scaling
            self.scheduler.step()
        self.optimizer.zero_grad()

    def _add_to_log(self, sums: dict[str, torch.Tensor], micro_batches) -> None:
        """Sums of the whole step, over processes, go to the state; so do the numbers of the callbacks."""
        tokens = sum(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum() for batch in micro_batches)
        names = sorted(sums)
        values = torch.stack([*(sums[name].detach().to(self.device, torch.float64) for name in names), tokens.double()])
        values = self.accelerator.reduce(values, reduction="sum").tolist()
        self.state.step += 1
        self.state.tokens += int(values.pop())
        metrics = dict(zip(names, values))
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"the loss is {metrics['loss']} at step {self.step}: try a lower --learning_rate or more --warmup_steps"
            )
        # A checkpoint of weights that are lost would take the place of a good one. Loss scaling skips such a step.
        scaled = self.accelerator.scaler is not None or self.accelerator.mixed_precision == "fp16"
        if not scaled and not math.isfinite(metrics.get("grad_norm", 0.0)):
            raise FloatingPointError(
                f"the norm of the gradient is {metrics['grad_norm']} at step {self.step}, though the loss is "
                f"{metrics['loss']:.4g}: try a lower --learning_rate or more --warmup_steps"
            )
        for callback in self.callbacks:
            metrics.update(callback.on_step_end(self) or {})
        for name, value in metrics.items():
            self.state.sums[name] = self.state.sums.get(name, 0.0) + float(value)
        self.state.counted += 1

    def _after_step(self, progress: tqdm) -> None:
        args, step, last = self.args, self.step, self.step == self.total_steps
        # Rows go on into the next epoch within a step: one ends where as many rows as there are have been seen.
        end_of_epoch = step * self.rows_per_step % len(self.train_dataset) < self.rows_per_step
        if step % args.logging_steps == 0 or last:
            metrics = {name: total / self.state.counted for name, total in self.state.sums.items()}
            self.state.sums, self.state.counted = {}, 0
            now, tokens = time.perf_counter(), self.state.tokens
            metrics["learning_rate"] = self.scheduler.get_last_lr()[0]
            metrics["tokens_per_second"] = (tokens - self._clock[1]) / max(1e-9, now - self._clock[0])
            metrics["tokens"] = tokens
            for callback in self.callbacks:
                metrics.update(callback.metrics(self))
            self._clock = (now, tokens)
            self.log(metrics)
            progress.set_postfix(loss=f"{metrics['loss']:.4f}")
        paused = time.perf_counter()
        due = {"steps": step % args.eval_steps == 0, "epoch": end_of_epoch, "no": False}[args.eval_strategy]
        if self.eval_dataset is not None and (due or (last and args.eval_strategy != "no")):
            self._judge(self.evaluate()["eval_loss"])
        due = {"steps": step % args.save_steps == 0, "epoch": end_of_epoch, "no": False}[args.save_strategy]
        best = args.load_best_model_at_end and self.state.best_step == step
        if due or best or (last and args.save_strategy != "no"):  # the last one, too: a longer run may go on from it
            save_checkpoint(self, self.output_dir / f"checkpoint-{step}")
            rotate(self.output_dir, args.save_total_limit, self.state.best_step, step, self.accelerator)
        # Tokens a second are those of training: neither evaluation nor a checkpoint counts.
        self._clock = (self._clock[0] + time.perf_counter() - paused, self._clock[1])

    def _judge(self, loss: float) -> None:
        state = self.state
        before = state.best_loss if state.progress_loss is None else state.progress_loss
        if state.best_loss is None or loss < state.best_loss:
            state.best_loss, state.best_step = loss, self.step
        if before is None or loss < before - self.args.early_stopping_threshold:
            state.progress_loss, state.bad_evaluations = loss, 0
        else:
            state.bad_evaluations += 1
        patience = self.args.early_stopping_patience
        state.stopped_early = patience is not None and state.bad_evaluations >= patience

    def _best_folder(self) -> Path:
        return self.output_dir / f"checkpoint-{self.state.best_step}"

    def _forget_missing_best(self) -> None:
        """Starts over with what is best if the run before kept no checkpoint of it, or kept it in another folder: it
        could not be loaded at the end."""
        state = self.state
        if not self.args.load_best_model_at_end or state.best_step is None:
            return
        try:
            check_checkpoint(self._best_folder())
        except CheckpointError as error:
            if self.accelerator.is_main_process:
                step, loss = state.best_step, state.best_loss
                message = f"the best model so far, of step {step} (evaluation loss {loss:.4f}), was not kept: {error}"
                warnings.warn(f"{message}; --load_best_model_at_end chooses among those to come", stacklevel=3)
            state.best_loss = state.best_step = None

    # --- evaluation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, dataset: TokenRows | None = None) -> dict[str, float]:
        """Mean loss of the main head per target of `dataset`, left out: of `eval_dataset`. MTP layers do not run.

        The random state is left as it was.
        """
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("there is no data to evaluate on")
        batch_size, world = self.args.per_device_eval_batch_size, self.accelerator.num_processes
        collate = Collator(self.collate.pad_id, packed=dataset.packed, flatten=self.collate.flatten and dataset.packed)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        was_training = self.model.training
        self.model.eval()
        with without_mtp(self.unwrapped):
            for turn in range(math.ceil(len(dataset) / (world * batch_size))):
                first = (turn * world + self.accelerator.process_index) * batch_size
                rows = [dataset[index] for index in range(first, min(first + batch_size, len(dataset)))]
                # Every process runs as many batches as the others, with the first row in place of none.
                batch = collate(rows or [dataset[0]])
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                if not rows:
                    batch["labels"].fill_(IGNORE_INDEX)
                with forward_context(self.accelerator, self.unwrapped):
                    outputs = self.model(**batch, **self.loss_arguments, num_items_in_batch=1)
                total += torch.stack([outputs.loss.double(), count_targets(batch["labels"]).double()])
        self.model.train(was_training)
        loss, targets = self.accelerator.reduce(total, reduction="sum").tolist()
        mean = loss / max(1.0, targets)
        metrics = {"eval_loss": mean, "eval_perplexity": math.exp(min(mean, 100.0)), "eval_targets": int(targets)}
        for callback in self.callbacks:
            callback.on_evaluate(self, metrics)
        self.log(metrics)
        return metrics

    # --- log --------------------------------------------------------------------------------------------------------

    def log(self, metrics: dict[str, float]) -> None:
        """A line of the log: to the file, the trackers and the console."""
        epoch = self.step * self.rows_per_step / max(1, len(self.train_dataset))
        line = {"step": self.step, "epoch": round(epoch, 4), **metrics}
        self.log_lines.append(line)
        self.accelerator.log(metrics, step=self.step)
        if not self.accelerator.is_main_process:
            return
        with (self.output_dir / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = "  ".join(f"{key} {value:.4g}" for key, value in line.items() if not key.endswith("tokens"))
        tqdm.write(shown)
        for callback in self.callbacks:
            callback.on_log(self, line)

    def _start_log(self, resume: str | None) -> None:
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            if not resume:
                (self.output_dir / LOG_FILE).unlink(missing_ok=True)
        if self.args.report_to:
            settings = {
                key: value if isinstance(value, (int, float, str, bool)) else str(value)
                for key, value in self.args.to_dict().items()
            }
            more = {"wandb": {"name": self.args.run_name}} if self.args.run_name else {}
            self.accelerator.init_trackers("hf-moe", config=settings, init_kwargs=more)

    def _truncate_log(self) -> None:
        """Drops the lines behind the checkpoint, which are going to be written again."""
        path = self.output_dir / LOG_FILE
        lines = read_log(path) if path.exists() else []
        self.log_lines = [line for line in lines if line["step"] <= self.step]
        if self.accelerator.is_main_process:
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.log_lines), encoding="utf-8")
            temporary.replace(path)
        self.accelerator.wait_for_everyone()


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log; one that was cut off by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def make_accelerator(args: FinetuneArguments) -> Accelerator:
    """An `Accelerator` for these options; what `accelerate launch` configured wins."""
    check_trackers(args.report_to)
    precision = "bf16" if args.bf16 else None
    # Accelerate keeps the precision of a process's first accelerator; a second run in it may have another.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != (precision or "no"):
        AcceleratorState._reset_state()
    # NCCL gives up after ten minutes, and the weights of a large model take longer.
    handlers = [InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout))]
    if args.ddp_find_unused_parameters is not None:
        handlers.append(DistributedDataParallelKwargs(find_unused_parameters=args.ddp_find_unused_parameters))
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to or None,
        project_dir=args.logging_dir or str(Path(args.output_dir) / "runs"),
        cpu=args.use_cpu or None,
        kwargs_handlers=handlers,
    )
    check_launch(accelerator)
    return accelerator


def check_launch(accelerator: Accelerator) -> None:
    """Raises `ValueError` where Accelerate would without a word do something else than it was started for."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > accelerator.num_processes:
        raise ValueError(
            f"this is one of {world} processes, but Accelerate found no accelerator to train on, so that each would "
            "train alone: pass --use_cpu to train on CPUs"
        )
    wants_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wants_fsdp and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError(
            f"FSDP is asked for, but Accelerate has it on accelerators alone, not on {accelerator.device}: start "
            "without it (examples/accelerate/ddp.yaml)"
        )


def check_accumulation(accelerator: Accelerator, args: FinetuneArguments) -> None:
    """Raises `ValueError` where a step would end after another number of micro-batches than the options say."""
    found, wanted = accelerator.gradient_accumulation_steps, args.gradient_accumulation_steps
    if found != wanted:
        raise ValueError(
            f"--gradient_accumulation_steps {wanted}, but the accelerator (or Accelerate's configuration, also that of "
            f"DeepSpeed) has {found}: give both the same"
        )


def fill_deepspeed_config(accelerator: Accelerator, args: FinetuneArguments) -> None:
    """What DeepSpeed's configuration leaves open, and Accelerate would read off a data loader of its own.

    Raises:
        ValueError: for an optimiser that needs whole matrices.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if args.optim in MUON:
            raise ValueError(f"--optim {args.optim} needs whole matrices, which DeepSpeed cuts: use FSDP2 or AdamW")
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size
        if config.get("gradient_clipping", "auto") == "auto":
            config["gradient_clipping"] = args.max_grad_norm


def check_trackers(names: list[str]) -> None:
    """Raises `ValueError` for a tracker that Accelerate does not know or that is not installed; it only skips those."""
    available = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    for name in names:
        if name not in available:
            shown = ", ".join(available) or "none"
            raise ValueError(f"--report_to {name}: no such tracker, or not installed; there are here: {shown}")


def count_targets(labels: torch.Tensor) -> torch.Tensor:
    """Targets of the main head in labels (batch, seq), as an int64 scalar: a row's first token is nobody's target."""
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def parts_of_loss(loss: torch.Tensor, outputs) -> dict[str, torch.Tensor]:
    """The loss and what it consists of, detached."""
    parts = {"loss": loss}
    if getattr(outputs, "main_loss", None) is not None:
        parts["main_loss"] = outputs.main_loss
    for depth, value in enumerate(getattr(outputs, "mtp_loss", None) or (), start=1):
        parts[f"mtp_loss_{depth}"] = value
    return {name: value.detach() for name, value in parts.items()}


def base_model(model: torch.nn.Module) -> torch.nn.Module:
    """The causal language model inside of a PEFT model, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward_of(model: torch.nn.Module):
    return type(base_model(model)).forward


def mtp_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters, factors of adapters too, of the MTP layers alone."""
    base = base_model(model)
    layers = base.model.mtp_layers() if hasattr(getattr(base, "model", None), "mtp_layers") else []
    return [parameter for _, layer in layers for parameter in layer.parameters()]


def set_mtp(model: torch.nn.Module, args: FinetuneArguments) -> float | None:
    """Applies `--mtp` and `--mtp_loss_weight` to the model; returns the weight that a configuration should keep."""
    config = base_model(model).config
    if args.mtp_loss_weight is not None and hasattr(config, "mtp_loss_weight"):
        config.mtp_loss_weight = args.mtp_loss_weight
    weight = getattr(config, "mtp_loss_weight", None)
    if args.mtp == "skip" and hasattr(config, "mtp_loss_weight"):
        config.mtp_loss_weight = 0.0
    if args.mtp != "train" or not getattr(config, "mtp_loss_weight", 0):
        for parameter in mtp_parameters(model):
            parameter.requires_grad_(False)
    return weight


@contextlib.contextmanager
def without_mtp(model: torch.nn.Module):
    """Runs the model without its MTP layers."""
    config = base_model(model).config
    weight = getattr(config, "mtp_loss_weight", None)
    if weight is None:
        yield
        return
    config.mtp_loss_weight = 0.0
    try:
        yield
    finally:
        config.mtp_loss_weight = weight


def print_on_main(accelerator: Accelerator, *lines: Any) -> None:
    """Prints above the progress bar, on one process."""
    if accelerator.is_main_process:
        for line in lines:
            tqdm.write(str(line))
