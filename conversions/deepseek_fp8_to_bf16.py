"""DeepSeek-V3, V3-Base, R1 and V3.1: block FP8 to bfloat16, the MTP layer included.

python conversions/deepseek_fp8_to_bf16.py deepseek-ai/DeepSeek-V3 DeepSeek-V3-bf16
"""

from hf_moe.conversion.quantization import plan_bf16
from hf_moe.conversion.script import run_script

if __name__ == "__main__":
    run_script(__doc__, plan_bf16, models=("deepseek_v3",))
