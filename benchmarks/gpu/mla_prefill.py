"""Attention of a prompt, or of a chunk of one, at DeepSeek-V3's head sizes (128 + 64, values of 128), bfloat16.

Compares what holds a piece of the context at a time with what holds all of it: `latent_prefill` on its kernel, and
PyTorch's `scaled_dot_product_attention` of some heads on keys and values of the whole context. Both expand the latents.

    python benchmarks/gpu/mla_prefill.py --cases 8192:8192 2048:32768

`--warm` only compiles and checks what a run times.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import report  # noqa: E402
from timing import Rows, add_resume, attempt, seconds_of_each  # noqa: E402

from hf_moe.models.op_prefill import CausalMask, latent_prefill  # noqa: E402

LATENT, NOPE, ROPE, VALUE = 512, 128, 64, 128
SCALING = (NOPE + ROPE) ** -0.5
WHOLE_ELEMENTS = 1 << 26  # of keys and values that the interface is given at a time


def row(queries: int, context: int, heads: int, device: str, warm: bool) -> dict:
    make = lambda *shape: torch.randn(shape, device=device).bfloat16()  # noqa: E731
    query = make(1, queries, heads, NOPE + ROPE)
    query_nope, query_rope = query.split([NOPE, ROPE], dim=-1)
    latent, key_rope = make(1, context, LATENT), make(1, context, ROPE)
    weight, width = make(heads * (NOPE + VALUE), LATENT) * LATENT**-0.5, NOPE + VALUE
    mask = CausalMask(context - queries)

    def expand(first, count, start, stop):
        return F.linear(latent[:, start:stop], weight[first * width : (first + count) * width])

    def pieces():
        return latent_prefill(query_nope, query_rope, key_rope, expand, mask, SCALING, VALUE)

    def whole():
        size = max(1, WHOLE_ELEMENTS // (context * (width + NOPE + ROPE)))
        matrix = mask.matrix(queries, key_rope.device) if mask.past else None
        outputs = []
        for first in range(0, heads, size):
            count = min(size, heads - first)
            expanded = expand(first, count, 0, context).unflatten(-1, (count, width)).transpose(1, 2)
            key, value = expanded.split([NOPE, VALUE], dim=-1)
            key = torch.cat((key, key_rope.unsqueeze(1).expand(-1, count, -1, -1)), dim=-1)
            own = query[:, :, first : first + count].transpose(1, 2)
            options = {"attn_mask": matrix, "is_causal": matrix is None, "scale": SCALING}
            outputs.append(F.scaled_dot_product_attention(own, key, value, **options).transpose(1, 2))
        return torch.cat(outputs, dim=2)

    output = pieces().float()  # before memory holds what is right
    reference = whole().float()
    error = (output - reference).norm() / reference.norm()
    del output, reference
    if not error < 2e-2:
        raise ValueError(f"the pieces are wrong by {error:.1e}: not timed")
    if warm:
        return {}
    seen = queries * context - queries * (queries - 1) // 2
    flops = 2 * heads * (seen * (NOPE + ROPE + VALUE) + context * LATENT * width)
    calls, result = {"whole": whole, "pieces": pieces}, {}
    seconds = seconds_of_each({name: [call] for name, call in calls.items()}, device)
    for name, call in calls.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        result |= {
            f"{name} ms": seconds[name] * 1e3,
            f"{name} TFLOP/s": flops / seconds[name] / 1e12,
            f"{name} MB": (torch.cuda.max_memory_allocated() - before) / 1e6,
        }
    return result


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=["8192:8192", "2048:32768", "32768:32768"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--warm", action="store_true", help="only compile")
    add_resume(parser)
    args = parser.parse_args()
    rows = Rows("mla_prefill", ("queries", "context"), args, args.device)
    for case in args.cases:
        queries, context = map(int, case.split(":"))
        if rows.has(queries, context):
            continue
        result = {"queries": queries, "context": context}
        result |= attempt(lambda sizes=(queries, context): row(*sizes, args.heads, args.device, args.warm))
        print(result, flush=True)
        if not args.warm:
            rows.keep(result)
    if not args.warm:
        report("mla_prefill", rows.rows, args.device, args.out)


if __name__ == "__main__":
    main()
