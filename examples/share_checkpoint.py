"""Save a checkpoint that loads with `trust_remote_code=True` where hf_moe is not installed, and check that it does.

    python examples/share_checkpoint.py SOURCE TARGET

A SOURCE in FP8 stays FP8, bit for bit; INT4 is dequantised. TARGET has upstream names, so native Transformers, vLLM and
SGLang read it too. The check runs in a process that cannot import hf_moe.
"""

import argparse
import subprocess
import sys

from transformers import AutoModelForCausalLM

import hf_moe  # noqa: F401  registers the models with the Auto classes

CHECK = """
import sys
sys.modules["hf_moe"] = None  # importing it now fails
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(f"loads without hf_moe: {type(model).__module__}.{type(model).__name__}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("target")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.source)
    model.save_pretrained(args.target)
    subprocess.run([sys.executable, "-c", CHECK, args.target], check=True)


if __name__ == "__main__":
    main()
