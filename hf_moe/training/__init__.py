"""Fine-tuning: data, a training loop on Accelerate, checkpoints, LoRA by PEFT.

from hf_moe.training import FinetuneArguments, finetune

finetune(FinetuneArguments(model_name_or_path="...", dataset_name="chats.jsonl", output_dir="out", use_peft=True))
"""

from .arguments import FinetuneArguments

__all__ = ["FinetuneArguments", "FinetuneTrainer", "finetune"]


def __getattr__(name: str):
    # The loop imports Accelerate and Transformers' models: later than the options.
    if name == "finetune":
        from .run import finetune

        return finetune
    if name == "FinetuneTrainer":
        from .trainer import FinetuneTrainer

        return FinetuneTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
