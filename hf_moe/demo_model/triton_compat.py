"""The one place that imports Triton, and what every kernel file shares.

Without Triton the kernel files can still be imported: `jit` leaves a function as it is and `tl` is an empty name (the
annotations of kernels are postponed); the ops never launch a kernel unless `HAS_TRITON`.

`INTERPRETING` tells that Triton runs its kernels in its interpreter, on CPU tensors (`TRITON_INTERPRET=1` at import).
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import warnings

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton, tl, HAS_TRITON = None, None, False

INTERPRETING = bool(HAS_TRITON and triton.knobs.runtime.interpret)
# Stands in for the number of multiprocessors where there is none: more than one, so that loops over tiles are tested.
_INTERPRETER_PROCESSORS = 3


def jit(function):
    """`triton.jit`, or the function itself where Triton is missing."""
    return triton.jit(function) if HAS_TRITON else function


def jit_for_any(*names: str):
    """`jit` that compiles one kernel for all values of the integers `names`, which change from call to call, such as
    the number of tokens. Triton would compile again for 1 and for multiples of 16."""

    def compiled(function):
        return triton.jit(function, do_not_specialize=names) if HAS_TRITON else function

    return compiled


def constant(value):
    """A module-level constant that kernels may read."""
    return tl.constexpr(value) if HAS_TRITON else value


# The interpreter multiplies bfloat16 operands as the integers that hold them, and rounds to bfloat16 towards zero.
INTERPRETED = constant(INTERPRETING)


@jit
def dot(a, b, acc):
    """`acc + a @ b` in float32, without TF32, on tensors of one dtype; the interpreter converts them first."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def narrow(value, dtype: tl.constexpr):
    """float32 to `dtype`, rounded to nearest even; the interpreter alone would cut bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)
    return value.to(dtype)


@jit
def e4m3_to_float(bits, dtype: tl.constexpr):
    """float8_e4m3fn, given as uint8, in another dtype by bit arithmetic: for devices that cannot convert it.

    The exponent and mantissa bits, moved to their place in a float32, read as the value times 2**-120: subnormals
    included, since those of float32 are kept. The two codes that mean NaN are not recognised: they read as 480.
    """
    wide = bits.to(tl.uint32)
    moved = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
    return (moved.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(dtype)  # 2**120, exact


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def _cuda_properties(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def _cuda_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def compute_capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a CUDA device; (0, 0) for any other."""
    return _cuda_properties(_cuda_index(device))[0] if device.type == "cuda" else (0, 0)


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device: the width of a persistent launch."""
    return _cuda_properties(_cuda_index(device))[1] if device.type == "cuda" else _INTERPRETER_PROCESSORS


@torch.compiler.assume_constant_result
def converts_fp8(device: torch.device) -> bool:
    """Whether kernels on `device` may name float8_e4m3fn: compute capability 8.9 and up. Elsewhere: `e4m3_to_float`."""
    return compute_capability(device) >= (8, 9)


@functools.cache
def _has_compiler() -> bool:
    """Whether Triton finds the C compiler that it builds the host's side of a launch with; warns if not."""
    build = triton.knobs.build
    if build.cc or build.impl or shutil.which("gcc") or shutil.which("clang"):
        return True
    warnings.warn(
        "hf_moe does without its GPU kernels, which is slower: Triton finds no C compiler to launch them with. Install "
        "gcc, or name a compiler in the variable CC.",
        stacklevel=2,
    )
    return False


@torch.compiler.assume_constant_result
def runs_kernels(device: torch.device) -> bool:
    """Whether kernels can be launched on tensors of `device`: a CUDA device of compute capability 8.0 and up, where
    there is a C compiler, or any CPU tensor under the interpreter."""
    if not HAS_TRITON:
        return False
    if INTERPRETING:
        return device.type == "cpu"
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return compute_capability(device) >= (8, 0) and _has_compiler()


def on_device(tensor: torch.Tensor):
    """Context in which kernels are launched on the device of `tensor`: Triton takes the current one, which with a model
    spread over several GPUs may be another."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def on_its_device(function):
    """`function` with its launches on the device of its first argument, a tensor; see `on_device`."""

    @functools.wraps(function)
    def launched(tensor: torch.Tensor, *args, **kwargs):
        with on_device(tensor):
            return function(tensor, *args, **kwargs)

    return launched
