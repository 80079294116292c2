"""A training step with LoRA on the experts through PEFT: the grouped path against PEFT's own, which adds the factors to
the weights.

64 experts of 512 x 1024, rank 16, 2,048 tokens. Both paths begin at `get_peft_model`; in one, PEFT uses its own layers.
They are timed in turns in one process, and each runs in a process of its own for its peak of memory. Every step has
another routing, as in training.

    python benchmarks/lora_experts.py
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import torch
from common import process_memory, report, time_interleaved

import hf_moe  # noqa: F401  makes PEFT know our experts
from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config
from hf_moe.models.layer_experts import Experts

EXPERTS, HIDDEN, INTER, RANK, TOKENS, TOP_K = 64, 1024, 512, 16, 2048, 4
ROUTES = 8
PATHS = ("grouped", "peft")


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
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.model import LoraModel

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.config = module, config

        def forward(self, *args):
            return self.experts(*args)

    ours = LoraModel._create_new_module
    if path == "peft":
        LoraModel._create_new_module = staticmethod(ours.hf_moe_original)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"r": RANK, "lora_alpha": RANK, "target_parameters": targets, "init_lora_weights": False}
    # With factors in the dtype of the weights, as PEFT's own path takes them.
    model = get_peft_model(Model(), LoraConfig(**options)).to(dtype)
    LoraModel._create_new_module = staticmethod(ours)
    assert type(model.base_model.model.experts).__module__.startswith("peft" if path == "peft" else "hf_moe")
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    seed = torch.randn(TOKENS, HIDDEN).to(dtype)
    routes = [
        (torch.rand(TOKENS, EXPERTS).argsort(-1)[:, :TOP_K], torch.rand(TOKENS, TOP_K, requires_grad=True))
        for _ in range(ROUTES)
    ]

    taken = itertools.cycle(routes)

    def step() -> None:
        model(x, *next(taken)).backward(seed)
        model.zero_grad()

    return step


def peak(path: str, dtype: str) -> float:
    """MiB that the first step takes beyond what was there before it."""
    torch.manual_seed(0)
    step = build(path, getattr(torch, dtype))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = process_memory("VmRSS")
    step()
    return (process_memory("VmHWM") - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--path", choices=PATHS, help="measure the memory of one path in this process")
    args = parser.parse_args()
    if args.path:
        print(json.dumps(peak(args.path, args.dtypes[0])))
        return
    rows = []
    for dtype in args.dtypes:
        memory = {}
        for path in PATHS:
            command = [sys.executable, __file__, "--path", path, "--dtypes", dtype]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            memory[path] = json.loads(result.stdout.splitlines()[-1])
        torch.manual_seed(0)
        seconds = time_interleaved({path: build(path, getattr(torch, dtype)) for path in PATHS}, args.repeats)
        row = {"dtype": dtype}
        for path in PATHS:
            row |= {f"{path} s": seconds[path], f"{path} extra MiB": memory[path]}
        row["faster"] = seconds["peft"] / seconds["grouped"]
        row["memory"] = memory["grouped"] / memory["peft"]
        rows.append(row)
    report("lora_experts", rows, "cpu", args.out)


if __name__ == "__main__":
    main()
