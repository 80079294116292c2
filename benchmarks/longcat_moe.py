"""One MoE layer of LongCat-Flash against the native class, patched to hold the weights, and by real experts hit.

The numbers of experts are those of LongCat-Flash-Chat (512 real, 256 zero, 12 per token), the matrices are smaller. The
native class cannot load a checkpoint: it is given one stack with unused rows for the zero experts, of which ours is the
front, so that both read the same memory.

    python benchmarks/longcat_moe.py --tokens 1 16 256
"""

import argparse
from itertools import cycle
from pathlib import Path

import torch
from common import report, save, time_interleaved
from transformers.models.longcat_flash import LongcatFlashConfig as NativeConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE as NativeMoE

from hf_moe.models.configuration_longcat_flash import LongcatFlashConfig
from hf_moe.models.layer_zero_experts import ZeroExpertMoE

# Added to the zero experts' bias: as trained (about 8 real experts a token), none, and fewer and fewer real ones.
BIASES = {"as routed": 0.0, "no zero expert": -10.0, "more zero experts": 0.002, "zero experts only": 10.0}


def make_pair(args: argparse.Namespace, dtype: torch.dtype) -> tuple[ZeroExpertMoE, NativeMoE]:
    sizes = {
        "hidden_size": args.hidden,
        "expert_ffn_hidden_size": args.intermediate,
        "n_routed_experts": args.experts,
        "zero_expert_num": args.zero_experts,
        "moe_topk": args.top_k,
    }
    config = LongcatFlashConfig(**sizes)
    config._experts_implementation = "hf_moe"
    with torch.device("meta"):
        ours, native = ZeroExpertMoE(config), NativeMoE(NativeConfig(**sizes))
    rows = args.experts + args.zero_experts
    generator = torch.Generator(args.device).manual_seed(0)

    def random(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device=args.device).normal_(std=0.02, generator=generator)

    gate_up = random(rows, 2 * args.intermediate, args.hidden)
    down = random(args.experts, args.hidden, args.intermediate)
    classifier = random(rows, args.hidden, dtype=torch.float32)
    bias = torch.zeros(rows, device=args.device)
    for module, stack in ((ours, gate_up[: args.experts]), (native, gate_up)):
        module.experts.gate_up_proj = torch.nn.Parameter(stack, requires_grad=False)
        module.experts.down_proj = torch.nn.Parameter(down, requires_grad=False)
        module.router.classifier.weight = torch.nn.Parameter(classifier, requires_grad=False)
        module.router.e_score_correction_bias = bias
    return ours.eval(), native.eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--experts", type=int, default=512)
    parser.add_argument("--zero-experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for dtype_name in args.dtypes:
        dtype = getattr(torch, dtype_name)
        ours, native = make_pair(args, dtype)
        for tokens in args.tokens:
            # Other tokens at each call, and with them other experts: weights come from memory.
            inputs = [torch.randn(1, tokens, args.hidden, dtype=dtype, device=args.device) for _ in range(16)]
            for case, shift in BIASES.items():
                bias = ours.router.e_score_correction_bias
                bias[args.experts :] = shift
                if case == "as routed":
                    expected, result = native(inputs[0]).float(), ours(inputs[0]).float()
                    error = (result - expected).norm() / expected.norm()
                    assert error < (2e-2 if dtype != torch.float32 else 1e-5), f"wrong: {error:.1e}"

                def turns(module, inputs=inputs):
                    following = cycle(inputs)
                    return lambda: module(next(following))

                cases = {"hf_moe": turns(ours), "native": turns(native)}
                median = time_interleaved(cases, args.repeats, args.device, block=3)
                loads = []
                for states in inputs:
                    ours(states)
                    loads.append(ours.load())
                row = {"dtype": dtype_name, "tokens": tokens, "routing": case}
                row["real experts a token"] = sum(load.real_experts_per_token for load in loads) / len(loads)
                row["real experts hit"] = sum((load.real > 0).sum().item() for load in loads) / len(loads)
                row |= {f"{name} ms": seconds * 1e3 for name, seconds in median.items()}
                rows.append({**row, "ratio": median["native"] / median["hf_moe"]})
                save("longcat_moe", rows, args.device, args.out)
    report("longcat_moe", rows, args.device, args.out)


if __name__ == "__main__":
    main()
