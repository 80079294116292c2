"""Triton kernels of absorbed latent attention: decode steps over a long latent cache.

Every head attends to the same latents, so a program takes up to 64 rows (queries x heads) and reads each latent once,
as key and as value. Programs that share a part of the context run side by side, so that the second one finds it in the
cache of the device. The context is split over programs, which leave a normalised sum and the logarithm of its weight;
`combine_kernel` joins them. A program first looks at its part of the mask and walks only from the first to the last
token in it: padding on the left and the free end of a static cache are not read.

Shapes: B sequences, S queries, h heads, M = S * h rows, T context, r latent width, p rotary width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .kernel_tiles import chosen
from .triton_compat import (
    INTERPRETING,
    cdiv,
    compute_capability,
    dot,
    jit,
    jit_for_any,
    narrow,
    next_power_of_2,
    num_processors,
    on_its_device,
    tl,
)

_LOG2_E = 1.4426950408889634
_SCAN = 1024  # mask entries that a program looks at together
_TOKENS_PER_SPLIT = 64  # what leaving and joining one more part costs, in tokens


class MlaTile(NamedTuple):
    """Rows and tokens of one step, warps of a program, steps that are loaded ahead, and registers of a thread.

    A limit of 255 registers is none, but said: it keeps the assembler from spilling some to fit more programs on a
    multiprocessor than its shared memory holds.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int | None


def mla_tile(num_rows: int, capability: tuple[int, int], per_query: bool = False) -> MlaTile:
    """The shipped tile for `num_rows` rows a sequence; `per_query`: with a mask that differs between its queries.

    The sums of 64 rows fill half of the registers; the rest decides how many tokens a step takes.
    """
    block_m = max(16, min(64, next_power_of_2(num_rows)))
    if capability in ((8, 6), (8, 9)) or capability[0] == 12:  # 99 KiB of shared memory
        return MlaTile(min(block_m, 32), 16, 8 if block_m >= 32 else 4, 3, 255)
    if per_query and capability[0] >= 9:
        block_m = min(block_m, 32)
    if block_m == 16:
        return MlaTile(block_m, 32, 4, 3, 255)  # two programs a multiprocessor, one on compute capability 8.0
    block_n = 16 if capability[0] == 8 else 32
    return MlaTile(block_m, block_n, 8, 2 if capability[0] == 10 else 3, None)


@functools.lru_cache(maxsize=1024)  # all layers of a decode step ask the same
def split_count(context: int, programs: int, processors: int, block_n: int) -> int:
    """Parts of the context for `programs` blocks of rows: those that finish first with one program a processor."""
    best = (float("inf"), 1)
    for splits in range(1, max(1, min(processors, cdiv(context, 2 * block_n))) + 1):
        waves = cdiv(programs * splits, processors)
        joining = _TOKENS_PER_SPLIT * (splits > 1)
        best = min(best, (waves * (cdiv(cdiv(context, splits), block_n) * block_n + joining), splits))
    return best[1]


@jit
def masked_range(mask_ptr, queries, mask_stride, begin, end, PER_QUERY: tl.constexpr, SCAN: tl.constexpr):
    """First token in [begin, end) that any query attends to, the one behind the last, and how many there are."""
    first = end
    last = begin
    count = 0
    for start in range(begin, end, SCAN):
        token = start + tl.arange(0, SCAN)
        seen = tl.load(mask_ptr + token, mask=token < end, other=0) != 0
        if PER_QUERY:
            for query in range(1, queries):
                row = mask_ptr + query * mask_stride
                seen |= tl.load(row + token, mask=token < end, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(seen, token, end), axis=0))
        last = tl.maximum(last, tl.max(tl.where(seen, token + 1, begin), axis=0))
        count += tl.sum(seen.to(tl.int32), axis=0)
    return first, last, count


@jit
def mask_scores(scores, token, end, mask_ptr, mask_rows, HAS_MASK: tl.constexpr, PER_QUERY: tl.constexpr):
    """(BLOCK_M, BLOCK_N) scores, minus infinity where a row does not attend to a token."""
    allowed = (token < end)[None, :]
    if PER_QUERY:
        allowed = tl.load(mask_ptr + mask_rows[:, None] + token[None, :], mask=allowed, other=0) != 0
    elif HAS_MASK:
        allowed = (tl.load(mask_ptr + token, mask=token < end, other=0) != 0)[None, :]
    return tl.where(allowed, scores, float("-inf"))


@jit
def store_nothing(
    out_ptr,
    weight_ptr,
    first,
    count,
    R: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Zeros, and the weight of nothing, for up to `count` rows. With addresses of its own: those of the results would
    wait in registers during the products."""
    element = tl.arange(0, BLOCK_M * BLOCK_R)
    nothing = tl.zeros_like(element).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + first * R + element, nothing, mask=element < tl.minimum(count, BLOCK_M) * R)
    if IS_SPLIT:
        row = tl.arange(0, BLOCK_M)
        tl.store(weight_ptr + first + row, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=row < count)


@jit_for_any("context", "split_length", "mask_batch", "mask_query")
def mla_decode_kernel(
    query_ptr,  # (B, M, r)
    query_rope_ptr,  # (B, M, p)
    latent_ptr,  # (B, T, r)
    key_rope_ptr,  # (B, T, p)
    mask_ptr,  # (B or 1, S, T) bytes, or unused
    out_ptr,  # (SPLITS, B, M, r)
    weight_ptr,  # (SPLITS, B, M) base-2 logarithm of the sum of weights, or unused
    num_rows,
    queries,
    heads,
    context,
    split_length,
    latent_batch,
    latent_token,
    key_batch,
    key_token,
    mask_batch,
    mask_query,
    scale,  # of the scores, times log2(e)
    R: tl.constexpr,
    P: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PER_QUERY: tl.constexpr,
    IS_SPLIT: tl.constexpr,  # the grid divides the context
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SCAN: tl.constexpr,
):
    split, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(0) * BLOCK_M
    # Places in the block: with one address for it, they need few registers beside the sums.
    local = tl.arange(0, BLOCK_M)
    rows = tl.minimum(local, num_rows - 1 - first_row)
    r, p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    query_ptr += (batch * num_rows + first_row) * R
    query_rope_ptr += (batch * num_rows + first_row) * P
    query = tl.load(query_ptr + rows[:, None] * R + r[None, :], mask=r[None, :] < R, other=0.0)
    query_rope = tl.load(query_rope_ptr + rows[:, None] * P + p[None, :], mask=p[None, :] < P, other=0.0)
    latent_ptr += batch * latent_batch
    key_rope_ptr += batch * key_batch

    begin = split * split_length
    end = tl.minimum(begin + split_length, context)
    mask_rows = None
    if HAS_MASK:
        mask_ptr += batch * mask_batch
    if PER_QUERY:  # from here on, only the queries that the rows belong to
        first_query = first_row // heads
        mask_ptr += first_query.to(tl.int64) * mask_query
        mask_rows = ((first_row + rows) // heads - first_query) * mask_query
        queries = tl.minimum((first_row + BLOCK_M - 1) // heads + 1, queries) - first_query
    if HAS_MASK:
        begin, end, count = masked_range(mask_ptr, queries, mask_query, begin, end, PER_QUERY, SCAN)

    if begin >= end:  # nothing to attend to; and with this case apart, the sums are those of products alone
        empty_row = (split * tl.num_programs(2) + batch) * num_rows + first_row
        store_nothing(out_ptr, weight_ptr, empty_row, num_rows - first_row, R, IS_SPLIT, BLOCK_M, BLOCK_R)
        return

    # Only the last step looks at masks, unless there are holes in them.
    masked_from = end - BLOCK_N + 1
    if PER_QUERY:
        masked_from = begin
    elif HAS_MASK:
        masked_from = tl.where(count < end - begin, begin, masked_from)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        place = tl.minimum(token, context - 1).to(tl.int64)
        latent = tl.load(latent_ptr + place[:, None] * latent_token + r[None, :], mask=r[None, :] < R, other=0.0)
        key_rope = tl.load(key_rope_ptr + place[:, None] * key_token + p[None, :], mask=p[None, :] < P, other=0.0)
        # Two products for themselves, and, with wide tiles, a branch: where the compiler sees that a product's results
        # go into another one, it gives each warp whole rows, and several warps compute the same scores.
        scores = dot(query, tl.trans(latent), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale
        scores += dot(query_rope, tl.trans(key_rope), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale
        if BLOCK_M < 64:
            scores = mask_scores(scores, token, end, mask_ptr, mask_rows, HAS_MASK, PER_QUERY)
        elif start >= masked_from:
            scores = mask_scores(scores, token, end, mask_ptr, mask_rows, HAS_MASK, PER_QUERY)
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # nothing to attend to so far
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(largest - shift)
        total = total * decay + tl.sum(weights, axis=1)
        acc = dot(narrow(weights, latent.dtype), latent, acc * decay[:, None])
        largest = new_largest

    out = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    out_row = (split * tl.num_programs(2) + batch) * num_rows + first_row
    valid = local < num_rows - first_row
    mask = valid[:, None] & (r[None, :] < R)
    out_ptr += out_row * R
    tl.store(out_ptr + local[:, None] * R + r[None, :], narrow(out, out_ptr.dtype.element_ty), mask=mask)
    if IS_SPLIT:
        tl.store(weight_ptr + out_row + local, largest + tl.log2(total), mask=valid)


@jit_for_any("num_rows", "splits")
def combine_kernel(
    parts_ptr,  # (SPLITS, rows, r) float32
    weight_ptr,  # (SPLITS, rows)
    out_ptr,  # (rows, r)
    num_rows,
    splits,
    R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, BLOCK_S)
    weight = tl.load(weight_ptr + split * num_rows + row, mask=split < splits, other=float("-inf"))
    largest = tl.max(weight, axis=0)
    weight = tl.exp2(weight - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weight, axis=0)
    mask = (split[:, None] < splits) & (column[None, :] < R)
    parts = tl.load(parts_ptr + (split[:, None] * num_rows + row) * R + column[None, :], mask=mask, other=0.0)
    out = tl.sum(parts * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * R + column, narrow(out, out_ptr.dtype.element_ty), mask=column < R)


@on_its_device
def mla_decode(
    query: torch.Tensor,
    query_rope: torch.Tensor,
    latent: torch.Tensor,
    key_rope: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Absorbed latent attention without gradients; the twin is `layer_mla.absorbed_attention`.

    Args:
        query: (B, S, h, r), bfloat16 or float16 (float32 in the interpreter).
        query_rope: (B, S, h, p).
        latent: (B, T, r); may be the front of a longer buffer.
        key_rope: (B, T, p), likewise.
        mask: boolean (B or 1, S or 1, T), True attends; `None` attends to all. A query that may attend to nothing
            gets zeros.
        scaling: of the scores.

    Returns (B, S, h, r).
    """
    batch, queries, heads, width = query.shape
    rope, context, device = query_rope.shape[-1], latent.shape[1], query.device
    num_rows = queries * heads
    out = torch.empty(batch, queries, heads, width, dtype=query.dtype, device=device)
    if out.numel() == 0:
        return out
    latent, key_rope = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (latent, key_rope))
    per_query = mask is not None and mask.shape[1] > 1
    tile = chosen("mla_decode", mla_tile(num_rows, compute_capability(device), per_query))
    blocks = cdiv(num_rows, tile.block_m)
    splits = chosen("mla_splits", split_count(context, batch * blocks, num_processors(device), tile.block_n))
    length = cdiv(cdiv(context, splits), tile.block_n) * tile.block_n
    splits = cdiv(context, length)
    target, weight = out, None
    if splits > 1:
        target = torch.empty(splits, batch, num_rows, width, dtype=torch.float32, device=device)
        weight = torch.empty(splits, batch, num_rows, dtype=torch.float32, device=device)
    strides = (0, 0)
    if mask is not None:
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        strides = (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(1) if mask.shape[1] > 1 else 0)
    mla_decode_kernel[(blocks, splits, batch)](
        query.contiguous(),
        query_rope.contiguous(),
        latent,
        key_rope,
        None if mask is None else mask.view(torch.uint8),
        target,
        weight,
        num_rows,
        queries,
        heads,
        context,
        length,
        latent.stride(0),
        latent.stride(1),
        key_rope.stride(0),
        key_rope.stride(1),
        *strides,
        float(scaling) * _LOG2_E,
        R=width,
        P=rope,
        HAS_MASK=mask is not None,
        PER_QUERY=per_query,
        IS_SPLIT=splits > 1,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_R=max(16, next_power_of_2(width)),
        BLOCK_P=max(16, next_power_of_2(rope)),
        SCAN=128 if INTERPRETING else _SCAN,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    if splits > 1:
        block = min(64, next_power_of_2(width))
        combine_kernel[(batch * num_rows, cdiv(width, block))](
            target,
            weight,
            out,
            batch * num_rows,
            splits,
            R=width,
            BLOCK_S=next_power_of_2(splits),
            BLOCK=block,
            num_warps=4,
        )
    return out
