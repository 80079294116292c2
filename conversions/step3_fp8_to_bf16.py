"""Step3-FP8: block FP8 to bfloat16; the vision tower is bfloat16 already.

python conversions/step3_fp8_to_bf16.py stepfun-ai/step3-fp8 step3-bf16
"""

from hf_moe.conversion.quantization import plan_bf16
from hf_moe.conversion.script import run_script

if __name__ == "__main__":
    run_script(__doc__, plan_bf16, models=("step3_vl", "step3_text"))
