"""The experts' kernels, interpreted, over the matrix of shapes in FP8; what they read, and what they hold."""

import pytest
import torch
from expert_cases import MATRIX, Shape, make_case, route, run_with_gradients
from testing import Held, assert_close, can_run_kernels

from hf_moe.models.kernel_routing import build_layout, most_tiles
from hf_moe.models.kernel_tiles import tile_rows
from hf_moe.models.op_experts import experts, experts_torch
from hf_moe.models.op_routing import build_layout_torch
from hf_moe.models.triton_compat import INTERPRETING

interpreted = pytest.mark.skipif(not (INTERPRETING and can_run_kernels()), reason="needs Triton's interpreter")
# What takes the interpreter seconds: every number of experts and of choices, and every kind of routing.
SMALL = [shape for shape in MATRIX if shape.tokens * shape.top_k <= (8 if shape.experts == 256 else 128)]


def test_the_matrix_is_as_wide_as_promised():
    """All of it runs in the definition, and on a GPU in the kernels."""
    assert len(MATRIX) >= 20 and {1, 8192} <= {shape.tokens for shape in MATRIX}
    for shapes in (MATRIX, SMALL):
        assert {shape.experts for shape in shapes} >= {2, 8, 16, 256}
        assert {shape.top_k for shape in shapes} >= {1, 2, 6, 8}
        assert {shape.routing for shape in shapes} >= {"empty", "one", "skipped", "nobody"}
        assert any(shape.tokens == 0 for shape in shapes)


@pytest.mark.parametrize("block_m", [16, 128])
@pytest.mark.parametrize("shape", [shape for shape in MATRIX if shape.tokens], ids=str)
def test_definition_of_the_layout_is_a_loop(shape, block_m):
    ids = route(shape)
    layout = build_layout_torch(ids, shape.experts, block_m)
    slots_of = [[] for _ in range(shape.experts + 1)]  # and of no expert
    for slot, expert in enumerate(ids.flatten().tolist()):
        slots_of[expert if 0 <= expert < shape.experts else shape.experts].append(slot)
    assert layout.order.tolist() == [slot for slots in slots_of for slot in slots]
    offsets, tiles = [0], []
    for expert, slots in enumerate(slots_of[:-1]):
        tiles += [(expert, offsets[-1] + start) for start in range(0, len(slots), block_m)]
        offsets.append(offsets[-1] + len(slots))
    assert layout.offsets.tolist() == offsets and int(layout.num_tiles) == len(tiles)
    assert list(zip(*layout.tiles[:, : len(tiles)].tolist())) == tiles


@interpreted
@pytest.mark.parametrize("shape", [s for s in MATRIX if s.tokens > 1024 or s.experts == 256], ids=str)
def test_layout_of_many_tokens_and_experts(shape, poisoned):
    ids = route(shape)
    actual, expected = build_layout(ids, shape.experts, 64), build_layout_torch(ids, shape.experts, 64)
    count = int(expected.num_tiles)
    assert int(actual.num_tiles) == count <= most_tiles(ids.numel(), shape.experts, 64)
    for one, other in ((actual.offsets, expected.offsets), (actual.order, expected.order)):
        assert torch.equal(one, other)
    assert torch.equal(actual.tiles[:, :count], expected.tiles[:, :count])


# Experts and choices of DeepSeek-V3, Kimi-K2, Step3 and LongCat-Flash.
@pytest.mark.parametrize("tokens", [1, 4, 16, 64])
@pytest.mark.parametrize("num_experts, top_k", [(256, 8), (384, 8), (48, 3), (512, 12)])
def test_a_step_of_few_tokens_reads_each_touched_expert_once(num_experts, top_k, tokens):
    """One row tile an expert, and programs that share no column of its weights."""
    ids = route(Shape(tokens, num_experts, top_k))
    block_m = tile_rows(ids.numel(), num_experts, torch.bfloat16)
    layout = build_layout_torch(ids, num_experts, block_m)
    assert block_m == 16 and int(layout.num_tiles) == ids.unique().numel()


@interpreted
@pytest.mark.parametrize("weights, quantize", [("fp8_ue8m0", False), ("fp8", True)], ids=["w8a16-ue8m0", "w8a8"])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_forward_in_fp8(shape, weights, quantize, poisoned):
    """Sizes that are no multiples of 128."""
    case = make_case(shape, 136, 72, torch.bfloat16, weights)
    with torch.no_grad():
        output = experts(*case.arguments(), quantize=quantize, impl="triton")
        expected = experts_torch(*case.widened().arguments(), quantize=quantize)
    assert output.dtype == torch.bfloat16
    assert_close("output", output, expected, "fp8_experts" if quantize else "bfloat16_experts")


@interpreted
@pytest.mark.parametrize("weights", ["plain", "fp8"])
def test_forward_of_8192_tokens(weights, poisoned):
    case = make_case(Shape(8192, 2, 1), 40, 24, torch.bfloat16, weights)
    with torch.no_grad():
        output = experts(*case.arguments(), impl="triton")
        assert_close("output", output, experts_torch(*case.widened().arguments()), "bfloat16_experts")


@interpreted
@pytest.mark.parametrize("weights, rank", [("fp8", 0), ("plain", 4), ("fp8", 4)])
@pytest.mark.parametrize("quantize", [False, True])
def test_no_stack_of_weights_is_built(weights, rank, quantize):
    """Neither decoded FP8 weights nor `W + BA`, forward and backward: beside the gradients there are rows alone."""
    if quantize and weights == "plain":
        pytest.skip("FP8 weights only")
    case = make_case(Shape(5, 24, 2), 136, 72, torch.bfloat16, weights, rank)
    with Held() as held:
        run_with_gradients(lambda *args: experts(*args, quantize=quantize, impl="triton"), case)
    factors = sum(factor.nbytes for factor in case.lora.factors) if rank else 0
    down = 2 * case.down_proj.numel()  # bytes of one stack in bfloat16
    assert held.largest < down / 8 and held.peak < 2 * factors + down / 4
