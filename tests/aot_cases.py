"""What `aot.py` compiles: launchers called on meta tensors, at DeepSeek-V3's sizes, for every shipped tile."""

import aot_cases_dense
import torch

from hf_moe.models import kernel_experts, kernel_routing

EXPERTS, TOP_K, HIDDEN, INTER = 256, 8, 7168, 2048
# Token counts that reach each number of rows per tile.
TOKENS = {16: 16, 64: 1024, 128: 8192}


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def layout_of(tokens: int, block_m: int) -> kernel_routing.Layout:
    return kernel_routing.build_layout(empty(tokens, TOP_K, dtype=torch.int64), EXPERTS, block_m)


def routing(capability: int) -> None:
    layout_of(1, 16)
    layout_of(4096, 128)
    common = {"top_k": 8, "sigmoid": True, "normalise": True, "factor": 2.5}
    logits, bias = empty(64, 256, dtype=torch.float32), empty(256, dtype=torch.float32)
    kernel_routing.choose_experts(logits, bias, num_group=8, topk_group=4, best_two=True, **common)
    common = {"top_k": 12, "sigmoid": False, "normalise": False, "factor": 6.0}
    logits, bias = empty(64, 768, dtype=torch.float32), empty(768, dtype=torch.float32)
    kernel_routing.choose_experts(logits, bias, num_group=1, topk_group=1, best_two=False, **common)


def forward(dtype: torch.dtype, rows: tuple[int, ...], save_pre: bool = False) -> None:
    for block_m in rows:
        tokens = TOKENS[block_m]
        layout = layout_of(tokens, block_m)
        x, gate_up, down = (
            empty(tokens, HIDDEN, dtype=dtype),
            empty(EXPERTS, 2 * INTER, HIDDEN, dtype=dtype),
            empty(EXPERTS, HIDDEN, INTER, dtype=dtype),
        )
        inner, _ = kernel_experts.gate_up(x, gate_up, None, layout, TOP_K, out_dtype=dtype, save_pre=save_pre)
        factors = empty(tokens * TOP_K, dtype=torch.float32)
        out_dtype = torch.float32 if block_m == 16 else dtype
        out = kernel_experts.multiply_rows(
            inner, down, None, layout, TOP_K, out_dtype=out_dtype, to_slots=True, factors=factors
        )
        kernel_experts.combine(out, empty(tokens, TOP_K, dtype=torch.int64), EXPERTS, dtype)


CASES = {
    "routing": routing,
    "bfloat16": lambda capability: forward(torch.bfloat16, (16, 64, 128)),
    "float16": lambda capability: forward(torch.float16, (16, 128)),
    "float32": lambda capability: forward(torch.float32, (16, 64)),
}
CASES.update(aot_cases_dense.CASES)
