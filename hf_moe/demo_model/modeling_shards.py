"""A model that several ranks share out: plans of who holds what, and parameters that are larger than in the files."""

import re
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .layer_experts import Experts
from .weights_checkpoint import parameter_targets
from .weights_experts import SCALE_SUFFIX
from .weights_shards import PaddedTensor


def fit_plans_to_fp8(model: PreTrainedModel) -> None:
    """Scales are sharded with the experts that they belong to. What is cut otherwise `layer_shards` sees to."""
    stems = {_numbered(name) for name, module in model.named_modules() if getattr(module, "fp8", None) is not None}
    for name, style in dict(model._ep_plan or {}).items():
        if style == "grouped_gemm" and name.rpartition(".")[0] in stems:
            model._ep_plan[name + SCALE_SUFFIX] = style


def take_experts_from_plans(model: PreTrainedModel, distributed_config: Any) -> None:
    """Takes experts that ranks share out from the plan of tensor parallelism, which PEFT reads."""
    if not _is_expert_parallel(distributed_config):
        return
    experts = {_numbered(name) for name, module in model.named_modules() if isinstance(module, Experts)}
    # Older Transformers give the plan of expert parallelism in its place.
    for name in ("_tp_plan",) if hasattr(distributed_config, "ep_size") else ("_tp_plan", "_ep_plan"):
        plan = getattr(model, name) or {}
        setattr(model, name, {rule: plan[rule] for rule in plan if not experts & {rule, rule.rpartition(".")[0]}})


def _is_expert_parallel(distributed_config: Any) -> bool:
    by_size = (getattr(distributed_config, "ep_size", None) or 1) > 1
    return by_size or getattr(distributed_config, "enable_expert_parallel", False)


def _numbered(name: str) -> str:
    """A module's name as the rules of parallel plans have it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def pad_to_ranks(model: PreTrainedModel, tensors: dict[str, Any], key_mapping: dict[str, str] | None) -> dict[str, Any]:
    """The tensors to load, those of padded parameters as large as these."""
    padded = {name: module for name, module in model.named_modules() if getattr(module, "unpadded_shapes", None)}
    if not padded:
        return tensors
    output, weights = dict(tensors), [name for name in tensors if name + SCALE_SUFFIX in tensors]
    for weight, stem, parameter in parameter_targets(model, weights, key_mapping):
        for suffix in ("", SCALE_SUFFIX):
            module, name, target = padded.get(stem), weight + suffix, parameter + suffix
            if module is not None and target in module.unpadded_shapes:
                *_, rows, cols = getattr(module, target).shape
                *leading, height, _ = tensors[name].get_shape()
                share = module.unpadded_shapes[target][-2] // height  # 2: gate or up alone
                parts = module.fp8_parts[parameter] // share
                output[name] = PaddedTensor(tensors[name], (*leading, rows // share, cols), parts)
    return output


def unpadded_shapes(model: nn.Module) -> dict[str, tuple[tuple[int, ...], int]]:
    """Of every padded parameter its shape in the files, and how many matrices are stacked along its rows."""
    return {
        f"{name}.{parameter}": (shape, module.fp8_parts[parameter.removesuffix(SCALE_SUFFIX)])
        for name, module in model.named_modules()
        for parameter, shape in getattr(module, "unpadded_shapes", {}).items()
    }
