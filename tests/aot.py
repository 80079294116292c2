"""Compiles kernels without a GPU: what the launchers ask for, at real shapes, for a given compute capability.

The launchers run on meta tensors; each launch is recorded instead of made, its signature derived as Triton would, and
compiled. Run as a script, since kernels must not be defined under the interpreter (which the tests switch on):

    python tests/aot.py --capability 90 --cases experts

prints one JSON line per distinct launch: kernel, tile, registers, spilled bytes, shared memory, whether there is wgmma.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


RUN = JITFunction.run


class StandInDriver:
    """Says which GPU there would be."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class Launch:
    """One recorded launch: the kernel with everything that compiling it depends on."""

    def __init__(self, kernel: JITFunction, grid: tuple, args: tuple, kwargs: dict):
        self.kernel, self.grid, self.call = kernel, grid, (args, dict(kwargs))
        self.options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs}
        named = dict(zip(kernel.arg_names, args)) | kwargs
        missing = set(kernel.arg_names) - set(named)
        assert not missing and set(named) <= set(kernel.arg_names), f"{kernel.__name__}: {missing or named.keys()}"
        self.signature, self.constants, self.attrs = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value = named[parameter.name]
            specialised = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialised):
                self.signature[parameter.name] = "constexpr"
                self.constants[parameter.name] = value
            elif isinstance(value, torch.Tensor):
                self.signature[parameter.name] = "*" + TYPES[value.dtype]
                # Parts of one allocation begin anywhere.
                if value.storage_offset() * value.element_size() % 16 == 0:
                    self.attrs[(index,)] = [["tt.divisibility", 16]]
            else:
                self.signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0 and specialised:
                    self.attrs[(index,)] = [["tt.divisibility", 16]]

    def key(self) -> str:
        return str((self.kernel.__name__, self.signature, self.constants, self.attrs, self.options))

    def compile(self, capability: int) -> dict:
        start = time.monotonic()
        source = ASTSource(self.kernel, self.signature, self.constants, self.attrs)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
        ptx = compiled.asm["ptx"]
        usage = register_usage(ptx, capability)
        pointers = {name: kind for name, kind in self.signature.items() if kind.startswith("*")}
        return {
            "kernel": self.kernel.__name__,
            "capability": capability,
            "types": sorted(set(pointers.values())),
            "constants": {name: value for name, value in self.constants.items() if isinstance(value, (int, str))},
            **self.options,
            "grid": self.grid,
            **usage,
            "shared": compiled.metadata.shared,
            "wgmma": ptx.count("wgmma.mma_async"),
            "fp8_wgmma": bool(re.search(r"wgmma\.mma_async\S*\.e4m3\.e4m3", ptx)),
            "tcgen05": "tcgen05.mma" in ptx,
            "mma": bool(re.search(r"\bmma\.sync", ptx)),
            "async_copy": "cp.async" in ptx,
            "seconds": round(time.monotonic() - start, 2),
        }

    def warm(self, capability: int) -> dict:
        """Compiles what the same launch will look for in Triton's cache on a GPU; what a program of it takes there."""
        triton.runtime.driver.set_active(StandInDriver(capability))
        args, kwargs = self.call
        compiled = RUN(self.kernel, *args, grid=self.grid, warmup=True, **kwargs)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        return {
            "kernel": self.kernel.__name__,
            "grid": self.grid,
            "registers": registers,
            "stack": stack,
            "shared": compiled.metadata.shared,
            "warps": compiled.metadata.num_warps,
        }


def register_usage(ptx: str, capability: int) -> dict:
    """Registers, spilled bytes and whether products wait for one another, as ptxas reports them."""
    target = re.search(r"\.target (\w+)", ptx).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups()
    registers = int(re.search(r"Used (\d+) registers", report).group(1))
    # Products that wait for one another, since something else writes registers that they add to.
    serialized = "wgmma.mma_async instructions are serialized" in report
    return {"registers": registers, "spills": int(stores) + int(loads), "serialized": serialized}


@contextlib.contextmanager
def recording(capability: int, processors: int = 132):
    """Within, launches are collected in the list that this yields, as on a device of `capability`."""
    from hf_moe.models import triton_compat

    launches: dict[str, Launch] = {}

    def run(self, *args, grid, warmup, **kwargs):
        assert all(size > 0 for size in grid), f"{self.__name__}: empty grid {grid}"
        launch = Launch(self, grid, args, dict(kwargs))
        launches.setdefault(launch.key(), launch)

    pair = divmod(capability, 10)
    stand_ins = {
        "compute_capability": lambda device: pair,
        "num_processors": lambda device: processors,
        "converts_fp8": lambda device: pair >= (8, 9),
    }
    modules = [module for name, module in sys.modules.items() if name.startswith("hf_moe.models.")]
    saved = [(module, name, vars(module)[name]) for module in modules for name in stand_ins if name in vars(module)]
    original = JITFunction.run
    assert triton_compat in modules
    try:
        JITFunction.run = run
        for module, name, _ in saved:
            setattr(module, name, stand_ins[name])
        yield launches
    finally:
        JITFunction.run = original
        for module, name, value in saved:
            setattr(module, name, value)


def main() -> None:
    import aot_cases

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, required=True)
    parser.add_argument("--cases", nargs="+", default=list(aot_cases.CASES))
    args = parser.parse_args()
    for name in args.cases:
        with recording(args.capability) as launches:
            aot_cases.CASES[name](args.capability)
        for launch in launches.values():
            print(json.dumps({"case": name, **launch.compile(args.capability)}), flush=True)


if __name__ == "__main__":
    main()
