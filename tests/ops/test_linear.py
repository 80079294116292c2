"""The linear product with its special forms for few rows: values, shapes, gradients, and the switch it borrows."""

import pytest
import torch
from testing import assert_close

from hf_moe.models import op_linear
from hf_moe.models.layer_linear import Linear
from hf_moe.models.op_linear import linear, linear_each

DTYPES = [pytest.param(getattr(torch, name), id=name) for name in ("float32", "bfloat16", "float64")]
SHAPES = [(1,), (1, 1), (2,), (3,), (2, 1), (4,), (5,), (4, 8), (33,), (5, 13), (0,)]


@pytest.fixture(params=["by_form", "by_size"])
def small(request, monkeypatch):
    """Small float32 weights multiplied by the special forms, too, and as they are by default."""
    if request.param == "by_form":
        monkeypatch.setattr(op_linear, "_SMALL_FLOAT32", 0)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("out_features", [8, 7, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, shape, out_features, bias, poisoned):
    rows, weight = torch.randn(*shape, 24).to(dtype), torch.randn(out_features, 24).to(dtype)
    offset = torch.randn(out_features).to(dtype) if bias else None
    expected = torch.einsum("...i,oi->...o", rows.double(), weight.double())
    expected = expected if offset is None else expected + offset.double()
    with torch.no_grad():
        result = linear(rows, weight, offset)
    assert result.dtype == dtype and result.is_contiguous()
    assert_close("output", result, expected, str(dtype).removeprefix("torch."))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_strided_operands(rows, dtype):
    """A weight that is a transposed or sliced view, and rows that are: the values do not depend on strides."""
    wide = torch.randn(rows, 2, 24).to(dtype)[:, 1]
    for weight in (torch.randn(24, 8).to(dtype).t(), torch.randn(8, 30).to(dtype)[:, 3:27]):
        with torch.no_grad():
            result = linear(wide, weight)
        assert_close("output", result, wide.double() @ weight.double().t(), str(dtype).removeprefix("torch."))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [3, 1, 40, 2, 1]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_matrix_takes_its_own_rows(dtype, sizes, poisoned):
    indices, start = [7, 0, 3, 3, 5][: len(sizes)], 0
    stack, rows = torch.randn(8, 6, 24).to(dtype), torch.randn(sum(sizes), 24).to(dtype)
    with torch.no_grad():
        result = linear_each(rows, sizes, stack, indices)
    assert result.dtype == dtype and result.is_contiguous() and result.shape == (sum(sizes), 6)
    for size, index in zip(sizes, indices):
        own, start = slice(start, start + size), start + size
        expected = rows[own].double() @ stack[index].double().t()
        assert_close("output", result[own], expected, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("rows", [1, 2, 9, 40])
def test_gradients(rows):
    layer = Linear(24, 8)
    states = torch.randn(rows, 24, requires_grad=True)
    seed_grad = torch.randn(rows, 8)
    layer(states).backward(seed_grad)
    assert_close("states", states.grad, seed_grad.double() @ layer.weight.double(), "float32")
    assert_close("weight", layer.weight.grad, seed_grad.double().t() @ states.double(), "float32")
    assert_close("bias", layer.bias.grad, seed_grad.double().sum(0), "float32")
    with torch.no_grad():
        assert_close("without gradients", layer(states), layer(states.detach().double().float()), "float32")


@pytest.mark.parametrize("enabled", [True, False])
def test_onednn_switch_is_left_as_it_was(enabled):
    rows, weight = torch.randn(1, 24).bfloat16(), torch.randn(8, 24).bfloat16()
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(enabled)
    try:
        with torch.no_grad():
            linear(rows, weight)
            assert torch._C._get_mkldnn_enabled() == enabled
            with pytest.raises(RuntimeError):
                linear(rows, weight, bias=torch.zeros(5).bfloat16())
            linear_each(rows, [1], weight.unsqueeze(0), [0])
            assert torch._C._get_mkldnn_enabled() == enabled
            with pytest.raises(IndexError):
                linear_each(rows, [1], weight.unsqueeze(0), [1])
        assert torch._C._get_mkldnn_enabled() == enabled, "an error must not leave oneDNN off"
    finally:
        torch._C._set_mkldnn_enabled(before)


def test_mixed_dtypes_fail_as_they_do_in_torch():
    with torch.no_grad(), pytest.raises(RuntimeError):
        linear(torch.randn(1, 24), torch.randn(8, 24).bfloat16())


def test_autocast():
    rows, weight = torch.randn(2, 24), torch.randn(8, 24)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(rows, weight).dtype == torch.bfloat16


def test_rows_of_another_width_are_an_error():
    """Two rows that together are as wide as the weight are not one row."""
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes"):
        linear(torch.randn(2, 24), torch.randn(8, 48))
