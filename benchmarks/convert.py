"""Conversion of a synthetic checkpoint with real layer shapes: peak memory, and throughput against a plain file copy.

    python benchmarks/convert.py --gigabytes 4

The checkpoint has DeepSeek-V3's shapes (576 rows in `kv_a_proj_with_mqa`), as many experts as fit. It is converted from
block FP8 to bfloat16 and back, each in a child process of its own, whose peak of resident memory is that of everything:
interpreter, libraries and tensors. In the same run, taking turns, `shutil.copyfile` copies the same bytes on the same
disk: the files that the conversion reads and, since a conversion does not write as much as it reads, those that it
writes. A conversion's rate counts bytes read plus bytes written, and so does a copy's. A pass begins with everything
flushed to the disk; neither side waits for the disk at its end.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import report
from safetensors.torch import save_file

HIDDEN, EXPERT, DENSE, VOCAB = 7168, 2048, 18432, 16160
ATTENTION = {
    "q_a_proj": (1536, HIDDEN),
    "q_b_proj": (24576, 1536),
    "kv_a_proj_with_mqa": (576, HIDDEN),
    "kv_b_proj": (32768, 512),
    "o_proj": (HIDDEN, 16384),
}
# Of the process itself: getrusage's maximum would begin with that of the parent.
PEAK = """
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
"""
CHILD = """
import json, sys, time
from hf_moe.conversion.command import TARGETS
from hf_moe.conversion.run import convert
from hf_moe.conversion.source import open_source

source, target, to, workers, shard = sys.argv[1:]
begin = time.perf_counter()
opened = open_source(source)
summary = convert(
    opened, TARGETS[to](opened), target, workers=int(workers), max_shard_size=shard, progress=False
)
seconds = time.perf_counter() - begin
print(json.dumps({"seconds": seconds, "peak": peak(), "read": summary.bytes_read, "written": summary.bytes_written}))
"""
IMPORTS = "import hf_moe.conversion.command; print(peak())"


def weight_shapes(total: int) -> list[tuple[str, tuple[int, int]]]:
    """Names and shapes of FP8 weights of about `total` bytes: a dense layer, an MoE layer, experts until it is full."""
    shapes = [(f"self_attn.{name}", shape) for name, shape in ATTENTION.items()]
    dense = [("mlp.gate_proj", (DENSE, HIDDEN)), ("mlp.up_proj", (DENSE, HIDDEN)), ("mlp.down_proj", (HIDDEN, DENSE))]
    weights = [(f"model.layers.0.{name}.weight", shape) for name, shape in (*shapes, *dense)]
    weights += [(f"model.layers.1.{name}.weight", shape) for name, shape in shapes]
    size, expert = sum(rows * columns for _, (rows, columns) in weights), 0
    while size + 3 * EXPERT * HIDDEN <= total:
        for name, shape in (("gate", (EXPERT, HIDDEN)), ("up", (EXPERT, HIDDEN)), ("down", (HIDDEN, EXPERT))):
            weights.append((f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight", shape))
        size, expert = size + 3 * EXPERT * HIDDEN, expert + 1
    return weights


def make_checkpoint(folder: Path, total: int, shard_bytes: int) -> None:
    """Writes random block FP8 weights, in files of about `shard_bytes`, and what else such a checkpoint has."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    plain = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    held = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in plain.items()}
    weight_map, index = {}, 0

    def flush() -> None:
        nonlocal held, index
        index += 1
        name = f"model-{index:05d}.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, name))
        held = {}

    for name, (rows, columns) in weight_shapes(total):
        # Random codes without the two NaNs: values of all magnitudes, made quickly.
        codes = torch.randint(0, 126, (rows, columns), generator=generator, dtype=torch.uint8)
        codes[:, 1::2] += 128
        codes[::128, ::128] = 126  # 448, which quantising reaches in every block
        grid = (-(-rows // 128), -(-columns // 128))
        held[name] = codes.view(torch.float8_e4m3fn)
        held[f"{name}_scale_inv"] = torch.rand(grid, generator=generator) * 1e-4 + 1e-5
        if sum(tensor.nbytes for tensor in held.values()) >= shard_bytes:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def run_child(code: str, *arguments: str) -> str:
    """Standard output of a Python process."""
    return subprocess.run(
        [sys.executable, "-c", PEAK + code, *arguments], check=True, capture_output=True, text=True
    ).stdout


def run_copy(source: Path, target: Path) -> dict[str, float]:
    """Copies the weight files of a folder one after another."""
    target.mkdir()
    begin = time.perf_counter()
    files = sorted(source.glob("*.safetensors"))
    for path in files:
        shutil.copyfile(path, target / path.name)
    size = sum(path.stat().st_size for path in files)
    return {"seconds": time.perf_counter() - begin, "read": size, "written": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--folder", type=Path, help="Where to work; left out: a temporary folder, removed at the end.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        rows = measure(Path(scratch), args)
    report("convert", rows, "cpu", args.out)


def measure(scratch: Path, args: argparse.Namespace) -> list[dict]:
    """Every case in turn, `--turns` times; a row a direction."""
    fp8, bf16, out = scratch / "fp8", scratch / "bf16", scratch / "out"
    make_checkpoint(fp8, int(args.gigabytes * 1e9), 10**9)
    options = (str(args.workers), args.max_shard_size)
    imports = int(run_child(IMPORTS))
    run_child(CHILD, str(fp8), str(bf16), "bf16", *options)
    cases = {
        "fp8 to bf16": lambda: json.loads(run_child(CHILD, str(fp8), str(out), "bf16", *options)),
        "bf16 to fp8": lambda: json.loads(run_child(CHILD, str(bf16), str(out), "fp8", *options)),
        "copy of fp8": lambda: run_copy(fp8, out),
        "copy of bf16": lambda: run_copy(bf16, out),
    }
    results: dict[str, list[dict]] = {name: [] for name in cases}
    order, shuffler = list(cases), random.Random(0)
    for _ in range(args.turns):
        shuffler.shuffle(order)
        for name in order:
            os.sync()
            results[name].append(cases[name]())
            shutil.rmtree(out)
    rates = {
        name: statistics.median((turn["read"] + turn["written"]) / turn["seconds"] for turn in turns)
        for name, turns in results.items()
    }
    rows = []
    for name, copies in (
        ("fp8 to bf16", ("copy of fp8", "copy of bf16")),
        ("bf16 to fp8", ("copy of bf16", "copy of fp8")),
    ):
        peak = max(turn["peak"] for turn in results[name])
        seconds = statistics.median(turn["seconds"] for turn in results[name])
        rows.append(
            {
                "case": name,
                "workers": args.workers,
                "read_gb": results[name][0]["read"] / 1e9,
                "written_gb": results[name][0]["written"] / 1e9,
                "seconds": seconds,
                "gb_per_s": rates[name] / 1e9,
                "copy_of_its_input_gb_per_s": rates[copies[0]] / 1e9,
                "copy_of_its_output_gb_per_s": rates[copies[1]] / 1e9,
                "share_of_slower_copy": rates[name] / min(rates[copy] for copy in copies),
                "share_of_faster_copy": rates[name] / max(rates[copy] for copy in copies),
                "peak_mb": peak / 1e6,
                "peak_beyond_imports_mb": (peak - imports) / 1e6,
                "load_average": os.getloadavg()[0],
            }
        )
    return rows


if __name__ == "__main__":
    main()
