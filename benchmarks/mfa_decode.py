"""One decode step of Step3 against the plain form, which repeats the one key and value head for every query head.

A 4-layer model of the Step3 architecture with 64 query heads of 256 (hidden 1024, low-rank query 512, 16 experts of
which 3 are used) with random weights, the same in both forms, batch 1. Plain is `repeat_kv` before
`scaled_dot_product_attention`, as Transformers does for grouped queries with a mask. The last columns are the traffic
of attention on paper: the plain form reads the cache, writes the repeated copy and reads that.

    python benchmarks/mfa_decode.py --contexts 4096 16384
"""

import argparse
import functools
from pathlib import Path

import torch
from common import report, time_interleaved
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import repeat_kv

from hf_moe.models import layer_mfa
from hf_moe.models.configuration_step3_text import Step3TextConfig
from hf_moe.models.layer_cache import adopt_growing_layers
from hf_moe.models.modeling_step3_text import Step3TextForCausalLM

LAYERS, HEADS, DIM = 4, 64, 256
SIZES = dict(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    head_dim=DIM,
    share_q_dim=512,
    moe_layers_enum="1,2,3",
    moe_num_experts=16,
    moe_top_k=3,
    moe_intermediate_size=512,
    share_expert_dim=512,
)


def repeated_attention(query, key, value, attention_mask, scaling, dropout=0.0):
    """What `shared_head_attention` computes, in the plain form."""
    heads = query.shape[2]
    output = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), repeat_kv(key, heads), repeat_kv(value, heads), attention_mask, scale=scaling
    )
    return output.transpose(1, 2), None


def filled_cache(model, context: int) -> DynamicCache:
    """A cache of random keys and values; timing does not depend on what they are."""
    cache = DynamicCache(config=model.config)
    adopt_growing_layers(cache, LAYERS)
    for layer in range(LAYERS):
        states = (torch.randn(1, 1, context, DIM, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(*states, layer)
    return cache


def step(model, cache: DynamicCache, attention) -> torch.Tensor:
    """Logits of one token behind the context, which stays as it is."""
    kept, layer_mfa.shared_head_attention = layer_mfa.shared_head_attention, attention
    try:
        token = torch.tensor([[5]], device=model.device)
        logits = model(token, past_key_values=cache, use_cache=True).logits
    finally:
        layer_mfa.shared_head_attention = kept
    cache.crop(-1)
    return logits


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--block", type=int, default=2, help="decode steps in a row, before the other form's turn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for dtype in args.dtypes:
        torch.manual_seed(0)
        model = Step3TextForCausalLM(Step3TextConfig(**SIZES)).to(args.device, getattr(torch, dtype)).eval()
        for context in args.contexts:
            cache = filled_cache(model, context)
            cases = {
                "plain": functools.partial(step, model, cache, repeated_attention),
                "ours": functools.partial(step, model, cache, layer_mfa.shared_head_attention),
            }
            difference = (cases["plain"]() - cases["ours"]()).abs().max().item()
            assert difference < (1e-3 if dtype == "float32" else 0.1), f"the two forms differ by {difference}"
            median = time_interleaved(cases, args.repeats, args.device, block=args.block)
            element = model.dtype.itemsize * LAYERS * context * DIM / 1e6
            rows.append(
                {
                    "context": context,
                    "dtype": dtype,
                    "plain ms": median["plain"] * 1e3,
                    "ours ms": median["ours"] * 1e3,
                    "ratio": median["plain"] / median["ours"],
                    "plain MB": (4 * HEADS + 2) * element,
                    "ours MB": 2 * element,
                }
            )
    report("mfa_decode", rows, args.device, args.out)


if __name__ == "__main__":
    main()
