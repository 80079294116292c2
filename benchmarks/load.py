"""Load time and peak memory against native Transformers, each in a process of its own, taking turns.

Writes a sharded bfloat16 checkpoint of random weights in upstream layout to a temporary folder first.

    python benchmarks/load.py --layers 6
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from common import report, run_alone

LOADER = """
import json, sys, time
import torch
from common import process_memory
folder, peer = sys.argv[1:]
if peer == "ours":
    import hf_moe
    from hf_moe.models.modeling_deepseek_v3 import DeepseekV3ForCausalLM
else:
    from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM

before = process_memory("VmRSS")
start = time.perf_counter()
model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
seconds = time.perf_counter() - start
peak = process_memory("VmHWM") - before
loaded = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
print(json.dumps({"seconds": seconds, "peak": peak, "loaded": loaded}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from decode import SIZES

    from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config
    from hf_moe.models.modeling_deepseek_v3 import DeepseekV3ForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**SIZES, "num_hidden_layers": args.layers})).bfloat16()
        model.save_pretrained(folder, max_shard_size="100MB")
        del model
        runs: dict[str, list[dict]] = {"native": [], "ours": []}
        for _ in range(args.repeats + 1):
            for peer, results in runs.items():
                results.append(run_alone(LOADER, folder, peer))
    rows = []
    for peer, results in runs.items():
        results = results[1:]  # the first round warms the page cache
        loaded = results[0]["loaded"]
        rows.append(
            {
                "peer": peer,
                "loaded MB": loaded / 1e6,
                "seconds": statistics.median(result["seconds"] for result in results),
                "peak MB": statistics.median(result["peak"] for result in results) / 1e6,
                "peak / loaded": statistics.median(result["peak"] for result in results) / loaded,
            }
        )
    report("load", rows, "cpu", args.out)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
