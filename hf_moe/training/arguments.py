"""Options of a fine-tuning run, under the names of Transformers' `TrainingArguments` and of TRL."""

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def option(default: Any, text: str, *aliases: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with a line of help for the command line."""
    metadata: dict[str, Any] = {"help": text}
    if aliases:
        metadata["aliases"] = list(aliases)
    if choices:
        metadata["choices"] = list(choices)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class FinetuneArguments:
    """Everything that decides a fine-tuning run; `finetune(arguments)` does it.

    Raises:
        ValueError: for options that contradict each other or are out of range; the message names them.
    """

    # --- model ---
    model_name_or_path: str = option("", "Folder or Hub id of the checkpoint to start from.")
    model_revision: str = option("main", "Branch, tag or commit of a Hub model.")
    trust_remote_code: bool = option(False, "Run the code that a checkpoint ships, for models hf_moe does not know.")
    dtype: str | None = option(
        None, "Of the loaded weights; left out: as stored for LoRA, float32 for full fine-tuning.", "--torch_dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    attn_implementation: str | None = option(None, "eager, sdpa, flex_attention or a flash attention.")

    # --- data ---
    dataset_name: str = option("", "JSONL, Parquet, CSV or text file, a folder of them, or a Hub dataset.")
    dataset_config: str | None = option(None, "Configuration of a Hub dataset.", "--dataset_config_name")
    dataset_split: str = option("train", "Split of a Hub dataset, or of a folder.", "--dataset_train_split")
    dataset_test_split: str | None = option(None, "Split of the same dataset to evaluate on.")
    eval_dataset_name: str | None = option(None, "Like --dataset_name, to evaluate on.")
    validation_split: float = option(0.0, "Fraction (below 1) or number of training samples put aside to evaluate on.")
    dataset_text_field: str = option("text", "Key of plain text.")
    sample_by: str = option("document", "What a sample of a text file is.", choices=("document", "paragraph", "line"))
    max_train_samples: int | None = option(None, "Take the first so many samples.")
    max_eval_samples: int | None = option(None, "Evaluate on the first so many samples.")
    max_length: int = option(1024, "Tokens of a sample, or of a packed row, at most.", "--max_seq_length")
    too_long: str | None = option(
        None, "What becomes of longer samples; left out: split for text files, error for all others.",
        choices=("error", "truncate", "drop", "split"),
    )  # fmt: skip
    packing: bool = option(False, "Fill rows of --max_length with whole samples that do not see one another.")
    assistant_only_loss: bool = option(True, "In chats, learn the assistant's turns alone.")
    completion_only_loss: bool = option(True, "With prompts, learn the completions alone.")
    chat_template_path: str | None = option(None, "Jinja file with a chat template to use, and to save.")
    add_bos_token: bool | None = option(None, "Begin text with the BOS token; left out: as the tokenizer does.")
    add_eos_token: bool = option(True, "End text and completions with the EOS token.")

    # --- output ---
    output_dir: str = option("", "Folder of the result and the checkpoints.")
    overwrite_output_dir: bool = option(False, "Start anew in a folder that holds a run.")
    merge_adapter: bool = option(False, "Also write the model with the adapter merged, to OUTPUT_DIR/merged.")
    push_to_hub: bool = option(False, "Upload the result.")
    hub_model_id: str | None = option(None, "Repository to upload to; left out: the name of the output folder.")
    hub_token: str | None = option(None, "Token for the upload; left out: the one that is logged in.")
    hub_private_repo: bool = option(False, "Make a new repository private.")

    # --- length and batches ---
    max_steps: int = option(-1, "Optimiser steps; overrides --num_train_epochs.")
    num_train_epochs: float = option(3.0, "Passes over the data.")
    per_device_train_batch_size: int = option(8, "Rows per device and micro-batch.")
    per_device_eval_batch_size: int = option(8, "Rows per device while evaluating.")
    gradient_accumulation_steps: int = option(1, "Micro-batches per optimiser step.")
    seed: int = option(42, "Of the adapter's initial weights, dropout and, without --data_seed, the order of the data.")
    data_seed: int | None = option(None, "Of the order of the data.")
    dataloader_num_workers: int = option(0, "Processes that put batches together.")

    # --- optimiser ---
    optim: str = option(
        "adamw_torch", "Optimiser; muon updates matrices, muonclip with QK-Clip, and leaves the rest to AdamW.",
        choices=("adamw_torch", "adamw_torch_fused", "adamw", "muon", "muonclip"),
    )  # fmt: skip
    learning_rate: float | None = option(None, "Peak rate; left out: 2e-4 for LoRA, 2e-5 for full fine-tuning.")
    lr_scheduler_type: str = option("linear", "Any schedule of Transformers, as cosine or constant_with_warmup.")
    lr_scheduler_kwargs: str | None = option(None, "More arguments of the schedule, as JSON.")
    warmup_steps: float = option(0, "Steps of warm-up; below 1: a fraction of all steps.")
    warmup_ratio: float = option(0.0, "Warm-up as a fraction of all steps.")
    weight_decay: float = option(0.0, "Of matrices; norms, biases and embeddings keep their scale.")
    adam_beta1: float = option(0.9, "Decay of AdamW's mean.")
    adam_beta2: float = option(0.999, "Decay of AdamW's variance.")
    adam_epsilon: float = option(1e-8, "Of AdamW.")
    muon_momentum: float = option(0.95, "Momentum of Muon.")
    max_grad_norm: float = option(1.0, "Clip gradients to this norm; 0: never.")

    # --- precision and memory ---
    bf16: bool = option(False, "Compute in bfloat16 (autocast).")
    fp8: str = option(
        "no", "Full fine-tuning with FP8 products, on GPUs that have them; simulate: the same rounding anywhere.",
        choices=("no", "yes", "simulate"),
    )  # fmt: skip
    gradient_checkpointing: bool = option(False, "Recompute layers in the backward pass, with the same routes.")
    use_cpu: bool = option(False, "Stay on the CPU.")

    # --- log, evaluation, checkpoints ---
    logging_steps: int = option(10, "Log every so many steps.")
    report_to: list[str] = option([], "tensorboard, wandb, ... (anything Accelerate tracks with), or none.")
    logging_dir: str | None = option(None, "Folder of the trackers; left out: OUTPUT_DIR/runs.")
    run_name: str | None = option(None, "Name of the run in the trackers.")
    disable_tqdm: bool = option(False, "No progress bar.")
    eval_strategy: str | None = option(
        None, "When to evaluate; left out: steps if there is data for it.", choices=("no", "steps", "epoch")
    )
    eval_steps: int | None = option(None, "Evaluate every so many steps; left out: as --logging_steps.")
    eval_on_start: bool = option(False, "Evaluate before the first step.")
    early_stopping_patience: int | None = option(None, "Stop after so many evaluations without progress.")
    early_stopping_threshold: float = option(0.0, "How much lower the loss must be to count as progress.")
    load_best_model_at_end: bool = option(False, "End with the checkpoint of the lowest evaluation loss.")
    save_strategy: str = option("steps", "When to save checkpoints.", choices=("no", "steps", "epoch"))
    save_steps: int = option(500, "Save every so many steps.")
    save_total_limit: int | None = option(None, "Keep the newest so many checkpoints (and the best).")
    resume_from_checkpoint: str | None = option(None, "A checkpoint's folder, or `latest`.")
    ddp_find_unused_parameters: bool | None = option(None, "Passed to DistributedDataParallel.")
    ddp_timeout: int = option(7200, "Seconds that processes wait for one that reads or writes weights.")

    # --- LoRA ---
    use_peft: bool = option(False, "Train LoRA factors; left out: all parameters.")
    lora_r: int = option(16, "Rank.")
    lora_alpha: int = option(32, "Scale: alpha / r, with rsLoRA alpha / sqrt(r).")
    lora_dropout: float = option(0.0, "Dropout of the factors' input.")
    lora_target_modules: list[str] | None = option(
        None,
        "Linear modules by the end of their names, or all-linear; left out with --lora_target_parameters: attention.",
    )
    lora_target_parameters: list[str] | None = option(
        None, "Stacked parameters by the end of their name; left out with --lora_target_modules: the experts."
    )
    lora_modules_to_save: list[str] | None = option(None, "Modules to train and save whole.")
    lora_mtp: str = option(
        "along", "Factors in the MTP layers: along with the others, none, or there alone (with their eh_proj).",
        choices=("along", "none", "only"),
    )  # fmt: skip
    use_rslora: bool = option(False, "Scale by alpha / sqrt(r).")

    # --- MTP ---
    mtp: str = option(
        "train", "Train the MTP layers along, freeze them (their loss still moves the rest), or skip their loss.",
        choices=("train", "freeze", "skip"),
    )  # fmt: skip
    mtp_loss_weight: float | None = option(None, "Weight of the MTP losses; left out: as configured (0.3).")

    # --- router and attention ---
    router_bias_update_rate: float | None = option(
        None, "Step of the correction biases, 0 freezes them; left out: as published, for LoRA 0."
    )
    router_sequence_loss: float | None = option(None, "Coefficient of DeepSeek-V3's balance loss; likewise.")
    router_expert_loss: float | None = option(None, "Coefficient of DeepSeek-V2's expert-level loss; likewise.")
    router_device_loss: float | None = option(None, "Coefficient of the device-level loss; likewise.")
    router_communication_loss: float | None = option(None, "Coefficient of the communication loss; likewise.")
    router_num_devices: int | None = option(None, "Devices that the last two speak of; left out: the router's groups.")
    router_real_experts_per_token: float | None = option(None, "LongCat: real experts a token gets on average.")
    qk_clip_threshold: float | None = option(None, "QK-Clip of latent attention; left out: 100 with muonclip.")

    def __post_init__(self):
        for name in ("model_name_or_path", "dataset_name", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is required")
        for entry in dataclasses.fields(self):
            choices, value = entry.metadata.get("choices"), getattr(self, entry.name)
            if choices and value is not None and value not in choices:
                raise ValueError(f"--{entry.name} must be one of {', '.join(choices)}, got {value!r}")
        self._check_ranges()
        for name in ("report_to", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save"):
            if isinstance(getattr(self, name), str):  # one name stands for a list of one
                setattr(self, name, [getattr(self, name)])
        self.report_to = [] if self.report_to == ["none"] else list(self.report_to)
        self._check_schedule()
        if isinstance(self.lr_scheduler_kwargs, str):
            self.lr_scheduler_kwargs = _parse_object("lr_scheduler_kwargs", self.lr_scheduler_kwargs)
        self.learning_rate_is_given = self.learning_rate is not None  # then a run that goes on takes it, too
        if not self.learning_rate_is_given:
            self.learning_rate = 2e-4 if self.use_peft else 2e-5
        if self.dtype is None:
            self.dtype = "auto" if self.use_peft else "float32"
        has_eval = bool(self.eval_dataset_name or self.dataset_test_split or self.validation_split)
        if self.eval_strategy is None:
            self.eval_strategy = "steps" if has_eval else "no"
        if self.eval_strategy != "no" and not has_eval:
            raise ValueError(
                "--eval_strategy needs data: give --eval_dataset_name, --dataset_test_split or --validation_split"
            )
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise ValueError("--early_stopping_patience needs evaluation: see --eval_strategy")
        if self.load_best_model_at_end and (self.eval_strategy == "no" or self.save_strategy == "no"):
            raise ValueError("--load_best_model_at_end needs evaluation and checkpoints")
        if self.fp8 != "no" and self.use_peft:
            raise ValueError("--fp8 is for training all parameters; LoRA takes FP8 checkpoints as they are")
        if self.merge_adapter and not self.use_peft:
            raise ValueError("--merge_adapter needs --use_peft")
        if self.eval_steps is None:
            self.eval_steps = self.logging_steps

    def _check_ranges(self) -> None:
        at_least_one = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
                        "logging_steps", "save_steps", "lora_r", "lora_alpha")  # fmt: skip
        for name in (*at_least_one, "eval_steps", "save_total_limit", "max_train_samples", "max_eval_samples",
                     "early_stopping_patience"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        not_negative = ("learning_rate", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm",
                        "validation_split", "mtp_loss_weight", "qk_clip_threshold", "early_stopping_threshold",
                        "dataloader_num_workers")  # fmt: skip
        for name in not_negative:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"--{name} must not be negative, got {value}")
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1 << 32:
                raise ValueError(f"--{name} must be at least 0 and below 2**32, got {value}")
        if self.max_length < 2:
            raise ValueError(f"--max_length must be at least 2, got {self.max_length}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout must be at least 0 and below 1, got {self.lora_dropout}")
        if self.max_steps < 1 and not self.num_train_epochs > 0:
            raise ValueError("--max_steps or --num_train_epochs must be positive")
        if self.warmup_ratio > 1:
            raise ValueError(f"--warmup_ratio must be at most 1, got {self.warmup_ratio}")

    def _check_schedule(self) -> None:
        from transformers.trainer_utils import SchedulerType

        # Those two are stepped with a loss, by the trainer of Transformers alone.
        known = [str(kind.value) for kind in SchedulerType if kind.value not in ("reduce_lr_on_plateau", "greedy")]
        if self.lr_scheduler_type not in known:
            raise ValueError(f"--lr_scheduler_type must be one of {', '.join(known)}, got {self.lr_scheduler_type!r}")

    def warmup(self, total_steps: int) -> int:
        """Steps of warm-up in a run of `total_steps`."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        fraction = self.warmup_steps or self.warmup_ratio
        return -int(-fraction * total_steps // 1)  # rounded up

    def to_dict(self) -> dict[str, Any]:
        """All options as plain values; the token is left out."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "hub_token"}


def _parse_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"--{name} must be a JSON object, got {text}")
    return value


def parse_arguments(argv: list[str], program: str = "hf-moe finetune") -> FinetuneArguments:
    """Reads command-line options, spelled with hyphens or underscores; `--config FILE` (JSON or YAML) comes first.

    Raises:
        ValueError: for unknown options and values that do not fit; the message names them.
        SystemExit: with status 0, after `--help`.
    """
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str):
            raise ValueError(message)

    parser = Parser(FinetuneArguments, prog=program, description="Fine-tune a model.", allow_abbrev=False)
    for action in parser._actions:
        if action.dest in ("add_bos_token", "ddp_find_unused_parameters"):  # yes, no, or left to others
            action.nargs, action.const = "?", True
    parser.add_argument("--config", help="JSON or YAML file with options; those of the command line win.")
    defaults: dict[str, Any] = {}
    for at, word in enumerate(argv):
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or (argv[at + 1] if at + 1 < len(argv) else "")
            defaults = _read_config(path)
    parser.set_defaults(**defaults)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        spelled = unknown[0].split("=")[0]
        close = difflib.get_close_matches(spelled, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"no such option: {unknown[0]}{hint}")
    fields = {name: value for name, value in vars(values).items() if name != "config"}
    return FinetuneArguments(**fields)


def _read_config(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"--config: no file {path!r}")
    import yaml  # reads JSON, too

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected names and values")
    known = {entry.name: str(entry.type) for entry in dataclasses.fields(FinetuneArguments)}
    unknown = sorted(map(str, set(values) - set(known)))
    if unknown:
        raise ValueError(f"--config {path}: no such option: {unknown[0]}")
    return {
        name: _as_words(value, known[name], f"--config {path}: {name}")
        for name, value in values.items()
        if value is not None  # left out
    }


def _as_words(value: Any, kind: str, where: str) -> Any:
    """A value of a file as the words of a command line would give it, so that both are checked alike."""
    if "list[" in kind:
        values = value if isinstance(value, list) else [value]
        if any(isinstance(entry, (list, dict)) for entry in values):
            raise ValueError(f"{where} must be a list of words, got {value!r}")
        return [str(entry) for entry in values]
    if isinstance(value, dict):
        value = json.dumps(value)
    if isinstance(value, (list, dict)):
        raise ValueError(f"{where} must be one value, got {value!r}")
    return value if isinstance(value, bool) and "bool" in kind else str(value)
