"""Fine-tune any of the models, with the options of `hf-moe finetune`, on as many processes as `accelerate` starts.

    accelerate launch examples/finetune_lora.py --model_name_or_path M --dataset_name chats.jsonl --output_dir out \\
        --use_peft --lora_r 16 --packing --bf16 --gradient_checkpointing --max_steps 500
    accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 ... examples/finetune_lora.py ...

LoRA is the default here; `--no_use_peft` trains all parameters.
"""

import sys

from hf_moe.training.command import run_finetune


def main() -> None:
    words = sys.argv[1:]
    if "--no_use_peft" in words:
        words.remove("--no_use_peft")
    elif words:
        words.insert(0, "--use_peft")
    try:
        run_finetune(words)
    except ValueError as error:
        sys.exit(f"finetune_lora.py: {error}")


if __name__ == "__main__":
    main()
