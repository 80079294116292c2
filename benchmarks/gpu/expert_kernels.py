"""The experts' kernels at the layer shapes of released models, against Transformers' backends and what the GPU can do.

Every row gives the time, the share of the measured copy bandwidth at which the touched experts' weights are read, and
the share of the measured dense bfloat16 rate, the share of what both allow together (quantised products count as twice
as fast), rows multiplied for one real row, and the time of each kernel as the profiler has it. A case is checked
against the definition on a few of its tokens before it is timed; one that fails leaves its error in its row. Experts
that do not fit into memory are halved in number, which the row says.

    python benchmarks/gpu/expert_kernels.py --out results --seconds 240 --models deepseek_v3

`--warm` only compiles what a run needs, with few experts, so that another process finds it done.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from occupancy import padded_rows  # noqa: E402
from timing import LOST, Rows, add_resume, attempt, copy_bandwidth, seconds_per_call  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402

from hf_moe.models.kernel_tiles import tile_rows  # noqa: E402
from hf_moe.models.op_expert_lora import ExpertLora  # noqa: E402
from hf_moe.models.op_experts import experts, experts_torch  # noqa: E402
from hf_moe.models.triton_compat import converts_fp8  # noqa: E402

# Experts, hidden, intermediate, choices per token.
MODELS = {
    "deepseek_v3": (256, 7168, 2048, 8),
    "kimi_k2": (384, 7168, 2048, 8),
    "step3": (48, 7168, 5120, 3),
    "longcat_flash": (512, 6144, 2048, 12),
}
TOKENS = (1, 64, 8192, 4096, 16, 16384, 4)  # the last ones are left out if time ends
# Sizes at which the script itself can be tried anywhere.
DRY_MODELS = {
    "deepseek_v3": (8, 256, 128, 2),
    "kimi_k2": (6, 136, 72, 2),
    "step3": (4, 136, 72, 2),
    "longcat_flash": (8, 136, 40, 3),
}
DRY_TOKENS = (1, 3, 20)
# Gathering a weight matrix per routed row: more rows than these do not fit.
MAX_BATCHED_ROWS = 64
# Calls that warm up, and calls that are timed; in a dry run, fewer.
WARM_UP, COUNT, DRY_COUNT = 2, 7, 1
# Experts, hidden, intermediate, choices, rank, tokens: those of PEFT's own figure.
LORA_SIZES = (128, 2048, 768, 8, 16, 4096)
# Layers of few tokens are timed in a row, each with a routing of its own: no cache holds the weights from call to call.
ROUTINGS = 8


def median_ms(calls: dict, repeats: int = COUNT) -> dict[str, float]:
    """Medians of single calls, by events, after `WARM_UP` others; the calls take turns."""
    times, repeats = {name: [] for name in calls}, DRY_COUNT if "--dry" in sys.argv else repeats
    for turn in range(repeats + WARM_UP):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            if turn >= WARM_UP:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def kernel_us(function) -> dict[str, float]:
    """Microseconds of each kernel in one call."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    # Operations of PyTorch are listed, too, with the time of the kernels that they launch.
    kernels = [event for event in profile.key_averages() if event.device_type == DeviceType.CUDA]
    return {event.key[:60]: event.device_time_total for event in kernels}


def dense_rate(size: int) -> float:
    """FLOP/s of a square bfloat16 product in cuBLAS."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_per_call([lambda: a @ b] * 4, "cuda")


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
    blocks = [-(-size // 128) for size in (inter, hidden)]
    grids = (2 * blocks[0], blocks[1]), (blocks[1], blocks[0])
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


class Case:
    """One layer's weights and its calls."""

    def __init__(self, sizes: tuple, tokens: int, weights: tuple):
        num_experts, self.hidden, self.inter, self.top_k = sizes
        x = torch.randn(tokens, self.hidden, device="cuda", dtype=torch.bfloat16)
        few = tile_rows(tokens * self.top_k, num_experts, x.dtype) == 16
        self.routings = [
            torch.rand(tokens, num_experts, device="cuda").argsort(-1)[:, : self.top_k].contiguous()
            for _ in range(1 if "--dry" in sys.argv or not few else ROUTINGS)
        ]
        self.arguments = (x, self.routings[0], torch.rand(tokens, self.top_k, device="cuda"), *weights)
        self.tokens = tokens
        self.touched = statistics.mean(ids.unique().numel() for ids in self.routings)

    def kinds(self) -> dict[str, bool]:
        """Whether rows are quantised, by the name of what is multiplied."""
        if self.arguments[5] is None:
            return {"bf16": False}
        return {"w8a16": False} | ({"w8a8": True} if converts_fp8(self.arguments[0].device) else {})

    def call(self, quantize: bool, ids: torch.Tensor | None = None):
        x, first, *rest = self.arguments
        return experts(x, first if ids is None else ids, *rest, quantize=quantize, impl="triton")

    def compile(self, quantize: bool) -> dict:
        self.call(quantize)
        return {"tokens": self.tokens, "quantize": quantize}

    def measure(self, quantize: bool, peak: dict) -> dict:
        error = check(self.call(quantize), self.arguments, quantize=quantize)
        if not error < 1e-2:
            raise ValueError(f"off by {error:.1e}: not timed")
        call = lambda: self.call(quantize)  # noqa: E731
        graph_ms = seconds_per_call([lambda ids=ids: self.call(quantize, ids) for ids in self.routings], "cuda") * 1e3
        peers = {} if self.arguments[5] is not None else self.native_calls()
        working, failed = {"": call}, {}
        for backend, peer in peers.items():
            tried = attempt(lambda peer=peer: {"shape": peer().shape})
            if "failed" in tried:
                failed[f"{backend} failed"] = tried["failed"]
            else:
                working[f"{backend} "] = peer
        ms = median_ms(working)
        size = self.touched * sum(weight[0].numel() * weight.element_size() for weight in self.arguments[3:5])
        flops = 6 * self.tokens * self.top_k * self.hidden * self.inter
        rate = flops / (graph_ms * 1e-3)
        least = max(size / peak["copy bytes/s"], flops / peak["dense bf16 FLOP/s"] / (2 if quantize else 1))
        hidden, ids, *_ = self.arguments
        num_experts = self.arguments[3].shape[0]
        block_m = tile_rows(ids.numel(), num_experts, hidden.dtype)
        return {
            "touched": self.touched,
            **{f"{name}ms": value for name, value in ms.items()},
            **failed,
            "graph ms": graph_ms,
            "error": error,
            "share of copy bandwidth": size / (graph_ms * 1e-3) / peak["copy bytes/s"],
            "TFLOP/s": rate / 1e12,
            "share of dense bf16": rate / peak["dense bf16 FLOP/s"],
            "share of both": least / (graph_ms * 1e-3),
            "padded rows": padded_rows(ids.cpu(), num_experts, block_m),
        }

    def native_calls(self) -> dict:
        """Transformers' backends by name."""
        layer, backends = Layer(*self.arguments[3:5]), ["grouped_mm"]
        if self.tokens * self.top_k <= MAX_BATCHED_ROWS:
            backends.append("batched_mm")
        return {name: lambda name=name: ALL_EXPERTS_FUNCTIONS[name](layer, *self.arguments[:3]) for name in backends}


def layer_rows(name: str, sizes: tuple, token_counts: tuple, fp8: bool, peak: dict, deadline: float, done: Rows):
    """Yields the rows of one layer; then, once more, those that the profiler had a look at."""
    num_experts = fitting_experts(*sizes[:3], 1 if fp8 else 2)
    weights, rows = make_weights(num_experts, *sizes[1:3], fp8), []
    for tokens in token_counts:
        case = Case((num_experts, *sizes[1:]), tokens, weights)
        for kind, quantize in case.kinds().items():
            if time.monotonic() > deadline:
                break
            if done.has(name, kind, tokens):
                continue
            row = {"model": name, "experts": num_experts, "kind": kind, "tokens": tokens}
            row |= attempt(lambda case=case, quantize=quantize: case.measure(quantize, peak))
            yield row
            if "failed" not in row:
                rows.append((row, quantize))
    for row, quantize in rows:
        if time.monotonic() > deadline:
            return
        case = Case((num_experts, *sizes[1:]), row["tokens"], weights)
        seen = attempt(lambda case=case, quantize=quantize: kernel_us(lambda: case.call(quantize)))
        if seen.pop(LOST, False):
            row[LOST] = True
        row["kernel us"] = seen
        yield row


def warm(models: dict, token_counts: tuple) -> bool:
    """Compiles what `layer_rows` launches: kernels do not depend on the number of experts, their tiles on rows each.
    Returns whether something failed."""
    failed = False
    for _, (num_experts, hidden, inter, top_k) in models.items():
        part = 8 if num_experts >= 256 else 4
        few = max(top_k, num_experts // part)
        for fp8 in (False, True):
            weights = make_weights(few, hidden, inter, fp8)
            for tokens in dict.fromkeys(max(1, tokens // part) for tokens in token_counts):
                case = Case((few, hidden, inter, top_k), tokens, weights)
                for quantize in case.kinds().values():
                    row = attempt(lambda case=case, quantize=quantize: case.compile(quantize))
                    failed |= "failed" in row
                    print(json.dumps(row))
    torch.cuda.synchronize()
    return failed


def lora_rows(sizes: tuple) -> list[dict]:
    """Forward and backward of LoRA experts."""
    num_experts, hidden, inter, top_k, rank, tokens = sizes
    gate_up, down, *_ = make_weights(num_experts, hidden, inter, False)
    sizes = [(rank, hidden), (2 * inter, rank), (rank, inter), (hidden, rank)]
    factors = [torch.randn(num_experts, *size, device="cuda", dtype=torch.bfloat16) * 0.02 for size in sizes]
    for factor in factors:
        factor.requires_grad_()
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.rand(tokens, num_experts, device="cuda").argsort(-1)[:, :top_k].contiguous()
    weights, seed = torch.rand(tokens, top_k, device="cuda"), torch.randn_like(x)

    def fold():
        a1, b1, a2, b2 = factors
        layer = Layer(gate_up + b1 @ a1, down + b2 @ a2)
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](layer, x, ids, weights)

    def grouped():
        return experts(x, ids, weights, gate_up, down, lora=ExpertLora(*factors), impl="triton")

    def step(forward):
        forward().backward(seed)
        for tensor in (x, *factors):
            tensor.grad = None

    def memory(forward) -> dict:
        step(forward)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(forward)
        return {"GB": (torch.cuda.max_memory_allocated() - before) / 1e9}

    forms = {"fold": fold, "grouped": grouped}
    rows = {name: attempt(lambda form=form: memory(form)) for name, form in forms.items()}
    ms = median_ms({name: lambda name=name: step(forms[name]) for name, row in rows.items() if "failed" not in row})
    rows = {name: row | ({"ms": ms[name]} if name in ms else {}) for name, row in rows.items()}
    if len(ms) == 2:
        with torch.no_grad():
            ours, theirs = grouped().float(), fold().float()
        rows["grouped"]["error"] = ((ours - theirs).norm() / theirs.norm()).item()
        rows["grouped"]["ratio"] = ms["fold"] / ms["grouped"]
    return [{"model": "lora", "kind": name, "tokens": tokens, **row} for name, row in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--lora", action="store_true", help="LoRA experts, too, against a fold")
    parser.add_argument("--warm", action="store_true", help="only compile")
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    add_resume(parser)
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    torch.manual_seed(0)
    table, token_counts = (DRY_MODELS, DRY_TOKENS) if args.dry else (MODELS, TOKENS)
    models = {name: table[name] for name in args.models if name in table}
    if args.warm:
        sys.exit(warm(models, token_counts))
    rows = Rows("expert_kernels", ("model", "kind", "tokens"), args)
    peak = {
        "copy bytes/s": copy_bandwidth("cuda", 16 if args.dry else 1024),
        "dense bf16 FLOP/s": dense_rate(256 if args.dry else 8192),
    }
    print(json.dumps(peak), flush=True)

    def keep(row: dict) -> None:
        print(json.dumps(row), flush=True)
        rows.keep(row, **peak)

    lora_sizes = (4, 64, 32, 2, 4, 40) if args.dry else LORA_SIZES
    if args.lora and not rows.has("lora", "fold", lora_sizes[-1]):
        for row in lora_rows(lora_sizes):
            keep(row)
    for name, sizes in models.items():
        for fp8 in (True, False):
            now = time.monotonic()
            until = now + 0.6 * (deadline - now) if fp8 else deadline  # some is left for bfloat16
            for row in layer_rows(name, sizes, token_counts, fp8, peak, until, rows):
                keep(row)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    main()
