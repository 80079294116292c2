"""DeepSeek-V3, V3-Base and R1: bfloat16 to block FP8 as released.

Embeddings, head, norms, routers and the MTP layer's `eh_proj` stay bfloat16.

    python conversions/deepseek_bf16_to_fp8.py DeepSeek-V3-bf16 DeepSeek-V3-fp8
"""

from hf_moe.conversion.quantization import plan_fp8
from hf_moe.conversion.script import run_script

if __name__ == "__main__":
    run_script(__doc__, plan_fp8, models=("deepseek_v3",))
