"""Places beyond 2**31 elements, as in the stacks of large models: memory that is never touched, but for its end."""

import pytest
import torch
from testing import can_run_kernels

from hf_moe.models import kernel_combine, kernel_experts, kernel_experts_backward, kernel_fp8, kernel_mla, op_quant
from hf_moe.models.kernel_routing import Layout
from hf_moe.models.op_routing import build_layout_torch
from hf_moe.models.triton_compat import INTERPRETING

pytestmark = pytest.mark.skipif(not (INTERPRETING and can_run_kernels()), reason="needs Triton's interpreter")
FP8 = torch.float8_e4m3fn
LIMIT = 1 << 31


@pytest.fixture(autouse=True)
def nothing_is_copied(monkeypatch):
    """The interpreter copies every argument's memory back, here onto itself."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)


@pytest.fixture
def last_program_only(monkeypatch):
    """Of each launch the interpreter runs the last program alone; none of these kernels has a scan, whose loops would
    be cut short, too."""
    from triton.runtime import interpreter

    def last(*bounds):
        return range(*bounds) if len(bounds) > 1 else (bounds[0] - 1,)

    monkeypatch.setattr(interpreter, "range", last, raising=False)


def stack(experts: int, rows: int, columns: int, dtype=torch.bfloat16) -> torch.Tensor:
    """Weights of which only the last expert's are there."""
    assert experts * rows * columns > LIMIT
    weight = torch.empty(experts, rows, columns, dtype=dtype)
    weight[-1] = torch.randn(rows, columns).to(dtype)
    return weight


def one_row(experts: int, tokens: int = 1):
    """Layout of the last token on the last expert; the others have none."""
    ids = torch.full((tokens, 1), experts)
    ids[-1] = experts - 1
    layout = build_layout_torch(ids, experts, 16)
    return layout._replace(tiles=layout.tiles[:, :1].contiguous())  # room for no more: idle programs take time here


def close(actual, expected):
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("transposed", [False, True])
def test_weights(transposed):
    weight, x = stack(34000, 256, 256), torch.randn(1, 256).bfloat16()
    layout = one_row(34000)
    output = kernel_experts.multiply_rows(x, weight, None, layout, 1, out_dtype=torch.float32, transposed=transposed)
    close(output, x.float() @ (weight[-1] if transposed else weight[-1].T).float())


def test_fp8_weights_of_gate_and_up_and_what_goes_along():
    experts = 34000
    weight, x = stack(experts, 256, 256, FP8), torch.randn(1, 256).bfloat16()
    scale = torch.ones(experts, 2, 2)
    output, _ = kernel_experts.gate_up(x, weight, scale, one_row(experts), 1, out_dtype=torch.float32)
    gate, up = (x.float() @ weight[-1].float().T).chunk(2, -1)
    close(output, torch.nn.functional.silu(gate) * up)


def test_gradient_of_inner_rows():
    experts = 34000
    weight, grad, pre = stack(experts, 256, 256), torch.randn(1, 256).bfloat16(), torch.randn(1, 512).bfloat16()
    factors = torch.ones(1)
    grad_pre, _, share = kernel_experts_backward.inner_grad(grad, weight, None, one_row(experts), 1, pre, factors)
    gate, up = pre.float().requires_grad_().chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up
    wanted = grad.float() @ weight[-1].float()
    close(share, (inner * wanted).sum(1))
    close(grad_pre[:, 256:], torch.nn.functional.silu(gate) * wanted)


def test_rows_of_tokens_and_results():
    """The last of 270,000 tokens of 8,192 channels, read, and written in the place of its slot."""
    tokens, width = 270000, 8192
    x = torch.empty(tokens, width, dtype=torch.bfloat16)
    x[-1] = torch.randn(width).bfloat16()
    layout, down = one_row(2, tokens), torch.randn(2, 16, width).bfloat16() * width**-0.5
    low = kernel_experts.multiply_rows(x, down, None, layout, 1, out_dtype=torch.bfloat16, gather=True)
    close(low[0], x[-1].float() @ down[-1].float().T)
    up = torch.randn(2, width, 16).bfloat16()
    output = kernel_experts.multiply_rows(low, up, None, layout, 1, out_dtype=torch.bfloat16, to_slots=True)
    close(output[-1], low[0].float() @ up[-1].float().T)


# Two matrices of these sizes, or as many tokens of 8,192 channels, have more than 2**31 elements.
TALL, WIDE, TOKENS = 32768, 36864, 270000


def test_gradient_of_a_large_stack(last_program_only):
    left, right = torch.randn(1, TALL).bfloat16(), torch.randn(1, WIDE).bfloat16()
    assert 2 * TALL * WIDE > LIMIT  # before the third expert
    grad = kernel_experts_backward.sum_outer(left, right, one_row(3), 1, out_dtype=torch.bfloat16)
    close(grad[2, -128:, -128:], left[0, -128:, None].float() * right[0, -128:].float())


@pytest.mark.parametrize("gathered", [True, False], ids=["tokens", "sorted rows"])
def test_gradient_from_rows_that_are_far(gathered, last_program_only):
    wide, narrow = torch.empty(TOKENS, 8192, dtype=torch.bfloat16), torch.empty(TOKENS, 16, dtype=torch.bfloat16)
    wide[-1] = torch.randn(8192).bfloat16()
    if gathered:
        layout, row = one_row(2, TOKENS), 0
    else:  # the first expert has all rows but the last
        ends = torch.tensor([0, TOKENS - 1, TOKENS], dtype=torch.int32)
        layout, row = Layout(torch.arange(TOKENS, dtype=torch.int32), ends, *2 * [torch.empty(0)], 16), TOKENS - 1
    narrow[row] = torch.randn(16).bfloat16()
    factors = torch.full((TOKENS,), 0.5)
    options = {"gather_left": gathered, "factors": factors, "out_dtype": torch.float32}
    grad = kernel_experts_backward.sum_outer(wide, narrow, layout, 1, **options)
    close(grad[1, -128:], wide[-1, -128:, None].float() * narrow[row].float() * 0.5)


def test_sums_of_rows_that_are_far(last_program_only):
    rows = torch.empty(TOKENS, 8192, dtype=torch.bfloat16)
    kept, base = torch.empty(rows.shape, dtype=torch.bool), torch.empty(rows.shape)
    rows[-1], kept[-1], base[-1] = torch.randn(8192).bfloat16(), torch.rand(8192) < 0.5, torch.randn(8192)
    ids = torch.zeros(TOKENS, 1, dtype=torch.long)
    close(kernel_combine.combine(rows, ids, 1, torch.bfloat16)[-1, -1024:], rows[-1, -1024:])
    output = kernel_combine.combine(rows, ids, 1, torch.bfloat16, kept, base)
    close(output[-1, -1024:], (base[-1] + rows[-1] * kept[-1])[-1024:])


def test_fp8_quantisers(last_program_only):
    rows = torch.empty(TOKENS, 8192, dtype=torch.bfloat16)
    rows[-1] = torch.randn(8192).bfloat16()
    values, scale = kernel_fp8.quantize_rows(rows)
    wanted, wanted_scale = op_quant.quantize_rows(rows[-1:])
    assert torch.equal(values[-1, -1024:].float(), wanted[0, -1024:].float())
    assert torch.equal(scale[-1, -8:], wanted_scale[0, -8:])
    weight = torch.empty(2 * TALL, WIDE, dtype=torch.bfloat16)
    weight[-128:, -128:] = torch.randn(128, 128).bfloat16()
    values, scale = kernel_fp8.quantize_block_fp8(weight)
    wanted, wanted_scale = op_quant.quantize_block_fp8(weight[-128:, -128:])
    assert torch.equal(values[-128:, -128:].float(), wanted.float()) and scale[-1, -1] == wanted_scale[0, 0]


@pytest.mark.parametrize("parts", [1, 2])
def test_fp8_weights_decoded(parts, last_program_only):
    weight, scale = torch.empty(2 * TALL, WIDE, dtype=FP8), torch.empty(2 * TALL // 128, WIDE // 128)
    weight[-32:, -128:], scale[-1, -1] = torch.randn(32, 128).to(FP8), 0.75
    decoded = kernel_fp8.dequantize_block_fp8(weight, scale, torch.bfloat16, parts)
    close(decoded[-32:, -128:], weight[-32:, -128:].float() * 0.75)


@pytest.mark.parametrize("far", ["weight", "transposed", "rows", "results"])
def test_fp8_linear(far, last_program_only, monkeypatch):
    monkeypatch.setattr(kernel_fp8, "num_processors", lambda device: 1 << 20)  # a program for every tile
    monkeypatch.setattr(kernel_fp8, "split_count", lambda *args: 1)
    depth, width, count = {
        "weight": (4096, 540672, 1),
        "transposed": (4096, 540672, 1),
        "rows": (8192, 128, TOKENS),
        "results": (128, 8192, TOKENS),
    }[far]
    transposed = far == "transposed"
    weight = torch.empty((depth, width) if transposed else (width, depth), dtype=FP8)
    x, near = torch.empty(count, depth, dtype=torch.bfloat16), (slice(None), slice(-64, None))
    assert max(weight.numel(), x.numel(), count * width) > LIMIT
    x[-48:] = torch.randn(x[-48:].shape).bfloat16()
    own = weight[near if transposed else near[::-1]]
    own.copy_((torch.randn(own.shape) * depth**-0.5).to(FP8))
    scale = torch.full([-(-size // 128) for size in weight.shape], 0.5)
    output = kernel_fp8.multiply(x, weight, scale, out_dtype=torch.bfloat16, transposed=transposed)
    wide = own.float() * 0.5
    close(output[-48:, -64:], x[-48:].float() @ (wide if transposed else wide.T))


def test_latents_in_a_large_cache():
    """The last of three sequences, with 2.2 million slots each, of which 40 are filled."""
    buffers = [torch.empty(3, 2_200_000, width, dtype=torch.bfloat16) for width in (512, 16)]
    latent, key_rope = (buffer[:, :40] for buffer in buffers)
    assert 2 * latent.stride(0) > LIMIT
    latent.copy_(torch.randn(3, 40, 512)), key_rope.copy_(torch.randn(3, 40, 16))
    query, query_rope = torch.randn(3, 1, 2, 512).bfloat16() * 0.1, torch.randn(3, 1, 2, 16).bfloat16()
    output = kernel_mla.mla_decode(query, query_rope, latent, key_rope, None, 0.1)
    scores = query.float() @ latent.float().mT.unsqueeze(1) + query_rope.float() @ key_rope.float().mT.unsqueeze(1)
    close(output, (scores * 0.1).softmax(-1) @ latent.float().unsqueeze(1))


def test_masks_of_queries_that_are_far_apart():
    """Three queries of 32 heads, whose rows of the mask are 2**30 bytes apart."""
    buffer = torch.empty(LIMIT + 40, dtype=torch.bool)
    mask = buffer.as_strided((1, 3, 40), (3 * LIMIT, LIMIT // 2, 1))
    mask.copy_(torch.rand(1, 3, 40) < 0.5)
    latent, key_rope = torch.randn(1, 40, 32).bfloat16(), torch.randn(1, 40, 16).bfloat16()
    query, query_rope = torch.randn(1, 3, 32, 32).bfloat16() * 0.2, torch.randn(1, 3, 32, 16).bfloat16()
    output = kernel_mla.mla_decode(query, query_rope, latent, key_rope, mask, 0.1)
    scores = query.float() @ latent.float().mT.unsqueeze(1) + query_rope.float() @ key_rope.float().mT.unsqueeze(1)
    weights = (scores * 0.1).masked_fill(~mask.unsqueeze(2), -torch.inf).softmax(-1)
    close(output, weights @ latent.float().unsqueeze(1))
