"""The experts layer against Transformers' backends, over token counts and dtypes.

32 experts of 512 x 1024, 4 per token; the weights of several layers take turns, so that they come from memory.

    python benchmarks/experts.py --tokens 1 16 256 1024
"""

import argparse
from itertools import cycle
from pathlib import Path

import torch
from common import report, save, time_interleaved

from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config
from hf_moe.models.layer_experts import Experts

BACKENDS = ("eager", "grouped_mm", "batched_mm", "hf_moe")
# Gathering a weight matrix per routed row: beyond this many rows it takes more memory than a machine has.
MAX_BATCHED_ROWS = 256


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--block", type=int, default=3, help="calls in a row, before the next backend's turn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = DeepseekV3Config(
        hidden_size=args.hidden,
        moe_intermediate_size=args.intermediate,
        n_routed_experts=args.experts,
        num_experts_per_tok=args.top_k,
        n_group=1,
        topk_group=1,
    )
    rows = []
    for dtype_name in args.dtypes:
        dtype = getattr(torch, dtype_name)
        torch.manual_seed(0)
        layers = [Experts(config).to(args.device, dtype) for _ in range(args.layers)]
        for layer in layers:
            for parameter in layer.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.02)
        for tokens in args.tokens:
            hidden_states = torch.randn(tokens, args.hidden, dtype=dtype, device=args.device)
            routes = [torch.randperm(args.experts)[: args.top_k] for _ in range(tokens)]
            topk_indices = torch.stack(routes).to(args.device)
            topk_weights = torch.rand(tokens, args.top_k, device=args.device)

            def run(backend, layers=layers, inputs=(hidden_states, topk_indices, topk_weights)):
                turns = cycle(layers)

                def case():
                    config._experts_implementation = backend
                    return next(turns)(*inputs)

                return case

            names = [name for name in BACKENDS if name != "batched_mm" or tokens * args.top_k <= MAX_BATCHED_ROWS]
            reference = run("eager")().float()
            for name in names:
                error = (run(name)().float() - reference).norm() / reference.norm()
                assert error < (2e-2 if dtype != torch.float32 else 1e-5), f"{name} is wrong: {error:.1e}"
            median = time_interleaved({name: run(name) for name in names}, args.repeats, args.device, block=args.block)
            best = min((name for name in names if name != "hf_moe"), key=median.get)
            row = {"dtype": dtype_name, "tokens": tokens}
            row.update({f"{name} ms": median[name] * 1e3 if name in median else None for name in BACKENDS})
            rows.append({**row, "best native": best, "ratio": median[best] / median["hf_moe"]})
            save("experts", rows, args.device, args.out)
    report("experts", rows, args.device, args.out)


if __name__ == "__main__":
    main()
