"""A checkpoint and the empty model that it is for: its tensors are checked against the model, which is fitted to them.

What families differ in they say themselves, through the methods of `MoePreTrainedModel` that this asks.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .weights_experts import expert_index
from .weights_fp8 import METHOD
from .weights_lazy import LazyTensor, plain_tensors
from .weights_safetensors import CheckpointError, ShapeError, open_files

logger = logging.get_logger(__name__)


def read_checkpoint(model: PreTrainedModel, files: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """The tensors to load, by upstream name, checked against the empty model, which is fitted to them.

    `options` are those of `weights_request`; what only the loader needs later is added to them.

    Raises:
        CheckpointError: for missing tensors, surplus experts and incomplete quantised tensors.
        ShapeError: for a shape that the configuration does not ask for.
    """
    tensors = plain_tensors(open_files(files), options["decoding"])
    if options["check_names"]:
        stored, tensors = tensors, model.own_tensors(tensors)
        options["renamed"] = tensors is not stored
        model.adapt_to_checkpoint({name_stem(name): tuple(tensor.get_shape()) for name, tensor in tensors.items()})
        options["host_weights"] = _take_host_tables(model, tensors, options)
        _fit_model(model, tensors, options)
    return tensors


def _take_host_tables(model: PreTrainedModel, tensors: dict[str, Any], options) -> dict[nn.Module, torch.Tensor]:
    """Reads or maps the tensors of host tables, and takes them out of what is left to load."""
    names, weights = {name_stem(name): name for name in tensors}, {}
    for stem, table in model.host_tables().items():
        if stem not in names:
            raise CheckpointError(f"{options['source'] or 'The checkpoint'}: tensor model.{stem} is missing.")
        _check_shape(names[stem], tensors, table.shape, options)
        entry = tensors.pop(names[stem]).entry
        weights[table] = entry.map() if table.on_disk else entry.read()
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {re.escape(stem)}
    return weights


def _fit_model(model: PreTrainedModel, tensors: dict[str, Any], options: dict[str, Any]) -> None:
    """Checks a checkpoint against the empty model, and gives the model the MTP layers that the checkpoint holds."""
    names = {model.checkpoint_stem(name): name for name in tensors}
    count = model.count_mtp_layers(set(names))
    model.resize_mtp_layers(count)
    for holder in (model.base_model, model):
        holder.name_present_layers()
    _leave_out_layers(model, names, tensors)
    for duplicate, original in model.mtp_duplicates().items():
        duplicate, original = names.get(name_stem(duplicate)), names.get(name_stem(original))
        if duplicate is None:
            continue
        if original is not None and not _same(tensors[duplicate], tensors[original]):
            model.untie_mtp_tensor(duplicate)
    shared = {re.escape(name_stem(duplicate)) for duplicate in model.mtp_duplicates()}
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | shared

    num_experts, missing, of_experts = model.config.get_text_config().n_routed_experts, [], False
    body = "" if model.base_model is model else f"{model.base_model_prefix}."  # a head may be new
    as_stored = getattr(model, "quantization_method", METHOD) == METHOD  # other methods bring tensors of their own
    for name in names.values():
        if (expert_index(name) or 0) >= num_experts:
            raise CheckpointError(
                f"The checkpoint has {name}, but config.json says `{model.experts_key}={num_experts}`: one is wrong."
            )
    for parameter, tensor in model.state_dict(keep_vars=True).items():
        stem = model.checkpoint_stem(parameter)
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3 leaves an empty tensor in its place
        parts = model.upstream_parts(stem, shape)
        if not parts or stem in names:  # not an expert, or already fused
            _check_shape(names.get(stem), tensors, shape, options)
            if stem not in names and as_stored and parameter.startswith(body) and not model.is_optional_tensor(stem):
                missing.append(stem)
            continue
        for part, shape in parts:
            if part not in names:
                missing.append(part)
                of_experts = True
            else:
                _check_shape(names[part], tensors, shape, options)
    if missing:
        source = options["source"] or "The checkpoint"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        key = f" (`{model.experts_key}={num_experts}`)" if of_experts else ""
        raise CheckpointError(
            f"{source}: tensor {model.upstream_name(missing[0])}{more} missing. They would be newly initialised; "
            f"complete the checkpoint, or correct config.json{key}."
        )


def _leave_out_layers(model: PreTrainedModel, names: dict[str, str], tensors: dict[str, Any]) -> None:
    """Takes the layers beyond those that the caller asked for out of both: of 61, say, with `num_hidden_layers=4`."""
    stored = getattr(model.config.get_text_config(), "_upstream_num_layers", None)
    kept = len(model.get_decoder().layers)
    if stored is None or kept >= stored:
        return
    logger.warning("Of the %d layers of the checkpoint the first %d are loaded, as asked.", stored, kept)
    of_layers = {stem: re.match(r"layers\.(\d+)\.", stem) for stem in names}
    for stem, found in of_layers.items():
        if found is not None and int(found.group(1)) >= kept:
            del tensors[names.pop(stem)]


def _check_shape(name: str | None, tensors: dict[str, Any], expected: tuple[int, ...], options) -> None:
    if name is None or options["ignore_mismatched_sizes"]:
        return
    shape = tuple(tensors[name].get_shape())
    if shape != expected:
        raise ShapeError(
            f"Tensor {name} has shape {shape}, but config.json asks for {expected}. Correct the configuration, or "
            "pass `ignore_mismatched_sizes=True` to initialise it anew."
        )


def _same(left, right) -> bool:
    if isinstance(left, LazyTensor) and isinstance(right, LazyTensor) and left.entry.dtype == right.entry.dtype:
        return left.entry.same_bytes(right.entry)
    return torch.equal(left[...], right[...])


def name_stem(name: str) -> str:
    """A tensor name without the prefix that only models with a head have."""
    return name.removeprefix("model.")


def parameter_targets(
    model: PreTrainedModel, names: Iterable[str], key_mapping: dict[str, str] | None
) -> Iterator[tuple[str, str, str]]:
    """For each tensor of a checkpoint its name, and the module and parameter that it goes to."""
    conversions = get_model_conversion_mapping(model, key_mapping)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    parameters = model.state_dict()
    for name in names:
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        stem, _, parameter = target.rpartition(".")
        yield name, stem, parameter


def extend_device_map(model: PreTrainedModel, device_map: dict | None) -> None:
    """Puts layers that the checkpoint added to the model beside the last layer that the device map knows."""
    if not device_map or "" in device_map:
        return
    layers = [key for key in device_map if re.fullmatch(r"(model\.)?layers\.\d+", key)]
    if layers:
        last = max(layers, key=lambda key: int(key.rsplit(".", 1)[1]))
        stem, index = last.rsplit(".", 1)
        for layer in range(int(index) + 1, len(model.base_model.layers)):
            device_map[f"{stem}.{layer}"] = device_map[last]
        if getattr(model.base_model, "mtp", None) is not None:  # LongCat's stand in a module of their own
            device_map.setdefault(stem.removesuffix("layers") + "mtp", device_map[last])
