"""Kimi-K2: bfloat16 to block FP8 as released.

python conversions/kimi_bf16_to_fp8.py Kimi-K2-bf16 Kimi-K2-fp8
"""

from hf_moe.conversion.quantization import plan_fp8
from hf_moe.conversion.script import run_script

if __name__ == "__main__":
    run_script(__doc__, plan_fp8, models=("kimi_k2",))
