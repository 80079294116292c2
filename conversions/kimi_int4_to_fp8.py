"""Kimi-K2-Thinking: to the block FP8 of Kimi-K2-Instruct, its attention, dense and shared experts too.

python conversions/kimi_int4_to_fp8.py moonshotai/Kimi-K2-Thinking Kimi-K2-Thinking-fp8
"""

from hf_moe.conversion.quantization import plan_fp8
from hf_moe.conversion.script import run_script

if __name__ == "__main__":
    run_script(__doc__, plan_fp8, models=("kimi_k2",))
