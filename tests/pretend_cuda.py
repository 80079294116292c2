"""A CPU that says it is a GPU, so that everything around the kernels runs as it will on one.

Within `pretend_cuda()`, what is made on or moved to "cuda" is a CPU tensor whose storage is noted as being there: its
`device` and `is_cuda` say so, and an operation that mixes it with others fails as it would on a device. Kernels run in
Triton's interpreter, which must be on; a launch fails unless every tensor it is given is on the current device. What
would make the host wait, or cannot be captured into a graph, is listed in `waits`.

As a script it runs another one, or a module, in this state:

    python tests/pretend_cuda.py SCRIPT [ARGUMENT ...]
    python tests/pretend_cuda.py -m pytest tests/gpu
"""

import contextlib
import functools
import os
import runpy
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # modes are those of one thread
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import torch  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten  # noqa: E402

# Operations whose results the host must see, to know their value or their shape.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount")
PLAIN_DEVICE = torch._C.TensorBase.device
MEMORY = 80 << 30


class Pretence:
    """What is where, what waited, and which device is current."""

    def __init__(self):
        self.places: dict[int, tuple[StorageWeakRef, int]] = {}
        self.waits: list[str] = []
        self.launches: list[str] = []
        self.current = 0
        self.capturing = False
        self.forbid_waits = False
        self.replays = False  # whether graphs do again what was captured, which takes as long as it did
        self.captured: list | None = None  # what the graph that is being captured will do again

    def record(self, function, args, result) -> None:
        """Keeps a call for the replays of the graph that is being captured: its result is written where it was."""
        if self.captured is None:
            return

        def again():
            for old, new in zip(tree_iter(result), tree_iter(function(*args)), strict=True):
                if isinstance(old, torch.Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)

        self.captured.append(again)

    def place_of(self, tensor: torch.Tensor) -> int | None:
        """Index of the device that `tensor` is on; `None` for the CPU."""
        if not tensor.is_cpu or tensor.layout != torch.strided:
            return None
        found = self.places.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]

    def put(self, tensors, index: int):
        """`tensors`, which are on the device from now on."""
        for tensor in tree_iter(tensors):
            if isinstance(tensor, torch.Tensor) and tensor.is_cpu:
                storage = tensor.untyped_storage()
                # The reference keeps the address from being used again.
                self.places.setdefault(storage._cdata, (StorageWeakRef(storage), index))
        return tensors

    def device_of(self, tensor: torch.Tensor) -> torch.device:
        place = self.place_of(tensor)
        if place is not None:
            return torch.device("cuda", place)
        with torch._C.DisableTorchFunction():
            return PLAIN_DEVICE.__get__(tensor)

    def wait(self, name: str) -> None:
        self.waits.append(name)
        if self.capturing or self.forbid_waits:
            raise RuntimeError(f"{name} waits for the device")

    def index(self, device) -> int | None:
        """Index of `device` if it is a GPU."""
        if device is None:
            return None
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        return (self.current if device.index is None else device.index) if device.type == "cuda" else None


class _Operations(TorchDispatchMode):
    """Results are where the operands are."""

    def __init__(self, pretence: Pretence):
        super().__init__()
        self.pretence = pretence

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs, pretence = func._schema.name.removeprefix("aten::"), dict(kwargs or {}), self.pretence
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = pretence.index(kwargs.get("device"))
        if there is not None:
            kwargs["device"] = torch.device("cpu")
        every = {pretence.place_of(tensor) for tensor in tensors}
        if name == "scatter_" and None in every and every != {None}:  # into what `one_hot` made without saying where
            pretence.put(args[0], max(place for place in every if place is not None))
            every = {pretence.place_of(tensor) for tensor in tensors}
        places = {pretence.place_of(tensor) for tensor in tensors if tensor.dim() or name == "copy_"}
        devices = every - {None}
        if len(places) > 1 and name not in ("copy_", "set_"):
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {places}")
        mask_index = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        sized = name == "repeat_interleave" and kwargs.get("output_size") is None
        from_host = name == "_to_copy" and there is not None and not devices
        if (devices and (name in WAITING or mask_index or sized or (name == "copy_" and len(places) > 1))) or from_host:
            pretence.wait(name)
        if devices and name in ("div", "div_") and self._is_on_host(args[1]) and not kwargs.get("rounding_mode"):
            wide = torch.promote_types(args[0].dtype, torch.float32)
            args = (args[0], torch.ones((), dtype=wide).div(args[1]).item())  # on a GPU, by the reciprocal
            func = torch.ops.aten.mul.Tensor if name == "div" else torch.ops.aten.mul_.Tensor
        if devices and name == "histc":  # counts integers on a GPU, and only there
            args = (args[0].float(), *args[1:])
        result = func(*args, **kwargs)
        if there is not None:
            pretence.put(result, there)
        elif devices and name not in ("copy_", "set_"):
            pretence.put(result, devices.pop())
        if not name.startswith(("empty", "new_empty")):
            pretence.record(functools.partial(func, **kwargs), args, result)
        return result

    def _is_on_host(self, value) -> bool:
        return not isinstance(value, torch.Tensor) or self.pretence.place_of(value) is None


class _Functions(TorchFunctionMode):
    """Arguments that name a device."""

    def __init__(self, pretence: Pretence):
        super().__init__()
        self.pretence = pretence

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, pretence = dict(kwargs or {}), self.pretence
        name = getattr(func, "__name__", "")
        if name in ("to", "cuda", "cpu") and isinstance(args[0], torch.Tensor):
            return self._move(func, name, args, kwargs)
        if name in ("tolist", "numpy", "__array__") and pretence.place_of(args[0]) is not None:
            pretence.wait(name)
            if name != "tolist":
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            return func(*args, **kwargs)
        if name in ("is_pinned", "pin_memory"):
            return args[0] if name == "pin_memory" else False
        if name == "scaled_dot_product_attention":  # a CPU takes it apart, with masks of its own
            places = {pretence.place_of(leaf) for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            if len(places) > 1:
                raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {places}")
            place = places.pop()
            return func(*args, **kwargs) if place is None else _attend(pretence, place, func, args, kwargs)
        index = pretence.index(kwargs.get("device")) if name in ("tensor", "as_tensor") else None
        if index is not None:  # converted where modes do not see it
            result = func(*args, **{**kwargs, "device": "cpu"})
            if result.numel():
                pretence.wait(name)
            pretence.put(result, index)
            return result
        return func(*args, **kwargs)

    def _move(self, func, name: str, args: tuple, kwargs: dict):
        tensor, rest, pretence = args[0], args[1:], self.pretence
        here = pretence.place_of(tensor)
        dtype, memory_format, copy, there = None, None, kwargs.pop("copy", False), here
        if name == "to":
            if rest and isinstance(rest[0], torch.Tensor):
                device, dtype = rest[0].device, rest[0].dtype
            else:
                device, dtype, _, memory_format = torch._C._nn._parse_to(*rest, **kwargs)
        else:
            device = torch.device("cpu") if name == "cpu" else (rest or (kwargs.get("device", 0),))[0]
        if device is not None:
            device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
            if device.type not in ("cpu", "cuda"):
                return func(*args, **kwargs)
            there = pretence.index(device)
        options = {} if memory_format is None else {"memory_format": memory_format}
        moved = tensor.to(dtype or tensor.dtype, copy=copy, **options) if dtype or copy else tensor
        if there == here:
            return moved
        if tensor.is_cpu and not kwargs.get("non_blocking"):
            pretence.wait(f"copy to {device}")
        if torch.is_grad_enabled() and tensor.requires_grad:
            return _Moved.apply(moved, pretence, here, there)
        with _disable_current_modes():
            moved = moved.clone()
        if there is None:
            pretence.places.pop(moved.untyped_storage()._cdata, None)
        else:
            pretence.put(moved, there)
        return moved


class _Moved(torch.autograd.Function):
    """A copy on another device, whose gradient goes back to where the tensor was."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, pretence: Pretence, here: int | None, there: int | None):
        ctx.pretence, ctx.here = pretence, here
        return _Moved._copy(tensor, pretence, there)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return _Moved._copy(grad, ctx.pretence, ctx.here), None, None, None

    @staticmethod
    def _copy(tensor: torch.Tensor, pretence: Pretence, place: int | None) -> torch.Tensor:
        with _disable_current_modes():
            copy = tensor.clone()
        pretence.places.pop(copy.untyped_storage()._cdata, None)
        if place is not None:
            pretence.put(copy, place)
        return copy


_nothing = contextlib.nullcontext


def _attend(pretence: Pretence, place: int, func, args: tuple, kwargs: dict) -> torch.Tensor:
    """`func(*args, **kwargs)` with what it, or its gradient, makes on its way unseen; the result is at `place`."""
    leaves, structure = tree_flatten((args, kwargs))
    at = [number for number, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    tensors = [leaves[number] for number in at]

    def call(*tensors):
        filled = list(leaves)
        for number, tensor in zip(at, tensors):
            filled[number] = tensor
        args, kwargs = tree_unflatten(filled, structure)
        return func(*args, **kwargs)

    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        result = _Unseen.apply(call, lambda gradient: pretence.put(gradient, place), *tensors)
    else:
        with _disable_current_modes():
            result = call(*tensors)
    pretence.put(result, place)
    pretence.record(call, tensors, result)
    return result


class _Unseen(torch.autograd.Function):
    """A function whose own small graph is built, and run backwards, while no mode looks."""

    @staticmethod
    def forward(ctx, call, put, *tensors):
        ctx.put, needs = put, ctx.needs_input_grad[2:]
        with _disable_current_modes(), torch.enable_grad():
            ctx.inputs = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(tensors, needs)]
            ctx.output = call(*ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx, grad):
        wanted = [tensor for tensor in ctx.inputs if tensor.requires_grad]
        with _disable_current_modes():
            gradients = iter(torch.autograd.grad(ctx.output, wanted, grad))
        placed = (ctx.put(next(gradients)) if tensor.requires_grad else None for tensor in ctx.inputs)
        return None, None, *placed


class _Event:
    def __init__(self, *args, **kwargs):
        self.time = 0.0

    def record(self, stream=None):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other) -> float:
        return (other.time - self.time) * 1e3


class _Stream:
    device_index = 0

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, other):
        pass

    synchronize = wait_event = record_event = wait_stream


def _cuda_functions(pretence: Pretence, capability: tuple[int, int]) -> dict:
    """What replaces the functions of `torch.cuda`."""
    properties = SimpleNamespace(
        major=capability[0], minor=capability[1], multi_processor_count=3, total_memory=MEMORY, name="Pretended GPU"
    )

    @contextlib.contextmanager
    def device(where):
        before, pretence.current = pretence.current, pretence.index(where)
        try:
            yield
        finally:
            pretence.current = before

    class Graph:
        """Does again what was captured, if the pretence keeps it; results else stay as they were."""

        calls: list = []

        def replay(self):
            with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
                for call in self.calls:
                    call()

    @contextlib.contextmanager
    def graph(captured, *args, **kwargs):
        pretence.capturing, pretence.captured = True, [] if pretence.replays else None
        try:
            yield
        finally:
            captured.calls, pretence.capturing, pretence.captured = pretence.captured or [], False, None

    def set_sync_debug_mode(mode):
        pretence.forbid_waits = mode == "error"

    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: pretence.current,
        "device": device,
        "get_device_properties": lambda *a: properties,
        "get_device_capability": lambda *a: capability,
        "get_device_name": lambda *a: properties.name,
        "synchronize": lambda *a: pretence.wait("synchronize"),
        "is_current_stream_capturing": lambda: pretence.capturing,
        "current_stream": lambda *a: _Stream(),
        "stream": lambda stream: _nothing(),
        "Stream": _Stream,
        "Event": _Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "mem_get_info": lambda *a: (MEMORY, MEMORY),
        "set_sync_debug_mode": set_sync_debug_mode,
        "manual_seed_all": lambda seed: None,
        "is_bf16_supported": lambda *a: True,
    }
    zero = ("memory_allocated", "max_memory_allocated", "memory_reserved", "reset_peak_memory_stats", "empty_cache")
    return functions | {name: lambda *a: 0 for name in zero}


@contextlib.contextmanager
def _replaced(module, values: dict) -> Iterator[None]:
    saved = {name: vars(module)[name] for name in values if name in vars(module)}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name in values:
            if name in saved:
                setattr(module, name, saved[name])
            else:
                delattr(module, name)


@contextlib.contextmanager
def pretend_cuda(capability: tuple[int, int] = (9, 0), processors: int = 3) -> Iterator[Pretence]:
    """Within, there are two GPUs of this compute capability."""
    from triton.runtime import interpreter

    import hf_moe.models.op_fp8
    import hf_moe.models.op_moe  # noqa: F401  with all kernels

    pretence, plain_generator = Pretence(), torch.Generator
    plain_launch = interpreter.GridExecutor.__call__

    def launch(executor, *args, **kwargs):
        name = executor.fn.__name__
        assert all(0 < size < (65536 if axis else 1 << 31) for axis, size in enumerate(executor.grid)), executor.grid
        for tensor in (leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)):
            place = pretence.place_of(tensor)
            assert place == pretence.current, f"{name}: a tensor on {tensor.device}, launched on {pretence.current}"
        pretence.launches.append(name)

        def run():
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                plain_launch(executor, *args, **kwargs)

        run()
        pretence.record(run, (), None)

    def on_kernels(device) -> bool:
        return device.type == "cuda"

    stand_ins = {
        "compute_capability": lambda device: capability if device.type == "cuda" else (0, 0),
        "num_processors": lambda device: processors,
        "converts_fp8": lambda device: capability >= (8, 9) and device.type == "cuda",
        "runs_kernels": on_kernels,
    }
    tensor_values = {
        "device": property(pretence.device_of),
        "is_cuda": property(lambda tensor: pretence.place_of(tensor) is not None),
        "record_stream": lambda tensor, stream: None,
        "get_device": lambda tensor: -1 if pretence.place_of(tensor) is None else pretence.place_of(tensor),
    }
    modules = [module for name, module in sys.modules.items() if name.startswith("hf_moe.models.")]
    with contextlib.ExitStack() as stack:
        for module in modules:
            values = {name: value for name, value in stand_ins.items() if name in vars(module)}
            stack.enter_context(_replaced(module, values))
        stack.enter_context(_replaced(torch.Tensor, tensor_values))
        stack.enter_context(_replaced(torch.cuda, _cuda_functions(pretence, capability)))
        stack.enter_context(_replaced(torch, {"Generator": lambda device="cpu": plain_generator()}))
        stack.enter_context(_replaced(interpreter.GridExecutor, {"__call__": launch}))
        stack.enter_context(_Operations(pretence))
        stack.enter_context(_Functions(pretence))
        yield pretence


def main() -> None:
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        with pretend_cuda() as pretence:
            pretence.replays = True
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    with pretend_cuda():
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
