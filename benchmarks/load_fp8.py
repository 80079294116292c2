"""An FP8 checkpoint on the CPU: memory after loading and in use, and the time of a forward pass, kept or decoded.

Writes an FP8 checkpoint of random weights in upstream layout to a temporary folder first. Every figure comes from a
process of its own; memory is the resident set, less what the process had before loading.

    python benchmarks/load_fp8.py --layers 6
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
import hf_moe
from common import process_memory
from hf_moe.models.modeling_deepseek_v3 import DeepseekV3ForCausalLM

folder, dequantize = sys.argv[1], sys.argv[2] == "decoded"
before = process_memory("VmRSS")
start = time.perf_counter()
model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, dequantize=dequantize)
seconds = time.perf_counter() - start
peak = process_memory("VmHWM") - before
held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
with torch.no_grad():
    model(torch.arange(64).unsqueeze(0))
    in_use = process_memory("VmHWM") - before
    cache = model(torch.arange(8).unsqueeze(0), use_cache=True).past_key_values
    steps = []
    for _ in range(9):
        start = time.perf_counter()
        model(torch.tensor([[5]]), past_key_values=cache)
        steps.append(time.perf_counter() - start)
print(json.dumps({"seconds": seconds, "held": held, "peak": peak, "in use": in_use, "step": sorted(steps)[4]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from decode import SIZES
    from transformers import FineGrainedFP8Config

    from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config
    from hf_moe.models.modeling_deepseek_v3 import DeepseekV3ForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        plain, quantised = f"{folder}/plain", f"{folder}/fp8"
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**SIZES, "num_hidden_layers": args.layers})).bfloat16()
        model.save_pretrained(plain)
        model = DeepseekV3ForCausalLM.from_pretrained(plain, quantization_config=FineGrainedFP8Config())
        model.save_pretrained(quantised, max_shard_size="100MB")
        del model
        stored = sum(path.stat().st_size for path in Path(quantised).glob("*.safetensors"))
        runs: dict[str, list[dict]] = {"kept": [], "decoded": []}
        for _ in range(args.repeats + 1):
            for form, results in runs.items():
                results.append(run_alone(LOADER, quantised, form))
    rows = []
    for form, results in runs.items():
        median = {key: statistics.median(result[key] for result in results[1:]) for key in results[0]}
        rows.append(
            {
                "weights": form,
                "files MB": stored / 1e6,
                "seconds": median["seconds"],
                "held / files": median["held"] / stored,
                "peak / files": median["peak"] / stored,
                "peak with a forward / files": median["in use"] / stored,
                "decode step ms": median["step"] * 1e3,
            }
        )
    report("load_fp8", rows, "cpu", args.out)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
