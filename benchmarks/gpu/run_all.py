"""The GPU queue: the `gpu`-marked tests, then every benchmark on the device. Meant to stay under nine minutes.

    python benchmarks/gpu/run_all.py --out results_folder

Exits with 1 if a test or a benchmark failed, after having run the rest.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUEUE = [
    ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"],
    ["benchmarks/gpu/expert_kernels.py", "--seconds", "150"],
    ["benchmarks/gpu/linear_fp8.py", "--rows", "1", "16", "64", "4096"],
    ["benchmarks/gpu/mla_decode.py", "--contexts", "4096", "32768", "--batches", "1", "16"],
    ["benchmarks/gpu/expert_kernels.py", "--seconds", "150"],
    ["benchmarks/decode.py", "--device", "cuda", "--contexts", "256", "4096", "16384", "32768"],
    ["benchmarks/experts.py", "--device", "cuda", "--dtypes", "bfloat16", "--layers", "2"],
    # LongCat-Flash-Chat's shapes: 512 experts of 2048 x 6144, 12 per token (38.7 GB a layer; native has half more).
    ["benchmarks/longcat_moe.py", "--device", "cuda", "--dtypes", "bfloat16", "--hidden", "6144"]
    + ["--intermediate", "2048"],
]
LIMIT_SECONDS = 9 * 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and JSON results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start, failed = time.monotonic(), []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    for number, arguments in enumerate(QUEUE):
        left = LIMIT_SECONDS - (time.monotonic() - start)
        folder = args.out / f"{number}_{Path(arguments[0]).stem.strip('-')}"
        command = [sys.executable, *arguments]
        if arguments[0] != "-m":
            command += ["--out", str(folder)]
        print(f"[{time.monotonic() - start:.0f} s] {' '.join(arguments)}", flush=True)
        try:
            failed += [arguments] if subprocess.run(command, cwd=ROOT, env=environment, timeout=left).returncode else []
        except subprocess.TimeoutExpired:
            failed.append(arguments)
            print("stopped: the queue's time is over", flush=True)
            break
    for arguments in failed:
        print(f"FAILED: {' '.join(arguments)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
