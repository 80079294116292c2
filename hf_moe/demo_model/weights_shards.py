"""Tensors of a model that several ranks share out: as they are read from a file, and written to one.

Ranks share FP8 matrices in whole blocks. Where these cannot be dealt out evenly the parameter is larger than the tensor
of the file: the last blocks are zeros, which add nothing to any product, and are not written back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .op_quant import FP8
from .weights_safetensors import slice_ranges


@dataclass(frozen=True)
class PaddedTensor:
    """A lazy tensor (..., rows, cols) of FP8 values or scales seen as one of `shape`, with zeros and ones behind it.

    `parts`: matrices of equal height that are stacked along the rows, each with its own padding.
    """

    unpadded: Any
    shape: tuple[int, ...]
    parts: int = 1

    @property
    def dtype(self) -> torch.dtype:
        return self.unpadded.dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index) -> torch.Tensor:
        ranges = tuple((0, size) for size in self.shape) if index is Ellipsis else slice_ranges(index, self.shape)
        *leading, (first, last), (left, right) = ranges
        sizes = [stop - start for start, stop in ranges]
        output = torch.full(sizes, 0 if self.dtype == FP8 else 1, dtype=torch.uint8, device="cpu")
        output = output.view(FP8) if self.dtype == FP8 else output.to(self.dtype)
        height, width = self.unpadded.get_shape()[-2:]
        height, padded, right = height // self.parts, self.shape[-2] // self.parts, min(right, width)
        for part in range(self.parts):
            start, stop = max(first - part * padded, 0), min(last - part * padded, height)
            if start < stop and left < right:
                place = part * padded - first + start
                source = (slice(part * height + start, part * height + stop), slice(left, right))
                source = (*(slice(*span) for span in leading), *source)
                output[..., place : place + stop - start, : right - left] = self.unpadded[source]
        return output

    def unbind(self, dim: int = 0) -> list["PaddedTensor"]:
        """The slices along the first dimension, unread."""
        return [PaddedTensor(matrix, self.shape[1:], self.parts) for matrix in self.unpadded.unbind(dim)]

    def read_into(self, target: torch.Tensor) -> None:
        """Reads the tensor into `target`, of the same shape."""
        target.copy_(self[...])


def unpad(tensor: torch.Tensor, shape: tuple[int, ...], parts: int) -> torch.Tensor:
    """What of a padded tensor is in `shape`, the padding of each of `parts` stacked matrices left out."""
    matrices = tensor.unflatten(-2, (parts, -1))
    return matrices[..., : shape[-2] // parts, : shape[-1]].reshape(shape)


def gather_state_dict(
    state_dict: dict[str, Any], unpadded: Mapping[str, tuple[tuple[int, ...], int]], keep: bool
) -> dict[str, Any]:
    """The tensors of all ranks joined, on the CPU, one by one; every rank has to call this.

    Args:
        state_dict: tensors, of which those that ranks share out are `DTensor`s.
        unpadded: shapes without padding, and stacked matrices, of those that have padding.
        keep: whether this rank wants the result; others get nothing and hold one tensor at a time.
    """
    output = {}
    for name, tensor in state_dict.items():
        if hasattr(tensor, "placements"):
            tensor = _full_tensor(tensor, keep)
        if keep and isinstance(tensor, torch.Tensor):
            tensor = tensor.detach().cpu()
            tensor = (unpad(tensor, *unpadded[name]) if name in unpadded else tensor).contiguous()
        if keep:
            output[name] = tensor
    return output


def _full_tensor(tensor, keep: bool) -> torch.Tensor | None:
    """A `DTensor` joined, if this rank is to `keep` it. Parts of one size go as bytes: not every backend moves FP8, and
    in torch 2.11 `full_tensor` refuses parts of stacked matrices, as those of experts' gate and up rows are."""
    placement = tensor.placements[0]
    if len(tensor.placements) > 1 or not hasattr(placement, "dim"):
        return tensor.full_tensor()
    group, dim = tensor.device_mesh.get_group(), placement.dim % tensor.ndim
    stacked = getattr(placement, "split_factor", 1)
    ranks = dist.get_world_size(group)
    if tensor.shape[dim] % (stacked * ranks):
        return tensor.full_tensor()
    own = tensor.detach().to_local().contiguous().view(torch.uint8)
    parts = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(parts, own, group=group)
    if not keep:
        return None
    matrices = torch.cat([part.cpu().unflatten(dim, (stacked, -1)) for part in parts], dim=dim + 1)
    return matrices.flatten(dim, dim + 1).view(tensor.dtype)
