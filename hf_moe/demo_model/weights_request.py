"""What a call of `from_pretrained` asks for: a configuration, what is done about quantised weights, notes for later."""

import copy
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from .weights_fp8 import BlockFp8Config, upstream_fp8_config
from .weights_lazy import read_quantization_config

# Arguments that both the configuration and the weights are fetched with.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
# Arguments of the model that the configuration would take for fields of its own.
_NOT_CONFIG = ("state_dict", "quantization_config", "dequantize", "dtype", "torch_dtype")
# Notes from `from_pretrained` to the loader, on the configuration.
LOAD_OPTIONS = {
    "decoding": None,
    "source": None,
    "check_names": True,
    "key_mapping": None,
    "ignore_mismatched_sizes": False,
    "foreign_quantization": False,
}


def read_config(cls, path, kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Reads the configuration as `from_pretrained` would; returns it and the arguments that are left."""
    hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    own = {name: kwargs.pop(name) for name in _NOT_CONFIG if name in kwargs}
    config, left = cls.config_class.from_pretrained(path, return_unused_kwargs=True, **kwargs)
    return config, {**hub_arguments, **left, **own}


def give_text_options(config: PreTrainedConfig, kwargs: dict[str, Any]) -> PreTrainedConfig:
    """`config` with those of `kwargs`, which are taken out, that its text part alone has a field for, such as
    `num_hidden_layers`. Of a model of text alone, it is as it was."""
    text = config.get_text_config()
    if text is config:
        return config
    fields = text.to_dict()
    given = {name: kwargs.pop(name) for name in (fields.keys() & kwargs.keys()) - {*_NOT_CONFIG}}
    if given:
        config = copy.deepcopy(config)
        config.text_config = type(text).from_dict(fields, **given)
    return config


def split_quantization(
    config: PreTrainedConfig, requested: Any, dequantize: bool = False
) -> tuple[PreTrainedConfig, Any]:
    """Takes the stored format out of the configuration where we read it, and settles what is done about it.

    Returns the configuration with `load_options`, and the `quantization_config` for Transformers.
    """
    config = copy.deepcopy(config)
    config.load_options = {**LOAD_OPTIONS}
    holder = config
    if getattr(config, "quantization_config", None) is None and "text_config" in config.sub_configs:
        holder = config.get_text_config()
    stored = getattr(holder, "quantization_config", None)
    method = getattr(requested, "quant_method", None) or (requested or {}).get("quant_method")
    method = getattr(method, "value", method)
    decoding = None if stored is None or method == "compressed-tensors" else read_quantization_config(stored)
    config.load_options["decoding"] = decoding
    if decoding is not None:
        del holder.quantization_config
    if (decoding is None and stored is not None) or method not in (None, "fp8"):
        config.load_options["foreign_quantization"] = True
        return config, requested
    asked = requested.get("dequantize") if isinstance(requested, dict) else getattr(requested, "dequantize", False)
    if dequantize or asked:
        return config, None
    if decoding is not None and decoding["quant_method"] == "fp8":
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        return config, BlockFp8Config(stored, in_text_config=holder is not config)
    if method == "fp8":
        return config, BlockFp8Config(upstream_fp8_config(requested), on_load=True)
    return config, None


def refuse_for_fp8(arguments: dict[str, Any]) -> None:
    """Raises for ways to load that would mistake FP8 weights for plain ones.

    Raises:
        ValueError: with what to do instead.
    """
    distributed = arguments.get("distributed_config")
    sizes = distributed if isinstance(distributed, dict) else vars(distributed) if distributed is not None else {}
    if any((sizes.get(name) or 1) > 1 for name in ("fsdp_size", "dp_replicate_size", "pp_size")):
        raise ValueError(
            "FP8 weights are sharded by tensor parallelism, `DistributedConfig(tp_size=N)`, or by expert, with "
            "`ep_size=N` too. Pass `dequantize=True` for any other sharding."
        )
    if any(tensor.dtype == torch.float8_e4m3fn for tensor in (arguments.get("state_dict") or {}).values()):
        raise ValueError(
            "`state_dict` holds FP8 weights, which are read from files only: load the checkpoint from its folder, and "
            "put another state into the model with `load_state_dict`."
        )
