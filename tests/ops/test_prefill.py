"""Attention of long prompts piece by piece: every form against the definition in float64, and its memory."""

import pytest
import torch
from testing import Held, assert_close, can_run_kernels

from hf_moe.models import kernel_prefill, op_prefill
from hf_moe.models.op_prefill import CausalMask, causal_mask, latent_prefill, piece_sizes

CUDA = torch.cuda.is_available()
if CUDA:  # there they are part of the GPU queue
    pytestmark = pytest.mark.gpu
DEVICE = "cuda" if CUDA else "cpu"
FORMAT = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16_kernel"}
FORMS = [
    pytest.param("kernel", marks=pytest.mark.skipif(not can_run_kernels(), reason="kernels cannot run here")),
    pytest.param("flash", marks=pytest.mark.skipif(CUDA, reason="of the CPU")),
    "products",
]
KERNEL_DTYPES = (torch.bfloat16,) if CUDA else (torch.bfloat16, torch.float32)  # the interpreter has the registers


@pytest.fixture
def in_form(monkeypatch):
    """Lets a form attend, to pieces of 256 tokens and one head."""

    def choose(form: str, elements: int = 1) -> None:
        monkeypatch.setattr(op_prefill, "prefill_on_kernels", lambda query: form == "kernel")
        monkeypatch.setattr(op_prefill, "_PIECE_ELEMENTS", (elements, elements))
        if form == "products":
            monkeypatch.setattr(op_prefill, "_flash_cpu", None)
            monkeypatch.setattr(op_prefill, "_SCORES", 5000)

    return choose


def make_inputs(batch, queries, heads, context, dtype, nope=24, rope=8, value=20, rank=32):
    make = lambda *shape: torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)  # noqa: E731
    query = make(batch, queries, heads, nope + rope)
    weight = make(heads * (nope + value), rank) * rank**-0.5
    return *query.split([nope, rope], dim=-1), make(batch, context, rope), make(batch, context, rank), weight


def run(query, query_rope, key_rope, latent, weight, mask, **options):
    heads = query.shape[2]
    width = weight.shape[0] // heads

    def expand(first, count, start, stop):
        return latent[:, start:stop] @ weight[first * width : (first + count) * width].t()

    return latent_prefill(query, query_rope, key_rope, expand, mask, 0.2, width - query.shape[-1], **options)


def by_definition(query, query_rope, key_rope, latent, weight, seen):
    query, query_rope, key_rope, latent, weight = (
        tensor.double() for tensor in (query, query_rope, key_rope, latent, weight)
    )
    expanded = (latent @ weight.t()).unflatten(-1, (query.shape[2], -1))
    key, value = expanded[..., : query.shape[-1]], expanded[..., query.shape[-1] :]
    scores = torch.einsum("bshn,bthn->bhst", query, key) + torch.einsum("bshp,btp->bhst", query_rope, key_rope)
    weights = (scores * 0.2).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhst,bthv->bshv", weights, value)


def padding(kind: str, batch: int, context: int) -> torch.Tensor | None:
    real = torch.ones(batch, context, dtype=torch.bool, device=DEVICE)
    if kind == "left":  # more than a piece, so that one is empty
        real[-1, : context // 2] = False
    elif kind == "right":
        real[-1, context // 3 :] = False
    elif kind == "scattered":
        real = torch.rand(batch, context, device=DEVICE) > 0.5
    return None if kind == "none" else real


# Batch, queries, heads, context.
SIZES = [(2, 70, 3, 600), (1, 300, 2, 300), (2, 1, 2, 513), (1, 260, 1, 261)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["none", "left", "right", "scattered"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_pieces_against_float64(form, sizes, kind, dtype, in_form, poisoned):
    if form == "kernel" and dtype not in KERNEL_DTYPES:
        pytest.skip("the kernel takes 16-bit tensors, and float32 in the interpreter")
    batch, queries, _, context = sizes
    inputs, real = make_inputs(*sizes, dtype), padding(kind, batch, context)
    mask = CausalMask(context - queries, real)
    in_form(form)
    output = run(*inputs, mask)
    assert output.dtype == dtype
    expected = by_definition(*inputs, mask.matrix(queries, torch.device(DEVICE)))
    # Each piece of bfloat16 keys, values and weights is rounded, as in one piece.
    assert_close("attended", output, expected, FORMAT[dtype])
    assert torch.equal(output, run(*inputs, mask)), "the same inputs gave other bits"


@pytest.mark.parametrize("form", FORMS)
def test_pieces_agree_with_one(form, in_form):
    inputs = make_inputs(2, 520, 4, 800, torch.float32 if not CUDA else torch.bfloat16)
    mask = CausalMask(280, padding("left", 2, 800))
    in_form(form, 1 << 30)
    whole = run(*inputs, mask)
    in_form(form)
    assert_close("attended", run(*inputs, mask), whole, FORMAT[inputs[0].dtype])
    assert_close("attended", run(*inputs, mask, head_step=0), whole, FORMAT[inputs[0].dtype])
    assert_close("attended", run(*inputs, mask, head_step=3), whole, FORMAT[inputs[0].dtype])


@pytest.mark.parametrize("form", FORMS)
def test_large_scores_in_a_late_piece(form, in_form):
    """Sums of the first pieces count for nothing once a later one has much larger scores, and the other way round."""
    query, query_rope, key_rope, latent, weight = make_inputs(1, 40, 2, 700, torch.bfloat16)
    for place in (650, 5):
        large = latent.clone()
        large[:, place] *= 60
        mask = CausalMask(660)
        in_form(form)
        output = run(query, query_rope, key_rope, large, weight, mask)
        expected = by_definition(query, query_rope, key_rope, large, weight, mask.matrix(40, torch.device(DEVICE)))
        assert_close("attended", output, expected, "bfloat16")


def test_the_mask_as_a_matrix():
    attention_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    mask = causal_mask(attention_mask, 2, 4)  # one token longer than the mask, which is padding then
    expected = torch.tensor(
        [
            [[0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]],
            [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]],
        ]
    )
    assert torch.equal(mask.matrix(4, torch.device("cpu")), expected.bool().unsqueeze(1))
    assert causal_mask(torch.ones(2, 6), 2, 4).real is None and causal_mask(None, 2, 4) == CausalMask(2)


def test_the_flash_attention_that_pytorch_does_not_publish():
    """Its arguments, the base of its logarithms, and that a row which sees nothing is finite."""
    query, key, value = (torch.randn(1, 2, size, 8) for size in (3, 5, 5))
    mask = torch.zeros(1, 1, 1, 5)
    mask[..., 0] = -torch.inf
    output, logarithm = op_prefill._flash_cpu(query, key, value, 0.0, True, attn_mask=mask, scale=0.5)
    scores = (query @ key.transpose(2, 3) * 0.5 + mask).masked_fill(~torch.ones(3, 5).tril().bool(), -torch.inf)
    assert_close("logarithm", logarithm[..., 1:], scores.logsumexp(-1)[..., 1:], "float32")
    assert_close("output", output[..., 1:, :], (scores.softmax(-1) @ value)[..., 1:, :], "float32")
    assert output.isfinite().all()


@pytest.mark.parametrize("form", FORMS[1:])
def test_memory_does_not_grow_with_the_context(form, in_form):
    """A chunk of a prompt against caches of 2,048 and 16,384 tokens."""
    peaks = {}
    for context in (2048, 16384):
        inputs = make_inputs(1, 256, 4, context, torch.float32)
        real = padding("left", 1, context)
        in_form(form, 1 << 16)
        with torch.no_grad(), Held() as held:
            run(*inputs, CausalMask(context - 256, real))
        peaks[context] = held.peak, held.largest
    assert peaks[16384][1] <= peaks[2048][1] <= 4 << 16
    assert peaks[16384][0] <= 1.1 * peaks[2048][0] + 8 * 16384  # counts of real tokens, 8 bytes each
    in_form(form, 1 << 30)
    with torch.no_grad(), Held() as held:
        run(*inputs, CausalMask(context - 256, real))
    assert held.peak > 10 * peaks[16384][0] and held.largest >= 4 * 4 * 16128 * 32  # the keys of four heads


@pytest.mark.skipif(CUDA or not can_run_kernels(), reason="needs Triton's interpreter")
@torch.no_grad()
def test_the_kernel_holds_a_piece_of_the_context(in_form):
    """Its keys and values are expanded 256 tokens and a head at a time, however long the context is."""
    peaks = {}
    for context in (512, 3072):
        inputs, real = make_inputs(1, 64, 2, context, torch.float32), padding("left", 1, context)
        for elements in (1, 1 << 30):
            in_form("kernel", elements)
            with Held() as held:
                run(*inputs, CausalMask(context - 64, real))
            peaks[context, elements] = held.peak, held.largest
    assert peaks[3072, 1][1] == peaks[512, 1][1] and peaks[3072, 1][0] <= peaks[512, 1][0] + 8 * 3072
    assert peaks[3072, 1 << 30][1] >= 4 * 2 * 3072 * 44 > 5 * peaks[3072, 1][1]


def test_sizes_of_pieces_at_deepseeks_sizes():
    """128 heads of 128 + 64 and 128: the expanded piece and the sums stay within 128 and 256 MiB on a GPU."""
    for batch, queries, context in ((1, 131072, 131072), (1, 2048, 131072), (4, 8192, 8192), (1, 1, 131072)):
        size, tokens = piece_sizes((batch, queries, 128), 256, 128, context, 1, True)
        assert batch * size * tokens * 256 * 2 <= 128 << 20 and batch * size * queries * 128 * 4 <= 256 << 20
        assert tokens >= min(context, 8192) and size >= 1
    assert piece_sizes((1, 131072, 128), 256, 128, 131072, 1, True) == (4, 65536)
    assert piece_sizes((1, 2048, 128), 256, 128, 131072, 1, True) == (32, 8192)
    assert piece_sizes((1, 2048, 128), 256, 128, 131072, 5, True)[0] == 30
    assert piece_sizes((1, 2048, 128), 256, 128, 131072, 0, True) == (128, 2048)
    assert piece_sizes((64, 16384, 128), 640, 128, 16384, 1, False) == (1, 256)


def test_tiles_are_chosen_by_capability():
    assert kernel_prefill.prefill_tile(4096, (9, 0)).block_m == 128
    assert kernel_prefill.prefill_tile(50, (9, 0)).block_m == 64
    assert kernel_prefill.prefill_tile(4096, (8, 0)) != kernel_prefill.prefill_tile(4096, (8, 9))
