"""A smaller checkpoint of the same architecture: some layers, some experts, and a configuration that fits them.

The result is no good model; it loads, runs and fails like the large one, on a laptop. Layers keep their order. Experts
keep theirs, and the rows of the router and of its correction bias that are not theirs go. MTP layers stay, behind the
last layer that is kept. Widths, vocabulary, n-gram tables and vision tower stay whole.
"""

import copy
import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ..models.weights_safetensors import CheckpointError
from .plan import Copy, Group, Output, Part, Plan
from .source import Source, SourceTensor
from .structure import family_of, read_config_class

_LAYER = re.compile(r"((?:model\.)?(?:language_model\.)?layers\.)(\d+)(\..+)")
_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)(\..+)")
# Tensors whose first dimension counts experts: routers, and experts in one tensor.
_PER_EXPERT = re.compile(
    r"mlp\.gate\.(weight|e_score_correction_bias)$|mlp\.router\.(classifier\.(weight|bias)|e_score_correction_bias)$"
    r"|moe\.gate\.weight$|moe\.(gate|up|down)_proj\.weight(_scale_inv)?$"
    r"|experts\.(gate_up_proj|down_proj)(_scale_inv)?$"
)
_ROUTER = re.compile(r"\.(gate|router)\.")


@dataclass(frozen=True)
class Keys:
    """How a family's configuration names what a slice changes."""

    layers: str
    experts: str
    top_k: str


def plan_slice(
    source: Source, first_layers: int | None = None, last_layers: int = 0, experts: str | int | None = None
) -> Plan:
    """Plans a slice of a checkpoint in any format, in upstream names or with fused experts.

    Args:
        first_layers: how many layers from the first on; left out: all, or with `last_layers` none.
        last_layers: how many layers up to the last.
        experts: a number of experts (the first ones, of every group alike), or ids such as "0,3,8-11"; left out: all.

    Raises:
        CheckpointError: for layers or experts that there are not, and for choices that no configuration describes.
    """
    config = read_config_class(source.config)
    text = config.get_text_config()
    keys = _keys(family_of(source.config))
    layers = choose_layers(getattr(text, keys.layers), first_layers, last_layers)
    chosen, changes = choose_experts(text, keys, experts)
    changes |= _layer_changes(text, keys, layers)
    renumbered = {layer: index for index, layer in enumerate(layers)}
    for depth in range(_mtp_layers(source, text, keys)):
        renumbered[getattr(text, keys.layers) + depth] = len(layers) + depth
    groups, numbers = [], {expert: index for index, expert in enumerate(chosen)}
    for name, entry in source.entries.items():
        group = _group(name, entry, renumbered, numbers, getattr(text, keys.experts))
        if group is not None:
            groups.append(group)
    if experts is None:
        kept = f"all {getattr(text, keys.experts)} experts"
    else:
        kept = f"{len(chosen)} of {getattr(text, keys.experts)} experts"
    total = getattr(text, keys.layers)
    return Plan(
        title=f"slice: {len(layers)} of {total} layers, {kept}",
        groups=groups,
        config=_edit_config(source.config, config, changes, renumbered),
        options={"layers": layers, "experts": chosen if experts is not None else None},
        notes=[f"layers {_ranges(layers)} of {total} are kept, and {kept}"],
    )


def _keys(family: str) -> Keys:
    if family.startswith("step3"):
        return Keys("num_hidden_layers", "moe_num_experts", "moe_top_k")
    if family.startswith("longcat"):
        return Keys("num_layers", "n_routed_experts", "moe_topk")
    return Keys("num_hidden_layers", "n_routed_experts", "num_experts_per_tok")


def choose_layers(total: int, first: int | None, last: int) -> list[int]:
    """Numbers of the layers that are kept.

    Raises:
        CheckpointError: if that is none, or more than there are.
    """
    first = (0 if last else total) if first is None else first
    if first < 0 or last < 0 or first + last > total or first + last == 0:
        raise CheckpointError(
            f"--first-layers {first} and --last-layers {last}: there are {total} layers; keep from 1 to all."
        )
    return [*range(first), *range(total - last, total)]


def choose_experts(config: PreTrainedConfig, keys: Keys, request: str | int | None) -> tuple[list[int], dict[str, Any]]:
    """Ids of the experts that are kept, ascending, and the keys of the configuration that change with them.

    With expert groups, the groups that keep experts must keep equally many: their number is the new `n_group`. A number
    of experts is spread over as many groups as it divides into, with at least two experts each where a group's score
    is the sum of its two best.

    Raises:
        CheckpointError: for ids that there are not, and for choices that leave groups of different sizes.
    """
    total, groups = getattr(config, keys.experts), getattr(config, "n_group", None) or 1
    size = total // groups
    least = 2 if getattr(config, "topk_method", None) == "noaux_tc" and groups > 1 else 1
    if request is None:
        return list(range(total)), {}
    text = str(request).strip()
    if text.isdigit():
        count = int(text)
        if not 1 <= count <= total:
            raise CheckpointError(f"--experts {text}: the model has {total} experts; keep from 1 to all of them.")
        fitting = [g for g in range(groups, 0, -1) if count % g == 0 and least <= count // g <= size]
        fitting = fitting or [1] * (count <= size)
        if not fitting:
            raise CheckpointError(
                f"--experts {text}: cannot be spread evenly over expert groups of {size} (`n_group={groups}`). Take a "
                f"multiple of {groups}, or name the experts: --experts 0-7,32-39."
            )
        ids = [group * size + index for group in range(fitting[0]) for index in range(count // fitting[0])]
    else:
        ids = _parse_ids(text, total)
    counts = {group: sum(expert // size == group for expert in ids) for group in range(groups)}
    used = [count for count in counts.values() if count]
    if len(set(used)) > 1 or (len(used) > 1 and used[0] < least):
        raise CheckpointError(
            f"--experts {text}: leaves {counts} experts in the {groups} groups (`n_group`). Keep equally many, at "
            f"least {least}, in each group that keeps any."
        )
    changes: dict[str, Any] = {keys.experts: len(ids)}
    choices = len(ids) + (getattr(config, "zero_expert_num", 0) or 0)
    if getattr(config, "n_group", None) is not None:
        kept = min(getattr(config, "topk_group", None) or groups, len(used))
        changes |= {"n_group": len(used), "topk_group": kept}
        choices = kept * used[0]
    changes[keys.top_k] = min(getattr(config, keys.top_k), choices)
    return ids, changes


def _parse_ids(text: str, total: int) -> list[int]:
    ids: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise CheckpointError(f"--experts {text!r}: give a number of experts, or ids such as 0,3,8-11.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise CheckpointError(f"--experts {text}: {part.strip()} ends before it begins.")
        ids.update(range(first, last + 1))
    if max(ids) >= total:
        raise CheckpointError(f"--experts {text}: the model has experts 0 to {total - 1}.")
    return sorted(ids)


def _layer_changes(config: PreTrainedConfig, keys: Keys, layers: list[int]) -> dict[str, Any]:
    changes: dict[str, Any] = {keys.layers: len(layers)}
    if not hasattr(config, "is_moe_layer"):
        return changes
    with_experts = [config.is_moe_layer(layer) for layer in layers]
    if hasattr(config, "moe_layers_enum"):
        ids = [str(index) for index, has_experts in enumerate(with_experts) if has_experts]
        changes["moe_layers_enum"] = ",".join(ids) or str(len(layers))  # an id behind the last layer means none
        return changes
    dense = with_experts.index(True) if True in with_experts else len(layers)
    changes["first_k_dense_replace"] = dense
    frequency = config.moe_layer_freq
    if any(has != (i >= dense and i % frequency == 0) for i, has in enumerate(with_experts)):
        raise CheckpointError(
            f"Layers {_ranges(layers)}: which of them have experts ({with_experts}) cannot be said by "
            f"`first_k_dense_replace` and `moe_layer_freq={frequency}`. Choose other layers."
        )
    return changes


def _mtp_layers(source: Source, config: PreTrainedConfig, keys: Keys) -> int:
    """MTP layers that stand behind the main ones under the same name (LongCat's have a place of their own)."""
    numbers = [int(match[2]) for match in map(_LAYER.fullmatch, source.entries) if match]
    return max(0, max(numbers, default=-1) + 1 - getattr(config, keys.layers))


def new_name(name: str, renumbered: dict[int, int], experts: dict[int, int]) -> str | None:
    """A tensor's name in the slice; `None` if it is not in it."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name
    if int(layer[2]) not in renumbered:
        return None
    name = f"{layer[1]}{renumbered[int(layer[2])]}{layer[3]}"
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        return name
    if int(expert[2]) not in experts:
        return None
    return f"{expert[1]}{experts[int(expert[2])]}{expert[3]}"


def _group(
    name: str, entry: SourceTensor, renumbered: dict[int, int], chosen: dict[int, int], total: int
) -> Group | None:
    target = new_name(name, renumbered, chosen)
    if target is None:
        return None
    if len(chosen) == total or not _PER_EXPERT.search(name):
        return Group((name,), (Output(target, entry.dtype, entry.shape),), Copy())
    rows = list(chosen)
    if _ROUTER.search(name):
        rows += range(total, entry.shape[0])  # those of zero experts
    elif entry.shape[0] != total:
        raise CheckpointError(f"Tensor {name} has {entry.shape[0]} experts, but config.json says {total}.")
    if len(rows) > entry.shape[0] or rows[-1] >= entry.shape[0]:
        raise CheckpointError(f"Tensor {name} has {entry.shape[0]} rows, but config.json says {total} experts.")
    parts = tuple(Part(name, begin, end) for begin, end in _runs(rows))
    shape = (len(rows), *entry.shape[1:])
    return Group(parts, (Output(target, entry.dtype, shape),), Copy())


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs `(begin, end)`."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def _ranges(numbers: list[int]) -> str:
    return ", ".join(str(begin) if end == begin + 1 else f"{begin}-{end - 1}" for begin, end in _runs(numbers))


def _edit_config(
    stored: dict[str, Any], config: PreTrainedConfig, changes: dict[str, Any], renumbered: dict[int, int]
) -> dict[str, Any]:
    """The file's configuration with the changed keys, under the spelling that the file has."""
    output = copy.deepcopy(stored)
    holder = output
    for key in ("text_config", "language_config", "llm_config"):
        if isinstance(output.get(key), dict):
            holder = output[key]
            break
    aliases = getattr(config.get_text_config(), "attribute_map", {})
    for key, value in changes.items():
        for alias, name in aliases.items():
            if name == key and alias in holder:
                holder[alias] = value
        if key in holder or not any(name == key and alias in holder for alias, name in aliases.items()):
            holder[key] = value
    if "num_layers" in changes and isinstance(holder.get("num_hidden_layers"), int):
        sublayers = holder["num_hidden_layers"] // config.get_text_config().num_layers  # 1 or 2, as files disagree
        holder["num_hidden_layers"] = sublayers * changes["num_layers"]
    for part in [output] if holder is output else [output, holder]:
        quantization = part.get("quantization_config")
        for key in ("ignore", "modules_to_not_convert"):
            if isinstance(quantization, dict) and isinstance(quantization.get(key), list):
                quantization[key] = _edit_modules(quantization[key], renumbered)
    return output


def _edit_modules(modules: list[str], renumbered: dict[int, int]) -> list[str]:
    """Names of modules that are not quantised, with the new numbers of their layers."""
    output = []
    for module in modules:
        layer = _LAYER.fullmatch(f"{module}.")
        if layer is None:
            output.append(module)
        elif int(layer[2]) in renumbered:
            output.append(f"{layer[1]}{renumbered[int(layer[2])]}{layer[3]}".removesuffix("."))
    return output
