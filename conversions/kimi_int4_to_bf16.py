"""Kimi-K2-Thinking: packed INT4 experts to bfloat16.

python conversions/kimi_int4_to_bf16.py moonshotai/Kimi-K2-Thinking Kimi-K2-Thinking-bf16
"""

from hf_moe.conversion.quantization import plan_bf16
from hf_moe.conversion.script import run_script

if __name__ == "__main__":
    run_script(__doc__, plan_bf16, models=("kimi_k2",))
