"""LongCat-Flash: bfloat16 to block FP8 as released; the router stays float32, the n-gram tables bfloat16.

python conversions/longcat_bf16_to_fp8.py meituan-longcat/LongCat-Flash-Chat LongCat-Flash-Chat-fp8
"""

from hf_moe.conversion.quantization import plan_fp8
from hf_moe.conversion.script import run_script

if __name__ == "__main__":
    run_script(__doc__, plan_fp8, models=("longcat_flash", "longcat_flash_ngram", "longcat", "longcat_next"))
