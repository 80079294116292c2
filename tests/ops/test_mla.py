"""The products of absorbed attention against float64, on both sides of the length from which a cache is split."""

import pytest
import torch
from testing import assert_close

from hf_moe.models.op_mla import latent_scores, latent_sums

LENGTHS = [1, 7, 2047, 2048, 2049, 5003]


def random(dtype, *shape):
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("context", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_products(dtype, context, batch, grad):
    queries, latent = random(dtype, batch, 16, 48), random(dtype, batch, context, 48)
    extra = random(dtype, batch, 16, context)
    weights = torch.rand(batch, 16, context).softmax(-1).to(dtype)
    wide = [tensor.double() for tensor in (queries, latent, extra, weights)]
    expected = wide[0] @ wide[1].transpose(1, 2)
    form = "float32" if dtype == torch.float32 else "bfloat16"
    with torch.set_grad_enabled(grad):
        assert_close("scores", latent_scores(queries, latent), expected, form)
        assert_close("sums", latent_sums(weights, latent), wide[3] @ wide[1], form)
        assert_close("scores plus", latent_scores(queries, latent, add=extra), expected + wide[2], form)


def test_a_cache_with_spare_room_is_read_where_it_lies():
    """The latents of a growing cache are the front of a longer buffer."""
    with torch.no_grad():
        latent = random(torch.float32, 1, 5000, 32)[:, :4100]
        queries = random(torch.float32, 1, 4, 32)
        expected = queries.double() @ latent.double().transpose(1, 2)
        assert_close("scores", latent_scores(queries, latent), expected, "float32")
