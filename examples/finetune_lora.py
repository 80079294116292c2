"""Fine-tune any of the models, with the options of `hf-moe finetune`, on as many processes as `accelerate` starts.

    accelerate launch examples/finetune_lora.py --model_name_or_path M --dataset_name chats.jsonl --output_dir out \\
        --use_peft --lora_r 16 --packing --bf16 --gradient_checkpointing --max_steps 500
    accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 ... examples/finetune_lora.py ...

LoRA is the default here; `--no_use_peft` trains all parameters.
"""

import sys

from hf_moe.training import finetune
from hf_moe.training.arguments import parse_arguments
from hf_moe.training.command import print_options


def main() -> None:
    argv = sys.argv[1:]
    if not argv or "--help" in argv:
        print_options()
        return
    if "--no_use_peft" in argv:
        argv = [word for word in argv if word != "--no_use_peft"]
    else:
        argv = ["--use_peft", *argv]
    try:
        args = parse_arguments(argv, "finetune_lora.py")
        finetune(args)
    except ValueError as error:
        sys.exit(f"finetune_lora.py: {error}")


if __name__ == "__main__":
    main()
