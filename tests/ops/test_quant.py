"""Dequantisation against loops over single elements."""

import pytest
import torch

from hf_moe.models.op_quant import dequantize_block_fp8, dequantize_packed_int4


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (9, 8), (12, 17)], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu], ids=["float32", "ue8m0"])
def test_block_fp8(shape, scale_dtype):
    rows, cols = 4, 6  # 9 and 17 leave short blocks; 12 rows over 3 scales must not be read as blocks of another size
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    grid = (-(-shape[0] // rows), -(-shape[1] // cols))
    scale = torch.exp2(torch.randint(-4, 5, grid).float()).to(scale_dtype)
    result = dequantize_block_fp8(weight, scale, (rows, cols))
    assert result.dtype == torch.float32
    for a in range(shape[0]):
        for b in range(shape[1]):
            assert result[a, b] == weight[a, b].float() * scale[a // rows, b // cols].float()


def test_block_fp8_edge_of_kv_a_proj():
    """576 rows have five scales of 128 rows, the last for 64 rows."""
    weight = torch.ones(576, 128).to(torch.float8_e4m3fn)
    result = dequantize_block_fp8(weight, torch.arange(1.0, 6.0).unsqueeze(1))
    assert torch.equal(result[:, 0], torch.arange(576).div(128, rounding_mode="floor") + 1.0)


def test_block_fp8_refuses_another_grid():
    weight = torch.ones(192, 128).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"\(3, 1\).*\(192, 128\).*\(2, 1\)"):
        dequantize_block_fp8(weight, torch.ones(3, 1))


@pytest.mark.parametrize("shape", [(3, 32), (2, 64), (4, 40)], ids=str)
def test_packed_int4(shape):
    group = 32
    out_features, in_features = shape
    values = torch.randint(-8, 8, shape)
    words = -(-in_features // 8)
    packed = torch.zeros(out_features, words, dtype=torch.int64)
    for row in range(out_features):
        for col in range(in_features):
            packed[row, col // 8] |= (int(values[row, col]) + 8) << (4 * (col % 8))
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    scale = torch.rand(out_features, -(-in_features // group)).to(torch.bfloat16)
    result = dequantize_packed_int4(packed, scale, shape, group)
    for row in range(out_features):
        for col in range(in_features):
            assert result[row, col] == values[row, col] * scale[row, col // group].float()


def test_packed_int4_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(3, 5\)"):
        dequantize_packed_int4(torch.zeros(3, 5, dtype=torch.int32), torch.ones(3, 1), (3, 32))


@pytest.mark.parametrize("parts", [1, 2])
def test_decoding_into_memory_gives_the_same(parts):
    weight = torch.randn(2 * 200, 300).to(torch.float8_e4m3fn)
    scales = torch.rand(parts * -(-400 // parts // 128), 3)
    plain = dequantize_block_fp8(weight, scales, parts=parts)
    assert plain.untyped_storage().nbytes() == plain.nbytes, "what is kept must not hold more than itself"
    scratch = torch.full((2 * weight.numel(),), float("nan"))
    for _ in range(2):
        decoded = dequantize_block_fp8(weight, scales, parts=parts, scratch=scratch)
        assert decoded.data_ptr() == scratch.data_ptr() and torch.equal(decoded, plain)
