"""PEFT's LoRA layers around our modules: experts, and linear layers with FP8 weights.

They keep PEFT's parameters, names and file format, so that adapters pass to and from its own layers. What differs:

- **Experts.** PEFT's `ParamWrapper` adds B A to the weights of all experts at every call. Ours hands the factors to the
  experts, which apply them to the rows of each expert inside the grouped products; so there can be dropout, too.
- **FP8.** Factors have the dtype that the model computes in, and merging decodes, adds and quantises one matrix at a
  time. What was merged into FP8 is taken out by restoring the weights from before, not by subtracting.

Shapes: E experts, O output features, I input features, R rank.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.distributed.tensor import DTensor

from ..models.op_quant import dequantize_block_fp8, quantize_block_fp8
from .lora_parallel import call_with_own_factors, check_sharding, is_shared_out, share_of

# Since PEFT 0.19 layers take the configuration as one argument; before, field by field.
_TAKES_CONFIG = "config" in inspect.signature(PeftParamWrapper.__init__).parameters
_EXPERT_WEIGHTS = {"gate_up_proj": "gate_up", "down_proj": "down"}


def create_layer(config, adapter_name: str, target: nn.Module, **kwargs) -> nn.Module | None:
    """The layer around `target`, or `None` if PEFT's own serves it. The arguments are those of PEFT's dispatchers."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    name = kwargs.pop("parameter_name", None)
    options = {"config": config, **kwargs} if _TAKES_CONFIG else kwargs
    if is_expert_weight(base, name):
        return ParamWrapper(target, adapter_name, parameter_name=name, **options)
    if name is None and isinstance(base, nn.Linear) and getattr(base, "fp8", None) is not None:
        return Linear(target, adapter_name, **options)
    return None


def is_expert_weight(owner: nn.Module | None, name: str | None) -> bool:
    """Whether `name` is a stack of our experts `owner`, which may be inside of wrappers."""
    base = owner.get_base_layer() if isinstance(owner, BaseTunerLayer) else owner
    return name in _EXPERT_WEIGHTS and hasattr(type(base), "lora_class")


def _option(kwargs: dict[str, Any], name: str, default: Any) -> Any:
    """A field of the configuration, however this version of PEFT passes it."""
    config = kwargs.get("config")
    return kwargs.get(name, default) if config is None else getattr(config, name, default)


def _check_init(kwargs: dict[str, Any], where: str, allowed: tuple[str, ...] = ("gaussian",)) -> None:
    init = _option(kwargs, "init_lora_weights", True)
    if not (isinstance(init, bool) or str(init).lower() in allowed):
        names = ", ".join(repr(name) for name in allowed)
        raise ValueError(f"init_lora_weights={init!r} does not work on {where}; use True, False or {names}.")


class _Merging:
    """Merging matrix by matrix into plain or FP8 weights, for a subclass of PEFT's layers.

    The subclass says which matrices there are (`_matrices`) and what an adapter adds to one of them (`_delta`).
    """

    # Weight and scale from before the first merge into FP8.
    _before: tuple[torch.Tensor, torch.Tensor] | None = None

    def _weight(self) -> tuple[str, nn.Parameter, torch.Tensor | None]:
        """Name, weight and scale in the base layer."""
        base, name = self.get_base_layer(), getattr(self, "parameter_name", "weight")
        return name, getattr(base, name), getattr(base, f"{name}_scale_inv", None)

    def _delta(self, adapter: str, index: int, dtype: torch.dtype) -> torch.Tensor:
        """B A of a matrix with the adapter's scaling, (O, I) in `dtype`."""
        a, b = self._factors(adapter)
        return (b[index].to(dtype) @ a[index].to(dtype)) * self.scaling[adapter]

    def _matrices(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """Each (O, I) matrix of the weight and its scale, as views; of experts that ranks share out, what is here.

        Raises:
            ValueError: for weights that are only put together while they are used.
        """
        name, weight, scale = self._weight()
        first = 0
        if isinstance(weight, DTensor):
            if weight.dim() == 2 or not is_shared_out(self.get_base_layer()):
                raise ValueError(f"{name} is sharded by FSDP2: merge the adapter in one process (`hf-moe merge`).")
            first = share_of(self.get_base_layer()).experts.start or 0
            weight, scale = weight.to_local(), scale.to_local() if isinstance(scale, DTensor) else scale
        if weight.dim() == 2:
            yield 0, weight.data, None if scale is None else scale.data
            return
        for index in range(weight.shape[0]):
            yield first + index, weight.data[index], None if scale is None else scale.data[index]

    def _sum(self, names: list[str], index: int, weight: torch.Tensor, scale: torch.Tensor | None, sign: float = 1.0):
        if scale is None:
            total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        else:
            base, name = self.get_base_layer(), self._weight()[0]
            total = dequantize_block_fp8(weight, scale, base.fp8.block_size, base.fp8_parts[name])
        for name in names:
            total += sign * self._delta(name, index, total.dtype)
        return total

    def _write(self, weight: torch.Tensor, scale: torch.Tensor | None, total: torch.Tensor) -> None:
        if scale is None:
            weight.copy_(total)
            return
        base, name = self.get_base_layer(), self._weight()[0]
        # Powers of two stay what they are in a scale of fewer bits.
        powers = base.fp8.ue8m0 or scale.dtype != torch.float32
        stacked = total.unflatten(0, (base.fp8_parts[name], -1))  # gate and up have blocks of their own
        values, scales = quantize_block_fp8(stacked, base.fp8.block_size, powers)
        weight.copy_(values.flatten(0, 1))
        scale.copy_(scales.flatten(0, 1))

    def _check_sums(self, names: list[str]) -> None:
        for index, weight, scale in self._matrices():
            if not torch.isfinite(self._sum(names, index, weight, scale)).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken"
                )

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        return [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.lora_A]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, keep_before: bool = True) -> None:
        """Adds adapters to the weights, matrix by matrix.

        Args:
            safe_merge: first look whether every sum is finite; nothing is changed otherwise.
            adapter_names: the active ones if not given.
            keep_before: keep FP8 weights as they were, for `unmerge`.

        Raises:
            ValueError: if `safe_merge` finds a sum that is not finite.
        """
        names = self._to_merge(adapter_names)
        if not names:
            return
        if safe_merge:
            self._check_sums(names)
        _, weight, scale = self._weight()
        if scale is not None and keep_before and self._before is None:
            self._before = weight.detach().clone(), scale.detach().clone()
        for index, matrix, matrix_scale in self._matrices():
            self._write(matrix, matrix_scale, self._sum(names, index, matrix, matrix_scale))
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes out what was merged: FP8 weights are put back, from others the sum is subtracted."""
        names, self.merged_adapters = self.merged_adapters, []
        _, weight, scale = self._weight()
        if scale is not None and self._before is not None:
            weight.data.copy_(self._before[0])
            scale.data.copy_(self._before[1])
            self._before = None
            return
        names = [name for name in names if name in self.lora_A]
        for index, matrix, matrix_scale in self._matrices():
            self._write(matrix, matrix_scale, self._sum(names, index, matrix, matrix_scale, -1.0))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, but factors beside FP8 weights get the dtype that the model computes in."""
        _, weight, scale = self._weight()
        dtype = weight.dtype if scale is None else self.get_base_layer().compute_dtype
        for holder in (getattr(self, name, None) for name in self.adapter_layer_names + self.other_param_names):
            if not isinstance(holder, nn.ModuleDict) or adapter_name not in holder:
                continue
            if not any(parameter.is_meta for parameter in holder.parameters()):
                holder[adapter_name] = holder[adapter_name].to(device or weight.device, dtype=dtype)


class ParamWrapper(_Merging, PeftParamWrapper):  # PEFT asks for this name when it nests wrappers
    """PEFT's wrapper of one stacked expert weight; it gives the factors to the experts instead of changing the weight.

    The wrapper of `down_proj` holds that of `gate_up_proj`, which holds the experts. A call goes through both, and each
    adds its factors to the `lora` argument of the experts' `forward`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, parameter_name: str, **kwargs):
        dropout, kwargs = _without_dropout(kwargs)
        super().__init__(base_layer, adapter_name, parameter_name=parameter_name, **kwargs)
        self._set_dropout(adapter_name, dropout)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, **kwargs) -> None:
        """Adds an adapter.

        Raises:
            ValueError: for an initialisation that reads the weights, for variants such as DoRA, and for experts that
                are cut by tensor parallelism.
        """
        check_sharding(self.get_base_layer())
        _check_init(kwargs, "the weights of experts")
        dropout, kwargs = _without_dropout(kwargs)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, **kwargs)
        self._set_dropout(adapter_name, dropout)

    def _set_dropout(self, adapter_name: str, dropout: float) -> None:
        if dropout:
            self.lora_dropout[adapter_name] = nn.Dropout(dropout)

    def _factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (E, R, I) and B (E, O, R) from PEFT's (E * R, I) and (O, R * E)."""
        first, second = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        first = first.view(self.num_experts, -1, first.shape[1])  # expert after expert
        # Here the experts alternate. Transposed, the numbers of an expert become rows that products take as they lie.
        second = second.t().contiguous().view(-1, self.num_experts, second.shape[0])  # (R, E, O)
        if getattr(self, "_did_swap_in_out_features", False):
            return first, second.permute(1, 2, 0)
        # PEFT up to 0.18 takes the stack for (E, I, O): what it calls A belongs to the output features.
        return second.transpose(0, 1), first.transpose(1, 2)

    def get_delta_weight(self, adapter_name: str, *args, **kwargs) -> torch.Tensor:
        """B A of all experts, (E, O, I): of the size of the weight. Nothing here calls it."""
        _, weight, scale = self._weight()
        dtype = weight.dtype if scale is None else torch.float32
        delta = super()._delta
        return torch.stack([delta(adapter_name, index, dtype) for index in range(self.num_experts)])

    def _delta(self, adapter: str, index: int, dtype: torch.dtype) -> torch.Tensor:
        delta, base = super()._delta(adapter, index, dtype), self.get_base_layer()
        if not is_shared_out(base):
            return delta
        inner = share_of(base).inner
        if self.parameter_name == "down_proj":
            return delta[:, inner]
        return delta.unflatten(0, (2, -1))[:, inner].flatten(0, 1)

    def forward(self, x: torch.Tensor, *args: Any, lora=None, **kwargs: Any) -> torch.Tensor:
        """(T, H) to (T, H); `args` are the ids and weights of the choices, `lora` the factors of a wrapper outside."""
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif not self.merged:
            lora = self._with_factors(lora, x, args[0] if args else kwargs["topk_indices"])
        if lora is not None:
            if not isinstance(self.base_layer, ParamWrapper) and is_shared_out(self.base_layer):
                return call_with_own_factors(self.base_layer, x, *args, lora=lora, **kwargs)
            kwargs["lora"] = lora
        return self.base_layer(x, *args, **kwargs)

    def _with_factors(self, lora, x: torch.Tensor, topk_indices: torch.Tensor):
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not names:
            return lora
        factors = [self._factors(name) for name in names]
        if len(names) == 1:
            (a, b), scaling = factors[0], self.scaling[names[0]]
        else:  # a sum of products is one product of a larger rank
            a = torch.cat([a for a, _ in factors], dim=1)
            b = torch.cat([b * self.scaling[name] for (_, b), name in zip(factors, names)], dim=2)
            scaling = 1.0
        part = _EXPERT_WEIGHTS[self.parameter_name]
        given = {f"{part}_a": a, f"{part}_b": b, f"{part}_scaling": scaling}
        dropout = self._dropout(names, lora)
        if dropout:
            # A mask for each token on its way into the experts, and for each of its choices inside of them.
            rows = x.shape[0] if part == "gate_up" else topk_indices.numel()
            kept = torch.empty(rows, a.shape[2], dtype=torch.bool, device=x.device).bernoulli_(1.0 - dropout)
            given |= {"dropout": dropout, "kept_hidden" if part == "gate_up" else "kept_inner": kept}
        return replace(lora or self.get_base_layer().lora_class(), **given)

    def _dropout(self, names: list[str], lora) -> float:
        """The probability that the active adapters share."""
        layers = [self.lora_dropout[name] for name in names]
        found = {layer.p if isinstance(layer, nn.Dropout) and layer.training else 0.0 for layer in layers}
        if lora is not None:
            found.add(lora.dropout)
        if len(found) > 1:
            raise ValueError(
                f"The active adapters {names} have different lora_dropout ({sorted(found)}), which experts cannot "
                "apply at once; activate them one at a time, or give them the same."
            )
        return found.pop()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The experts alone, with adapters merged into them if `merge`."""
        if merge:
            wrappers, layer = [], self
            while isinstance(layer, ParamWrapper):
                wrappers.append(layer)
                layer = layer.base_layer
            if safe_merge:  # of both weights, before one of them changes
                for wrapper in wrappers:
                    wrapper._check_sums(wrapper._to_merge(adapter_names))
            for wrapper in wrappers:
                wrapper.merge(adapter_names=adapter_names, keep_before=False)
        return self.get_base_layer()


def _without_dropout(kwargs: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """The dropout, and the arguments without it: PEFT's wrapper refuses it."""
    dropout = _option(kwargs, "lora_dropout", 0.0)
    if kwargs.get("config") is None:
        return dropout, {**kwargs, "lora_dropout": 0.0}
    config = copy.copy(kwargs["config"])
    config.lora_dropout = 0.0
    return dropout, {**kwargs, "config": config}


class Linear(_Merging, PeftLinear):  # PEFT tells linear layers by this name
    """PEFT's linear layer around one with FP8 weights."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, **kwargs) -> None:
        """Adds an adapter.

        Raises:
            ValueError: for initialisations and variants that read or change the weights, and for `lora_bias`.
        """
        _check_init(kwargs, "FP8 weights")
        if _option(kwargs, "lora_bias", False):
            raise ValueError("lora_bias=True does not work on FP8 weights.")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, **kwargs)

    def resolve_lora_variant(self, **kwargs):
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None:
            raise ValueError(
                f"{type(variant).__name__} (such as use_dora=True) does not work on FP8 weights; "
                "`model.dequantize(dtype)` makes a model without them."
            )
        return None

    def _factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_A[adapter].weight.unsqueeze(0), self.lora_B[adapter].weight.unsqueeze(0)
