"""Block FP8 linear layers of DeepSeek-V3: W8A8 and W8A16 against a bfloat16 product of the vendor library.

Few rows are judged by the bandwidth at which the FP8 weight is read, against that of a copy on the device; many rows by
their arithmetic. The quantisation of the activations is part of the W8A8 time.

    python benchmarks/gpu/linear_fp8.py --rows 1 16 64 4096

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
from timing import Rows, add_resume, attempt, copies_beyond_cache, copy_bandwidth, seconds_of_each  # noqa: E402

from hf_moe.models import kernel_fp8, op_quant  # noqa: E402

# Output and input features of V3's layers, by name.
LAYERS = {
    "q_a_proj": (1536, 7168),
    "kv_a_proj_with_mqa": (576, 7168),
    "q_b_proj": (24576, 1536),
    "o_proj": (7168, 16384),
    "mlp.down_proj": (7168, 18432),
}


def cases(rows: int, out_features: int, in_features: int, device: str, limit: int = 64) -> dict[str, list]:
    """Calls of each form, each with operands of its own, of which there are at most `limit`."""
    count = copies_beyond_cache(out_features * in_features, limit)
    x = torch.randn(rows, in_features, device=device).bfloat16()
    weights = []
    for _ in range(count):
        weight = torch.randn(out_features, in_features, device=device)
        weights.append((weight.bfloat16(), *op_quant.quantize_block_fp8(weight)))
    plain = weights[: copies_beyond_cache(2 * out_features * in_features)]

    def w8a8(values, scale):
        inputs, x_scale = kernel_fp8.quantize_rows(x)
        return kernel_fp8.multiply(inputs, values, scale, out_dtype=x.dtype, x_scale=x_scale)

    def w8a16(values, scale):
        return kernel_fp8.multiply(x, values, scale, out_dtype=x.dtype)

    # Quantised activations are off by 2 to 3 % themselves.
    reference = x.float() @ op_quant.dequantize_block_fp8(*weights[0][1:]).t()
    for name, function, limit in (("w8a8", w8a8, 5e-2), ("w8a16", w8a16, 1e-2)):
        error = (function(*weights[0][1:]).float() - reference).norm() / reference.norm()
        if not error < limit:
            raise ValueError(f"{name} is wrong by {error:.1e}: not timed")
    return {
        "bfloat16": [lambda w=w: F.linear(x, w) for w, _, _ in plain],
        "w8a8": [lambda v=v, s=s: w8a8(v, s) for _, v, s in weights],
        "w8a16": [lambda v=v, s=s: w8a16(v, s) for _, v, s in weights],
    }


def measure(rows: int, sizes: tuple[int, int], device: str, bandwidth: float) -> dict:
    out_features, in_features = sizes
    calls = cases(rows, out_features, in_features, device)
    seconds = seconds_of_each(calls, device)
    row = {f"{form} us": value * 1e6 for form, value in seconds.items()}
    for form in ("w8a8", "w8a16"):
        row[f"{form} of copy bandwidth"] = out_features * in_features / seconds[form] / bandwidth
        row[f"{form} TFLOP/s"] = 2 * rows * out_features * in_features / seconds[form] / 1e12
        row[f"{form} against bfloat16"] = seconds["bfloat16"] / seconds[form]
    return row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 4096])
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), help="names, or sizes such as 256x512")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--megabytes", type=int, default=1024, help="size of the copy that bandwidths are compared with"
    )
    parser.add_argument("--warm", action="store_true", help="only compile")
    add_resume(parser)
    args = parser.parse_args()
    bandwidth = 0.0 if args.warm else copy_bandwidth(args.device, args.megabytes)
    table, failed = Rows("linear_fp8", ("layer", "rows"), args, args.device), False
    for name in args.layers:
        sizes = LAYERS.get(name) or tuple(map(int, name.split("x")))
        for rows in args.rows:
            if args.warm:
                forms = attempt(lambda sizes=sizes, rows=rows: cases(rows, *sizes, args.device, 2))
                failed |= "failed" in forms
                print(name, rows, forms.get("failed", "compiled"))
                continue
            if table.has(name, rows):
                continue
            row = {"layer": name, "rows": rows, "copy GB/s": bandwidth / 1e9}
            row |= attempt(lambda sizes=sizes, rows=rows: measure(rows, sizes, args.device, bandwidth))
            table.keep(row)
    if table.rows:
        report("linear_fp8", table.rows, args.device, args.out)
    sys.exit(failed)


if __name__ == "__main__":
    main()
