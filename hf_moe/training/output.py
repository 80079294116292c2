"""What a run leaves behind: adapter, merged or full model, with tokenizer, card and curve; and its upload."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from .arguments import FinetuneArguments
from .charts import draw_losses
from .checkpoints import is_sharded
from .trainer import FinetuneTrainer, TrainResult, base_model

CHART = "loss.png"
MERGED = "merged"


def write_result(trainer: FinetuneTrainer, result: TrainResult) -> Path:
    """Writes the result to `output_dir`; every process calls it. Files appear under their names when complete.

    Returns the folder.
    """
    args, accelerator, folder = trainer.args, trainer.accelerator, Path(trainer.args.output_dir)
    staging = folder / ".result.tmp"
    model = trainer.unwrapped
    state = None
    if is_sharded(accelerator):
        state = accelerator.get_state_dict(trainer.model)
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
        for path in sorted(staging.iterdir()):
            os.replace(path, folder / path.name)
        staging.rmdir()
        if args.merge_adapter:
            write_merged(trainer, result, folder / MERGED)
    accelerator.wait_for_everyone()
    return folder


def write_merged(trainer: FinetuneTrainer, result: TrainResult, folder: Path) -> None:
    """Merges the adapter into the model, for good, and saves that beside the adapter."""
    if is_sharded(trainer.accelerator):
        raise ValueError("--merge_adapter needs the whole model on one process: merge the adapter afterwards")
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
    """A model card: where the model comes from, what was trained on what, and the losses that were measured."""
    from huggingface_hub import ModelCard, ModelCardData

    args = trainer.args
    adapter = args.use_peft and not merged
    config = base_model(trainer.unwrapped).config
    metadata = ModelCardData(
        # A Hub id has at most one slash; a folder of some machine says nothing to others.
        base_model=args.model_name_or_path if _is_hub_id(args.model_name_or_path) else None,
        datasets=[args.dataset_name] if _is_hub_id(args.dataset_name) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[str(config.model_type), "hf-moe", *(["lora"] if args.use_peft else []), "text-generation"],
    )
    card = f"---\n{metadata.to_yaml()}\n---\n\n" + card_text(trainer, result, merged)
    ModelCard(card, ignore_metadata_errors=True).save(path)


def card_text(trainer: FinetuneTrainer, result: TrainResult, merged: bool = False) -> str:
    """The body of the card."""
    args, data = trainer.args, trainer.train_dataset
    base, dataset = _public_name(args.model_name_or_path), _public_name(args.dataset_name)
    what = "LoRA adapter of" if args.use_peft and not merged else "Fine-tuned from"
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
        rows.append(("MTP", f"{args.mtp}, weight {weight:g}"))
    evaluations = [line for line in result.log if "eval_loss" in line]
    if evaluations:
        rows.append(("held-out loss, first", f"{evaluations[0]['eval_loss']:.4f} at step {evaluations[0]['step']}"))
        best = min(evaluations, key=lambda line: line["eval_loss"])
        rows.append(("held-out loss, best", f"{best['eval_loss']:.4f} at step {best['step']}"))
        rows.append(("held-out loss, last", f"{evaluations[-1]['eval_loss']:.4f} at step {evaluations[-1]['step']}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    usage = _USAGE_ADAPTER if args.use_peft and not merged else _USAGE_MODEL
    chart = "" if merged else f"\n![losses]({CHART})\n"
    return f"# {what} {base}\n\nTrained on {dataset}.\n\n{usage}\n| | |\n|---|---|\n{table}\n{chart}"


_USAGE_ADAPTER = """```python
import hf_moe
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""
_USAGE_MODEL = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
```
"""


def _is_hub_id(name: str) -> bool:
    return not Path(name).exists() and name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def _public_name(name: str) -> str:
    return name if _is_hub_id(name) else Path(name).resolve().name


def push(args: FinetuneArguments) -> str:
    """Uploads the result, without checkpoints and trackers; returns the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=args.hub_token)
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    repository = api.create_repo(name, private=args.hub_private_repo or None, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repository,
        folder_path=args.output_dir,
        commit_message="Fine-tuned with hf_moe",
        ignore_patterns=["checkpoint-*", "checkpoint-*/**", "runs/**", "*.tmp", "*.tmp/**"],
    )
    return str(commit)
