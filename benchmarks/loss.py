"""Loss of a language model head, forward and backward: in pieces of the vocabulary against all logits at once.

Time with the two taking turns, and peak memory above what is held before, each in a process of its own on the CPU.

    python benchmarks/loss.py --tokens 1024 4096
"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from common import process_memory, report, time_interleaved
from torch.nn import functional as F

from hf_moe.models.op_loss import linear_cross_entropy


def whole(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What Transformers does: logits, a float32 copy, cross entropy."""
    return F.cross_entropy(F.linear(states, weight).float(), targets)


def pieces(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(states, weight, targets).mean()


CASES = {"whole": whole, "pieces": pieces}


def prepare(args, tokens: int):
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    states = torch.randn(tokens, args.hidden, dtype=dtype, device=args.device, requires_grad=True)
    weight = (torch.randn(args.vocab, args.hidden, device=args.device) * args.hidden**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, args.vocab, (tokens,), device=args.device)
    return states, weight, targets


def step(name: str, inputs) -> torch.Tensor:
    states, weight, _ = inputs
    states.grad = weight.grad = None
    loss = CASES[name](*inputs)
    loss.backward()
    return loss.detach()


def kept_step(name: str, inputs, values: dict[str, list[torch.Tensor]]) -> None:
    """`step`, whose loss and gradients stay in `values` to be compared."""
    values[name] = [step(name, inputs), inputs[0].grad, inputs[1].grad]


def peak_bytes(args, name: str, tokens: int) -> int:
    """Peak above inputs, in this process; the gradients of the inputs are part of it."""
    inputs = prepare(args, tokens)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(name, inputs)
        return torch.cuda.max_memory_allocated() - before
    few = [tensor.detach()[:8].requires_grad_() for tensor in inputs[:2]]
    step(name, [*few, inputs[2][:8] % 8])  # what libraries allocate once
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here
    before = process_memory("VmRSS")
    step(name, inputs)
    return process_memory("VmHWM") - before


def peak_in_own_process(args, name: str, tokens: int) -> int:
    if args.device != "cpu":
        return peak_bytes(args, name, tokens)
    command = [sys.executable, __file__, "--peak-of", name, "--tokens", str(tokens)]
    for option in ("vocab", "hidden", "dtype", "device"):
        command += [f"--{option}", str(getattr(args, option))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--vocab", type=int, default=129280)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak-of", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(peak_bytes(args, args.peak_of, args.tokens[0]))
        return
    rows = []
    for tokens in args.tokens:
        inputs, values = prepare(args, tokens), {}
        cases = {name: partial(kept_step, name, inputs, values) for name in CASES}
        warm_ups = {name: partial(step, name, prepare(args, 64)) for name in CASES}
        median = time_interleaved(cases, args.repeats, args.device, warm_ups=warm_ups)
        for ours, expected in zip(values["pieces"], values["whole"]):
            error = (ours.float() - expected.float()).norm() / expected.float().norm()
            assert error < (1e-5 if args.dtype == "float32" else 2e-2), f"wrong by {error:.1e}"
        del values
        logits = tokens * args.vocab * 4
        row = {"tokens": tokens, "float32 logits MB": logits / 1e6}
        peaks = {name: peak_in_own_process(args, name, tokens) for name in CASES}
        row |= {f"{name} peak MB": peaks[name] / 1e6 for name in CASES}
        gradients = sum(tensor.numel() * tensor.element_size() for tensor in inputs[:2])
        row["pieces without gradients / logits"] = (peaks["pieces"] - gradients) / logits
        row |= {f"{name} s": median[name] for name in CASES}
        rows.append({**row, "time ratio": median["pieces"] / median["whole"]})
    report("loss", rows, args.device, args.out)


if __name__ == "__main__":
    main()
