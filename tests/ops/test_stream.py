"""The second stream: never on the CPU, while compiling or capturing; and the order of waits, on pretended streams."""

import contextlib

import pytest
import torch

from hf_moe.models import op_stream


class Stream:
    def __init__(self, name: str, log: list):
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class CudaTensor:
    """What `branch` asks of a tensor on a GPU."""

    is_cuda = True
    requires_grad = False
    device = torch.device("cuda", 0)

    def __init__(self, name: str, log: list):
        self.name, self.log = name, log

    def record_stream(self, stream: Stream) -> None:
        self.log.append(f"{self.name} is used on {stream.name}")


@pytest.fixture
def log(monkeypatch):
    """A log of what happens on two pretended streams."""
    log = []
    main, side = Stream("main", log), Stream("side", log)
    monkeypatch.setattr(op_stream, "_side_stream", lambda index: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    @contextlib.contextmanager
    def stream(stream):
        log.append(f"enter {stream.name}")
        yield
        log.append(f"leave {stream.name}")

    monkeypatch.setattr(torch.cuda, "stream", stream)
    return log


def test_waits_and_memory(log):
    first, second, result = (CudaTensor(name, log) for name in ("first", "second", "result"))

    def function(*inputs):
        assert inputs == (first, second)
        log.append("work")
        return result

    wait = op_stream.branch(function, first, second)
    log.append("dense path")
    assert wait() is result
    assert log == [
        "side waits for main",  # the inputs are made
        "enter side",
        "work",
        "leave side",
        "first is used on side",
        "second is used on side",
        "dense path",
        "main waits for side",
        "result is used on main",
    ]


@pytest.mark.parametrize("reason", ["cpu", "compiling", "capturing"])
def test_at_once_where_a_stream_would_not_do(log, reason, monkeypatch):
    tensor = torch.ones(2) if reason == "cpu" else CudaTensor("tensor", log)
    if reason == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if reason == "capturing":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not op_stream.can_branch(tensor)
    wait = op_stream.branch(lambda value: log.append("work") or value, tensor)
    assert log == ["work"] and wait() is tensor and log == ["work"]


def test_gradients_of_weights_are_added_up_before_those_of_the_inputs_leave_the_branch():
    """In the order of autograd, which is that of the kernels on the branch's stream and of the event behind them: a
    weight that is multiplied first, with a gradient from before, and one that is used behind a view of its own."""
    log = []
    source = torch.randn(3, 4, requires_grad=True)
    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(2)]
    for index, weight in enumerate(weights):
        weight.grad = torch.zeros_like(weight)
        weight.register_post_accumulate_grad_hook(lambda _, index=index: log.append(f"weight {index}"))
    entered = op_stream._entered(source * 2)
    entered.grad_fn.register_prehook(lambda _: log.append("leaves"))
    (entered @ weights[0] @ weights[1].t().contiguous()).sum().backward()
    assert sorted(log[:2]) == ["weight 0", "weight 1"] and log[2:] == ["leaves"]
    assert op_stream._entered(weights[0].detach()).grad_fn is None
