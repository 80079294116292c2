"""A fine-tuning run from options to files: `finetune(arguments)`."""

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf_moe  # noqa: F401  registers the models

from .adapters import apply_lora, estimate_memory
from .arguments import FinetuneArguments
from .callbacks import Callback
from .checkpoints import find_checkpoint, is_sharded, list_checkpoints
from .data import TokenRows, load_rows
from .distributed import reads_once
from .fp8_training import disable_fp8_training, enable_fp8_training
from .lora import trained_table
from .output import make_repository, push, write_result
from .partition import count_elements
from .router_callbacks import balance_callbacks
from .sources import DataError
from .trainer import FinetuneTrainer, TrainResult, make_accelerator, print_on_main


@dataclass
class FinetuneResult:
    """What `finetune` returns: the folder, the model in memory, and what was measured."""

    output_dir: Path
    model: torch.nn.Module
    tokenizer: object
    training: TrainResult
    trainer: FinetuneTrainer
    trained_parameters: int
    commit: str | None = None


def finetune(args: FinetuneArguments, callbacks: Sequence[Callback] = ()) -> FinetuneResult:
    """Reads the data, then the model; trains; writes the result.

    Raises:
        ValueError: for options and data that cannot be used (`DataError` names file and line), before the model is
            loaded; for LoRA targets that match nothing.
        CheckpointError: for a checkpoint that cannot be taken up.
        FloatingPointError: when the loss is no longer a number.
    """
    if args.use_peft and importlib.util.find_spec("peft") is None:
        raise ImportError("LoRA needs peft: pip install 'hf-moe[train]'")
    check_output_dir(args)
    accelerator = make_accelerator(args)
    if args.merge_adapter and is_sharded(accelerator):
        raise ValueError(
            "--merge_adapter needs the whole model in one process, which FSDP and DeepSpeed do not have: leave it out, "
            "and merge the adapter afterwards with `hf-moe merge`"
        )
    tokenizer = load_tokenizer(args)
    check_length(args)
    train, held_out = load_rows(tokenizer, args, accelerator)
    print_on_main(accelerator, describe("train", train), *([describe("held out", held_out)] if held_out else []))
    if accelerator.is_main_process and not args.resume_from_checkpoint:
        for folder in list_checkpoints(Path(args.output_dir)):  # there are some with --overwrite_output_dir alone
            shutil.rmtree(folder)
    uploads = args.push_to_hub and accelerator.is_main_process
    repository = make_repository(args) if uploads else ""
    torch.manual_seed(args.seed)  # before the factors are drawn
    # The others get the weights of the main process when FSDP2 has cut them.
    model = load_model(args, empty=reads_once(accelerator) and not accelerator.is_main_process)
    if args.use_peft:
        model = apply_lora(model, args)
    elif any(p.is_floating_point() and p.dtype.itemsize < 2 for p in model.parameters()):
        raise ValueError("FP8 weights cannot be trained: pass --use_peft, or start from a bfloat16 checkpoint")
    if args.fp8 != "no":
        enable_fp8_training(model, simulate=args.fp8 == "simulate", device=accelerator.device)
    callbacks = [*balance_callbacks(model, args), *callbacks]
    trainer = FinetuneTrainer(model, args, train, held_out, tokenizer, callbacks, accelerator)
    shards = accelerator.num_processes if is_sharded(accelerator) else 1
    print_on_main(accelerator, trained_table(model), estimate_memory(model, shards=shards))
    count = count_elements(parameter for parameter in model.parameters() if parameter.requires_grad)
    result = trainer.train()
    if args.fp8 != "no":
        disable_fp8_training(model)
    folder = write_result(trainer, result)
    print_on_main(accelerator, f"written to {folder}")
    commit = push(args, repository) if uploads else None
    if commit:
        print_on_main(accelerator, f"uploaded: {commit}")
    return FinetuneResult(folder, trainer.unwrapped, tokenizer, result, trainer, count, commit)


def leave_process_group() -> None:
    """Ends communication with other processes, as the last thing a script does."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_output_dir(args: FinetuneArguments) -> None:
    """Raises `ValueError` where a run would overwrite another, or has nothing to go on from."""
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file")
    if args.resume_from_checkpoint:
        find_checkpoint(folder, args.resume_from_checkpoint)
        return
    finished = [name for name in ("adapter_config.json", "config.json") if (folder / name).exists()]
    if not args.overwrite_output_dir and (finished or list_checkpoints(folder)):
        raise ValueError(
            f"--output_dir {folder} holds a run: pass --resume_from_checkpoint latest to go on, "
            "--overwrite_output_dir to start anew, or name another folder"
        )
    if folder.resolve() == Path(args.model_name_or_path).resolve():
        raise ValueError("--output_dir is the folder of the model to start from")


def load_tokenizer(args: FinetuneArguments):
    """The model's tokenizer, with the chat template that the options name."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            args.model_name_or_path, revision=args.model_revision, trust_remote_code=args.trust_remote_code
        )
    except OSError as error:
        raise OSError(f"--model_name_or_path {args.model_name_or_path}: no tokenizer can be read: {error}") from error
    if args.chat_template_path:
        path = Path(args.chat_template_path)
        if not path.is_file():
            raise DataError(f"--chat_template_path: no file {path}")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def check_length(args: FinetuneArguments) -> None:
    """Raises `ValueError` for rows that the model has no positions for."""
    config = AutoConfig.from_pretrained(
        args.model_name_or_path, revision=args.model_revision, trust_remote_code=args.trust_remote_code
    )
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and args.max_length > limit:
        raise ValueError(f"--max_length {args.max_length} is more than the model's {limit} positions")


def load_model(args: FinetuneArguments, empty: bool = False) -> torch.nn.Module:
    """The causal language model, on the CPU or where `accelerate` will move it.

    `empty`: nothing of its weights is read; their memory is not touched, and holds whatever it does.
    """
    options = {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
    if empty:
        options["device_map"] = {"": "meta"}
    model = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path,
        revision=args.model_revision,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        **options,
    )
    if empty:
        model.to_empty(device="cpu").tie_weights()
    return model


def describe(name: str, data: TokenRows) -> str:
    """A line on rows of data."""
    text = f"{name}: {data.num_samples:,} samples, {data.num_tokens:,} tokens, {data.num_targets:,} to learn"
    if data.packed:
        text += f", packed into {len(data):,} rows"
    return text + "".join(f", {count:,} {what}" for what, count in sorted(data.dropped.items()))
