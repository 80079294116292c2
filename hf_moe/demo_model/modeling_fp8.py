"""Models with block FP8 weights: which modules get them from a checkpoint, and what the whole does with them."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .layer_fp8 import Fp8Module, refuse_cast
from .modeling_shards import fit_plans_to_fp8
from .op_fp8 import Fp8Format
from .weights_checkpoint import parameter_targets, read_checkpoint
from .weights_experts import SCALE_SUFFIX
from .weights_fp8 import BlockFp8Config
from .weights_lazy import Fp8Weight, QuantizedOnLoad
from .weights_safetensors import CheckpointError

_FP8_TENSORS = (Fp8Weight, QuantizedOnLoad)


class Fp8ModelMixin:
    """What a `PreTrainedModel` does with the FP8 weights of its modules. Stands before it among the bases."""

    # Modules of ours that the family's FP8 releases leave in bfloat16, by the end of their name. A family extends it.
    _fp8_modules_to_not_convert = ("lm_head", "eh_proj", "shared_head.head")

    def prepare_fp8(self, request: BlockFp8Config, checkpoint_files: list[str] | None) -> dict[str, Any] | None:
        """Gives the modules of the still empty model FP8 weights where the checkpoint has them, or where asked.

        Returns the tensors to load, by upstream name; `None` if there are no files.
        """
        if checkpoint_files is None:
            return None
        options = self.config.load_options
        tensors = read_checkpoint(self, checkpoint_files, options)
        if request.on_load:
            skipped = request.stored.get("modules_to_not_convert") or ()
            candidates = {name: _on_load(name, tensor, request) for name, tensor in tensors.items()}
        else:
            skipped, candidates = None, tensors
        tensors = {**tensors, **_store_fp8(self, candidates, request, options["key_mapping"], skipped)}
        fit_plans_to_fp8(self)
        self.get_correct_experts_implementation(self.config._experts_implementation)
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def freeze_fp8(self) -> None:
        """Takes the gradient from FP8 weights and their scales."""
        for module in self._fp8_modules():
            module.freeze_fp8()

    def set_fp8_activations(self, quantize: bool | None) -> None:
        """Whether products with FP8 weights quantise their activations, 1 x 128, too.

        `None`, the default, does so on GPUs whose tensor cores multiply FP8, where the checkpoint is meant for it.
        `False` gives the product with the exact weights anywhere, `True` that with quantised activations.
        """
        for module in self._fp8_modules():
            module.quantize_activations = quantize

    def store_dequantized(self, dtype: torch.dtype):
        """Decodes every FP8 weight to `dtype`, module by module; `dequantize()` is the whole of it."""
        for module in self._fp8_modules():
            module.store_dequantized(dtype)
        return self

    def _fp8_modules(self) -> Iterator[Fp8Module]:
        return (module for module in self.modules() if isinstance(module, Fp8Module) and module.fp8 is not None)

    # Before any parameter is cast, so that a refused cast leaves the model as it was.
    def _apply(self, fn, recurse=True):
        first = next(self._fp8_modules(), None)
        if first is not None:
            refuse_cast(fn, next(first.parameters(recurse=False)).device)
        return super()._apply(fn, recurse)

    def half(self, *args):
        """As in Transformers; a model with FP8 weights says why not."""
        return nn.Module.half(self) if any(self._fp8_modules()) else super().half(*args)

    def float(self, *args):
        """As in Transformers; a model with FP8 weights says why not."""
        return nn.Module.float(self) if any(self._fp8_modules()) else super().float(*args)


def _on_load(name: str, tensor: Any, request: BlockFp8Config) -> Any:
    """The tensor as one that is quantised on load, where it may be a weight at all."""
    if len(tensor.get_shape()) < 2 or not tensor.dtype.is_floating_point:
        return tensor
    parts = 2 if name.endswith("gate_up_proj") else 1
    return QuantizedOnLoad(name, tensor, request.block_size, request.ue8m0, parts)


def _store_fp8(
    model: PreTrainedModel,
    tensors: dict[str, Any],
    request: BlockFp8Config,
    key_mapping: dict[str, str] | None,
    skipped: Collection[str] | None,
) -> dict[str, Any]:
    """Gives FP8 weights to the modules whose every tensor in `tensors` is FP8 or is to be.

    `skipped` names modules that stay as they are, beside those of the family; `None` if the files decide.

    Returns the entries to replace: two for each weight, its values and its scales.

    Raises:
        CheckpointError: if the parts of one parameter differ in what they are.
    """
    modules = dict(model.named_modules())
    found: dict[str, dict[str, Any]] = {}
    for name, stem, parameter in parameter_targets(model, tensors, key_mapping):
        module = modules.get(stem)
        if isinstance(module, Fp8Module) and parameter in module.fp8_parts:
            ends = () if skipped is None else (*model._fp8_modules_to_not_convert, *skipped)
            if not any(stem == end or stem.endswith(f".{end}") for end in ends):
                found.setdefault(stem, {})[name] = tensors[name]
    output: dict[str, Any] = {}
    for stem, group in found.items():
        pairs = {name: tensor.stored() for name, tensor in group.items() if isinstance(tensor, _FP8_TENSORS)}
        if not pairs:
            continue
        odd = next((name for name in group if name not in pairs), None)
        dtypes = {scale.dtype for _, scale in pairs.values()}
        if odd is not None or len(dtypes) > 1:
            problem = f"tensor {odd} is not FP8" if odd else f"scales are of {len(dtypes)} dtypes"
            raise CheckpointError(f"Module {stem} has FP8 weights, but its {problem}: load with `dequantize=True`.")
        modules[stem].store_fp8(Fp8Format(request.block_size, request.ue8m0, request.dynamic), dtypes.pop())
        for name, (values, scales) in pairs.items():
            output[name], output[name + SCALE_SUFFIX] = values, scales
    return output
