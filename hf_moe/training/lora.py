"""What LoRA trains: targets that are checked before anything is built, and a table of what came of them.

`import hf_moe` is all that PEFT needs to train experts by `target_parameters` (see `lora_hook` and `lora_layers`); the
functions here look at configurations and models and change nothing.
"""

from __future__ import annotations

import copy
import difflib
import re
from dataclasses import dataclass

from torch import nn

from .partition import count_elements

_LAYER = re.compile(r"(^|\.)layers\.(\d+)(?=\.)")
_SAVED = re.compile(r"\.modules_to_save\.([^.]+)(\.[^.]+)$")
_ADAPTER = re.compile(r"\.(lora_[A-Za-z_]+)\.([^.]+)(\.weight|\.bias)?$")


@dataclass(frozen=True)
class TrainedKind:
    """Trained tensors of one kind, over all layers.

    Attributes:
        kind: the target, with `*` for the layer number; `(MTP)` behind it in MTP layers.
        adapter: name of the adapter; empty for parameters that are trained themselves.
        targets: layers (or modules) that have it.
        tensors, parameters: how many tensors and numbers are trained.
        rank: the rank, `None` for parameters that are trained themselves; a sorted tuple where layers differ.
    """

    kind: str
    adapter: str
    targets: int
    tensors: int
    parameters: int
    rank: int | tuple[int, ...] | None


def check_targets(model: nn.Module, config) -> None:
    """Looks for each target of a `LoraConfig` in the model, each for itself; PEFT is content if one of them is there.

    Looks at `target_modules`, `target_parameters`, `modules_to_save`, `layers_to_transform`, and the keys of
    `rank_pattern` and `alpha_pattern`. `target_modules="all-linear"` always matches. FP8 weights cannot be saved whole:
    they have no gradient.

    Args:
        model: the model before or after `get_peft_model`.
        config: a `peft.LoraConfig`.

    Raises:
        ValueError: naming every target that matches nothing, with names that are alike, or that cannot be trained.
    """
    modules = {_plain(name) for name, _ in model.named_modules()} - {""}
    parameters = {_plain(name) for name, _ in model.named_parameters() if not _ADAPTER.search(name)}
    problems, matched = [], set()
    targets = config.target_modules
    if isinstance(targets, str):
        found = modules if targets == "all-linear" else _matching_modules(config, targets, modules)
        matched |= found
        if not found:
            problems.append(f"target_modules={targets!r} matches no module")
    for target in sorted(targets) if isinstance(targets, (list, set, tuple)) else ():
        found = _matching_modules(config, {target}, modules)
        matched |= found
        if not found:
            problems.append(f"target_modules: {target!r} matches no module{_alike(target, modules)}")
    for target in getattr(config, "target_parameters", None) or ():
        found = {name for name in parameters if _is_suffix(target, name)}
        matched |= found
        if not found:
            problems.append(f"target_parameters: {target!r} matches no parameter{_alike(target, parameters)}")
    frozen = [_plain(name) for name, module in model.named_modules() if getattr(module, "fp8", None) is not None]
    for target in config.modules_to_save or ():
        found = {name for name in modules if _is_suffix(target, name)}
        if not found:
            problems.append(f"modules_to_save: {target!r} matches no module{_alike(target, modules)}")
        elif any(f"{name}.".startswith(f"{saved}.") for name in frozen for saved in found):
            problems.append(f"modules_to_save: {target!r} has FP8 weights, which are frozen: target them with LoRA")
    layers = config.layers_to_transform
    present = {int(found.group(2)) for found in map(_LAYER.search, modules) if found}
    for layer in [layers] if isinstance(layers, int) else layers or ():
        if layer not in present:
            problems.append(f"layers_to_transform: there is no layer {layer} (layers 0 to {max(present, default=0)})")
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in matched):
                problems.append(f"{field}: {pattern!r} matches none of the targets")
    if not matched and not problems:
        problems.append("neither target_modules nor target_parameters is given")
    if problems:
        raise ValueError("The LoRA configuration does not fit the model:\n- " + "\n- ".join(problems))


def _plain(name: str) -> str:
    """A name as it is in the model before `get_peft_model`."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _is_suffix(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _matching_modules(config, targets, modules: set[str]) -> set[str]:
    """The modules that PEFT takes for these `target_modules`."""
    from peft.tuners.tuners_utils import BaseTuner

    alone = copy.copy(config)
    alone.target_modules = targets
    return {name for name in modules if BaseTuner._check_target_module_exists(alone, name)}


def _alike(target: str, names: set[str]) -> str:
    """Names that may be meant, without the layer numbers before them."""
    depth = target.count(".") + 1
    suffixes = {".".join(name.split(".")[-depth:]) for name in names}
    leaf = target.rpartition(".")[2]
    same = sorted(suffix for suffix in suffixes if suffix.rpartition(".")[2] == leaf)
    close = same or difflib.get_close_matches(target, sorted(suffixes), 3)
    return f" (did you mean {', '.join(map(repr, close[:3]))}?)" if close else ""


def mtp_targets(model: nn.Module, experts: bool = True) -> tuple[list[str], list[str]]:
    """`target_modules` and `target_parameters` for the MTP layers alone: their `eh_proj`, attention and experts.

    Args:
        model: a model with MTP layers.
        experts: whether to name experts, where the MTP layers have any.

    Raises:
        ValueError: if the model has no MTP layers.
    """
    prefixes = [name[: -len(".eh_proj")] for name in map(_plain, dict(model.named_modules())) if _is_eh_proj(name)]
    if not prefixes:
        raise ValueError("This model has no MTP layers: load it from a checkpoint that holds them.")
    inside = tuple(f"{prefix}." for prefix in prefixes)
    modules = sorted(
        _plain(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and _plain(name).startswith(inside)
        and (_is_eh_proj(name) or ".self_attn" in name)
        and ".lora_" not in name
    )
    parameters = sorted(
        {
            _plain(name)
            for name, _ in model.named_parameters()
            if _plain(name).startswith(inside) and name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        }
    )
    return modules, parameters if experts else []


def _is_eh_proj(name: str) -> bool:
    return _plain(name).endswith(".eh_proj")


def trained_kinds(model: nn.Module) -> list[TrainedKind]:
    """What has gradients in a model, LoRA or not, by kind and in the order of the model."""
    layers = _main_layers(model)
    owners = dict(model.named_modules())
    found: dict[tuple[str, str], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = _ADAPTER.search(name)
        owner = name[: factor.start()] if factor else name
        target = _plain(owner)
        if factor and hasattr(owners[owner], "parameter_name"):
            target = f"{target}.{owners[owner].parameter_name}"
        adapter = factor.group(2) if factor else ""
        saved = _SAVED.search(target)
        if saved:
            target, adapter = _SAVED.sub("", target) + saved.group(2), saved.group(1)
        empty = {"targets": set(), "tensors": 0, "count": 0, "r": set()}
        row = found.setdefault((_kind(target, layers), adapter), empty)
        row["targets"].add(target)
        row["tensors"] += 1
        row["count"] += count_elements([parameter])
        if factor:
            row["r"].add(owners[owner].r[adapter])
    kinds = []
    for (kind, adapter), row in found.items():
        ranks = tuple(sorted(row["r"]))
        rank = ranks[0] if len(ranks) == 1 else ranks or None
        kinds.append(TrainedKind(kind, adapter, len(row["targets"]), row["tensors"], row["count"], rank))
    return kinds


def _main_layers(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "num_hidden_layers", None) if hasattr(text, "num_nextn_predict_layers") else None


def _kind(name: str, layers: int | None) -> str:
    number = _LAYER.search(name)
    is_mtp = ".mtp." in name or (number is not None and layers is not None and int(number.group(2)) >= layers)
    return _LAYER.sub(r"\1layers.*", name) + (" (MTP)" if is_mtp else "")


def trained_table(model: nn.Module) -> str:
    """`trained_kinds` as a table in plain text, with the share of all parameters in its last line."""
    rows = [("trained", "adapter", "rank", "targets", "tensors", "parameters")]
    kinds = trained_kinds(model)
    for kind in kinds:
        rank = "-" if kind.rank is None else str(kind.rank)
        counts = (f"{count:,}" for count in (kind.targets, kind.tensors, kind.parameters))
        rows.append((kind.kind, kind.adapter or "-", rank, *counts))
    everything = count_elements(model.parameters())
    trained = sum(kind.parameters for kind in kinds)
    rows.append(("in all", "", "", "", f"{sum(kind.tensors for kind in kinds):,}", f"{trained:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        left = (cell.ljust(width) for cell, width in zip(row[:2], widths))
        right = (cell.rjust(width) for cell, width in zip(row[2:], widths[2:]))
        lines.append("  ".join((*left, *right)).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    lines.append(f"{trained / max(everything, 1):.4%} of {everything:,} parameters")
    return "\n".join(lines)
