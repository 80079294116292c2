"""Block FP8 or packed INT4 checkpoint to bfloat16, MTP layers included.

    python conversions/dequantize.py DeepSeek-V3 DeepSeek-V3-bf16
    python conversions/dequantize.py Kimi-K2-Thinking Kimi-K2-Thinking-bf16

Reads tensor by tensor into the model, so that memory must hold the bfloat16 model once. Tokenizer files are copied.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import hf_moe  # noqa: F401  registers the models with the Auto classes

CARRIED = ("tokenizer*", "*.tiktoken", "vocab*", "merges.txt", "special_tokens_map.json", "chat_template*", "LICENSE*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--max-shard-size", default="5GB")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.source, dtype=getattr(torch, args.dtype))
    model.save_pretrained(args.target, max_shard_size=args.max_shard_size)
    for pattern in CARRIED:
        for path in args.source.glob(pattern):
            shutil.copy2(path, args.target / path.name)


if __name__ == "__main__":
    main()
