"""One decode step of latent attention at DeepSeek-V3's sizes (128 heads, latents of 512 + 64), bfloat16.

Two questions. How near the kernel comes to the bandwidth of a copy on the device, since reading the cache is what a
decode step costs; and how much faster the whole attention layer is than that of native Transformers, which expands the
context at every step.

    python benchmarks/gpu/mla_decode.py --contexts 4096 32768 --batches 1 16

`--warm` only compiles and checks what a run times.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import DynamicCache
from transformers.models.deepseek_v3 import DeepseekV3Config as NativeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention as NativeAttention

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import report, time_interleaved  # noqa: E402
from timing import LOST, Rows, add_resume, attempt, copies_beyond_cache, copy_bandwidth, seconds_of_each  # noqa: E402

from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config  # noqa: E402
from hf_moe.models.kernel_mla import mla_decode  # noqa: E402
from hf_moe.models.layer_cache import adopt_growing_layers  # noqa: E402
from hf_moe.models.layer_mla import LatentAttention, absorbed_attention  # noqa: E402
from hf_moe.models.layer_rope import RotaryEmbedding  # noqa: E402

LATENT, ROPE = 512, 64


def kernel_row(batch: int, context: int, heads: int, device: str, bandwidth: float) -> dict:
    """The kernel alone, against the same attention in PyTorch's products; without a bandwidth, only checked."""
    nbytes = batch * context * (LATENT + ROPE) * 2
    make = lambda *shape: torch.randn(shape, device=device).bfloat16()  # noqa: E731
    query, query_rope = make(batch, 1, heads, LATENT) * 0.2, make(batch, 1, heads, ROPE) * 0.2
    caches = [(make(batch, context, LATENT), make(batch, context, ROPE)) for _ in range(copies_beyond_cache(nbytes))]

    def plain(latent, key_rope):
        return absorbed_attention(query, query_rope, latent.unsqueeze(1), key_rope.unsqueeze(1), None, 0.1)[0]

    output = mla_decode(query, query_rope, *caches[0], None, 0.1).float()  # before memory holds what is right
    reference = plain(*caches[0]).float()
    error = (output - reference).norm() / reference.norm()
    del output
    if not error < 2e-2:
        raise ValueError(f"the kernel is wrong by {error:.1e}: not timed")
    if not bandwidth:
        return {}
    calls = {
        "kernel": [lambda c=c: mla_decode(query, query_rope, *c, None, 0.1) for c in caches],
        "products": [lambda c=c: plain(*c) for c in caches],
    }
    seconds = seconds_of_each(calls, device)
    flops = 2 * batch * heads * context * (2 * LATENT + ROPE)
    return {
        "products us": seconds["products"] * 1e6,
        "kernel us": seconds["kernel"] * 1e6,
        "GB/s": nbytes / seconds["kernel"] / 1e9,
        "of copy bandwidth": nbytes / seconds["kernel"] / bandwidth,
        "TFLOP/s": flops / seconds["kernel"] / 1e12,
        "copy GB/s": bandwidth / 1e9,
    }


def layer_row(context: int, device: str, sizes: dict, repeats: int) -> dict:
    """The attention layer with its projections and its cache, batch 1, against that of native Transformers: as called,
    and as a CUDA graph, where launching takes no time."""
    config, native_config = DeepseekV3Config(**sizes), NativeConfig(**sizes)
    config._attn_implementation = native_config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    ours = LatentAttention(config, 0).to(device, torch.bfloat16).eval()
    native = NativeAttention(native_config, 0).to(device, torch.bfloat16).eval()
    native.load_state_dict(ours.state_dict())
    hidden = torch.randn(1, 1, config.hidden_size, device=device).bfloat16()
    positions = torch.tensor([[context]], device=device)
    position_embeddings = RotaryEmbedding(config).to(device)(hidden, positions)
    filled = [torch.randn(1, 1, context, width, device=device).bfloat16() for width in (LATENT, ROPE)]
    caches = {"ours": DynamicCache(config=config), "native": DynamicCache(config=native_config)}
    adopt_growing_layers(caches["ours"], 1)
    for cache in caches.values():
        cache.update(*filled, 0)
    # Native rotates with tables of the full width.
    twice = tuple(torch.cat((table, table), dim=-1) for table in position_embeddings)
    steps = {
        "native": lambda: native(hidden, twice, None, caches["native"]),
        "ours": lambda: ours(hidden, position_embeddings, None, caches["ours"], absorbed=True),
    }
    median = time_interleaved(steps, repeats, device, block=4)
    row = {
        "native ms": median["native"] * 1e3,
        "ours ms": median["ours"] * 1e3,
        "ratio": median["native"] / median["ours"],
    }

    def graphs() -> dict:
        seconds = seconds_of_each({name: [step] for name, step in steps.items()}, device, repeats)
        return {
            "native graph ms": seconds["native"] * 1e3,
            "ours graph ms": seconds["ours"] * 1e3,
            "graph ratio": seconds["native"] / seconds["ours"],
        }

    captured = attempt(graphs)
    if LOST not in captured and "failed" in captured:  # the steps as called count without it
        captured = {"graph failed": captured["failed"]}
    return row | captured


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--megabytes", type=int, default=1024, help="size of the copy that bandwidths are compared with"
    )
    parser.add_argument("--warm", action="store_true", help="only compile")
    add_resume(parser)
    args = parser.parse_args()
    bandwidth = 0.0 if args.warm else copy_bandwidth(args.device, args.megabytes)
    rows, failed = Rows("mla_kernel", ("batch", "context"), args, args.device), False
    for batch in args.batches:
        for context in args.contexts:
            if rows.has(batch, context):
                continue
            case = batch, context, args.heads, args.device, bandwidth
            row = {"batch": batch, "context": context} | attempt(lambda case=case: kernel_row(*case))
            print(row, flush=True)
            failed |= "failed" in row
            if not args.warm:
                rows.keep(row)
    if args.warm:
        sys.exit(failed)
    heads = {"num_attention_heads": args.heads, "num_key_value_heads": args.heads}
    sizes = {"hidden_size": args.hidden, "num_hidden_layers": 1, "n_group": 1, "topk_group": 1, **heads}
    rows = Rows("mla_layer", ("context",), args, args.device)
    for context in reversed(args.contexts):  # the longest counts most
        if not rows.has(context):
            row = attempt(lambda context=context: layer_row(context, args.device, sizes, args.repeats))
            rows.keep({"context": context} | row)
    report("mla_layer", rows.rows, args.device, args.out)


if __name__ == "__main__":
    main()
