"""Block FP8: definitions against loops, kernels (in Triton's interpreter without a GPU) against the definitions."""

import threading

import pytest
import torch
from testing import GOLDENS, assert_close, assert_golden, can_run_kernels, load_golden, watch_quantised_products
from transformers import AutoModelForCausalLM

import hf_moe  # noqa: F401  registers the families
from hf_moe.models import kernel_fp8, op_fp8, op_quant
from hf_moe.models.op_fp8 import Fp8Format, fp8_linear
from hf_moe.models.triton_compat import INTERPRETING

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # there, part of the GPU queue
kernels = pytest.mark.skipif(not can_run_kernels(), reason="kernels cannot run here")
# Rows, input features, output features: odd sizes, whole blocks, the 576 rows of kv_a_proj_with_mqa.
SIZES = [(1, 128, 128), (3, 200, 72), (17, 384, 576), (70, 130, 257), (5, 1024, 64)]


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def spread(*shape, dtype=torch.float32):
    """Values of many magnitudes, zeros and whole groups of zeros."""
    values = torch.randn(shape) * torch.logspace(-6, 3, shape[-1])
    values[..., ::7] = 0
    values[0, :128] = 0
    return values.to(dtype).to(DEVICE)


def fp8_weight(out_features, in_features, ue8m0=False, scale_dtype=torch.float32):
    # Blocks of very different size: the wrong scale cannot go unnoticed.
    rows = torch.logspace(-1, 1, out_features)[:, None] * torch.logspace(-1, 1, in_features)[None, :]
    values, scale = op_quant.quantize_block_fp8(torch.randn(out_features, in_features) * rows, ue8m0=ue8m0)
    return values.to(DEVICE), scale.to(scale_dtype).to(DEVICE)


# --- definitions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (2, 256)], ids=str)
def test_quantize_rows_against_a_loop(shape, ue8m0):
    rows = spread(*shape).cpu()
    values, scales = op_quant.quantize_rows(rows, ue8m0=ue8m0)
    assert values.dtype == FP8 and scales.shape == (shape[0], -(-shape[1] // 128))
    for row in range(shape[0]):
        for group in range(scales.shape[1]):
            x = rows[row, group * 128 : group * 128 + 128]
            scale = max(x.abs().max().item(), 1e-4) / 448
            if ue8m0:
                exponent = -149
                while 2.0**exponent < torch.tensor(scale).item():
                    exponent += 1
                scale = 2.0**exponent
            scale = torch.tensor(scale, dtype=torch.float32)
            assert scales[row, group] == scale
            wanted = (x / scale).clamp(-448, 448).to(FP8)
            assert torch.equal(values[row, group * 128 : group * 128 + 128].float(), wanted.float())


@pytest.mark.parametrize("ue8m0", [False, True])
def test_quantised_blocks_are_near_and_zero_stays_zero(ue8m0):
    weight = random(200, 300, scale=3.0).cpu()
    weight[:128, :128] = 0
    values, scales = op_quant.quantize_block_fp8(weight, ue8m0=ue8m0)
    assert scales.shape == (2, 3) and scales[0, 0] == 1
    assert not ue8m0 or torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))
    back = op_quant.dequantize_block_fp8(values, scales)
    assert (back - weight).abs().max() <= 2**-4 * weight.abs().max() * (2 if ue8m0 else 1)
    again, same = op_quant.quantize_block_fp8(back, ue8m0=ue8m0)
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8)) and torch.equal(same, scales)


def test_stacked_parts_have_blocks_of_their_own():
    parts = [op_quant.quantize_block_fp8(random(72, 200).cpu()) for _ in range(2)]
    values, scales = (torch.cat(pair) for pair in zip(*parts))
    whole = op_quant.dequantize_block_fp8(values, scales, parts=2)
    assert torch.equal(whole, torch.cat([op_quant.dequantize_block_fp8(*part) for part in parts]))
    stack = op_quant.dequantize_block_fp8(torch.stack([values] * 3), torch.stack([scales] * 3), parts=2)
    assert torch.equal(stack, torch.stack([whole] * 3))


def test_every_code_is_decoded_as_pytorch_does():
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    wanted = codes.float()
    for weight in (codes, codes[:127], codes[128:255]):  # with and without NaN
        decoded = op_quant.dequantize_block_fp8(weight.view(1, -1), torch.ones(1, -(-weight.numel() // 128)))
        assert torch.equal(decoded.nan_to_num(7.0)[0], weight.float().nan_to_num(7.0))
    assert wanted.isnan().sum() == 2


@pytest.mark.parametrize("scale", [1e-38, 2.0**127, 3.4e38])
def test_scales_of_any_size(scale):
    weight = torch.tensor([[0.001953125, -1.0, 0.5]]).to(FP8)
    decoded = op_quant.dequantize_block_fp8(weight, torch.full((1, 1), scale))
    assert torch.equal(decoded, weight.float() * torch.tensor(scale, dtype=torch.float32))


# --- the linear layer, piece by piece ---------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_linear_and_gradient_against_float64(sizes, quantize, parts, monkeypatch):
    monkeypatch.setattr(op_fp8, "_PIECE", 128 * 256)
    num_rows, in_features, out_features = sizes
    pairs = [fp8_weight(out_features, in_features) for _ in range(parts)]
    weight, scale = (torch.cat(pair).cpu() for pair in zip(*pairs))
    rows, bias = random(num_rows, in_features).cpu().requires_grad_(), random(weight.shape[0]).cpu()
    output = fp8_linear(rows, weight, scale, Fp8Format(), bias, parts=parts, quantize=quantize)
    wide = op_quant.dequantize_block_fp8(weight, scale, parts=parts).double()
    inputs = op_quant.dequantize_rows(*op_quant.quantize_rows(rows)) if quantize else rows
    assert_close("output", output, inputs.double() @ wide.T + bias.double(), "float32")
    grad = random(*output.shape).cpu()
    output.backward(grad)
    assert_close("gradient", rows.grad, grad.double() @ wide, "float32")


def test_linear_in_bfloat16_rounds_weights_once():
    weight, scale = (tensor.cpu() for tensor in fp8_weight(256, 384))
    rows = random(4, 384, dtype=torch.bfloat16).cpu()
    output = fp8_linear(rows, weight, scale, Fp8Format())
    assert output.dtype == torch.bfloat16
    wide = op_quant.dequantize_block_fp8(weight, scale).bfloat16().double()
    assert_close("output", output, rows.double() @ wide.T, "bfloat16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("num_rows", [1, 2, 4, 5])
def test_linear_with_few_rows(num_rows, dtype, monkeypatch):
    monkeypatch.setattr(op_fp8, "_PIECE", 256 * 300)  # pieces of two blocks, of which the last is short
    weight, scale = (tensor.cpu() for tensor in fp8_weight(600, 300))
    scale = scale.to(torch.float8_e8m0fnu) if num_rows == 2 else scale
    rows = random(num_rows, 300).cpu().to(getattr(torch, dtype))
    output = fp8_linear(rows, weight, scale, Fp8Format())
    assert output.dtype == rows.dtype
    wide = op_quant.dequantize_block_fp8(weight, scale).double()
    assert_close("output", output, rows.double() @ wide.T, "float32" if dtype == "float64" else dtype)
    weight.view(torch.uint8)[[1, 599], 5] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)
    broken = fp8_linear(rows, weight, scale, Fp8Format())
    assert broken[:, [1, 599]].isnan().all() and broken.isnan().sum() == 2 * num_rows
    with pytest.raises(ValueError, match="expected"):
        fp8_linear(rows, weight, scale[:4], Fp8Format())


def test_memory_of_pieces_serves_in_and_out_of_inference_mode(monkeypatch):
    monkeypatch.setattr(op_fp8, "_PIECE", 128 * 256)
    monkeypatch.setattr(op_fp8, "_memory", threading.local())
    weight, scale = (tensor.cpu() for tensor in fp8_weight(600, 300))
    wide = op_quant.dequantize_block_fp8(weight, scale)
    for mode, dtype in ((True, torch.float32), (False, torch.bfloat16), (False, torch.float64)):
        rows = random(9, 300).cpu().to(dtype)
        with torch.inference_mode(mode):
            output = fp8_linear(rows, weight, scale, Fp8Format())
        fmt = "bfloat16" if dtype == torch.bfloat16 else "float32"
        assert_close("output", output, rows.double() @ wide.double().T, fmt)
        assert torch.equal(op_fp8.dequantize(weight, scale, Fp8Format(), torch.bfloat16), wide.bfloat16())


# --- kernels ----------------------------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 128), (3, 130), (2, 1100)], ids=str)
def test_quantize_rows_kernel_is_the_definition_bit_for_bit(shape, dtype, ue8m0, poisoned):
    rows = spread(*shape, dtype=dtype)
    values, scales = kernel_fp8.quantize_rows(rows, ue8m0)
    wanted_values, wanted_scales = op_quant.quantize_rows(rows, ue8m0=ue8m0)
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(values.view(torch.uint8), wanted_values.view(torch.uint8))


@kernels
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (130, 200), (256, 128)], ids=str)
def test_quantize_block_kernel_is_the_definition_bit_for_bit(shape, ue8m0, poisoned):
    weight = spread(*shape)
    values, scales = kernel_fp8.quantize_block_fp8(weight, ue8m0)
    wanted_values, wanted_scales = op_quant.quantize_block_fp8(weight, ue8m0=ue8m0)
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(values.view(torch.uint8), wanted_values.view(torch.uint8))


@kernels
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("kind", ["rows", "block_fp8"])
def test_what_is_no_finite_number_stays_so(kind, ue8m0):
    """A limit of FP8 in its place would hide from everything behind a layer that it overflowed."""
    values = random(3, 300)
    values[0, 3], values[1, 140], values[2, 299] = float("nan"), float("inf"), 1e30
    outputs, scales = getattr(kernel_fp8, f"quantize_{kind}")(values, ue8m0)
    wanted, wanted_scales = getattr(op_quant, f"quantize_{kind}")(values, ue8m0=ue8m0)
    assert torch.equal(scales.nan_to_num(-1.0), wanted_scales.nan_to_num(-1.0))
    outputs, wanted = outputs.float(), wanted.float()
    assert wanted[0, 3].isnan() and wanted[1, 140].isnan() and torch.equal(outputs.isnan(), wanted.isnan())
    assert torch.equal(outputs.nan_to_num(0.0), wanted.nan_to_num(0.0))


@kernels
def test_rounding_to_fp8_is_that_of_pytorch_on_every_neighbourhood():
    """Every value of FP8, every midpoint, and their float32 neighbours."""
    codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    points = torch.cat((codes, (codes[1:] + codes[:-1]) / 2))
    points = torch.cat(
        (points, torch.nextafter(points, torch.tensor(1e9)), torch.nextafter(points, torch.tensor(-1.0)))
    )
    points = torch.cat((points, -points)).clamp(-448, 448).to(DEVICE)
    rows = torch.nn.functional.pad(points, (0, -points.numel() % 127)).view(-1, 127)
    rows = torch.cat((rows, torch.full_like(rows[:, :1], 448.0)), dim=1)  # so that the scale is 1
    values, scales = kernel_fp8.quantize_rows(rows)
    assert torch.equal(scales, torch.ones_like(scales))
    assert torch.equal(values.view(torch.uint8), rows.to(FP8).view(torch.uint8))


@kernels
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantize_kernel_is_the_definition_bit_for_bit(dtype, scale_dtype, parts, poisoned):
    pairs = [fp8_weight(200, 130, ue8m0=scale_dtype != torch.float32, scale_dtype=scale_dtype) for _ in range(parts)]
    weight, scale = (torch.cat([part.view(torch.uint8) for part in pair]).view(pair[0].dtype) for pair in zip(*pairs))
    scale = scale if scale_dtype == torch.float32 else scale.view(torch.uint8).view(scale_dtype)
    decoded = kernel_fp8.dequantize_block_fp8(weight, scale, dtype, parts)
    assert torch.equal(decoded, op_quant.dequantize_block_fp8(weight, scale, parts=parts).to(dtype))


@kernels
def test_every_ue8m0_code_is_what_torch_makes_of_it(poisoned):
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e8m0fnu).view(1, -1)
    weight = torch.ones(1, 256 * 128, device=DEVICE).to(FP8)
    decoded = kernel_fp8.dequantize_block_fp8(weight, codes, torch.float32)[0, ::128]
    assert decoded[255].isnan() and decoded[0] == 2.0**-127
    torch.testing.assert_close(decoded, codes[0].float(), rtol=0, atol=0, equal_nan=True)


@kernels
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize(
    ("kind", "fmt"), [("w8a8", "fp8"), ("w8a8-ue8m0", "fp8"), ("bfloat16", "bfloat16_kernel"), ("float32", "float32")]
)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_product_kernel_against_float64_on_the_same_quantised_inputs(sizes, kind, fmt, transposed, poisoned):
    if transposed and kind.startswith("w8a8"):
        pytest.skip("gradients are not quantised")
    num_rows, in_features, out_features = sizes
    ue8m0 = kind.endswith("ue8m0")
    weight, scale = fp8_weight(out_features, in_features, ue8m0, torch.float8_e8m0fnu if ue8m0 else torch.float32)
    wide = op_quant.dequantize_block_fp8(weight, scale).double()
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    rows = random(num_rows, out_features if transposed else in_features, dtype=dtype)
    bias = None if transposed else random(out_features)
    inputs, x_scale = rows, None
    if kind.startswith("w8a8"):
        inputs, x_scale = op_quant.quantize_rows(rows, ue8m0=ue8m0)
        reference = op_quant.dequantize_rows(inputs, x_scale).double()
    else:
        reference = rows.double()
    output = kernel_fp8.multiply(
        inputs, weight, scale, out_dtype=dtype, x_scale=x_scale, bias=bias, transposed=transposed
    )
    wanted = reference @ (wide if transposed else wide.T) + (0 if bias is None else bias.double())
    assert output.dtype == dtype
    assert_close("output", output, wanted, fmt)
    again = kernel_fp8.multiply(
        inputs, weight, scale, out_dtype=dtype, x_scale=x_scale, bias=bias, transposed=transposed
    )
    assert torch.equal(output, again), "the same inputs gave other bits"


@kernels
def test_no_rows():
    weight, scale = fp8_weight(64, 128)
    assert kernel_fp8.multiply(random(0, 128), weight, scale, out_dtype=torch.float32).shape == (0, 64)
    values, scales = kernel_fp8.quantize_rows(random(0, 130))
    assert values.shape == (0, 130) and scales.shape == (0, 2)


@pytest.mark.parametrize(
    ("depth", "tiles", "wanted"),
    [(7168, 112, 4), (7168, 9, 14), (1536, 384, 1), (2048, 112, 4), (200, 3, 1), (384, 3, 1), (512, 3, 1)],
)
def test_split_count(depth, tiles, wanted):
    assert kernel_fp8.split_count(depth, tiles, 132) == wanted


@kernels
def test_a_model_on_kernels_gives_the_golden_logits(monkeypatch):
    """The layers with everything that a GPU would run, here interpreted."""
    monkeypatch.setattr(op_fp8, "_uses_kernels", lambda tensor, dtype, fp8: True)
    monkeypatch.setattr(op_fp8, "converts_fp8", lambda device: True)
    expected, _ = load_golden("v3_fp8")
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "v3_fp8", dtype=torch.float32).to(DEVICE).eval()
    ids = expected["input_ids"][:1, :6].to(DEVICE)
    with torch.no_grad():
        for mla_mode in ("expanded", "absorbed"):
            model.config.mla_mode = mla_mode
            model.set_fp8_activations(False)
            assert_golden("logits", model(ids).logits.cpu(), expected["logits"][:1, :6], "logits")
        model.config.mla_mode = "expanded"
        model.set_fp8_activations(True)
        with monkeypatch.context() as watching:
            seen = watch_quantised_products(watching)
            logits = model(ids).logits.cpu()
        assert "linear" in seen
        if INTERPRETING:  # sums are exact
            exact, wanted = (expected[name][:1, :6] for name in ("logits", "logits_actquant"))
            assert (logits - wanted).norm() < 0.2 * (exact - wanted).norm()
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.set_fp8_activations(False)
    model(inputs_embeds=embeds).logits.square().sum().backward()
    on_kernels = embeds.grad.clone()
    monkeypatch.undo()
    embeds.grad = None
    model(inputs_embeds=embeds).logits.square().sum().backward()
    assert_close("gradient", on_kernels, embeds.grad, "float32_grad")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
def test_no_tile_spans_two_scales(dtype, capability):
    for rows in (1, 16, 17, 64, 129, 4096):
        for transposed in (False, True):
            tile = kernel_fp8.linear_tile(rows, dtype, kernel_fp8.FP8_BITS, capability, transposed)
            assert 128 % tile.block_n == 0 and 128 % tile.block_k == 0
