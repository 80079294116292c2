"""What a run leaves behind: adapter, merged or full model, with tokenizer, card and curve; and its upload."""

import dataclasses
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData

from ..hub.card import CardOptions, Checkpoint, Training, read_checkpoint, render_card
from ..register import FAMILIES
from .arguments import FinetuneArguments
from .charts import draw_losses
from .checkpoints import is_sharded
from .partition import gathered
from .trainer import FinetuneTrainer, TrainResult, base_model

CHART = "loss.png"
MERGED = "merged"
# What says what is in a folder: an adapter beside a whole model, or shards of two models, would be read as one.
WEIGHTS = ("config.json", "model*.safetensors", "model.safetensors.index.json", "adapter_*", MERGED)


def write_result(trainer: FinetuneTrainer, result: TrainResult) -> Path:
    """Writes the result to `output_dir`; every process calls it. Files appear under their names when complete.

    Returns the folder.
    """
    args, accelerator, folder = trainer.args, trainer.accelerator, Path(trainer.args.output_dir)
    staging = folder / ".result.tmp"
    model = trainer.unwrapped
    state = whole_state(trainer) if is_sharded(accelerator) else None
    if accelerator.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        extra = {} if state is None else {"state_dict": state}
        model.save_pretrained(str(staging), **extra)
        if trainer.tokenizer is not None:
            trainer.tokenizer.save_pretrained(str(staging))
        if importlib.util.find_spec("matplotlib") is not None and any("loss" in line for line in result.log):
            title = f"{_public_name(args.model_name_or_path)} on {_public_name(args.dataset_name)}"
            draw_losses(result.log, staging / CHART, title)
        write_card(staging / "README.md", trainer, result)
        put_in_place(staging, folder, anew=args.overwrite_output_dir and not args.resume_from_checkpoint)
        if args.merge_adapter:
            write_merged(trainer, result, folder / MERGED)
    accelerator.wait_for_everyone()
    return folder


def put_in_place(staging: Path, folder: Path, anew: bool) -> None:
    """Moves a complete result from `staging`; `anew`: what is left of the weights of another run goes."""
    names = {path.name for path in staging.iterdir()}
    for pattern in WEIGHTS if anew else ():
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in names:
                path.unlink()
    for path in sorted(staging.iterdir()):
        if path.is_dir():  # of chat templates; a folder takes no other one's place
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)
    staging.rmdir()


def whole_state(trainer: FinetuneTrainer) -> dict[str, torch.Tensor] | None:
    """What is saved of a sharded model, on the main process; every process calls it.

    Of a model with an adapter that is what was trained, one tensor at a time: the rest may fit into no process.
    """
    accelerator = trainer.accelerator
    if not trainer.args.use_peft:
        return accelerator.get_state_dict(trainer.model)
    state = {}
    for name, parameter in trainer.unwrapped.named_parameters():
        if parameter.requires_grad:
            with gathered(parameter) as whole:
                if accelerator.is_main_process:
                    state[name] = whole.detach().to("cpu", copy=True)
    return state


def write_merged(trainer: FinetuneTrainer, result: TrainResult, folder: Path) -> None:
    """Merges the adapter into the model, for good, and saves that beside the adapter."""
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    merged = trainer.unwrapped.merge_and_unload()
    merged.save_pretrained(str(staging))
    if trainer.tokenizer is not None:
        trainer.tokenizer.save_pretrained(str(staging))
    write_card(staging / "README.md", trainer, result, merged=True)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def write_card(path: Path, trainer: FinetuneTrainer, result: TrainResult, merged: bool = False) -> None:
    """A model card beside what was saved: where the model comes from, what was trained on what, and what came of it."""
    args, model = trainer.args, base_model(trainer.unwrapped)
    base, dataset = _public_name(args.model_name_or_path), _public_name(args.dataset_name)
    adapter = args.use_peft and not merged
    report, datasets = training_report(trainer, result, merged), (args.dataset_name,)
    training = Training(
        report=report,
        origin=f"Trained on {dataset}.",
        datasets=datasets if _is_hub_id(args.dataset_name) else (),
        adapter=adapter,
    )
    address = args.hub_model_id or "path/to/this/folder"
    title = f"{'LoRA adapter of' if adapter else 'Fine-tuned from'} {base}"
    if model.config.model_type not in FAMILIES:
        path.write_text(_plain_card(title, training, address), encoding="utf-8")
        return
    if adapter:
        config = json.loads(model.config.to_json_string(use_diff=False))
        checkpoint = Checkpoint(base, address, config, frozenset(), code=False)
    else:
        checkpoint = dataclasses.replace(read_checkpoint(path.parent), address=address)
    # A Hub id has a slash; a folder of some machine says nothing to others.
    release = args.model_name_or_path if _is_hub_id(args.model_name_or_path) and "/" in base else None
    path.write_text(render_card(checkpoint, CardOptions(release, title=title), training), encoding="utf-8")


def _plain_card(title: str, training: Training, address: str) -> str:
    """The card of a model of another family, which brings its own code."""
    data = ModelCardData(
        datasets=list(training.datasets) or None,
        library_name="peft" if training.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["hf-moe", *(["lora"] if training.adapter else [])],
    )
    body = f"# {title}\n\n{training.origin} To load from `{address}`.\n\n## Training\n\n{training.report}\n"
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def training_report(trainer: FinetuneTrainer, result: TrainResult, merged: bool = False) -> str:
    """What was trained how, and the losses that were measured, as a table; and the picture of them."""
    args, data = trainer.args, trainer.train_dataset
    rows: list[tuple[str, Any]] = [
        ("steps", f"{result.step:,} of {trainer.rows_per_step} rows"),
        (
            "samples",
            f"{data.num_samples:,}, {data.num_targets:,} tokens to learn" + (", packed" if args.packing else ""),
        ),
        ("longest row", args.max_length),
        ("optimiser", f"{args.optim}, rate {args.learning_rate:g}, {args.lr_scheduler_type}"),
        ("clipped at", args.max_grad_norm or "never"),
        ("seed", args.seed),
    ]
    if args.use_peft:
        scale = "alpha / sqrt(r)" if args.use_rslora else "alpha / r"
        rows.append(("LoRA", f"r {args.lora_r}, alpha {args.lora_alpha} ({scale}), dropout {args.lora_dropout:g}"))
    weight = getattr(base_model(trainer.unwrapped).config, "mtp_loss_weight", None)
    if weight is not None:
        rows.append(("MTP", args.mtp if args.mtp == "skip" else f"{args.mtp}, weight {weight:g}"))
    evaluations = [line for line in result.log if "eval_loss" in line]
    if evaluations:
        rows.append(("held-out loss, first", f"{evaluations[0]['eval_loss']:.4f} at step {evaluations[0]['step']}"))
        best = min(evaluations, key=lambda line: line["eval_loss"])
        rows.append(("held-out loss, best", f"{best['eval_loss']:.4f} at step {best['step']}"))
        rows.append(("held-out loss, last", f"{evaluations[-1]['eval_loss']:.4f} at step {evaluations[-1]['step']}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    chart = "" if merged else f"\n\n![losses]({CHART})"
    return f"| | |\n|---|---|\n{table}{chart}"


def _is_hub_id(name: str) -> bool:
    return not Path(name).exists() and name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def _public_name(name: str) -> str:
    return name if _is_hub_id(name) else Path(name).resolve().name


def make_repository(args: FinetuneArguments) -> str:
    """The repository to upload to, made if it is not there; its whole name. Before the training: a token that is wrong
    or missing is better known then."""
    from huggingface_hub import HfApi

    name = args.hub_model_id or Path(args.output_dir).resolve().name
    api = HfApi(token=args.hub_token)
    return api.create_repo(name, private=args.hub_private_repo or None, exist_ok=True).repo_id


def push(args: FinetuneArguments, repository: str) -> str:
    """Uploads the result, without checkpoints and trackers; returns the address of the commit."""
    from huggingface_hub import HfApi

    ignored = ["checkpoint-*", "checkpoint-*/**", "runs/**", "*.tmp", "*.tmp/**"]
    folder, trackers = Path(args.output_dir).resolve(), Path(args.logging_dir or "runs").resolve()
    if trackers.is_relative_to(folder):
        ignored.append(f"{trackers.relative_to(folder).as_posix()}/**")
    commit = HfApi(token=args.hub_token).upload_folder(
        repo_id=repository,
        folder_path=args.output_dir,
        commit_message="Fine-tuned with hf_moe",
        ignore_patterns=ignored,
    )
    return str(commit)
