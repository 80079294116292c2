"""The formats' arithmetic as `op_quant` defines it, for conversions that should run as fast as the disk.

The same numbers, bit for bit, made a few rows at a time in memory that is used again: on a CPU, new memory costs more
than the arithmetic.
"""

import threading

import torch

from ..models.op_quant import HALF_BIAS, HALF_SCALE_LIMIT, fp8_as_halves, fp8_scales

_MAGNITUDE_BITS = 0x7FFFFFFF
_FIRST_ROWS = 8
_held = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory of this thread under a name: its content is lost at the next call with that name."""
    count = 1
    for size in shape:
        count *= size
    buffers = _held.__dict__
    buffer = buffers.get(name)
    if buffer is None or buffer.numel() < count or buffer.dtype != dtype:
        buffers[name] = buffer = torch.empty(max(count, 1), dtype=dtype)
    return buffer[:count].view(shape)


def decode_block_rows(codes: torch.Tensor, scales: torch.Tensor, columns: int) -> torch.Tensor:
    """Rows of one row of blocks in float32: `dequantize_block_fp8` for codes that hold no NaN.

    Args:
        codes: (R, I) float8_e4m3fn, R at most the rows of a block.
        scales: (ceil(I / columns),) float32 or float8_e8m0fnu.
        columns: of a block.

    Returns (R, I) in scratch memory.
    """
    shape = tuple(codes.shape)
    halves = fp8_as_halves(codes.view(torch.int8), scratch("halves", shape, torch.int16))
    values = scratch("values", shape, torch.float32).copy_(halves)
    row = scales.float().repeat_interleave(columns)[: codes.shape[1]]
    if row.numel() and row.amax() < HALF_SCALE_LIMIT:
        return values.mul_(row * HALF_BIAS)
    return values.mul_(HALF_BIAS).mul_(row)


def encode_block_rows(
    values: torch.Tensor, codes: torch.Tensor, columns: int, ue8m0: bool, source: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantises one row of blocks into `codes`: `quantize_block_fp8`. Spoils `values`; returns the scales.

    Args:
        values: (R, I) float32, all rows of the blocks.
        codes: (R, I) float8_e4m3fn, written to.
        columns: of a block.
        ue8m0: scales that are powers of two.
        source: (R, I) bfloat16 of the same numbers; the largest is found there in half the time.

    Returns (ceil(I / columns),) float32. Scales of blocks with values that are not finite are not finite.
    """
    width = values.shape[1]
    # The bits without the sign are ordered as the magnitudes are.
    if source is None:
        bits = scratch("bits", tuple(values.shape), torch.int32)
        tops = torch.bitwise_and(values.view(torch.int32), _MAGNITUDE_BITS, out=bits).amax(0).view(torch.float32)
    else:
        bits = scratch("half bits", tuple(values.shape), torch.int16)
        tops = torch.bitwise_and(source.view(torch.int16), 0x7FFF, out=bits).amax(0).view(torch.bfloat16).float()
    count = -(-width // columns)
    tops = torch.nn.functional.pad(tops, (0, count * columns - width)).view(count, columns)
    scales = fp8_scales(tops.view(torch.int32).amax(1).view(torch.float32), ue8m0)
    # No quotient rounds to more than 448 by more than a unit in the last place, which e4m3 does not see.
    codes.copy_(values.div_(scales.repeat_interleave(columns)[:width]))
    return scales


def changed_blocks(codes: torch.Tensor, scales: torch.Tensor, source: torch.Tensor, columns: int) -> int:
    """How many blocks of one row of blocks have a number that is no longer what it was, as far as bfloat16 tells.

    A block that came from FP8 and fills the range of its scale gets its bytes back, while its scale moves with the
    rounding of its largest number to bfloat16: what it stands for then differs by a unit in the last place at most. So
    that is not a change, and all else is.

    Args:
        codes, scales, columns: as `decode_block_rows` takes them.
        source: (R, I), a float dtype: the numbers before.
    """
    # What is not of this format changes at once: most blocks are done with after a few rows.
    changed = _differing(codes[:_FIRST_ROWS], scales, source[:_FIRST_ROWS], columns)
    if codes.shape[0] > _FIRST_ROWS and not changed.all():
        changed |= _differing(codes[_FIRST_ROWS:], scales, source[_FIRST_ROWS:], columns)
    return int(changed.sum())


def _differing(codes: torch.Tensor, scales: torch.Tensor, source: torch.Tensor, columns: int) -> torch.Tensor:
    """(ceil(I / columns),) boolean: blocks with a number that differs."""
    width = codes.shape[1]
    rounded = scratch("rounded", tuple(codes.shape), torch.bfloat16).copy_(decode_block_rows(codes, scales, columns))
    before = source.contiguous().bfloat16()
    # Units in the last place and one: 0, 1 or 2 in the lower byte, and nothing in the upper one.
    steps = rounded.view(torch.int16).sub_(before.view(torch.int16)).add_(1)
    low, high = steps.view(torch.uint8).amax(0).view(width, 2).unbind(1)
    moved = (low > 2) | (high > 0)
    return torch.nn.functional.pad(moved, (0, -width % columns)).view(-1, columns).any(1)
