"""A latent cache that grows in place.

Transformers' dynamic cache concatenates at every step, which copies the whole context per token. The layer below keeps
spare room behind the last token and writes into it; `keys` and `values` are views that end at the last token, so every
reader sees the layout of a dynamic layer.
"""

import sys

import torch
from transformers.cache_utils import Cache, DynamicLayer

# Spare slots: an eighth of the context, but no fewer than this many tokens.
_MIN_SPARE_TOKENS = 64


class GrowingLayer(DynamicLayer):
    """Dynamic cache layer with amortised growth; (batch, heads, seq, dim) like `DynamicLayer`.

    Copies the context once per 12.5 % of growth instead of once per token. After a crop the freed slots are written
    again, unless somebody else holds `keys` or `values`, to come back to them later. A copy, shallow or deep, goes its
    own way. An operation of the base class that makes new tensors (reordering, selecting, repeating) leaves the spare
    room behind, and the next `update` makes new room.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Appends (batch, heads, new, dim) states; returns keys and values of the whole context."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, new = self.get_seq_length(), key_states.shape[-2]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            # Writing in place would break what autograd saved: the context itself, even where only queries are trained.
            self._buffers = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self._has_room(past + new, key_states, value_states):
            self._make_room(past, past + new, key_states, value_states)
        views = []
        for buffer, states in zip(self._buffers, (key_states, value_states)):
            buffer.narrow(-2, past, new).copy_(states)
            views.append(buffer.narrow(-2, 0, past + new))
        self.keys, self.values = views
        return self.keys, self.values

    def _has_room(self, length: int, *new: torch.Tensor) -> bool:
        if self._buffers is None or self._buffers[0].shape[-2] < length or self._buffers[0].shape[0] != new[0].shape[0]:
            return False
        if any(torch.promote_types(old.dtype, states.dtype) != old.dtype for old, states in zip(self._buffers, new)):
            return False  # the first ones came from under autocast, these do not
        if self._buffers[0].is_inference() and not torch.is_inference_mode_enabled():
            return False  # made under inference_mode, not writable outside
        # The base class may have replaced the tensors (beam reordering, batch selection): then the views are not ours.
        return all(
            tensor.numel() == 0 or tensor.data_ptr() == buffer.data_ptr()
            for tensor, buffer in zip((self.keys, self.values), self._buffers)
        )

    def _make_room(self, past: int, length: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # A first update is usually the whole prompt: spare room for it as well, since tokens follow.
        capacity = length + max(length // 8, _MIN_SPARE_TOKENS)
        buffers = []
        for tensor, states in ((self.keys, key_states), (self.values, value_states)):
            dtype = torch.promote_types(tensor.dtype, states.dtype) if past else states.dtype
            buffer = states.new_empty((*states.shape[:-2], capacity, states.shape[-1]), dtype=dtype)
            if past:
                buffer.narrow(-2, 0, past).copy_(tensor)
            buffers.append(buffer)
        self._buffers = tuple(buffers)

    def crop(self, *args, **kwargs):
        if max(sys.getrefcount(self.keys), sys.getrefcount(self.values)) > 2:  # the attribute, and the argument here
            self._buffers = None
        return super().crop(*args, **kwargs)

    def __copy__(self) -> "GrowingLayer":
        output = type(self).__new__(type(self))
        output.__dict__.update(self.__dict__, _buffers=None)
        return output

    def reset(self) -> None:
        self._buffers = None
        super().reset()

    def offload(self) -> None:
        self._buffers = None
        super().offload()


def adopt_growing_layers(cache: Cache, num_layers: int) -> None:
    """Replaces the empty plain dynamic layers of `cache` by growing ones. Static, quantised and filled layers stay."""
    if getattr(cache, "offloading", False) or not isinstance(getattr(cache, "layers", None), list):
        return
    replicated = getattr(cache, "layer_class_to_replicate", None)
    if replicated is DynamicLayer:
        while len(cache.layers) < num_layers:
            cache.layers.append(GrowingLayer())
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = GrowingLayer()


def new_tokens(mask: torch.Tensor, past: torch.Tensor | int, seq: int) -> torch.Tensor:
    """The part (batch, seq) of a mask over the context that belongs to the new tokens.

    The number of cached tokens is a tensor in static caches, whose masks may cover slots that are not yet written.
    """
    if mask.shape[1] == seq:
        return mask
    if isinstance(past, int):
        return mask[:, past : past + seq] if mask.shape[1] >= past + seq else mask[:, -seq:]
    own = torch.arange(seq, device=mask.device) + past
    return mask.index_select(1, own.clamp(max=mask.shape[1] - 1))
