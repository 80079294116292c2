"""Rows of a batch that grow at different speeds: their tokens, and caches that hold a different length per row.

Slots count the tokens of a row from its first prompt slot, left padding included. A forward pass writes its states into
the same slots for all rows, behind the longest one. `RowCache.commit` then moves what each row keeps to where that row
ends and gives the rest back, so that a cache is as long as its longest row, whatever was rejected. Between the end of
a shorter row and the newly written slots lie slots of no meaning, which `RowCache.mask` hides.

Lengths are kept on the host, where shapes are decided; nothing here waits for a device.
"""

import torch
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
    offloading = getattr(cache, "offloading", False)
    foreign = [type(layer).__name__ for layer in getattr(cache, "layers", [None]) if type(layer) not in _LAYER_TYPES]
    if offloading or foreign:
        what = "an offloaded cache" if offloading else f"cache layers of type {foreign[0]}"
        raise ValueError(
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
