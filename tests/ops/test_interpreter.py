"""What `interpreter.py` relies on in Triton's interpreter, and that nothing of it is left behind a launch."""

import pytest
import torch
from testing import can_run_kernels

from hf_moe.models.kernel_fp8 import quantize_rows
from hf_moe.models.triton_compat import INTERPRETING

pytestmark = pytest.mark.skipif(not (INTERPRETING and can_run_kernels()), reason="needs Triton's interpreter")


def test_functions_are_replaced_once_in_a_launch(monkeypatch):
    import interpreter
    from triton import language

    calls, before, replace = [], language.max, interpreter.replace_functions
    monkeypatch.setattr(interpreter, "replace_functions", lambda function: calls.append(function) or replace(function))
    for _ in range(2):
        calls.clear()
        quantize_rows(torch.randn(40, 300))
        assert 1 <= len(calls) <= 3  # for the kernel, and for the modules that helpers know
        assert language.max is before and not interpreter._replaced


def test_overflows_are_not_looked_for_unless_they_are_reported():
    from triton.runtime.interpreter import interpreter_builder

    assert interpreter_builder.options.sanitize_overflow == interpreter_builder.options.debug
