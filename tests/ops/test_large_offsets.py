"""Places beyond 2**31 elements, as in the stacks of large models: memory that is never touched, but for its end."""

import pytest
import torch
from testing import can_run_kernels

from hf_moe.models import kernel_experts, kernel_experts_backward, kernel_mla
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
