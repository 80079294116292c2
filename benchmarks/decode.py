"""One decode step against native Transformers, over the length of the context.

A 4-layer model of the DeepSeek-V3 architecture (hidden 1024, 16 heads, MLA dimensions 512/64/128/128, 32 experts of
which 4 are used) with random bfloat16 weights, the same in both classes, batch 1.

    python benchmarks/decode.py --contexts 256 4096 16384
"""

import argparse
from pathlib import Path

import torch
from common import report, save, time_interleaved
from transformers import DynamicCache
from transformers.models.deepseek_v3 import DeepseekV3Config as NativeConfig
from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM as NativeModel

from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config
from hf_moe.models.layer_cache import adopt_growing_layers
from hf_moe.models.modeling_deepseek_v3 import DeepseekV3ForCausalLM

SIZES = dict(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=2048,
    moe_intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=16,
    n_routed_experts=32,
    num_experts_per_tok=4,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=512,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    max_position_embeddings=65536,
)


def build(device: str, dtype: torch.dtype):
    torch.manual_seed(0)
    ours = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES)).to(device, dtype).eval()
    native = NativeModel(NativeConfig(**SIZES, num_mtp_layers=0)).to(device, dtype).eval()
    native.load_state_dict(ours.state_dict())
    return ours, native


def filled_cache(model, context: int, growing: bool) -> DynamicCache:
    """A cache of random latents; timing does not depend on what they are."""
    cache = DynamicCache(config=model.config)
    if growing:
        adopt_growing_layers(cache, SIZES["num_hidden_layers"])
    options = {"dtype": model.dtype, "device": model.device}
    for layer in range(SIZES["num_hidden_layers"]):
        cache.update(torch.randn(1, 1, context, 512, **options), torch.randn(1, 1, context, 64, **options), layer)
    return cache


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 4096, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--block", type=int, default=4, help="decode steps in a row, before the peer's turn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ours, native = build(args.device, getattr(torch, args.dtype))
    token = torch.tensor([[5]], device=args.device)
    rows = []
    for context in args.contexts:
        caches = {"ours": filled_cache(ours, context, True), "native": filled_cache(native, context, False)}

        def step(model, cache):
            return lambda: model(token, past_key_values=cache, use_cache=True)

        cases = {"native": step(native, caches["native"]), "ours": step(ours, caches["ours"])}
        median = time_interleaved(cases, args.repeats, args.device, block=args.block)
        rows.append(
            {
                "context": context,
                "dtype": args.dtype,
                "native ms": median["native"] * 1e3,
                "ours ms": median["ours"] * 1e3,
                "ratio": median["native"] / median["ours"],
            }
        )
        save("decode", rows, args.device, args.out)
    report("decode", rows, args.device, args.out)


if __name__ == "__main__":
    main()
