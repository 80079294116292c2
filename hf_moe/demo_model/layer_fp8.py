"""Modules whose weights can be block FP8: the storage, and what must not happen to it."""

import torch
from torch import nn

from .op_fp8 import Fp8Format, dequantize, quantizes_activations
from .op_quant import FP8, block_grid


class Fp8Module(nn.Module):
    """A module with weights that are either plain or block FP8, then each with a parameter `<name>_scale_inv`.

    FP8 parameters are frozen: they have no gradient and no optimiser can move them. They change device like any other,
    and refuse to change their dtype, since values without their scales mean nothing.

    Class attribute `fp8_parts`: names of the weights, each with the number of matrices stacked along its rows.
    """

    fp8_parts: dict[str, int] = {}
    fp8: Fp8Format | None = None
    # Of parameters that are padded so that ranks can share them: their shapes in the checkpoint. See `layer_shards`.
    unpadded_shapes: dict[str, tuple[int, ...]] = {}
    # Quantise activations: `None` decides by device. See `MoePreTrainedModel.set_fp8_activations`.
    quantize_activations: bool | None = None

    def register_scales(self) -> None:
        """To be called at the end of `__init__`: makes the scales known as parameters that are not there yet."""
        for name in self.fp8_parts:
            self.register_parameter(f"{name}_scale_inv", None)

    def store_fp8(self, fp8: Fp8Format, scale_dtype: torch.dtype) -> None:
        """Replaces the weights by FP8 ones, uninitialised and on the same device, to be filled by a loader.

        `compute_dtype`, from then on an attribute, is the dtype that the weights had.
        """
        self.fp8 = fp8
        for name, parts in self.fp8_parts.items():
            weight = getattr(self, name)
            self.compute_dtype = weight.dtype if weight.dtype != FP8 else self.compute_dtype
            grid = block_grid(tuple(weight.shape), fp8.block_size, parts)
            scale = torch.empty(grid, dtype=scale_dtype, device=weight.device)
            setattr(self, name, nn.Parameter(torch.empty_like(weight, dtype=FP8), requires_grad=False))
            setattr(self, f"{name}_scale_inv", nn.Parameter(scale, requires_grad=False))

    def store_dequantized(self, dtype: torch.dtype) -> None:
        """Replaces FP8 weights by decoded ones."""
        for name, parts in self.fp8_parts.items():
            weight, scale = getattr(self, name), getattr(self, f"{name}_scale_inv")
            if hasattr(weight, "placements"):  # this rank's part
                layout = {"run_check": False, "shape": weight.shape, "stride": weight.stride()}
                decoded = dequantize(weight.to_local(), scale.to_local(), self.fp8, dtype, parts)
                decoded = type(weight).from_local(decoded, weight.device_mesh, weight.placements, **layout)
            else:
                decoded = dequantize(weight, scale, self.fp8, dtype, parts)
            setattr(self, name, nn.Parameter(decoded))
            setattr(self, f"{name}_scale_inv", None)
        self.fp8 = None
        del self.compute_dtype

    def freeze_fp8(self) -> None:
        """Takes the gradient from FP8 weights and scales, which loaders give to every floating point tensor."""
        if self.fp8 is not None:
            for name in self.fp8_parts:
                getattr(self, name).requires_grad_(False)
                getattr(self, f"{name}_scale_inv").requires_grad_(False)

    def quantizes(self, rows: torch.Tensor) -> bool:
        """Whether a product with `rows` quantises them.

        Raises:
            TypeError: for weights that something cast, such as FSDP2's mixed precision before it gathers them.
        """
        for name in self.fp8_parts:
            dtype = getattr(self, name).dtype
            if dtype != FP8:
                raise TypeError(
                    f"{type(self).__name__}.{name} is {dtype}, its FP8 numbers without their "
                    "scales. FSDP's mixed precision does that: give it no `param_dtype`, or, through Accelerate, call "
                    "`hf_moe.training.distributed.keep_fp8(accelerator, model)` before the model is prepared."
                )
        return quantizes_activations(self.quantize_activations, rows.device, self.fp8)

    def _apply(self, fn, recurse=True):
        if self.fp8 is not None:
            refuse_cast(fn, next(iter(self.parameters(recurse=False))).device)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        for name in self.fp8_parts:
            given = state_dict.get(prefix + name)
            if given is not None and (given.dtype == FP8) != (self.fp8 is not None):
                here, there = ("FP8", "not") if self.fp8 is not None else ("not FP8", "FP8")
                errors.append(
                    f"{prefix}{name} is {here} in this model, {there} in the state dict; convert one of them."
                )
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


def refuse_cast(fn, device: torch.device) -> None:
    """Raises where `fn`, about to be applied to every parameter, would change the dtype of FP8 weights.

    Raises:
        TypeError: with what to do instead.
    """
    dtype = fn(torch.empty(0, dtype=FP8, device=device)).dtype
    if dtype != FP8:
        raise TypeError(
            f"This model has FP8 weights, and casting them to {dtype} would lose their scales. Pass `dtype=` to "
            "`from_pretrained` to choose the dtype of everything else, or `dequantize=True` for a model without FP8 "
            "weights; `model.dequantize(dtype)` does it after loading."
        )
