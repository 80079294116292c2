"""DeepSeek-V3.1: bfloat16 to block FP8 as released, whose scales are powers of two.

python conversions/deepseek_bf16_to_fp8_ue8m0.py DeepSeek-V3.1-bf16 DeepSeek-V3.1-fp8
"""

from hf_moe.conversion.quantization import plan_fp8_ue8m0
from hf_moe.conversion.script import run_script

if __name__ == "__main__":
    run_script(__doc__, plan_fp8_ue8m0, models=("deepseek_v3",))
