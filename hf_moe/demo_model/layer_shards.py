"""FP8 modules whose weights tensor parallelism has cut: cuts between blocks, and scales that are cut with them.

Transformers cuts a dimension into equal parts, wherever that is. Scales belong to blocks of the whole matrix, so a part
must consist of whole ones. The inner width of a gated MLP or of experts is nobody else's: it is padded with blocks of
zeros until every rank gets as many, and the product stays what it was. Any other dimension has to fit.
"""

import torch
from torch import nn

from .layer_dense import GatedMLP
from .layer_experts import Experts
from .layer_fp8 import Fp8Module
from .op_quant import block_grid

_INNER = {"gate_proj": {"weight": 0}, "up_proj": {"weight": 0}, "down_proj": {"weight": 1}}


def fit_fp8_to_ranks(model: nn.Module) -> None:
    """Fits the still empty FP8 parameters that are `DTensor`s to blocks; makes their scales `DTensor`s alike.

    Raises:
        ValueError: for a dimension that cannot be cut between blocks and must not be padded.
    """
    inner: dict[nn.Module, dict[str, int]] = {}
    for module in model.modules():
        if isinstance(module, Experts):
            inner[module] = {"gate_up_proj": 1, "down_proj": 2}
        elif isinstance(module, GatedMLP):
            linears = {getattr(module, name): dims for name, dims in _INNER.items()}
            cuts = all(_cut(linear.weight) == dims["weight"] for linear, dims in linears.items())
            if cuts and all(linear.fp8 is not None for linear in linears):
                inner.update(linears)
    for name, module in model.named_modules():
        if isinstance(module, Fp8Module) and module.fp8 is not None:
            for parameter in module.fp8_parts:
                if _cut(getattr(module, parameter)) is not None:
                    _fit(f"{name}.{parameter}", module, parameter, inner.get(module, {}).get(parameter))


def _cut(weight: torch.Tensor) -> int | None:
    """The dimension along which ranks share out a tensor; `None` if each has it whole."""
    dims = [placement.dim % weight.ndim for placement in getattr(weight, "placements", ()) if hasattr(placement, "dim")]
    return dims[0] if dims else None


def _fit(name: str, module: Fp8Module, parameter: str, inner: int | None) -> None:
    weight, parts = getattr(module, parameter), module.fp8_parts[parameter]
    mesh, (placement,), dim = weight.device_mesh, weight.placements, _cut(weight)
    scale = getattr(module, f"{parameter}_scale_inv")
    whole = {parameter: tuple(weight.shape), f"{parameter}_scale_inv": tuple(scale.shape)}
    shape = list(weight.shape)
    if dim >= weight.ndim - 2:  # otherwise whole experts
        of_rows = dim == weight.ndim - 2
        stacked = parts if of_rows else 1
        unit = module.fp8.block_size[0 if of_rows else 1] * mesh.size()
        size = shape[dim] // stacked
        mixed = getattr(placement, "split_factor", 1) != stacked
        if mixed or (size % unit and dim != inner):
            unfit = f"{size} {'rows' if of_rows else 'columns'} inside of a block"
            what = f"{parts} matrices in other places than their own" if mixed else unfit
            raise ValueError(
                f"Tensor parallelism over {mesh.size()} ranks would cut {what}, in FP8 tensor {name}. Use fewer ranks, "
                "leave it out of `tp_plan`, share out whole experts (`DistributedConfig(tp_size=N, ep_size=N)`), or "
                "pass `dequantize=True`."
            )
        shape[dim] = stacked * -(-size // unit) * unit
        # What makes Transformers hand over plain tensors, also with gradients; no product here takes others.
        module._hf_quantized_needs_local_tp = True
    grid = block_grid(tuple(shape), module.fp8.block_size, parts)
    if tuple(shape) != whole[parameter]:
        module.unpadded_shapes = {**module.unpadded_shapes, **whole}
        _place(module, parameter, shape, weight.dtype, mesh, placement)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = shape
    if tuple(scale.shape) != grid or getattr(scale, "placements", None) != weight.placements:
        _place(module, f"{parameter}_scale_inv", grid, scale.dtype, mesh, placement)


def _place(module: Fp8Module, name: str, shape, dtype: torch.dtype, mesh, placement) -> None:
    from torch.distributed.tensor import distribute_tensor  # not in every build of torch

    empty = torch.empty(tuple(shape), dtype=dtype, device="meta")
    placed = distribute_tensor(empty, mesh, [placement], src_data_rank=None)
    setattr(module, name, nn.Parameter(placed, requires_grad=False))
