"""A training step with LoRA on the experts: the grouped path against PEFT's, which adds the factors to the weights.

64 experts of 512 x 1024, rank 16, 2,048 tokens. Each path runs in a process of its own, for its peak of memory.

    python benchmarks/lora_experts.py
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import report

from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config
from hf_moe.models.layer_experts import Experts
from hf_moe.models.op_experts import ExpertLora, experts

EXPERTS, HIDDEN, INTER, RANK, TOKENS, TOP_K = 64, 1024, 512, 16, 2048, 4


def status(name: str) -> int:
    """A field of the process's status, in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def build(path: str, dtype: torch.dtype):
    """A function that makes one step, forward and backward."""
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTER,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=1,
        topk_group=1,
    )
    config._experts_implementation = "hf_moe"
    module = Experts(config).to(dtype).requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.02)
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    ids = torch.rand(TOKENS, EXPERTS).argsort(-1)[:, :TOP_K]
    weights, seed = torch.rand(TOKENS, TOP_K), torch.randn(TOKENS, HIDDEN).to(dtype)
    if path == "grouped":
        sizes = [(RANK, HIDDEN), (2 * INTER, RANK), (RANK, INTER), (HIDDEN, RANK)]
        factors = [(torch.randn(EXPERTS, *size) * 0.02).to(dtype).requires_grad_() for size in sizes]
        stacks = (module.gate_up_proj, module.down_proj)
        return lambda: experts(x, ids, weights, *stacks, lora=ExpertLora(*factors)).backward(seed)

    from peft import LoraConfig, get_peft_model

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.config = module, config

        def forward(self, *args):
            return self.experts(*args)

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(Model(), LoraConfig(r=RANK, lora_alpha=RANK, target_parameters=targets)).to(dtype)
    return lambda: model(x, ids, weights).backward(seed)


def measure(path: str, dtype: str, repeats: int) -> dict:
    torch.manual_seed(0)
    step = build(path, getattr(torch, dtype))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = status("VmRSS")
    step()
    memory = (status("VmHWM") - before) / 1024
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "MiB": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--path", choices=["grouped", "peft"], help="measure one path in this process")
    args = parser.parse_args()
    if args.path:
        print(json.dumps(measure(args.path, args.dtypes[0], args.repeats)))
        return
    rows = []
    for dtype in args.dtypes:
        results = {}
        for path in ("grouped", "peft"):
            command = [sys.executable, __file__, "--path", path, "--dtypes", dtype, "--repeats", str(args.repeats)]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            results[path] = json.loads(result.stdout.splitlines()[-1])
        row = {"dtype": dtype}
        for path, result in results.items():
            row.update({f"{path} s": result["seconds"], f"{path} extra MiB": result["MiB"]})
        row["faster"] = results["peft"]["seconds"] / results["grouped"]["seconds"]
        row["memory"] = results["grouped"]["MiB"] / results["peft"]["MiB"]
        rows.append(row)
    report("lora_experts", rows, "cpu", args.out)


if __name__ == "__main__":
    main()
