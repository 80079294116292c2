"""Rows of a batch that grow at different speeds: their tokens, and caches that hold a different length per row.

Slots count the tokens of a row from its first prompt slot, left padding included. A forward pass writes its states into
the same slots for all rows, behind the longest one. `RowCache.commit` then moves what each row keeps to where that row
ends and gives the rest back, so that a cache is as long as its longest row, whatever was rejected. Between the end of
a shorter row and the newly written slots lie slots of no meaning, which `RowCache.mask` hides.

Lengths are kept on the host, where shapes are decided; nothing here waits for a device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .layer_cache import GrowingLayer

_LAYER_TYPES = (DynamicLayer, GrowingLayer, StaticLayer)


class SingleLayerCache(Cache):
    """Cache of one attention layer, which may have any `layer_idx`."""

    def __init__(self):
        super().__init__(layers=[GrowingLayer()])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        return super().update(key_states, value_states, 0, *args, **kwargs)


def check_cache(cache: Cache) -> None:
    """Raises `ValueError` for a cache whose rows cannot be moved: quantised, sliding or offloaded."""
    foreign = [type(layer).__name__ for layer in getattr(cache, "layers", [None]) if type(layer) not in _LAYER_TYPES]
    if getattr(cache, "offloading", False):
        raise unsupported_cache("an offloaded cache")
    if foreign:
        raise unsupported_cache(f"cache layers of type {foreign[0]}")


def unsupported_cache(what: str) -> ValueError:
    return ValueError(
        f"`use_mtp=True` does not support {what}: leave `cache_implementation` out, or set it to 'static'."
    )


def pick(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Entries (B, n, ...) of `rows` (B, T, ...) at `columns` (B or 1, n)."""
    return rows[torch.arange(rows.shape[0], device=rows.device).unsqueeze(1), columns]


def columns_from(starts: list[int], count: int, device: torch.device) -> torch.Tensor:
    """(B, count): in each row `starts[b]` and what follows it."""
    return torch.tensor(starts, device=device).unsqueeze(1) + torch.arange(count, device=device)


def cut(rows: torch.Tensor, starts: list[int], count: int) -> torch.Tensor:
    """`count` entries of each row of `rows` (B, T, ...), from `starts[b]` on; behind its end, the last one again."""
    if _all_equal(starts) and starts[0] + count <= rows.shape[1]:
        return rows.narrow(1, starts[0], count)
    return pick(rows, columns_from(starts, count, rows.device).clamp(max=rows.shape[1] - 1))


def write(rows: torch.Tensor, starts: list[int], entries: torch.Tensor) -> None:
    """Puts `entries` (B, n) into `rows` (B, T), in each row from `starts[b]` on."""
    if _all_equal(starts):
        rows.narrow(1, starts[0], entries.shape[1]).copy_(entries)
    else:
        rows.scatter_(1, columns_from(starts, entries.shape[1], rows.device), entries)


def _all_equal(values: list[int]) -> bool:
    return values.count(values[0]) == len(values)


@dataclass
class Prompt:
    """What `generate` hands on of the prompt.

    Attributes:
        input_ids: (B, given): all tokens, or with a cache only the new ones.
        length: slots of the prompt, those in the cache included.
        past: slots that the cache holds already.
        mask: (B, length) of ones and zeros, or `None` where nothing is hidden.
        position_ids: (B, length - past) of the new slots.
        embeds: (B, length, hidden) in place of tokens, or `None`.
    """

    input_ids: torch.Tensor
    length: int
    past: int
    mask: torch.Tensor | None
    position_ids: torch.Tensor
    embeds: torch.Tensor | None

    @property
    def first(self) -> int:
        """Slot of the first token in `input_ids`."""
        return self.length - self.input_ids.shape[1]


def take_prompt(input_ids: torch.Tensor, past: int, model_kwargs: dict[str, Any], mask_length: int | None) -> Prompt:
    """Takes out of `model_kwargs` what describes the prompt; `mask_length` stands in where there is no mask.

    Raises:
        ValueError: if the cache holds all of the prompt.
    """
    mask, position_ids = model_kwargs.pop("attention_mask", None), model_kwargs.pop("position_ids", None)
    embeds = model_kwargs.pop("inputs_embeds", None)
    batch, given = input_ids.shape
    if embeds is not None:
        length = embeds.shape[1]
    else:
        # With a past, either all tokens are given or only the new ones; the mask always covers all.
        total = mask.shape[1] if mask is not None else mask_length or given
        length = given if total == given else past + given
    new = length - past
    if new < 1:
        raise ValueError(f"The cache holds {past} tokens and the prompt {length}: there is nothing new to process.")
    if position_ids is None:
        position_ids = torch.arange(past, length, device=input_ids.device).unsqueeze(0)
    if mask is not None and (mask.shape[1] != length or bool(mask.all())):
        mask = None
    return Prompt(input_ids, length, past, mask, position_ids[:, -new:].expand(batch, -1), embeds)


class TokenRows:
    """The tokens of all rows that have not ended, known ones and drafts.

    Attributes:
        tokens: (B, slots) with the prompt in slots `prompt.first` to `prompt.length`.
        positions: (B, slots), which go on from the last one of the prompt.
        lengths: known tokens of each row.
        originals: index of each row in the original batch.
    """

    def __init__(self, prompt: Prompt, max_length: int | None, drafts: int):
        self.prompt, self.max_length, self.drafts = prompt, max_length, drafts
        batch, given = prompt.input_ids.shape
        room = max(1, max_length - given) if max_length else 256
        self.tokens = prompt.input_ids.new_zeros((batch, prompt.length + room + drafts + 1))
        self.tokens[:, prompt.first : prompt.length] = prompt.input_ids
        shift = prompt.position_ids[:, -1:] - (prompt.length - 1)  # (B, 1)
        self.positions = torch.arange(self.tokens.shape[1], device=self.tokens.device).unsqueeze(0) + shift
        self.lengths = [prompt.length] * batch
        self.originals = list(range(batch))

    def __len__(self) -> int:
        return len(self.lengths)

    def make_room(self) -> None:
        """Room for a step's drafts: without a maximal length the buffer grows as needed."""
        short = max(self.lengths) + self.drafts + 2 - self.tokens.shape[1]
        if self.max_length is None and short > 0:
            more = max(short, self.tokens.shape[1])
            self.tokens = nn.functional.pad(self.tokens, (0, more))
            behind = torch.arange(1, more + 1, device=self.tokens.device)
            self.positions = torch.cat((self.positions, self.positions[:, -1:] + behind), dim=1)

    def draft_limit(self) -> int:
        """Drafts that could still be used."""
        limit = self.tokens.shape[1] - max(self.lengths) - 1
        if self.max_length is not None:
            limit = min(limit, self.max_length + self.prompt.first - min(self.lengths) - 1)
        return limit

    def is_full(self, length: int) -> bool:
        """Whether a row with `length` known tokens may get no more."""
        return self.max_length is not None and length - self.prompt.first >= self.max_length

    def select(self, active: list[int]) -> None:
        """Drops all rows but these, given as indices into the present ones."""
        self.originals, self.lengths = [self.originals[i] for i in active], [self.lengths[i] for i in active]
        index = torch.tensor(active, dtype=torch.long, device=self.tokens.device)
        self.tokens, self.positions = self.tokens[index], self.positions[index]


class RowCache:
    """A cache of any number of layers whose rows have their own lengths.

    Args:
        cache: the cache; all layers hold `length` slots.
        lengths: slots that each row uses, host side.
        mask: (B, n) of ones and zeros for the first n slots (the prompt), or `None` where none is hidden.
        keep: keep the states of rows that are dropped, so that `restore` can put the batch together again.
    """

    def __init__(self, cache: Cache, lengths: list[int], mask: torch.Tensor | None, keep: bool = False):
        self.cache = cache
        self.lengths = lengths
        # The same on devices: (B, 1).
        self._ends: dict[torch.device, torch.Tensor] = {}
        self.prompt_mask = mask
        self.rows = list(range(len(lengths)))
        self.keep = keep
        self._kept: list[tuple[int, list[tuple[torch.Tensor, torch.Tensor]]]] = []

    @property
    def length(self) -> int:
        """Slots of the longest row, which is where the next forward pass writes."""
        return max(self.lengths)

    @property
    def layers(self) -> list:
        return [layer for layer in self.cache.layers if layer.is_initialized]

    def mask(self, new: torch.Tensor | int, device: torch.device) -> torch.Tensor | None:
        """(B, length + n) mask for a forward pass over n slots: the row's own slots, then `new`.

        `new` is (B, n) of booleans, or n where all are real. `None` where nothing is hidden.
        """
        length, count = self.length, new if isinstance(new, int) else new.shape[1]
        if self.prompt_mask is None and isinstance(new, int) and _all_equal(self.lengths):
            return None
        mask = torch.arange(length + count, device=device).unsqueeze(0) < self._ends_on(device)
        if self.prompt_mask is not None:
            known = min(self.prompt_mask.shape[1], length)
            mask[:, :known] &= self.prompt_mask[:, :known].to(device=device, dtype=torch.bool)
        mask[:, length:] = True if isinstance(new, int) else new
        return mask.long()

    def _ends_on(self, device: torch.device) -> torch.Tensor:
        # Once per step and device: the copy may wait for the device.
        if device not in self._ends:
            self._ends[device] = torch.tensor(self.lengths, device=device).unsqueeze(1)
        return self._ends[device]

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths, self._ends = lengths, {}

    def commit(self, counts: list[int]) -> None:
        """Keeps the first `counts[b]` of the slots just written in row b, and frees the others."""
        start = self.length
        moves = any(count and length < start for count, length in zip(counts, self.lengths))
        if moves:
            self._move(start, max(counts))
        self._set_lengths([length + count for length, count in zip(self.lengths, counts)])
        self.truncate(self.length)

    def _move(self, start: int, width: int) -> None:
        """Copies slots `start` to `start + width` of every row to where the row ends."""
        indices: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in self.layers:
            device = layer.keys.device
            if device not in indices:
                indices[device] = (
                    torch.arange(len(self.lengths), device=device).unsqueeze(1),
                    self._ends_on(device) + torch.arange(width, device=device),
                )
            rows, slots = indices[device]
            for states in (layer.keys, layer.values):  # (B, heads, T, d)
                # Slots beyond what a row keeps receive states of no meaning, which the mask hides.
                states[rows, :, slots] = states[:, :, start : start + width].transpose(1, 2).clone()

    def truncate(self, length: int) -> None:
        """Frees the slots behind `length`."""
        for layer in self.layers:
            if isinstance(layer, StaticLayer):
                layer.cumulative_length.fill_(length)
            elif layer.keys.shape[-2] > length:
                layer.keys, layer.values = layer.keys.narrow(-2, 0, length), layer.values.narrow(-2, 0, length)

    def select(self, rows: list[int]) -> None:
        """Drops all rows but these (at least one), given as indices into the present batch."""
        if self.keep:
            for row in set(range(len(self.rows))) - set(rows):
                length = self.lengths[row]
                states = [
                    (layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone())
                    for layer in self.layers
                ]
                self._kept.append((self.rows[row], states))
        for layer in self.layers:
            index = torch.tensor(rows, device=layer.keys.device)
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        self.rows = [self.rows[row] for row in rows]
        self._set_lengths([self.lengths[row] for row in rows])
        if self.prompt_mask is not None:
            self.prompt_mask = self.prompt_mask[torch.tensor(rows, device=self.prompt_mask.device)]
        self.truncate(self.length)

    def restore(self, length: int) -> None:
        """Puts dropped rows back, each in its place; the cache then holds `length` slots, zeros behind a row's end."""
        if not self._kept:
            self.truncate(length)
            return
        batch = len(self.rows) + len(self._kept)
        for index, layer in enumerate(self.layers):
            width = layer.keys.shape[-2] if isinstance(layer, StaticLayer) else length
            restored = []
            for part, states in enumerate((layer.keys, layer.values)):
                whole = states.new_zeros((batch, states.shape[1], width, states.shape[3]))
                for row, original in enumerate(self.rows):
                    end = self.lengths[row]
                    whole[original, :, :end] = states[row, :, :end]
                for original, kept in self._kept:
                    whole[original, :, : kept[index][part].shape[1]] = kept[index][part]
                restored.append(whole)
            layer.keys, layer.values = restored
        self.rows, self._kept = list(range(batch)), []
        self.truncate(length)
