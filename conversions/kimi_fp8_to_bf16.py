"""Kimi-K2 Base and Instruct: block FP8 to bfloat16.

python conversions/kimi_fp8_to_bf16.py moonshotai/Kimi-K2-Instruct Kimi-K2-bf16
"""

from hf_moe.conversion.quantization import plan_bf16
from hf_moe.conversion.script import run_script

if __name__ == "__main__":
    run_script(__doc__, plan_bf16, models=("kimi_k2",))
