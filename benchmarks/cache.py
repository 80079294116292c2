"""Bytes of cache per token, measured on real caches: ours, native, and an expanded key and value cache by formula.

python benchmarks/cache.py
"""

import argparse
from pathlib import Path

import torch
from common import report
from decode import SIZES, build


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ours, native = build("cpu", torch.bfloat16)
    ids = torch.randint(0, SIZES["vocab_size"], (1, args.tokens))
    rows = []
    for name, model in (("ours", ours), ("native", native)):
        cache = model(ids, use_cache=True).past_key_values
        held = sum(
            tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in (layer.keys, layer.values)
        )
        rows.append({"cache": name, "bytes per token": held / args.tokens})
    heads, layers = SIZES["num_attention_heads"], SIZES["num_hidden_layers"]
    width = SIZES["qk_nope_head_dim"] + SIZES["qk_rope_head_dim"] + SIZES["v_head_dim"]
    rows.append({"cache": "expanded keys and values", "bytes per token": float(2 * heads * width * layers)})
    for row in rows:
        row["against ours"] = row["bytes per token"] / rows[0]["bytes per token"]
    report("cache", rows, "cpu", args.out)


if __name__ == "__main__":
    main()
