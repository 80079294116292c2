"""Parameters that several processes share out.

Those of FSDP2 know their whole shape. DeepSpeed's ZeRO-3 leaves empty vectors, which keep their shape in `ds_shape`.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of the parameter that all processes together hold."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def count_elements(parameters: Iterable[nn.Parameter]) -> int:
    """Elements of parameters, on all processes that share them."""
    return sum(math.prod(whole_shape(parameter)) for parameter in parameters)


@contextlib.contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[torch.Tensor]:
    """The whole parameter, as long as the context lasts; every process that holds a part of it enters."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def reduction_device(device: torch.device, group: dist.ProcessGroup | None = None) -> torch.device:
    """Where to put what processes are to join: `device`, unless that is the CPU, of offloaded parameters, and their
    backend moves nothing that lies there."""
    if device.type != "cpu" or not (dist.is_available() and dist.is_initialized()):
        return device
    if "cpu:" in dist.get_backend_config(group):
        return device
    return torch.device("cuda", torch.cuda.current_device())
