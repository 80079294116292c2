"""N-gram input embedding of LongCat-Flash-Lite: every token is embedded together with hashes of those before it.

For each order o = 2..n and each of k hash functions there is a table of embeddings. The row of table i at position p is
a polynomial in the token ids t_p, t_{p-1}, ... t_{p-o+1}, modulo the table's size m + 2i + 1; tokens before the start
of the sequence, or at and before an earlier end-of-sequence token, count as zero. The rows go through a projection
each, and word embedding and projections are averaged.

Three steps: find the tokens before each position (`preceding_tokens`, `masked_preceding_tokens`), hash them
(`NgramHash`), look the rows up (`embed_ngrams`). What the first needs of the past is kept in the cache, as a
layer of ids (`token_layer`), so that cropping, reordering and selecting treat it as they treat keys.

Shapes: B batch, S new tokens, T slots of context, n longest order, I = k (n - 1) tables.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, StaticLayer

from .layer_cache import GrowingLayer
from .layer_linear import Linear

# In place of a token id. A slot of padding is passed over; a token that is only known as an embedding ends the context.
PADDING, UNKNOWN = -1, -2


def token_layer(cache: Cache, index: int) -> GrowingLayer | StaticLayer:
    """The layer of token ids of `cache`, added at `index`, behind the layers of keys and values, if it is not there.

    An ordinary layer, with ids as keys (B, 1, T, 1) and values of no width.
    """
    if len(cache.layers) <= index:
        static = isinstance(cache.layers[0], StaticLayer)
        cache.layers.append(StaticLayer(cache.layers[0].max_cache_len) if static else GrowingLayer())
    return cache.layers[index]


def preceding_tokens(
    tokens: torch.Tensor, count: int, past: torch.Tensor | None = None, segments: torch.Tensor | None = None
) -> torch.Tensor:
    """The `count` tokens before each new one, nearest first, slots of padding passed over.

    Args:
        tokens: (B, S) new ids, `PADDING` where masked.
        past: (B, T) ids before them; `PADDING` where masked.
        segments: (B or 1, S) numbers of packed sequences; tokens of another segment are not seen.

    Returns (B, S, count), `PADDING` where there is no such token.
    """
    batch, seq = tokens.shape
    if past is not None and past.shape[1]:
        slots = torch.arange(past.shape[1], device=past.device).expand(batch, -1)
        slots = slots.masked_fill(past == PADDING, -1)
        slots = slots.topk(min(count, past.shape[1]), dim=-1).values.flip(-1)  # the last ones, in order
        recent = past.gather(1, slots.clamp_min(0)).masked_fill(slots < 0, PADDING)
    else:
        recent = tokens.new_empty((batch, 0))
    window = torch.cat((recent, tokens), dim=1)  # (B, W)
    valid = window != PADDING
    rank = valid.long().cumsum(1) - 1  # place of each valid token among the valid ones
    width = window.shape[1]
    # Valid tokens moved together, and a place behind them for the rest.
    place = torch.where(valid, rank, width)
    packed = window.new_full((batch, width + 1), PADDING).scatter(1, place, window)
    before = rank[:, -seq:, None] - torch.arange(1, count + 1, device=tokens.device)  # (B, S, count)
    # The rank of padding is that of the token before it, which it does see.
    before = before + (~valid[:, -seq:, None]).long()
    found = packed.gather(1, before.clamp_min(0).flatten(1)).view(before.shape).masked_fill(before < 0, PADDING)
    if segments is not None:
        segments = segments.expand(batch, -1)
        packed = segments.new_full((batch, width + 1), -1).scatter(1, place, segments)  # no past: the window is new
        same = packed.gather(1, before.clamp_min(0).flatten(1)).view(before.shape) == segments.unsqueeze(-1)
        found = found.masked_fill(~same, PADDING)
    return found


def masked_preceding_tokens(slots: torch.Tensor, visible: torch.Tensor, first: torch.Tensor | int, count: int):
    """As `preceding_tokens`, where a mask says what each query sees (static caches, trees of drafts, packing).

    Args:
        slots: (B, T) ids of the whole context, new tokens included.
        visible: (B, S, T) boolean, True where query s attends.
        first: slot of the first query.
    """
    seq, length = visible.shape[1:]
    index = torch.arange(length, device=slots.device)
    own = (torch.arange(seq, device=slots.device) + first).view(1, seq, 1)
    usable = visible & (index < own) & (slots[:, None, :length] != PADDING)
    last = torch.where(usable, index, -1).topk(min(count, length), dim=-1).values  # (B, S, count), nearest first
    found = slots.unsqueeze(1).expand(-1, seq, -1).gather(2, last.clamp_min(0)).masked_fill(last < 0, PADDING)
    return F.pad(found, (0, count - found.shape[-1]), value=PADDING)


class NgramHash:
    """Token ids to rows of the tables; (B, S) and their predecessors (B, S, n - 1) to (B, S, I), all int64.

    Args:
        vocab_size: V, the base of the polynomial.
        table_size: m; table i has m + 2i + 1 rows.
        order: n.
        splits: k.
        boundaries: tokens that end the context of those behind them; the token itself still looks back.
    """

    def __init__(self, vocab_size: int, table_size: int, order: int, splits: int, boundaries: list[int]):
        self.order, self.boundaries = order, boundaries
        self._constants: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self.moduli = [table_size + 2 * table + 1 for table in range(splits * (order - 1))]
        # Powers of V beyond a table's order are zero: those tokens do not enter it.
        self.powers = [
            [pow(vocab_size, distance, modulus) if distance < 2 + table // splits else 0 for distance in range(order)]
            for table, modulus in enumerate(self.moduli)
        ]

    def __call__(self, tokens: torch.Tensor, preceding: torch.Tensor) -> torch.Tensor:
        boundary = preceding < 0
        for token in self.boundaries:
            boundary = boundary | (preceding == token)
        preceding = preceding.masked_fill(boundary.cumsum(-1) > 0, 0)
        history = torch.cat((tokens.clamp_min(0).unsqueeze(-1), preceding), dim=-1).long()  # (B, S, n)
        # int64 throughout: the products reach V times the table size, beyond 2 ** 42.
        powers, moduli = self._on_device(tokens.device)  # (I, n), (I,)
        return (history.unsqueeze(-2) * powers).sum(-1) % moduli

    def _on_device(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.compiler.is_compiling():
            return torch.tensor(self.powers, device=device), torch.tensor(self.moduli, device=device)
        if device not in self._constants:
            self._constants[device] = (
                torch.tensor(self.powers, device=device),
                torch.tensor(self.moduli, device=device),
            )
        return self._constants[device]


class HostTable(nn.Module):
    """A table that stays on the CPU or on disk while the model is elsewhere: no parameter, never moved, not trained.

    `weight` (rows, width) is a plain attribute in the dtype of the file, set by the loader: a tensor in memory, or
    with `on_disk` a view of the file.
    """

    def __init__(self, rows: int, width: int, on_disk: bool):
        super().__init__()
        self.shape = (rows, width)
        self.on_disk = on_disk
        self.weight: torch.Tensor | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, S) ids on the CPU to (B, S, width)."""
        if self.weight is None:
            raise ValueError(
                "This n-gram table was never loaded: `ngram_tables='cpu'` and `'disk'` are for `from_pretrained` with "
                "a checkpoint. A model made from a configuration alone keeps its tables as parameters ('model')."
            )
        return F.embedding(ids, self.weight)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight is not None:
            destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        name = prefix + "weight"
        others = {key: value for key, value in state_dict.items() if key != name}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing, unexpected, errors)
        given = state_dict.get(name)
        if given is None or given is self.weight:
            return
        if tuple(given.shape) != self.shape:
            errors.append(f"size mismatch for {name}: {tuple(given.shape)} in the state dict, {self.shape} here.")
            return
        if self.weight is None:
            self.weight = given.detach().to("cpu", copy=True)
        elif given.data_ptr() != self.weight.data_ptr():
            if self.on_disk:  # the view of a file cannot be written: memory takes its place
                self.weight = torch.empty_like(self.weight)
            self.weight.copy_(given.detach())

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}"


def make_table(rows: int, width: int, place: str) -> nn.Module:
    """A table whose rows are where `place` says: `"model"`, `"cpu"` or `"disk"`."""
    return nn.Embedding(rows, width) if place == "model" else HostTable(rows, width, on_disk=place == "disk")


class NgramTables(nn.Module):
    """Tables and projections under their upstream names: `embedders.{i}.weight`, `post_projs.{i}.weight`."""

    def __init__(self, rows: list[int], hidden_size: int, place: str):
        super().__init__()
        width = hidden_size // len(rows)
        self.embedders = nn.ModuleList([make_table(count, width, place) for count in rows])
        self.post_projs = nn.ModuleList([Linear(width, hidden_size, bias=False) for _ in rows])


def embed_ngrams(
    word_embeds: torch.Tensor, ngram_ids: torch.Tensor, tables, projections, zero_is_empty: bool = False
) -> torch.Tensor:
    """Average of the word embedding and all projected n-gram embeddings.

    Args:
        word_embeds: (B, S, hidden).
        ngram_ids: (B, S, I).
        tables, projections: I modules each.
        zero_is_empty: row 0 of each table stands for no n-gram, and adds nothing (LongCat-Next).
    """
    output = word_embeds
    for rows, ids, projection in zip(_look_up(ngram_ids, tables), ngram_ids.unbind(-1), projections):
        rows = rows.to(word_embeds.dtype)
        if zero_is_empty:
            rows = rows.masked_fill((ids == 0).unsqueeze(-1), 0.0)
        output = output + projection(rows).to(output.device)
    return output / (1 + len(tables))


def _look_up(ngram_ids: torch.Tensor, tables) -> list[torch.Tensor]:
    """Rows of each table, (B, S, width), on the device of the ids."""
    if not isinstance(tables[0], HostTable):
        return [table(ids) for ids, table in zip(ngram_ids.unbind(-1), tables)]
    # One copy there and one back for all tables.
    rows = torch.stack([table(ids) for ids, table in zip(ngram_ids.cpu().unbind(-1), tables)])
    return list(rows.to(ngram_ids.device).unbind(0))
