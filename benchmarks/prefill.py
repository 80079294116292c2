"""One pass over a long prompt against native Transformers: seconds, and peak memory above the model.

A 2-layer model of the DeepSeek-V3 architecture (sizes of `decode.py`, 4 heads) with random weights, the same in both
classes, batch 1, logits of the last token alone. Each pass runs in a process of its own, the peers taking turns.

    python benchmarks/prefill.py --tokens 2048 8192 16384
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from common import report, run_alone, save
from decode import SIZES

PASS = """
import json, sys, time, zlib
import torch
from common import process_memory
peer, tokens, dtype, sizes = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3]), json.loads(sys.argv[4])
if peer == "ours":
    from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config as Config
    from hf_moe.models.modeling_deepseek_v3 import DeepseekV3ForCausalLM as Model
else:
    from transformers.models.deepseek_v3 import DeepseekV3Config as Config, DeepseekV3ForCausalLM as Model
torch.set_grad_enabled(False)
model = Model(Config(**sizes, attn_implementation="sdpa")).to(dtype).eval()
for name, parameter in model.named_parameters():
    torch.manual_seed(zlib.crc32(name.encode()))
    parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
torch.manual_seed(0)
prompt = torch.randint(3, sizes["vocab_size"], (1, tokens))
model(prompt[:, :128], logits_to_keep=1)  # what a first call sets up

open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = process_memory("VmRSS")
start = time.perf_counter()
logits = model(prompt, logits_to_keep=1).logits
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak": process_memory("VmHWM") - before, "logits": logits[0, -1, :16].tolist()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sizes = {**SIZES, "num_hidden_layers": args.layers}
    sizes |= {"num_attention_heads": args.heads, "num_key_value_heads": args.heads}
    rows = []
    for tokens in args.tokens:
        runs: dict[str, list[dict]] = {"native": [], "ours": []}
        for _ in range(args.repeats):
            for peer, results in runs.items():
                results.append(run_alone(PASS, peer, str(tokens), args.dtype, json.dumps(sizes)))
        row: dict = {"tokens": tokens}
        for peer, results in runs.items():
            row[f"{peer} s"] = statistics.median(result["seconds"] for result in results)
            row[f"{peer} peak MB"] = statistics.median(result["peak"] for result in results) / 1e6
        first, second = (torch.tensor(results[0]["logits"]) for results in runs.values())
        row["logits differ by"] = ((first - second).norm() / first.norm()).item()
        row["time ratio"] = row["native s"] / row["ours s"]
        row["memory ratio"] = row["native peak MB"] / row["ours peak MB"]
        rows.append(row)
        save("prefill", rows, "cpu", args.out)
    report("prefill", rows, "cpu", args.out)


if __name__ == "__main__":
    main()
