"""The experts' kernels at the layer shapes of released models, against Transformers' backends and what the GPU can do.

Every row gives the time, the share of the measured copy bandwidth at which the touched experts' weights are read, and
the share of the measured dense bfloat16 rate. A case is checked against the definition on a few of its tokens before
it is timed. Weights of a case that do not fit into memory are halved in number of experts, which the row says.

    python benchmarks/gpu/expert_kernels.py --out results --seconds 240
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from common import device_name  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402

from hf_moe.models.op_experts import ExpertLora, experts, experts_torch  # noqa: E402
from hf_moe.models.triton_compat import converts_fp8  # noqa: E402

# Experts, hidden, intermediate, choices per token.
MODELS = {
    "deepseek_v3": (256, 7168, 2048, 8),
    "kimi_k2": (384, 7168, 2048, 8),
    "step3": (48, 7168, 5120, 3),
    "longcat_flash": (512, 6144, 2048, 12),
}
DECODE, PREFILL = (1, 4, 16, 64), (4096, 8192)
# Gathering a weight matrix per routed row: more rows than these do not fit.
MAX_BATCHED_ROWS = 64
COUNT = 9


def time_ms(function, repeats: int = COUNT) -> float:
    """Median of single calls, by events, after two that warm up."""
    times = []
    for turn in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        if turn > 1:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def graphed(function):
    """`function` as a CUDA graph: the time of the kernels without that of launching them."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def copy_bandwidth() -> float:
    """Bytes per second of a device copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (time_ms(lambda: target.copy_(source)) * 1e-3)


def dense_rate() -> float:
    """FLOP/s of a square bfloat16 product in cuBLAS."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (time_ms(lambda: a @ b) * 1e-3)


class Layer(torch.nn.Module):
    """What Transformers' backends ask of an experts module."""

    has_gate, has_bias, has_post_expert_norm, is_transposed, is_concatenated = True, False, False, False, True
    _is_expert_parallel = False

    def __init__(self, gate_up_proj, down_proj):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.num_experts = gate_up_proj, down_proj, gate_up_proj.shape[0]

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


def make_weights(num_experts: int, hidden: int, inter: int, fp8: bool) -> tuple:
    """gate_up, down and their scales; filled expert by expert, so that nothing larger exists beside them."""
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    gate_up = torch.empty(num_experts, 2 * inter, hidden, dtype=dtype, device="cuda")
    down = torch.empty(num_experts, hidden, inter, dtype=dtype, device="cuda")
    for weight in (gate_up, down):
        std = 100.0 if fp8 else weight.shape[-1] ** -0.5
        for expert in range(num_experts):
            weight[expert] = (torch.randn(weight.shape[1:], device="cuda") * std).clamp(-448, 448).to(dtype)
    if not fp8:
        return gate_up, down, None, None
    grids = (2 * inter // 128, hidden // 128), (hidden // 128, inter // 128)
    widths = hidden, inter
    return (
        gate_up,
        down,
        *(torch.full((num_experts, *grid), 0.01 * width**-0.5, device="cuda") for grid, width in zip(grids, widths)),
    )


def fitting_experts(num_experts: int, hidden: int, inter: int, element: int) -> int:
    free = torch.cuda.mem_get_info()[0] * 0.75
    while num_experts * 3 * hidden * inter * element > free:
        num_experts //= 2
    return num_experts


def check(output, arguments, **options) -> float:
    """Relative error on the first tokens."""
    hidden, ids, weights, *rest = arguments
    few = slice(0, 4)
    expected = experts_torch(hidden[few], ids[few], weights[few], *rest, **options).float()
    return ((output[few].float() - expected).norm() / expected.norm()).item()


def layer_rows(model: str, fp8: bool, peak: dict, deadline: float) -> list[dict]:
    full, hidden, inter, top_k = MODELS[model]
    num_experts = fitting_experts(full, hidden, inter, 1 if fp8 else 2)
    weights = make_weights(num_experts, hidden, inter, fp8)
    layer, rows = Layer(*weights[:2]), []
    for tokens in (*DECODE, *PREFILL):
        if time.monotonic() > deadline:
            break
        x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
        ids = torch.rand(tokens, num_experts, device="cuda").argsort(-1)[:, :top_k].contiguous()
        arguments = (x, ids, torch.rand(tokens, top_k, device="cuda"), *weights)
        touched = ids.unique().numel()
        size = touched * sum(weight[0].numel() * weight.element_size() for weight in weights[:2])
        flops = 6 * tokens * top_k * hidden * inter
        kinds = (
            {"w8a16": False, "w8a8": True} if fp8 and converts_fp8(x.device) else {"w8a16" if fp8 else "bf16": False}
        )
        for kind, quantize in kinds.items():
            call = lambda quantize=quantize, args=arguments: experts(*args, quantize=quantize, impl="triton")  # noqa: E731
            error = check(call(), arguments, quantize=quantize)
            assert error < 1e-2, f"{model} {kind} with {tokens} tokens is off by {error:.1e}"
            ms, graph_ms = time_ms(call), time_ms(graphed(call))
            row = {"model": model, "experts": num_experts, "kind": kind, "tokens": tokens, "touched": touched}
            row.update({"ms": ms, "graph ms": graph_ms, "error": error})
            row["share of copy bandwidth"] = size / (graph_ms * 1e-3) / peak["copy bytes/s"]
            row["TFLOP/s"] = flops / (graph_ms * 1e-3) / 1e12
            row["share of dense bf16"] = flops / (graph_ms * 1e-3) / peak["dense bf16 FLOP/s"]
            for backend in ("grouped_mm", "batched_mm") if not fp8 else ():
                if backend == "batched_mm" and tokens * top_k > MAX_BATCHED_ROWS:
                    continue
                native = lambda backend=backend, args=arguments: ALL_EXPERTS_FUNCTIONS[backend](layer, *args[:3])  # noqa: E731
                row[f"{backend} ms"] = time_ms(native, 5)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def lora_row(fold: bool) -> dict:
    """Forward and backward of LoRA experts: 128 experts of 2048 x 768, rank 16, 4,096 tokens of 8 choices."""
    num_experts, hidden, inter, top_k, rank, tokens = 128, 2048, 768, 8, 16, 4096
    gate_up, down, *_ = make_weights(num_experts, hidden, inter, False)
    sizes = [(rank, hidden), (2 * inter, rank), (rank, inter), (hidden, rank)]
    factors = [torch.randn(num_experts, *size, device="cuda", dtype=torch.bfloat16) * 0.02 for size in sizes]
    for factor in factors:
        factor.requires_grad_()
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.rand(tokens, num_experts, device="cuda").argsort(-1)[:, :top_k].contiguous()
    weights, seed = torch.rand(tokens, top_k, device="cuda"), torch.randn_like(x)

    def step():
        if fold:
            a1, b1, a2, b2 = factors
            layer = Layer(gate_up + b1 @ a1, down + b2 @ a2)
            output = ALL_EXPERTS_FUNCTIONS["grouped_mm"](layer, x, ids, weights)
        else:
            output = experts(x, ids, weights, gate_up, down, lora=ExpertLora(*factors), impl="triton")
        output.backward(seed)
        for tensor in (x, *factors):
            tensor.grad = None

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    memory = (torch.cuda.max_memory_allocated() - before) / 1e9
    return {"model": "lora", "kind": "fold" if fold else "grouped", "tokens": tokens, "ms": time_ms(step), "GB": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    torch.manual_seed(0)
    peak = {"copy bytes/s": copy_bandwidth(), "dense bf16 FLOP/s": dense_rate()}
    print(json.dumps(peak), flush=True)
    rows = []

    def write() -> None:
        record = {"benchmark": "expert_kernels", "device": device_name("cuda"), "torch": torch.__version__, **peak}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "expert_kernels_gpu.json").write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")

    for fold in (False, True):
        rows.append(lora_row(fold))
        print(json.dumps(rows[-1]), flush=True)
    write()
    for model in args.models:
        for fp8 in (False, True):
            if time.monotonic() < deadline:
                rows += layer_rows(model, fp8, peak, deadline)
                torch.cuda.empty_cache()
                write()  # what there is, should the time run out


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    main()
