"""Triton kernel of latent attention for prompts: many queries against a piece of the context, expanded for some heads.

The expanded piece is read as `kv_b_proj` leaves it, keys and values of a head side by side, and the rotary key, which
all heads share, from the cache: nothing is concatenated or repeated. Masks are positions and a flag for each key, never
a matrix. Where the context comes in several pieces, every call goes on from the sums of the one before, which are kept
normalised, in float32, with the logarithm of their weight.

Why the pieces are expanded before and not in here: a program has up to 128 queries, and would expand each key for
itself. With heads of 128 + 64 and 128 and latents of 512 that is 2 x 512 x 256 operations a key, against
2 x 128 x 320 for attending to it: 3 times the work. Attending to the latents themselves is 2 x 1088 a key and query
against 2 x 320.

Shapes: B sequences, S queries, g heads, t tokens of the piece, n non-rotary, p rotary and v value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .kernel_mla import masked_range
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
    on_its_device,
    tl,
)

_LOG2_E = 1.4426950408889634
_SCAN = 1024  # flags of keys that a program looks at together


class PrefillTile(NamedTuple):
    """Queries and tokens of one step, warps of a program, and steps that are loaded ahead."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def prefill_tile(num_queries: int, capability: tuple[int, int]) -> PrefillTile:
    """The shipped tile for `num_queries` queries a sequence and head."""
    if capability in ((8, 6), (8, 9)) or capability[0] == 12:  # 99 KiB of shared memory
        return PrefillTile(64, 32, 4, 2)
    if capability[0] == 8:  # the sums and the queries are in registers, which more tokens a step would spill
        return PrefillTile(128, 16, 8, 3)
    return PrefillTile(128, 64, 8, 3) if num_queries > 64 else PrefillTile(64, 64, 4, 2)


@jit
def attend_to_tokens(
    acc,  # (BLOCK_M, BLOCK_V)
    largest,  # (BLOCK_M,)
    total,  # (BLOCK_M,)
    query,  # (BLOCK_M, BLOCK_D)
    query_rope,  # (BLOCK_M, BLOCK_P)
    last_seen,  # (BLOCK_M,) the last token that each query may see
    begin,
    whole,  # the tokens from `begin` up to here, whole blocks, are seen by all queries
    end,
    tokens,
    expanded_ptr,  # (t, n + v) of one sequence and head
    key_rope_ptr,  # (t, p)
    real_ptr,  # (t,) bytes, or unused
    expanded_token,
    key_token,
    scale,
    N: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the tokens from `begin` to `end` to the sums of one block of queries."""
    n, p, v = tl.arange(0, query.shape[1]), tl.arange(0, query_rope.shape[1]), tl.arange(0, acc.shape[1])
    for triangle in tl.static_range(2):  # tokens that all of the queries see, and the rest
        for start in range(whole if triangle else begin, end if triangle else whole, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            place = token
            if triangle:
                place = tl.minimum(token, tokens - 1)
            expanded_row = expanded_ptr + place[:, None] * expanded_token
            key = tl.load(expanded_row + n[None, :], mask=n[None, :] < N, other=0.0)
            key_rope = tl.load(key_rope_ptr + place[:, None] * key_token + p[None, :], mask=p[None, :] < P, other=0.0)
            scores = dot(query, tl.trans(key), tl.zeros((query.shape[0], BLOCK_N), tl.float32))
            scores = dot(query_rope, tl.trans(key_rope), scores) * scale
            if triangle:
                scores = tl.where(token[None, :] <= last_seen[:, None], scores, float("-inf"))
            if HAS_MASK:
                real = tl.load(real_ptr + token, mask=token < end, other=0) != 0
                scores = tl.where(real[None, :], scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, axis=1))
            shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # nothing to attend to so far
            weights = tl.exp2(scores - shift[:, None])
            decay = tl.exp2(largest - shift)
            total = total * decay + tl.sum(weights, axis=1)
            value = tl.load(expanded_row + N + v[None, :], mask=v[None, :] < V, other=0.0)
            acc = dot(narrow(weights, value.dtype), value, acc * decay[:, None])
            largest = new_largest
    return acc, largest, total


@jit_for_any("queries", "tokens", "position", "real_batch")
def mla_prefill_kernel(
    query_ptr,  # (B, S, g, n)
    query_rope_ptr,  # (B, S, g, p)
    expanded_ptr,  # (B, t, g (n + v))
    key_rope_ptr,  # (B, t, p)
    real_ptr,  # (B, t) bytes, or unused
    out_ptr,  # (B, S, g, v)
    weight_ptr,  # (B, S, g) base-2 logarithm of the sum of weights, or unused
    queries,
    tokens,
    position,  # of the first query, counted from the first token of the piece; may be negative
    query_batch,
    query_token,
    query_head,
    rope_batch,
    rope_token,
    rope_head,
    expanded_batch,
    expanded_token,
    key_batch,
    key_token,
    real_batch,
    out_batch,
    out_token,
    out_head,
    scale,  # of the scores, times log2(e)
    N: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_FIRST: tl.constexpr,  # there are no sums yet
    IS_PIECE: tl.constexpr,  # the context comes in several pieces
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SCAN: tl.constexpr,
):
    # The last queries see the most tokens: they begin first.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)
    valid = rows < queries
    rows = tl.minimum(rows, queries - 1)
    begin, end = 0, tl.minimum(tokens, position + tl.minimum(first_row + BLOCK_M, queries))
    if end <= 0:  # all of the piece lies ahead
        return
    if HAS_MASK:
        real_ptr += batch * real_batch
        begin, end, _ = masked_range(real_ptr, 1, 0, begin, end, False, SCAN)

    n, p, v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_V)
    wide_rows = rows.to(tl.int64)[:, None]
    query_ptr += batch * query_batch + head * query_head
    query = tl.load(query_ptr + wide_rows * query_token + n[None, :], mask=n[None, :] < N, other=0.0)
    query_rope_ptr += batch * rope_batch + head * rope_head
    query_rope = tl.load(query_rope_ptr + wide_rows * rope_token + p[None, :], mask=p[None, :] < P, other=0.0)
    expanded_ptr += batch * expanded_batch + head * (N + V)
    key_rope_ptr += batch * key_batch
    out_ptr += batch * out_batch + head * out_head + wide_rows * out_token + v[None, :]
    mask = valid[:, None] & (v[None, :] < V)
    weight_row = (batch * queries + rows) * tl.num_programs(1) + head

    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    if not IS_FIRST:
        largest = tl.load(weight_ptr + weight_row)
        total = tl.where(largest == float("-inf"), 0.0, 1.0)
        acc = tl.load(out_ptr, mask=v[None, :] < V, other=0.0)
    last_seen = tl.minimum(position + rows, tokens - 1)
    seen_by_all = tl.minimum(position + first_row + 1, end) - begin
    acc, largest, total = attend_to_tokens(
        acc,
        largest,
        total,
        query,
        query_rope,
        last_seen,
        begin,
        begin + tl.maximum(seen_by_all, 0) // BLOCK_N * BLOCK_N,
        end,
        tokens,
        expanded_ptr,
        key_rope_ptr,
        real_ptr,
        expanded_token,
        key_token,
        scale,
        N,
        P,
        V,
        HAS_MASK,
        BLOCK_N,
    )
    total = tl.where(total == 0.0, 1.0, total)  # nothing seen: the sums are zero, and the logarithm minus infinity
    tl.store(out_ptr, narrow(acc / total[:, None], out_ptr.dtype.element_ty), mask=mask)
    if IS_PIECE:
        tl.store(weight_ptr + weight_row, largest + tl.log2(total), mask=valid)


@on_its_device
def mla_prefill(
    query: torch.Tensor,
    query_rope: torch.Tensor,
    expanded: torch.Tensor,
    key_rope: torch.Tensor,
    real: torch.Tensor | None,
    position: int,
    scaling: float,
    out: torch.Tensor,
    weight: torch.Tensor | None = None,
    first: bool = True,
) -> None:
    """Attends to one piece of the context, causally, without gradients; the twin is `op_prefill.attend_piece`.

    Args:
        query: (B, S, g, n), bfloat16 or float16 (float32 in the interpreter).
        query_rope: (B, S, g, p).
        expanded: (B, t, g (n + v)), of each head the key and then the value.
        key_rope: (B, t, p).
        real: boolean (B, t), False for keys that no query may see; `None` if there are none.
        position: place of the first query, counted from the first token of the piece; query i sees the tokens up to
            `position + i`.
        scaling: of the scores.
        out: (B, S, g, v), written; float32 where there are several pieces. A query that sees nothing gets zeros.
        weight: (B, S, g) float32, base-2 logarithms of the sums of weights; for several pieces.
        first: whether `out` and `weight` hold nothing yet; else they are continued.
    """
    batch, queries, heads, nope = query.shape
    tokens, rope, value = expanded.shape[1], query_rope.shape[-1], out.shape[-1]
    if out.numel() == 0 or tokens == 0:
        return
    # Any strides, as long as the elements of a row lie side by side.
    query, query_rope, expanded, key_rope = (
        tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, query_rope, expanded, key_rope)
    )
    if real is not None and real.stride(-1) != 1:
        real = real.contiguous()
    tile = chosen("mla_prefill", prefill_tile(queries, compute_capability(query.device)))
    mla_prefill_kernel[(cdiv(queries, tile.block_m), heads, batch)](
        query,
        query_rope,
        expanded,
        key_rope,
        None if real is None else real.view(torch.uint8),
        out,
        weight,
        queries,
        tokens,
        position,
        *query.stride()[:3],
        *query_rope.stride()[:3],
        *expanded.stride()[:2],
        *key_rope.stride()[:2],
        0 if real is None else real.stride(0),
        *out.stride()[:3],
        float(scaling) * _LOG2_E,
        N=nope,
        P=rope,
        V=value,
        HAS_MASK=real is not None,
        IS_FIRST=first,
        IS_PIECE=weight is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=max(16, next_power_of_2(nope)),
        BLOCK_P=max(16, next_power_of_2(rope)),
        BLOCK_V=max(16, next_power_of_2(value)),
        SCAN=128 if INTERPRETING else _SCAN,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
