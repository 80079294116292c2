"""Loading, saving and defaults that every family shares, on top of Transformers' `PreTrainedModel`."""

import copy
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import PreTrainedModel

from .layer_experts import Experts
from .layer_router import TopkRouter
from .op_moe import BACKEND_NAME
from .weights_experts import defer_experts, expert_index, upstream_parts
from .weights_lazy import LazyTensor, plain_tensors, read_quantization_config
from .weights_safetensors import CheckpointError, ShapeError, check_folder, open_files, variant_names

ADAPTER_CONFIG = "adapter_config.json"
# Arguments that both the configuration and the weights are fetched with.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
# Arguments of the model that the configuration would take for fields of its own.
_NOT_CONFIG = ("state_dict", "quantization_config", "dtype", "torch_dtype")


class MoePreTrainedModel(PreTrainedModel):
    """Base of all our models: upstream checkpoints in, upstream checkpoints out.

    - `from_pretrained` checks the files first, decodes block FP8 and packed INT4 weights on the way, keeps or drops
      MTP layers by what the checkpoint holds, and refuses a checkpoint that lacks experts.
    - `save_pretrained` writes upstream names, the remote code with its `auto_map`, and replaces files only when all
      are complete.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    # --- defaults -------------------------------------------------------------------------------------------------

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As in Transformers, with our per-call choice as the default."""
        return super().get_correct_experts_implementation(requested_experts or BACKEND_NAME)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers looks for the decorator in the modeling file; ours is in `layer_experts`.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, TopkRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)

    # --- MTP layers: families that have them override these -----------------------------------------------------

    def resize_mtp_layers(self, count: int) -> None:
        """Makes the model have `count` MTP layers; new ones are on the meta device, to be filled by the loader."""

    def count_mtp_layers(self, tensor_names: set[str]) -> int:
        """MTP layers that a checkpoint with these upstream names holds."""
        return 0

    def mtp_duplicates(self) -> dict[str, str]:
        """Tensors that upstream files repeat and this model holds once: `{duplicate: original}`, upstream names."""
        return {}

    def is_mtp_tensor(self, stem: str) -> bool:
        """Whether `stem`, an upstream name without the `model.` prefix, belongs to an MTP layer."""
        return False

    def untie_mtp_tensor(self, duplicate: str) -> None:
        """Gives an MTP layer its own parameter where a checkpoint's copy differs from the original."""

    # --- loading ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Loads an upstream, native or own checkpoint. Arguments are those of Transformers.

        FP8 and INT4 checkpoints are dequantised to the requested dtype, tensor by tensor. A `quantization_config` of
        another method then quantises them anew; one of method compressed-tensors keeps INT4 weights packed, through
        Transformers' own integration.

        Raises:
            CheckpointError: (an `OSError` and a `ValueError`) for missing, truncated or foreign files, pickles,
                missing or surplus experts, wrong shapes and incomplete quantised tensors.
        """
        path = pretrained_model_name_or_path
        if path is not None and kwargs.get("gguf_file") is None:
            kwargs.setdefault("use_safetensors", True)
            folder = os.path.join(path, kwargs.get("subfolder") or "")
            if os.path.isdir(folder):
                check_folder(folder, kwargs.get("variant"))
            if not isinstance(config, PreTrainedConfig) and not os.path.isfile(os.path.join(folder, ADAPTER_CONFIG)):
                config, kwargs = _read_config(cls, path if config is None else config, kwargs)
        if isinstance(config, PreTrainedConfig):
            config, quantization_config = _split_quantization(config, kwargs.pop("quantization_config", None))
            config.load_options["check_names"] = kwargs.get("key_mapping") is None
            if quantization_config is not None:
                kwargs["quantization_config"] = quantization_config
        return super().from_pretrained(path, *model_args, config=config, **kwargs)

    # The one private hook: the model is still empty here, and the files are known. `tests/test_tree.py` fails
    # when its signature changes.
    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        options = model.config.__dict__.pop("load_options", None) or {"decoding": None, "check_names": True}
        in_quantized_form = getattr(load_config.hf_quantizer, "pre_quantized", False)
        if state_dict is None and checkpoint_files and not in_quantized_form:
            tensors = plain_tensors(open_files(checkpoint_files), options["decoding"])
            if options["check_names"]:
                _fit_model(model, tensors, load_config)
            to_disk = "disk" in (load_config.device_map or {}).values()
            if options["decoding"] is not None or not (to_disk or is_deepspeed_zero3_enabled()):
                # Offloading to disk refers to plain files where they lie, and ZeRO-3 reads them itself.
                state_dict, checkpoint_files = defer_experts(tensors), None
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    # --- saving -----------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        """Saves upstream names, the configuration in upstream spelling and the remote code. Arguments as Transformers.

        Files are written beside their final place and moved when all are complete, so that an interrupted save leaves
        an older checkpoint as it was.
        """
        if self.is_remote_code():
            self.config.auto_map = dict(self.config.remote_code_map)
        arguments = {"is_main_process": is_main_process, "state_dict": state_dict, **kwargs}
        if getattr(self, "_hf_peft_config_loaded", False) or kwargs.get("distributed_checkpoint"):
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **arguments)
        if state_dict is None and kwargs.get("save_original_format", True):
            arguments["state_dict"] = self._state_dict_with_duplicates()
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if push_to_hub or distributed or not is_main_process or os.path.isfile(save_directory):
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **arguments)
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".saving-") as staging:
            super().save_pretrained(staging, **arguments)
            _replace_files(Path(staging), Path(save_directory), kwargs.get("variant"))

    def _state_dict_with_duplicates(self) -> dict[str, torch.Tensor]:
        state_dict = self.state_dict()
        for duplicate, original in self.mtp_duplicates().items():
            tensor = state_dict[original]
            if tensor.device.type == "meta":  # offloaded
                tensor = load_offloaded_parameter(self, original)
            state_dict[duplicate] = tensor.detach().clone()  # safetensors refuses tensors that share memory
        return state_dict


def _read_config(cls, path, kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Reads the configuration as `from_pretrained` would; returns it and the arguments that are left."""
    hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    own = {name: kwargs.pop(name) for name in _NOT_CONFIG if name in kwargs}
    config, left = cls.config_class.from_pretrained(path, return_unused_kwargs=True, **kwargs)
    return config, {**hub_arguments, **left, **own}


def _split_quantization(config: PreTrainedConfig, requested: Any) -> tuple[PreTrainedConfig, Any]:
    """Takes the stored format out of the configuration where we decode it, and settles what was requested instead."""
    config = copy.deepcopy(config)
    config.load_options = {"decoding": None}
    stored = getattr(config, "quantization_config", None)
    method = getattr(requested, "quant_method", None) or (requested or {}).get("quant_method")
    method = getattr(method, "value", method)
    if stored is None or method == "compressed-tensors":
        return config, requested
    config.load_options["decoding"] = read_quantization_config(stored)
    if config.load_options["decoding"] is None:
        return config, requested
    del config.quantization_config
    if method == "fp8":
        if not getattr(requested, "dequantize", False):
            raise ValueError("Weights cannot stay FP8 in memory yet: leave `quantization_config` out to dequantise.")
        requested = None
    return config, requested


def _fit_model(model: MoePreTrainedModel, tensors: dict[str, Any], load_config) -> None:
    """Checks a checkpoint against the empty model, and gives the model the MTP layers that the checkpoint holds."""
    names = {_stem(name): name for name in tensors}
    count = model.count_mtp_layers(set(names))
    model.resize_mtp_layers(count)
    _extend_device_map(model, load_config.device_map)
    for duplicate, original in model.mtp_duplicates().items():
        duplicate, original = names.get(_stem(duplicate)), names.get(_stem(original))
        if duplicate is None:
            continue
        if original is not None and not _same(tensors[duplicate], tensors[original]):
            model.untie_mtp_tensor(duplicate)
    shared = {re.escape(_stem(duplicate)) for duplicate in model.mtp_duplicates()}
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | shared

    num_experts, missing = model.config.n_routed_experts, []
    for name in names.values():
        if (expert_index(name) or 0) >= num_experts:
            raise CheckpointError(
                f"The checkpoint has {name}, but config.json says `n_routed_experts={num_experts}`: one is wrong."
            )
    for parameter, tensor in model.state_dict().items():
        stem = _stem(parameter)
        parts = list(upstream_parts(stem, num_experts))
        if not parts or stem in names:  # not an expert, or already fused
            _check_shape(names.get(stem), tensors, tuple(tensor.shape), load_config)
            if stem not in names and model.is_mtp_tensor(stem):
                missing.append(stem)
            continue
        for part, share in parts:
            if part not in names:
                missing.append(part)
            else:
                _check_shape(names[part], tensors, (tensor.shape[1] // share, tensor.shape[2]), load_config)
    if missing:
        source = load_config.pretrained_model_name_or_path or "The checkpoint"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{source}: tensor model.{missing[0]}{more} missing. They would be newly initialised; complete the "
            f"checkpoint, or correct config.json (`n_routed_experts={num_experts}`)."
        )


def _same(left, right) -> bool:
    if isinstance(left, LazyTensor) and isinstance(right, LazyTensor) and left.entry.dtype == right.entry.dtype:
        return left.entry.same_bytes(right.entry)
    return torch.equal(left[...], right[...])


def _stem(name: str) -> str:
    """A tensor name without the prefix that only models with a head have."""
    return name.removeprefix("model.")


def _check_shape(name: str | None, tensors: dict[str, Any], expected: tuple[int, ...], load_config) -> None:
    if name is None or load_config.ignore_mismatched_sizes:
        return
    shape = tuple(tensors[name].get_shape())
    if shape != expected:
        raise ShapeError(
            f"Tensor {name} has shape {shape}, but config.json asks for {expected}. Correct the configuration, or "
            "pass `ignore_mismatched_sizes=True` to initialise it anew."
        )


def _extend_device_map(model: MoePreTrainedModel, device_map: dict | None) -> None:
    """Puts layers that the checkpoint added to the model beside the last layer that the device map knows."""
    if not device_map or "" in device_map:
        return
    layers = [key for key in device_map if re.fullmatch(r"(model\.)?layers\.\d+", key)]
    if layers:
        last = max(layers, key=lambda key: int(key.rsplit(".", 1)[1]))
        stem, index = last.rsplit(".", 1)
        for layer in range(int(index) + 1, len(model.base_model.layers)):
            device_map[f"{stem}.{layer}"] = device_map[last]


def _replace_files(staging: Path, target: Path, variant: str | None) -> None:
    """Moves complete files into place, and removes weight files of an older checkpoint that would be read with them.

    Files of other variants stay: they are other checkpoints of the same folder.
    """
    new = {path.name for path in staging.iterdir()}
    for path in sorted(staging.iterdir(), key=lambda path: path.suffix == ".json"):  # index and config last
        os.replace(path, target / path.name)
    infix = re.escape(f".{variant}") if variant else ""
    shard = re.compile(rf"model{infix}-\d{{5}}-of-\d{{5}}\.safetensors")
    if any(name.endswith(".safetensors") for name in new):
        for path in target.iterdir():
            stale = shard.fullmatch(path.name) or path.name in variant_names(variant)
            if stale and path.name not in new:
                path.unlink()
