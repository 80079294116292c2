"""Checkpoints: what a run needs to go on with the same losses, in folders that are whole or not there.

A folder is written under a temporary name and renamed when everything is in it. `manifest.json` lists the files with
their sizes: a folder that lost some is not taken up.

    adapter_model.safetensors, adapter_config.json    LoRA; or the whole model, which `from_pretrained` reads
    router_bias.safetensors                           correction biases, which no gradient moves
    optimizer.pt  scheduler.pt  callbacks.pt  rng_state_<rank>.pt  trainer_state.json  manifest.json
    scaler.pt                                         the loss scale of float16
    sharded/                                          with FSDP or DeepSpeed, in place of weights and optimiser; of LoRA
                                                      under FSDP2 the factors alone, whatever the size of the model
"""

import dataclasses
import json
import os
import pickle
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .distributed import uses_fsdp2
from .partition import count_elements

if TYPE_CHECKING:
    from .trainer import FinetuneTrainer, TrainerState

MANIFEST, STATE = "manifest.json", "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be taken up; the message names folder and reason."""


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders `checkpoint-N` of a run, the newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: -int(_NAME.fullmatch(path.name)[1]))


def check_checkpoint(folder: Path) -> None:
    """Raises `CheckpointError` if the folder is not as it was written."""
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint {folder}")
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: {MANIFEST} is missing or broken") from error
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is broken: {name} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{folder} is broken: {name} has {path.stat().st_size} bytes in place of {size}")


def find_checkpoint(output_dir: Path, name: str, warn: bool = True) -> Path:
    """The folder that `name` means: a path, or `latest` (also `true`), the newest whole one of `output_dir`.

    Broken ones are passed over, with a warning that names them.

    Raises:
        CheckpointError: if there is none, or the named one is broken.
    """
    if name.lower() not in ("latest", "true"):
        check_checkpoint(Path(name))
        return Path(name)
    for folder in list_checkpoints(output_dir):
        try:
            check_checkpoint(folder)
        except CheckpointError as error:
            if warn:
                warnings.warn(f"{error}; the one before it is taken", stacklevel=2)
        else:
            return folder
    raise CheckpointError(f"--resume_from_checkpoint {name}: there is no whole checkpoint in {output_dir}")


def rotate(output_dir: Path, limit: int | None, best_step: int | None, step: int, accelerator: Accelerator) -> None:
    """Deletes all but the newest `limit` checkpoints up to `step` and the best one.

    Those behind `step`, of a run that was taken up again from an earlier checkpoint, are the oldest.
    """
    if limit is None or not accelerator.is_main_process:
        return
    for left in output_dir.glob("checkpoint-*.old"):  # by a run that was killed while it deleted
        shutil.rmtree(left)
    folders = sorted(list_checkpoints(output_dir), key=lambda path: int(_NAME.fullmatch(path.name)[1]) > step)
    for folder in folders[limit:]:
        if best_step is None or folder.name != f"checkpoint-{best_step}":
            doomed = folder.with_name(folder.name + ".old")  # a kill while deleting leaves no half checkpoint
            folder.rename(doomed)
            shutil.rmtree(doomed)


def run_identity(trainer: "FinetuneTrainer") -> dict[str, Any]:
    """What must be the same for a run to go on: the order of its data, and what is trained."""
    return {
        "data": trainer.train_dataset.fingerprint,
        "data_seed": trainer.order.seed,
        "rows_per_step": trainer.rows_per_step,
        "trained_parameters": count_elements(p for p in trainer.unwrapped.parameters() if p.requires_grad),
        "optim": trainer.args.optim,
    }


# --- saving -----------------------------------------------------------------------------------------------------------


def save_checkpoint(trainer: "FinetuneTrainer", folder: Path) -> None:
    """Writes a checkpoint; every process calls it."""
    accelerator, rank = trainer.accelerator, trainer.accelerator.process_index
    staging = folder.with_name(folder.name + ".tmp")
    if accelerator.is_main_process:
        for left in folder.parent.glob("checkpoint-*.tmp"):  # by a run that was killed, or met a full disk
            shutil.rmtree(left)
        staging.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if is_sharded(accelerator):
        save_sharded(trainer, staging / "sharded")
    elif accelerator.is_main_process:
        save_weights(trainer.unwrapped, staging)
        torch.save(trainer.optimizer.state_dict(), staging / "optimizer.pt")
        if accelerator.scaler is not None:
            torch.save(accelerator.scaler.state_dict(), staging / "scaler.pt")
    torch.save(_random_state(), staging / f"rng_state_{rank}.pt")
    if accelerator.is_main_process:
        biases = router_biases(trainer.unwrapped)
        if biases:
            save_file({name: bias.detach().cpu().contiguous() for name, bias in biases.items()},
                      staging / "router_bias.safetensors")  # fmt: skip
        torch.save(trainer.scheduler.state_dict(), staging / "scheduler.pt")
        torch.save([callback.state_dict() for callback in trainer.callbacks], staging / "callbacks.pt")
        state = {"state": dataclasses.asdict(trainer.state), "run": run_identity(trainer)}
        (staging / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        sizes = {
            path.relative_to(staging).as_posix(): path.stat().st_size
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        }
        (staging / MANIFEST).write_text(json.dumps({"files": sizes}, indent=2), encoding="utf-8")
        _flush(staging)
        old = folder.with_name(folder.name + ".old")
        if folder.exists():  # of a run that went on from an earlier step; deleting takes longer than renaming
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        staging.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def save_weights(model: torch.nn.Module, folder: Path) -> None:
    """The adapter of a PEFT model, or the whole model."""
    model.save_pretrained(str(folder), safe_serialization=True)
    if hasattr(model, "peft_config"):
        (folder / "README.md").unlink(missing_ok=True)  # an empty form


def save_sharded(trainer: "FinetuneTrainer", folder: Path) -> None:
    """What each process has of weights and optimiser; of LoRA under FSDP2 without the weights that stay as they are."""
    accelerator, model = trainer.accelerator, trainer.model
    if not uses_fsdp2(accelerator) or not hasattr(trainer.unwrapped, "peft_config"):
        accelerator.save_state(str(folder))
        return
    state = {
        "model": get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True)),
        "optimizer": get_optimizer_state_dict(model, trainer.optimizer),
    }
    distributed_checkpoint.save(state, checkpoint_id=str(folder))


def router_biases(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The routers' correction biases, by name."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


# --- loading ----------------------------------------------------------------------------------------------------------


def load_checkpoint(trainer: "FinetuneTrainer", folder: Path, weights_only: bool = False) -> "TrainerState":
    """Puts a run back to where `folder` was written; returns the state. Every process calls it.

    Raises:
        CheckpointError: for a folder that is broken, or of a run over other data, in another order.
    """
    check_checkpoint(folder)
    saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
    for name, value in run_identity(trainer).items():
        if not weights_only and saved["run"].get(name) != value:
            raise CheckpointError(
                f"{folder} cannot be taken up: its {name} is {saved['run'].get(name)}, that of this run is {value}"
            )
    accelerator = trainer.accelerator
    if is_sharded(accelerator):
        load_sharded(trainer, folder / "sharded", weights_only)
    else:
        load_weights(trainer.unwrapped, folder)
        if not weights_only:
            trainer.optimizer.load_state_dict(_read(folder / "optimizer.pt"))
            if accelerator.scaler is not None and (folder / "scaler.pt").exists():
                accelerator.scaler.load_state_dict(_read(folder / "scaler.pt"))
    if (folder / "router_bias.safetensors").exists():
        stored = load_file(folder / "router_bias.safetensors")
        for name, bias in router_biases(trainer.unwrapped).items():
            bias.copy_(stored[name])
    if not weights_only:
        wanted = trainer.scheduler.base_lrs
        trainer.scheduler.load_state_dict(_read(folder / "scheduler.pt"))
        if trainer.args.learning_rate_is_given and trainer.scheduler.base_lrs != wanted:
            change_learning_rates(trainer, folder, wanted)
        else:  # left out, or the same: what the result's card will say
            trainer.args.learning_rate = max(trainer.scheduler.base_lrs)
        for callback, state in zip(trainer.callbacks, _read(folder / "callbacks.pt")):
            callback.load_state_dict(state)
        path = folder / f"rng_state_{accelerator.process_index}.pt"
        if path.exists():
            _set_random_state(_read(path))
        else:  # this one keeps the state of its seed, which dropout alone asks for
            warnings.warn(f"{folder} is of fewer processes: {path.name} is missing", stacklevel=2)
    return type(trainer.state)(**saved["state"])


def change_learning_rates(trainer: "FinetuneTrainer", folder: Path, peaks: list[float]) -> None:
    """Goes on with other peak rates, one for each group of the optimiser, at the same step of the schedule."""
    scheduler = trainer.scheduler
    if trainer.accelerator.is_main_process:
        before, after = max(scheduler.base_lrs), max(peaks)
        warnings.warn(f"{folder} was trained with --learning_rate {before:g}; it goes on with {after:g}", stacklevel=4)
    shares = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    scheduler.base_lrs = peaks
    scheduler._last_lr = [peak * share for peak, share in zip(peaks, shares)]
    for group, peak, rate in zip(trainer.optimizer.param_groups, peaks, scheduler._last_lr):
        group.update(initial_lr=peak, lr=rate)


def load_sharded(trainer: "FinetuneTrainer", folder: Path, weights_only: bool = False) -> None:
    """Reads what `save_sharded` wrote, and what was saved before it left anything out."""
    model, optimizer = trainer.model, trainer.optimizer
    if not (folder / ".metadata").is_file():
        trainer.accelerator.load_state(str(folder))
        return
    state = {"model": get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))}
    if not weights_only:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    distributed_checkpoint.load(state, checkpoint_id=str(folder))
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    if not weights_only:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Reads what `save_weights` wrote into a model of the same kind."""
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        weights = load_file(folder / "adapter_model.safetensors")
        result = set_peft_model_state_dict(model, weights)
        if result.unexpected_keys:
            raise CheckpointError(f"{folder} holds factors this model does not have: {result.unexpected_keys[0]}")
        return
    loaded = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path.parent} is broken: {path.name} cannot be read: {reason}") from error


def _flush(folder: Path) -> None:
    """Waits until the files are on the disk: the checkpoint before may be deleted next."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _set_random_state(state: dict[str, Any]) -> None:
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
