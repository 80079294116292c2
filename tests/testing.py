"""What every test shares: comparison with named tolerances, the golden folders, and poisoned memory."""

import contextlib
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from hf_moe.models.triton_compat import HAS_TRITON

GOLDENS = Path(__file__).parent / "goldens"

# Relative error of the whole tensor (norm of the difference over norm of the reference), by format. A test names a
# format, never a number.
TOL = {
    "exact": 0.0,
    "float64": 1e-12,
    "float32": 1e-5,
    # Parameters after several steps whose gradients were summed in another order.
    "float32_grad": 1e-4,
    # Low-rank factors after AdamW's first steps, which go a whole step by the sign of however small a gradient.
    "float32_adamw": 5e-4,
    # Products of FP8 operands, against exact ones of the same quantised operands.
    "fp8": 1e-2,
    "bfloat16": 1e-2,
    # Other kernels: sums in float32, rounded once.
    "bfloat16_kernel": 5e-3,
    # Gradients that went through several bfloat16 products, each rounded on its way.
    "bfloat16_grad": 2e-2,
    # Experts, outputs and gradients: every product summed in float32, rounded once per stored tensor.
    "float64_experts": 1e-12,
    "float32_experts": 1e-5,
    "float16_experts": 1e-3,
    "bfloat16_experts": 5e-3,
    "fp8_experts": 1e-2,
}

# `modeling_*` modules that belong to no family.
SHARED_MODELING = {"base", "causal_lm", "classification", "decoder", "fp8", "shards"}

# Largest absolute difference from a golden value, by quantity: what the project promises.
GOLDEN_ATOL = {"logits": 1e-4, "mtp_logits": 1e-4, "last_hidden_state": 1e-4, "loss": 1e-5, "router_weights": 1e-5}


def can_run_kernels() -> bool:
    """Whether Triton kernels run here: on a GPU, or in the interpreter, whose older releases do not know new NumPy."""
    if torch.cuda.is_available() or not HAS_TRITON:
        return HAS_TRITON
    import triton

    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return release >= (3, 7) or tuple(int(part) for part in numpy.__version__.split(".")[:2]) < (2, 4)


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, fmt: str) -> None:
    """Fails unless `actual` is finite, has the shape of `expected` and is within `TOL[fmt]` of it in relative norm."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    a, e = actual.detach().double(), expected.detach().double()
    assert a.isfinite().all(), f"{name}: {(~a.isfinite()).sum().item()} of {a.numel()} values are not finite"
    if a.numel() == 0:
        return
    error = ((a - e).norm() / e.norm().clamp_min(1e-12)).item()
    worst = (a - e).abs().argmax().item()
    assert error <= TOL[fmt], (
        f"{name}: relative error {error:.2e} > {TOL[fmt]:.0e} ({fmt}), worst at flat index {worst}: "
        f"{a.flatten()[worst].item():.6g} instead of {e.flatten()[worst].item():.6g}, {actual.dtype}"
    )


def assert_golden(name: str, actual: torch.Tensor, expected: torch.Tensor, quantity: str) -> None:
    """Fails unless every element is within `GOLDEN_ATOL[quantity]` of the golden value."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.detach().double() - expected.double()).abs().max().item()
    assert error <= GOLDEN_ATOL[quantity], f"{name}: off by {error:.2e} > {GOLDEN_ATOL[quantity]:.0e} ({quantity})"


def load_golden(case: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Expected tensors and `meta.json` of a golden folder."""
    folder = GOLDENS / case
    return load_file(folder / "expected.safetensors"), json.loads((folder / "meta.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Within, `torch.empty` returns NaN (integers: their largest value), so that memory never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def watch_quantised_products(monkeypatch) -> list[str]:
    """From now on, every product of quantised rows on kernels, of linear layers and of experts, is compared with its
    definition on the same inputs. Returns the names of those that were, which grows.

    The logits of a tiny random model do not tell: tensor cores sum FP8 products with some 14 bits, and noise of 1e-4
    makes so many values round to their neighbour in the next layer that logits move as far as by the quantisation.
    """
    from hf_moe.models import op_experts, op_fp8, op_quant

    seen, multiply, experts_triton = [], op_fp8.multiply, op_experts.experts_triton

    def watched_multiply(rows, weight, scale, **options):
        output = multiply(rows, weight, scale, **options)
        if options.get("x_scale") is not None:
            wide = op_quant.dequantize_block_fp8(weight, scale).double()
            wanted = op_quant.dequantize_rows(rows, options["x_scale"]).double() @ wide.T
            assert_close("quantised linear layer", output, wanted, "fp8")
            seen.append("linear")
        return output

    def watched_experts(hidden, indices, factors, weights, lora, options):
        output = experts_triton(hidden, indices, factors, weights, lora, options)
        if options.quantize:
            wanted = op_experts.experts_torch(hidden, indices, factors, *weights, lora, *options)
            assert_close("quantised experts", output, wanted, "fp8_experts")
            seen.append("experts")
        return output

    monkeypatch.setattr(op_fp8, "multiply", watched_multiply)
    monkeypatch.setattr(op_experts, "experts_triton", watched_experts)
    return seen


class Held(TorchDispatchMode):
    """The largest tensor, and the most bytes, that are made and held within."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak, self.largest = {}, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), inputs)
        return result

    def _count(self, storage, inputs) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self.known or place in inputs:
            return
        self.known[place] = weakref.finalize(storage, self._drop, place, size)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)

    def _drop(self, place, size) -> None:
        del self.known[place]
        self.now -= size
