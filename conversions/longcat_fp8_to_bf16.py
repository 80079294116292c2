"""LongCat-Flash FP8 releases: block FP8 to bfloat16; the router stays float32.

python conversions/longcat_fp8_to_bf16.py meituan-longcat/LongCat-Flash-Chat-FP8 LongCat-Flash-Chat-bf16
"""

from hf_moe.conversion.quantization import plan_bf16
from hf_moe.conversion.script import run_script

if __name__ == "__main__":
    run_script(__doc__, plan_bf16, models=("longcat_flash", "longcat_flash_ngram", "longcat", "longcat_next"))
