"""Text from any checkpoint of the supported families: an upstream folder, one of ours, or a Hub id.

python examples/generate.py                                  # the demo model that the package ships
python examples/generate.py path/to/DeepSeek-V3 --prompt "The capital of France is" --max-new-tokens 32 --use-mtp
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import hf_moe  # noqa: F401  registers the models with the Auto classes
from hf_moe.demo import DEMO_MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default=str(DEMO_MODEL))
    parser.add_argument("--prompt", default="def read_lines(path):")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32; of what is not FP8")
    parser.add_argument("--device-map", default="auto", help="where the layers go; auto fills GPUs, then memory")
    parser.add_argument("--use-mtp", action="store_true", help="speculate with the checkpoint's MTP layers")
    args = parser.parse_args()

    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=dtype, device_map=args.device_map)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "streamer": streamer}
    output = model.generate(**inputs, **options, use_mtp=args.use_mtp, return_dict_in_generate=True)
    if args.use_mtp:
        print(output.speculation)


if __name__ == "__main__":
    main()
