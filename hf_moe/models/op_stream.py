"""Work beside the main computation: a second CUDA stream for a branch whose result is needed later."""

import functools
from collections.abc import Callable

import torch


@functools.cache
def _side_stream(device_index: int) -> "torch.cuda.Stream":
    # One a device: the caching allocator keeps a pool a stream.
    return torch.cuda.Stream(device_index)


def can_branch(tensor: torch.Tensor) -> bool:
    """Whether `branch` would use a second stream: on CUDA, neither while compiling nor inside a graph capture."""
    return tensor.is_cuda and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()


def _entered(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor behind a node of the stream that is current, where there is a gradient.

    The main stream waits for what the side stream was given when the last node there has run. Without this one that
    might be the node whose gradient of a weight is then added to an earlier one, after the event. With it, autograd
    adds to weights first: it runs such nodes before all others that are ready.
    """
    return tensor.view_as(tensor) if tensor.requires_grad else tensor


def branch(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Starts `function(*inputs)` and returns a function that waits for its result and gives it.

    On a second stream where `can_branch` allows, at once otherwise; the numbers are the same. The result may be used
    on the current stream after the wait, and the inputs may be freed at any time. In the backward pass autograd runs
    the branch on its stream again, and orders the two by itself: what reads gradients of weights on the main stream
    once those of the inputs are there, as FSDP2 does, finds them complete, accumulated or not.
    """
    if not can_branch(inputs[0]):
        result = function(*inputs)
        return lambda: result
    main = torch.cuda.current_stream(inputs[0].device)
    side = _side_stream(inputs[0].device.index)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = function(*map(_entered, inputs))
    for tensor in inputs:
        # Made on the main stream, read on the other: its memory must not go to a new tensor before that is done.
        tensor.record_stream(side)

    def wait() -> torch.Tensor:
        main.wait_stream(side)
        result.record_stream(main)
        return result

    return wait
