"""Counts how often each kernel would be compiled while the number of tokens, or the length of the context, changes.

Run as a script, as `aot.py`: prints {case: {kernel: compilations}} for compute capability 9.0.
"""

import json

import aot
import torch

from hf_moe.models import kernel_fp8, kernel_mla, kernel_routing
from hf_moe.models.kernel_tiles import tile_rows
from hf_moe.models.op_expert_lora import ExpertLora
from hf_moe.models.op_expert_options import ExpertOptions
from hf_moe.models.op_experts_triton import Plan, backward, forward

FP8 = torch.float8_e4m3fn
SIZES = sorted({*range(1, 260), *range(261, 8193, 97), *(1 << power for power in range(14)), 8191, 8192})
EXPERTS, TOP_K, HIDDEN, INTER, RANK = 32, 8, 7168, 2048, 16


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def stacks(dtype: torch.dtype) -> tuple:
    """Both weights, and both scales."""
    weights = empty(EXPERTS, 2 * INTER, HIDDEN, dtype=dtype), empty(EXPERTS, HIDDEN, INTER, dtype=dtype)
    if dtype != FP8:
        return *weights, None, None
    return *weights, *(empty(w.shape[0], w.shape[1] // 128, w.shape[2] // 128, dtype=torch.float32) for w in weights)


def run_experts(tokens: int, dtype: torch.dtype = torch.bfloat16, quantize: bool = False) -> None:
    gate_up, down, *scales = stacks(dtype)
    inputs = empty(tokens, HIDDEN), empty(tokens, TOP_K, dtype=torch.float32), gate_up, down, *[None] * 4
    many = tile_rows(tokens * TOP_K, EXPERTS, torch.bfloat16) == 128
    plan = Plan(
        empty(tokens, TOP_K, dtype=torch.int64), *scales, ExpertLora(), ExpertOptions(quantize=quantize and many)
    )
    forward(inputs, plan, save=False)


def train_experts(tokens: int) -> None:
    gate_up, down, *scales = stacks(FP8)
    sizes = (RANK, HIDDEN), (2 * INTER, RANK), (RANK, INTER), (HIDDEN, RANK)
    inputs = empty(tokens, HIDDEN), empty(tokens, TOP_K, dtype=torch.float32), gate_up, down
    inputs = *inputs, *(empty(EXPERTS, *size) for size in sizes)
    masks = empty(tokens, HIDDEN, dtype=torch.bool), empty(tokens * TOP_K, INTER, dtype=torch.bool)
    lora = ExpertLora(*inputs[4:], kept_hidden=masks[0], kept_inner=masks[1], dropout=0.1)
    plan = Plan(empty(tokens, TOP_K, dtype=torch.int64), *scales, lora)
    _, saved = forward(inputs, plan, save=True)
    backward(empty(tokens, HIDDEN), inputs, plan, saved, (True, True, False, False, *[True] * 4))


def route_tokens(tokens: int) -> None:
    options = {"top_k": 8, "num_group": 8, "topk_group": 4, "best_two": True, "sigmoid": True, "normalise": True}
    logits, bias = empty(tokens, 256, dtype=torch.float32), empty(256, dtype=torch.float32)
    kernel_routing.choose_experts(logits, bias, factor=2.5, **options)


def multiply(rows: int) -> None:
    """W8A16, W8A8, and the gradient."""
    weight, scale = empty(1536, HIDDEN, dtype=FP8), empty(12, 56, dtype=torch.float32)
    kernel_fp8.multiply(empty(rows, HIDDEN), weight, scale, out_dtype=torch.bfloat16)
    values, x_scale = kernel_fp8.quantize_rows(empty(rows, HIDDEN))
    kernel_fp8.multiply(values, weight, scale, out_dtype=torch.bfloat16, x_scale=x_scale)
    kernel_fp8.multiply(empty(rows, 1536), weight, scale, out_dtype=torch.bfloat16, transposed=True)


def attend(context: int) -> None:
    """A decode step in a cache that grows, and in a static one with a mask."""
    queries = empty(2, 1, 128, 512), empty(2, 1, 128, 64)
    kernel_mla.mla_decode(*queries, empty(2, context, 512), empty(2, context, 64), None, 0.1)
    mask = empty(2, 1, context, dtype=torch.bool)
    buffers = (empty(2, 8192, width)[:, :context] for width in (512, 64))
    kernel_mla.mla_decode(*queries, *buffers, mask, 0.1)


CASES = {
    "experts": run_experts,
    "experts in FP8": lambda tokens: run_experts(tokens, FP8, True),
    "training of LoRA on FP8": train_experts,
    "routing": route_tokens,
    "linear": multiply,
    "attention": attend,
}


def main() -> None:
    counts = {}
    for name, case in CASES.items():
        with aot.recording(90) as launches:
            for size in SIZES:
                case(size)
        kernels = [
            launch.kernel.__module__.rpartition(".")[2] + "." + launch.kernel.__name__ for launch in launches.values()
        ]
        counts[name] = {kernel: kernels.count(kernel) for kernel in sorted(set(kernels))}
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
