"""Parts of checkpoint tensors as ranks read them, against slices of the whole; and padding, there and back."""

import json
import os
import struct
import sys

import pytest
import torch
from checkpoints import golden
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from hf_moe.models import weights_safetensors
from hf_moe.models.weights_lazy import DeferredTensor, plain_tensors
from hf_moe.models.weights_safetensors import open_files, slice_ranges
from hf_moe.models.weights_shards import PaddedTensor, unpad

DENSE = "model.layers.0.mlp.up_proj.weight"  # (320, 192)
STACK = "model.layers.1.moe.down_proj.weight"  # (8, 192, 160)
INDICES = {
    "rows": (slice(128, 256),),
    "columns": (slice(0, 192), slice(128, 192)),
    "inside of blocks": (slice(5, 131), slice(60, 129)),
    "one row": slice(191, 192),
    "to the end": (slice(100, None), slice(None, -3)),
    "nothing": (slice(64, 64), slice(0, 10)),
    "steps": (slice(0, 100, 3),),
    "mixed": (1, slice(0, 50)),
}


@pytest.fixture(scope="module")
def tensors() -> dict:
    entries = open_files([str(golden("step3_fp8") / "model.safetensors")])
    return plain_tensors(entries, {"quant_method": "fp8", "block_size": (128, 128)})


@pytest.fixture(scope="module")
def files() -> dict[str, torch.Tensor]:
    return load_file(golden("step3_fp8") / "model.safetensors")


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether both have the same dtype, shape and bits."""
    actual, expected = (tensor.contiguous() for tensor in (actual, expected))
    alike = actual.dtype == expected.dtype and actual.shape == expected.shape
    return alike and torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("stacked", [False, True], ids=["matrix", "stack"])
@pytest.mark.parametrize("form", ["values", "scales", "decoded"])
def test_part_of_a_tensor_is_a_slice_of_the_whole(form, stacked, index, tensors, files, monkeypatch):
    monkeypatch.setattr(weights_safetensors, "_PIECE_BYTES", 1000)  # several pieces
    index = INDICES[index]
    if stacked:
        index = (slice(2, 5), *index) if isinstance(index, tuple) else (slice(2, 5), index)
    weight = tensors[STACK if stacked else DENSE]
    values, scales = weight.stored()
    lazy = {"values": values, "scales": scales, "decoded": weight}[form]
    name = (STACK if stacked else DENSE) + ("_scale_inv" if form == "scales" else "")
    whole = weight.decode() if form == "decoded" else files[name]
    part = lazy[index]
    assert same(part, whole[index])
    assert part.untyped_storage().nbytes() == part.numel() * part.dtype.itemsize


def test_a_part_reads_only_its_rows(tensors, monkeypatch):
    read = []
    original = weights_safetensors.TensorEntry.read
    monkeypatch.setattr(weights_safetensors.TensorEntry, "read", lambda self: read.append(self.shape) or original(self))
    tensors[DENSE].stored()[0][64:96, 10:20]
    tensors[STACK][3:5, 130:150, :]
    assert sum(torch.Size(shape).numel() for shape in read) == 32 * 192 + 2 * (22 * 160 + 2)


def test_fused_experts_are_decoded_in_parts(tmp_path):
    """One tensor for gate and up of all experts: blocks of both are apart, and do not end where rows do."""
    values = torch.randint(0, 100, (3, 2 * 72, 192), dtype=torch.uint8).view(torch.float8_e4m3fn)
    stored = {"experts.gate_up_proj": values, "experts.gate_up_proj_scale_inv": torch.rand(3, 2, 2)}
    save_file(stored, tmp_path / "model.safetensors")
    entries = open_files([str(tmp_path / "model.safetensors")])
    weight = plain_tensors(entries, {"quant_method": "fp8", "block_size": (128, 128)})["experts.gate_up_proj"]
    whole = weight.decode()
    for index in ((slice(1, 3),), (slice(0, 2), slice(36, 72), slice(None)), (slice(None), slice(70, 80), slice(3, 9))):
        assert same(weight[index], whole[index])


def test_notes_of_parts_are_read_where_they_go(tensors):
    note = DeferredTensor(tensors[STACK])[1:7, 10:150, 5:].to(dtype=torch.bfloat16)
    assert note.shape == (6, 140, 155)
    whole = tensors[STACK].decode()[1:7, 10:150, 5:].bfloat16()
    for part, expected in zip(note.unbind(0), whole, strict=True):
        target = part.new_empty(part.shape)
        part.read_into(target)
        assert same(target, expected)


def test_slices_that_are_no_ranges():
    assert slice_ranges((slice(1, 3), 2), (4, 5)) is None
    assert slice_ranges(slice(0, 4, 2), (4, 5)) is None
    assert slice_ranges((slice(2, 9), slice(3, 1)), (4, 5, 6)) == ((2, 4), (3, 3), (0, 6))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("stacked", [False, True], ids=["matrix", "stack"])
@pytest.mark.parametrize("suffix", ["", "_scale_inv"], ids=["values", "scales"])
def test_padded_tensor(suffix, stacked, parts, tensors, files):
    name = STACK if stacked else DENSE.replace("up", "down")  # an even number of scales
    lazy, stored = tensors[name].stored()[bool(suffix)], files[name + suffix]
    *leading, height, width = stored.shape
    shape = (*leading, height + 6 * parts, width + 2)
    padded = PaddedTensor(lazy, shape, parts)
    assert padded.dtype == stored.dtype and padded.get_shape() == list(shape)
    matrices = stored.float().unflatten(-2, (parts, -1))
    expected = F.pad(matrices, (0, 2, 0, 6), value=1.0 if suffix else 0.0).flatten(-3, -2).to(stored.dtype)
    assert same(padded[...], expected)
    for index in ((slice(1, 4), slice(0, 3)), (slice(height // parts - 1, height // parts + 7), slice(1, None))):
        index = (slice(1, 3), *index) if stacked else index
        assert same(padded[index], expected[index])
    target = torch.empty(shape, dtype=stored.dtype)
    padded.read_into(target)
    assert same(target, expected) and same(unpad(target, stored.shape, parts), stored)
    if stacked:
        assert same(padded.unbind()[2][...], expected[2])


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels promise more memory than they have")
def test_a_table_that_is_larger_than_the_memory_is_mapped(tmp_path):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows, path = 8 * memory // 4096, tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, rows * 4096]}
    header = json.dumps({"table": entry}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + rows * 4096)  # a hole, which takes no disk
        stream.seek(8 + len(header) + (rows - 1) * 4096)
        stream.write(struct.pack("<f", 2.5))
    table = open_files([str(path)])["table"].map()
    assert table.shape == (rows, 1024) and table[-1, 0] == 2.5 and table[0].count_nonzero() == 0
    table[0] = 3.0  # as a state dict that is loaded does
    assert table[0].sum() == 3072 and open_files([str(path)])["table"].rows(0, 1).read().count_nonzero() == 0
