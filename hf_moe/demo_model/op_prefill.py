"""Causal attention of long prompts in bounded memory: masks that are never a matrix, a context that comes in pieces.

A prompt of 16,384 tokens has a mask of 268 million entries, and a head as many scores. Here the mask is a `CausalMask`:
where the queries begin, and which keys are padding. Latent attention takes the context piece by piece: the keys and
values of a piece are expanded, attended to and dropped, and what the pieces give is joined by the logarithms of their
sums of weights, in float32.

On GPUs one kernel attends to a piece (`kernel_prefill`). On the CPU it is PyTorch's own flash attention, asked for the
logarithms too. Elsewhere, and for dtypes that neither takes, `attend_piece` does it in plain products.

Shapes: B sequences, S queries, T context (the queries' own tokens are its last), h heads, g of them at a time, t tokens
of a piece, n non-rotary, p rotary and v value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from .kernel_prefill import mla_prefill
from .triton_compat import runs_kernels

# A context of so many tokens is taken piece by piece. Below, whole keys and masks are small, and calls are fewer.
LONG_CONTEXT = 4096
# Elements of keys and values that are expanded at a time, and of sums that wait for the next piece: with the kernel,
# and without.
_PIECE_ELEMENTS = 1 << 26, 1 << 24
# A piece is so long before it has several heads: sums are read and written once a piece and head.
_PIECE_TOKENS = 8192, 2048
# Elements of the scores of plain products.
_SCORES = 1 << 24
# PyTorch's flash attention of the CPU, with the logarithms that `scaled_dot_product_attention` does not return. Not
# public: where it is missing, plain products take its place.
_flash_cpu = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FLASH_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CausalMask:
    """Which keys a query sees: those up to its own place that are not padding.

    Attributes:
        past: tokens of the context before the first query.
        real: (B, T) bool, False for padding; `None` if there is none.
    """

    past: int
    real: torch.Tensor | None = None

    def to(self, *args, **kwargs) -> CausalMask:
        """On another device, as hooks of models that are spread over several ask."""
        return self if self.real is None else replace(self, real=self.real.to(*args, **kwargs))

    def block(self, start: int, stop: int, context: int, device: torch.device) -> torch.Tensor:
        """Rows `start` to `stop` of the matrix against the first `context` keys, (B or 1, 1, rows, context)."""
        keys = torch.arange(context, device=device)
        seen = (keys <= torch.arange(start, stop, device=device).unsqueeze(1) + self.past)[None, None]
        return seen if self.real is None else seen & self.real[:, None, None, :context]

    def matrix(self, queries: int, device: torch.device) -> torch.Tensor:
        """All of it, for attention that takes nothing else."""
        return self.block(0, queries, self.past + queries, device)


def causal_mask(attention_mask: torch.Tensor | None, past: int, queries: int) -> CausalMask:
    """Of a mask (B, L) over the context, ones for real tokens; what it does not cover is padding."""
    if attention_mask is None:
        return CausalMask(past)
    real = attention_mask[:, : past + queries].bool()
    real = F.pad(real, (0, past + queries - real.shape[1]), value=False)
    return CausalMask(past, None if bool(real.all()) else real)


def prefill_on_kernels(query: torch.Tensor) -> bool:
    """Whether the kernel takes these queries: 16-bit, on a GPU."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and runs_kernels(query.device)


def latent_prefill(
    query_nope: torch.Tensor,
    query_rope: torch.Tensor,
    key_rope: torch.Tensor,
    expand: Callable[[int, int, int, int], torch.Tensor],
    mask: CausalMask,
    scaling: float,
    value_width: int,
    head_step: int = 1,
) -> torch.Tensor:
    """Latent attention without gradients that expands a piece of the context at a time.

    Args:
        query_nope: (B, S, h, n).
        query_rope: (B, S, h, p).
        key_rope: (B, T, p).
        expand: called with the first and the number of some heads and the first and last token of a piece, `stop`
            excluded; returns (B, t, g (n + v)), of each head the key and then the value.
        mask: of the keys.
        scaling: of the scores.
        value_width: v.
        head_step: heads that are expanded together come in multiples of this; 0 if they are always all.

    Returns (B, S, h, v). A query that sees nothing gets zeros.
    """
    batch, queries, heads, nope = query_nope.shape
    context, on_kernels = mask.past + queries, prefill_on_kernels(query_nope)
    width = nope + value_width
    if not on_kernels:  # keys and values stand by themselves, of one width
        width += 2 * (nope + query_rope.shape[-1])
    size, tokens = piece_sizes(query_nope.shape[:3], width, value_width, context, head_step, on_kernels)
    attend = mla_prefill if on_kernels else attend_piece
    output = query_nope.new_empty(batch, queries, heads, value_width)
    pieces = list(_pieces(0 if on_kernels else mask.past, context, tokens))
    real = None if mask.real is None else mask.real[:, :context]
    for first in range(0, heads, size):
        some = slice(first, min(first + size, heads))
        own, own_rope, target, weight = query_nope[:, :, some], query_rope[:, :, some], output[:, :, some], None
        if len(pieces) > 1:
            wide = torch.promote_types(output.dtype, torch.float32)
            target = output.new_empty(target.shape, dtype=wide)
            weight = output.new_empty(target.shape[:3], dtype=wide)
        for start, stop in pieces:
            flags = None if real is None else real[:, start:stop]
            attend(
                own,
                own_rope,
                expand(first, own.shape[2], start, stop),
                key_rope[:, start:stop],
                flags,
                mask.past - start,
                scaling,
                target,
                weight,
                start == 0,
            )
        if weight is not None:
            output[:, :, some] = target
    return output


def piece_sizes(
    shape: tuple[int, int, int], width: int, value_width: int, context: int, head_step: int, on_kernels: bool
) -> tuple[int, int]:
    """How many heads to take together, and how many tokens of the context.

    Args:
        shape: B, S and h.
        width: elements of an expanded token of a head, with what is made of it.
        head_step: as for `latent_prefill`.
    """
    batch, queries, heads = shape
    elements = _PIECE_ELEMENTS[0 if on_kernels else 1]
    size, tokens = heads, min(context, _PIECE_TOKENS[0 if on_kernels else 1])
    if head_step:
        by_piece = elements // max(1, batch * tokens * width)
        by_sums = elements // max(1, batch * queries * value_width)
        size = min(heads, max(1, min(by_piece, by_sums) // head_step) * head_step)
    return size, max(256, elements // max(1, batch * size * width) // 256 * 256)


def _pieces(past: int, context: int, tokens: int) -> Iterator[tuple[int, int]]:
    """The context in pieces of up to `tokens`, of which none holds both tokens before the first query and others."""
    for begin, end in ((0, past), (past, context)):
        for start in range(begin, end, tokens):
            yield start, min(start + tokens, end)


def attend_piece(
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
    """Attends to one piece of the context, causally: `kernel_prefill.mla_prefill` in PyTorch.

    The arguments are those of the kernel; the piece begins at the first query (`position` 0), behind it or wholly
    before it. Logarithms in `weight` are to the base 2.
    """
    tokens, begin = expanded.shape[1], max(0, -position)  # queries before `begin` see nothing of the piece
    if begin >= query.shape[1]:
        return
    expanded = expanded.unflatten(-1, (query.shape[2], -1)).transpose(1, 2)
    key, value = expanded.split([query.shape[3], out.shape[3]], dim=-1)  # (B, g, t, .)
    key = torch.cat((key, key_rope.unsqueeze(1).expand(-1, key.shape[1], -1, -1)), dim=-1)
    query = torch.cat((query[:, begin:], query_rope[:, begin:]), dim=-1).transpose(1, 2)  # (B, g, s, n + p)
    causal = position < tokens - 1
    flash = _flash_cpu is not None and query.device.type == "cpu" and query.dtype in _FLASH_DTYPES
    part, logarithm = (_by_flash if flash else _by_products)(query, key, value, real, causal, scaling)
    part, logarithm = part.transpose(1, 2), logarithm.transpose(1, 2)  # (B, s, g, v), (B, s, g)
    if real is not None:  # what a query saw that saw nothing differs from form to form
        count = real.cumsum(1)  # (B, t)
        rows = torch.arange(begin, begin + part.shape[1], device=real.device) + position
        nothing = (count[:, rows.clamp(max=tokens - 1)] == 0).unsqueeze(-1)  # (B, s, 1)
        logarithm = logarithm.masked_fill(nothing, -math.inf)
        part = part.masked_fill(nothing.unsqueeze(-1), 0.0)
    if weight is None:
        out.copy_(part)
        return
    logarithm = logarithm.to(weight.dtype) / math.log(2.0)
    if first:
        out.copy_(part)
        weight.copy_(logarithm)
        return
    out, weight = out[:, begin:], weight[:, begin:]
    joined = torch.logaddexp2(weight, logarithm)
    # Where both are empty, the difference of infinities is no number, and what is weighed is zero.
    old, new = (torch.exp2(each - joined).nan_to_num_(0.0).unsqueeze(-1) for each in (weight, logarithm))
    out.mul_(old).addcmul_(part.to(out.dtype), new)
    weight.copy_(joined)


def _by_flash(query, key, value, real, causal: bool, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attended values (B, g, s, v), and natural logarithms (B, g, s) of the sums of weights."""
    width = max(query.shape[-1], value.shape[-1])  # it knows one
    query, key, padded = (
        tensor if tensor.shape[-1] == width else F.pad(tensor, (0, width - tensor.shape[-1]))
        for tensor in (query, key, value)
    )
    mask = None
    if real is not None:
        mask = query.new_zeros(real.shape).masked_fill_(~real, -math.inf)[:, None, None]
    part, logarithm = _flash_cpu(query, key, padded, 0.0, causal, attn_mask=mask, scale=scaling)
    return part[..., : value.shape[-1]], logarithm


def _by_products(query, key, value, real, causal: bool, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the definition, some queries at a time."""
    batch, heads, queries, _ = query.shape
    step = max(1, _SCORES // max(1, batch * heads * key.shape[2]))
    mask, parts = CausalMask(0, real), []
    for start in range(0, queries, step):
        rows = query[:, :, start : start + step]
        scores = torch.matmul(rows * scaling, key.transpose(2, 3))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if causal:
            seen = mask.block(start, start + rows.shape[2], key.shape[2], key.device)
        else:
            seen = None if real is None else real[:, None, None]
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        logarithm = scores.logsumexp(-1)
        weights = (scores - logarithm.unsqueeze(-1)).exp().to(value.dtype)
        parts.append((torch.matmul(weights, value), logarithm))
    outputs, logarithms = zip(*parts)
    return torch.cat(outputs, dim=2), torch.cat(logarithms, dim=2)
