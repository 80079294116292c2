"""What `aot.py` compiles: launchers called on meta tensors, at DeepSeek-V3's sizes, for every shipped tile."""

import aot_cases_dense
import torch

from hf_moe.models import kernel_combine, kernel_experts, kernel_experts_backward, kernel_routing

EXPERTS, TOP_K, HIDDEN, INTER = 256, 8, 7168, 2048
# Token counts that reach each number of rows per tile.
TOKENS = {16: 16, 64: 1024, 128: 8192}
FP8 = torch.float8_e4m3fn


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def layout_of(block_m: int) -> kernel_routing.Layout:
    return kernel_routing.build_layout(empty(TOKENS[block_m], TOP_K, dtype=torch.int64), EXPERTS, block_m)


def weights_of(dtype: torch.dtype, scale_dtype: torch.dtype = torch.float32, inter: int = INTER) -> tuple:
    """gate_up_proj, its scale, down_proj, its scale."""
    gate_up, down = empty(EXPERTS, 2 * inter, HIDDEN, dtype=dtype), empty(EXPERTS, HIDDEN, inter, dtype=dtype)
    if dtype != FP8:
        return gate_up, None, down, None
    rows, columns = -(-inter // 128), HIDDEN // 128
    scales = empty(EXPERTS, 2 * rows, columns, dtype=scale_dtype), empty(EXPERTS, columns, rows, dtype=scale_dtype)
    return gate_up, scales[0], down, scales[1]


def routing(capability: int) -> None:
    # One slot, and so one tile: Triton takes an argument of 1 as a constant.
    layout = kernel_routing.build_layout(empty(1, 1, dtype=torch.int64), 8, 16)
    kernel_experts.gate_up(empty(1, 512), empty(8, 512, 512), None, layout, 1, out_dtype=torch.bfloat16)
    layout_of(16)
    layout_of(128)
    common = {"top_k": 8, "sigmoid": True, "normalise": True, "factor": 2.5}
    logits, bias = empty(64, 256, dtype=torch.float32), empty(256, dtype=torch.float32)
    kernel_routing.choose_experts(logits, bias, num_group=8, topk_group=4, best_two=True, **common)
    common = {"top_k": 12, "sigmoid": False, "normalise": False, "factor": 6.0}
    logits, bias = empty(64, 768, dtype=torch.float32), empty(768, dtype=torch.float32)
    kernel_routing.choose_experts(logits, bias, num_group=1, topk_group=1, best_two=False, **common)


def forward(dtype: torch.dtype, rows: tuple[int, ...], weights: tuple) -> None:
    gate_up, gate_up_scale, down, down_scale = weights
    for block_m in rows:
        tokens, layout = TOKENS[block_m], layout_of(block_m)
        x = empty(tokens, HIDDEN, dtype=dtype)
        inner, _ = kernel_experts.gate_up(x, gate_up, gate_up_scale, layout, TOP_K, out_dtype=dtype)
        options = {"to_slots": True, "factors": empty(tokens * TOP_K, dtype=torch.float32)}
        out_dtype = torch.float32 if block_m == 16 else dtype
        out = kernel_experts.multiply_rows(inner, down, down_scale, layout, TOP_K, out_dtype=out_dtype, **options)
        kernel_combine.combine(out, empty(tokens, TOP_K, dtype=torch.int64), EXPERTS, dtype)


def w8a16(capability: int) -> None:
    forward(torch.bfloat16, (16, 64, 128), weights_of(FP8))
    forward(torch.float16, (128,), weights_of(FP8))
    forward(torch.float32, (16, 64), weights_of(FP8))
    forward(torch.bfloat16, (16,), weights_of(FP8, torch.float8_e8m0fnu))
    forward(torch.bfloat16, (128,), weights_of(FP8, torch.float8_e8m0fnu, inter=1408))


def w8a8(capability: int) -> None:
    if capability < 89:
        return
    for scale_dtype, rows in ((torch.float32, (16, 64, 128)), (torch.float8_e8m0fnu, (128,))):
        gate_up, gate_up_scale, down, down_scale = weights_of(FP8, scale_dtype)
        for block_m in rows:
            tokens, layout = TOKENS[block_m], layout_of(block_m)
            x, x_scale = empty(tokens, HIDDEN, dtype=FP8), empty(tokens, HIDDEN // 128, dtype=torch.float32)
            options = {"out_dtype": torch.bfloat16}
            kernel_experts.gate_up(x, gate_up, gate_up_scale, layout, TOP_K, x_scale=x_scale, out_dtype=torch.float32)
            inner = empty(tokens * TOP_K, INTER, dtype=FP8)
            options.update(x_scale=empty(tokens * TOP_K, INTER // 128, dtype=torch.float32), to_slots=True)
            options.update(factors=empty(tokens * TOP_K, dtype=torch.float32))
            kernel_experts.multiply_rows(inner, down, down_scale, layout, TOP_K, **options)


def training(dtype: torch.dtype, block_m: int, weights: tuple, rank: int = 0, dropout: bool = False) -> None:
    """What a training step launches beside the forward products without LoRA."""
    gate_up, gate_up_scale, down, down_scale = weights
    tokens, layout = TOKENS[block_m], layout_of(block_m)
    slots = tokens * TOP_K
    x, inner = empty(tokens, HIDDEN, dtype=dtype), empty(slots, INTER, dtype=dtype)
    pre, factors = empty(slots, 2 * INTER, dtype=dtype), empty(slots, dtype=torch.float32)
    low = empty(slots, rank, dtype=dtype) if rank else None
    sizes = [(rank, HIDDEN), (2 * INTER, rank), (rank, INTER), (HIDDEN, rank)]
    gate_up_a, gate_up_b, down_a, down_b = (empty(EXPERTS, *size, dtype=dtype) if rank else None for size in sizes)
    multiply, outer, options = kernel_experts.multiply_rows, kernel_experts_backward.sum_outer, {"out_dtype": dtype}
    kernel_experts.gate_up(
        x, gate_up, gate_up_scale, layout, TOP_K, pre_dtype=dtype, low=low, lora_b=gate_up_b, **options
    )
    kernel_experts_backward.inner_grad(
        x,
        down,
        down_scale,
        layout,
        TOP_K,
        pre,
        factors,
        save_inner=True,
        low=low,
        lora_a=down_a,
        kept=empty(slots, INTER, dtype=torch.bool) if dropout else None,
    )
    multiply(
        pre,
        gate_up,
        gate_up_scale,
        layout,
        TOP_K,
        transposed=True,
        to_slots=True,
        parts=2,
        low=low,
        lora=gate_up_a,
        **options,
    )
    if not rank:
        if gate_up_scale is None:
            outer(x, inner, layout, TOP_K, gather_left=True, **options)
            outer(pre, x, layout, TOP_K, gather_right=True, **options)
        return
    multiply(inner, down, down_scale, layout, TOP_K, to_slots=True, factors=factors, low=low, lora=down_b, **options)
    multiply(x, gate_up_a, None, layout, TOP_K, gather=True, **options)
    multiply(inner, down_a, None, layout, TOP_K, **options)
    multiply(x, down_b, None, layout, TOP_K, gather=True, transposed=True, **options)
    multiply(pre, gate_up_b, None, layout, TOP_K, transposed=True, **options)
    if dropout:
        rows = multiply(low, gate_up_a, None, layout, TOP_K, transposed=True, to_slots=True, **options)
        sums = {"kept": empty(tokens, HIDDEN, dtype=torch.bool), "base": empty(tokens, HIDDEN, dtype=torch.float32)}
        kernel_combine.combine(rows, empty(tokens, TOP_K, dtype=torch.int64), EXPERTS, dtype, **sums)
    outer(low, inner, layout, TOP_K, **options)
    outer(x, low, layout, TOP_K, gather_left=True, factors=factors, **options)
    outer(low, x, layout, TOP_K, gather_right=True, **options)
    outer(pre, low, layout, TOP_K, **options)


def backward(capability: int) -> None:
    for block_m in (16, 64, 128):
        training(torch.bfloat16, block_m, weights_of(torch.bfloat16))
    training(torch.float32, 64, weights_of(torch.float32))
    training(torch.bfloat16, 64, weights_of(FP8))
    training(torch.bfloat16, 128, weights_of(FP8))
    training(torch.bfloat16, 128, weights_of(FP8, inter=1408))


def lora(capability: int) -> None:
    training(torch.bfloat16, 16, weights_of(torch.bfloat16), rank=16)
    training(torch.bfloat16, 128, weights_of(torch.bfloat16), rank=16, dropout=True)
    training(torch.bfloat16, 128, weights_of(FP8), rank=64)
    training(torch.float32, 64, weights_of(torch.float32), rank=8)


def activations(capability: int) -> None:
    """Epilogues that compute more than SiLU, where the products leave them the fewest registers."""
    for activation, limit in (("gelu", 0.0), ("gelu_tanh", 0.0), ("relu2", 0.0), ("silu", 7.0)):
        options = {"activation": activation, "limit": limit}
        for dtype, block_m in ((torch.bfloat16, 64), (torch.bfloat16, 128), (FP8, 128), (torch.float32, 64)):
            training_gate(torch.bfloat16 if dtype == FP8 else dtype, block_m, weights_of(dtype), options)
        if capability == 90:  # the tile of two blocks
            gate_up, scale, *_ = weights_of(FP8)
            x, x_scale = empty(TOKENS[128], HIDDEN, dtype=FP8), empty(TOKENS[128], HIDDEN // 128, dtype=torch.float32)
            inputs = (x, gate_up, scale, layout_of(128), TOP_K)
            kernel_experts.gate_up(*inputs, x_scale=x_scale, out_dtype=torch.float32, **options)


def training_gate(dtype: torch.dtype, block_m: int, weights: tuple, options: dict) -> None:
    """The two kernels that compute the gate, with LoRA and dropout."""
    gate_up, gate_up_scale, down, down_scale = weights
    tokens, layout, rank = TOKENS[block_m], layout_of(block_m), 16
    slots = tokens * TOP_K
    x, low = empty(tokens, HIDDEN, dtype=dtype), empty(slots, rank, dtype=dtype)
    lora_b, lora_a = empty(EXPERTS, 2 * INTER, rank, dtype=dtype), empty(EXPERTS, rank, INTER, dtype=dtype)
    factors, kept = empty(slots, dtype=torch.float32), empty(slots, INTER, dtype=torch.bool)
    inputs = (x, gate_up, gate_up_scale, layout, TOP_K)
    _, pre = kernel_experts.gate_up(*inputs, out_dtype=dtype, pre_dtype=dtype, low=low, lora_b=lora_b, **options)
    inputs = (x, down, down_scale, layout, TOP_K, pre, factors)
    kernel_experts_backward.inner_grad(*inputs, save_inner=True, low=low, lora_a=lora_a, kept=kept, **options)


CASES = {
    "routing": routing,
    "bfloat16": lambda capability: forward(torch.bfloat16, (16, 64, 128), weights_of(torch.bfloat16)),
    "float16": lambda capability: forward(torch.float16, (16, 128), weights_of(torch.float16)),
    "float32": lambda capability: forward(torch.float32, (16, 64), weights_of(torch.float32)),
    "w8a16": w8a16,
    "w8a8": w8a8,
    "backward": backward,
    "lora": lora,
    "activations": activations,
}
CASES.update(aot_cases_dense.CASES)
