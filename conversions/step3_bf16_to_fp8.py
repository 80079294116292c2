"""Step3: the text model's weights to block FP8 as released, stacked experts included.

python conversions/step3_bf16_to_fp8.py stepfun-ai/step3 step3-fp8
"""

from hf_moe.conversion.quantization import plan_fp8
from hf_moe.conversion.script import run_script

if __name__ == "__main__":
    run_script(__doc__, plan_fp8, models=("step3_vl", "step3_text"))
