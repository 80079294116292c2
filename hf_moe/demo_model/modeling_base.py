"""Loading, saving and defaults that every family shares, on top of Transformers' `PreTrainedModel`."""

import copy
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import PreTrainedModel

from .layer_experts import Experts
from .layer_fp8 import Fp8Module, refuse_cast
from .layer_router import TopkRouter, ZeroExpertRouter
from .layer_shards import fit_fp8_to_ranks
from .op_experts import TRITON_BACKEND_NAME
from .op_fp8 import Fp8Format
from .op_moe import BACKEND_NAME
from .weights_experts import SCALE_SUFFIX, defer_experts, expert_index, upstream_parts
from .weights_fp8 import METHOD, BlockFp8Config, BlockFp8Quantizer, upstream_fp8_config
from .weights_lazy import Fp8Weight, LazyTensor, QuantizedOnLoad, plain_tensors, read_quantization_config
from .weights_safetensors import CheckpointError, ShapeError, check_folder, open_files, raise_caught, variant_names
from .weights_shards import PaddedTensor, gather_state_dict

ADAPTER_CONFIG = "adapter_config.json"
# Arguments that both the configuration and the weights are fetched with.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
# Arguments of the model that the configuration would take for fields of its own.
_NOT_CONFIG = ("state_dict", "quantization_config", "dequantize", "dtype", "torch_dtype")
# Notes from `from_pretrained` to the loader, on the configuration.
_LOAD_OPTIONS = {
    "decoding": None,
    "source": None,
    "check_names": True,
    "key_mapping": None,
    "ignore_mismatched_sizes": False,
}
_FP8_TENSORS = (Fp8Weight, QuantizedOnLoad)


class MoePreTrainedModel(PreTrainedModel):
    """Base of all our models: upstream checkpoints in, upstream checkpoints out.

    - `from_pretrained` checks the files first, keeps block FP8 weights as they are or decodes them, decodes packed INT4
      weights, keeps or drops MTP layers by what the checkpoint holds, and refuses a checkpoint that lacks experts.
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
    # Modules of ours that the family's FP8 releases leave in bfloat16, by the end of their name. A family extends it.
    _fp8_modules_to_not_convert = ("lm_head", "eh_proj", "shared_head.head")

    # --- defaults -------------------------------------------------------------------------------------------------

    def post_init(self):
        """As in Transformers; see `name_present_layers`."""
        super().post_init()
        self.name_present_layers()

    def name_present_layers(self) -> None:
        """Leaves in `_no_split_modules` the classes that occur: Accelerate's FSDP looks for each, MTP layers too."""
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = present & {*self._no_split_modules, *(type(self)._no_split_modules or ())}

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As in Transformers, with our per-call choice as the default.

        Raises:
            ValueError: for a backend of Transformers that multiplies plain weights, where the weights are FP8.
        """
        name = super().get_correct_experts_implementation(requested_experts or BACKEND_NAME)
        if name not in (BACKEND_NAME, TRITON_BACKEND_NAME, "eager") and any(self._fp8_modules()):
            raise ValueError(
                f"`experts_implementation={name!r}` multiplies plain weights, and this model's are FP8; use "
                f"{BACKEND_NAME!r}, {TRITON_BACKEND_NAME!r} or 'eager', or load with `dequantize=True`."
            )
        return name

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers looks for the decorator in the modeling file; ours is in `layer_experts`.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Fp8Module) and module.fp8 is not None:
            return  # comes from a checkpoint, whole
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, TopkRouter):
            weight = module.classifier.weight if isinstance(module, ZeroExpertRouter) else module.weight
            init.normal_(weight, mean=0.0, std=std)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)

    def _check_token_ids(self, input_ids: torch.LongTensor) -> None:
        """Raises `IndexError` for token ids outside of the vocabulary."""
        # On an accelerator the check waits for the device: there only prompts are checked, not training or decoding.
        on_cpu = input_ids.device.type == "cpu"
        is_prompt = input_ids.shape[-1] > 1 and not self.training
        if torch.compiler.is_compiling() or input_ids.device.type == "meta" or input_ids.numel() == 0:
            return
        capturing = input_ids.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if on_cpu or (is_prompt and not capturing):
            low, high = (bound.item() for bound in input_ids.aminmax())
            entries = self.get_input_embeddings().num_embeddings
            if low < 0 or high >= entries:
                raise IndexError(
                    f"`input_ids` holds token ids from {low} to {high}, but the vocabulary has {entries} entries. "
                    "Is this the tokenizer of this model?"
                )

    @classmethod
    def own_config(cls, config: PreTrainedConfig) -> PreTrainedConfig:
        """The part of `config` that this class reads: all of it, unless a family has composite configurations."""
        return config

    # --- expert tensors: families that name them otherwise override these ---------------------------------------

    experts_key = "n_routed_experts"  # the configuration's name for the number of experts, for messages

    def checkpoint_stem(self, name: str) -> str:
        """What a parameter's name and its name in a file have in common."""
        return _stem(name)

    def upstream_name(self, stem: str) -> str:
        """A stem as upstream files name the tensor."""
        return f"model.{stem}"

    def upstream_parts(self, stem: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        """Stems and shapes of the upstream tensors that a fused parameter is made of; nothing for any other one."""
        parts = upstream_parts(stem, shape[0]) if shape else ()
        return [(part, (shape[1] // share, shape[2])) for part, share in parts]

    def join_sharded(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The tensors of a checkpoint for a model whose parameters are sharded, joined where a slice spans several."""
        return tensors

    # --- MTP layers: families that have them override these -----------------------------------------------------

    def resize_mtp_layers(self, count: int) -> None:
        """Makes the model have `count` MTP layers; new ones are on the meta device, to be filled by the loader."""

    def count_mtp_layers(self, tensor_names: set[str]) -> int:
        """MTP layers that a checkpoint with these upstream names holds."""
        return 0

    def mtp_duplicates(self) -> dict[str, str]:
        """Tensors that upstream files repeat and this model holds once: `{duplicate: original}`, upstream names."""
        return {}

    def is_optional_tensor(self, stem: str) -> bool:
        """Whether a checkpoint may lack `stem`, an upstream name without the `model.` prefix."""
        return False

    def untie_mtp_tensor(self, duplicate: str) -> None:
        """Gives an MTP layer its own parameter where a checkpoint's copy differs from the original."""

    # --- what a family may add to loading ---------------------------------------------------------------------------

    def own_tensors(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Of a checkpoint's tensors those of this model, under upstream names (wrappers put theirs beside them)."""
        return tensors

    def adapt_to_checkpoint(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Fits the empty model to the shapes of a checkpoint's tensors, by upstream name without `model.`."""

    def host_tables(self) -> dict[str, nn.Module]:
        """Modules whose `weight` is no parameter and stays off the model's device, by upstream name of the tensor."""
        return {}

    # --- block FP8 --------------------------------------------------------------------------------------------------

    def prepare_fp8(self, request: BlockFp8Config, checkpoint_files: list[str] | None) -> dict[str, Any] | None:
        """Gives the modules of the still empty model FP8 weights where the checkpoint has them, or where asked.

        Returns the tensors to load, by upstream name; `None` if there are no files.
        """
        if checkpoint_files is None:
            return None
        options = self.config.load_options
        tensors = _read_checkpoint(self, checkpoint_files, options)
        if request.on_load:
            skipped = request.stored.get("modules_to_not_convert") or ()
            candidates = {name: _on_load(name, tensor, request) for name, tensor in tensors.items()}
        else:
            skipped, candidates = None, tensors
        tensors = {**tensors, **_store_fp8(self, candidates, request, options["key_mapping"], skipped)}
        self._fit_plans_to_fp8()
        self.get_correct_experts_implementation(self.config._experts_implementation)
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _fit_plans_to_fp8(self) -> None:
        """Scales are sharded with the experts that they belong to. What is cut otherwise `layer_shards` sees to."""
        stems = {_numbered(name) for name, module in self.named_modules() if getattr(module, "fp8", None) is not None}
        for name, style in dict(self._ep_plan or {}).items():
            if style == "grouped_gemm" and name.rpartition(".")[0] in stems:
                self._ep_plan[name + SCALE_SUFFIX] = style

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
        """As in `torch`; a model with FP8 weights says why not."""
        return nn.Module.half(self)

    def float(self, *args):
        """As in `torch`; a model with FP8 weights says why not."""
        return nn.Module.float(self)

    # --- loading ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Loads an upstream, native or own checkpoint. Arguments are those of Transformers.

        FP8 weights stay FP8; `dtype` is that of everything else. INT4 weights are dequantised to it, and so are FP8
        ones with `dequantize=True` (here or in a `FineGrainedFP8Config`). A `FineGrainedFP8Config` for a checkpoint
        that is not FP8 quantises it on load. A `quantization_config` of another method quantises decoded weights; one
        of method compressed-tensors keeps INT4 weights packed, through Transformers' own integration.

        Raises:
            CheckpointError: (an `OSError` and a `ValueError`) for missing, truncated or foreign files, pickles,
                missing tensors, surplus experts, wrong shapes, incomplete quantised tensors and scales that are not
                finite. Tensors of a head may be missing.
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
            config = cls.own_config(config)
            config, quantization_config = _split_quantization(
                config, kwargs.pop("quantization_config", None), kwargs.pop("dequantize", False)
            )
            if isinstance(quantization_config, BlockFp8Config):
                _refuse_for_fp8(kwargs)
            config.load_options.update(
                source=path,
                check_names=kwargs.get("key_mapping") is None,
                key_mapping=kwargs.get("key_mapping"),
                ignore_mismatched_sizes=kwargs.get("ignore_mismatched_sizes", False),
            )
            if quantization_config is not None:
                kwargs["quantization_config"] = quantization_config
        return super().from_pretrained(path, *model_args, config=config, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *args, **kwargs):
        """As in Transformers; experts that ranks share out leave the plan of tensor parallelism, which PEFT reads."""
        model = super().maybe_distribute_model(model, distributed_config, *args, **kwargs)
        fit_fp8_to_ranks(model)
        if _is_expert_parallel(distributed_config):
            experts = {_numbered(name) for name, module in model.named_modules() if isinstance(module, Experts)}
            # Older Transformers give the plan of expert parallelism in its place.
            for name in ("_tp_plan",) if hasattr(distributed_config, "ep_size") else ("_tp_plan", "_ep_plan"):
                plan = getattr(model, name) or {}
                setattr(
                    model, name, {rule: plan[rule] for rule in plan if not experts & {rule, rule.rpartition(".")[0]}}
                )
        return model

    # The one private hook: the model is still empty here, and the files are known. `tests/test_tree.py` fails
    # when its signature changes.
    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        options = model.config.__dict__.pop("load_options", None) or {**_LOAD_OPTIONS}
        quantizer = load_config.hf_quantizer
        if state_dict is None and checkpoint_files and not getattr(quantizer, "pre_quantized", False):
            tensors = quantizer.tensors if isinstance(quantizer, BlockFp8Quantizer) else None
            if tensors is None:
                tensors = _read_checkpoint(model, checkpoint_files, options)
            _extend_device_map(model, load_config.device_map)
            to_disk = "disk" in (load_config.device_map or {}).values()
            as_stored = all(isinstance(tensor, LazyTensor) for tensor in tensors.values())
            if options.get("renamed") or not as_stored or not (to_disk or is_deepspeed_zero3_enabled()):
                # Offloading to disk refers to plain files where they lie, and ZeRO-3 reads them itself.
                state_dict, checkpoint_files = defer_experts(_pad_to_ranks(model, tensors, options)), None
                if any(hasattr(parameter, "placements") for parameter in model.parameters()):
                    state_dict = model.join_sharded(state_dict)
        info = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)
        raise_caught(getattr(info[0], "conversion_errors", None) or {})
        for table, weight in options.get("host_weights", {}).items():  # to the loader they are no tensors of the model
            table.weight = weight
        return info

    # --- saving -----------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        """Saves upstream names, the configuration in upstream spelling and the remote code. Arguments as Transformers.

        Files are written beside their final place and moved when all are complete, so that an interrupted save leaves
        an older checkpoint as it was. Of a model that ranks share out, all call this and the first one writes.

        Raises:
            ValueError: for `distributed_checkpoint=True` where there are FP8 weights.
        """
        if self.is_remote_code():
            self.config.auto_map = dict(self.config.remote_code_map)
        if not any(self._fp8_modules()):
            _drop_fp8_config(self.config)  # of a model that was made from the configuration of an FP8 checkpoint
        elif kwargs.get("distributed_checkpoint"):
            raise ValueError("FP8 weights are not written by each rank for itself: leave out `distributed_checkpoint`.")
        arguments = {"is_main_process": is_main_process, "state_dict": state_dict, **kwargs}
        if getattr(self, "_hf_peft_config_loaded", False) or kwargs.get("distributed_checkpoint"):
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **arguments)
        if kwargs.get("save_original_format", True):
            arguments["state_dict"] = self._with_duplicates(self.state_dict() if state_dict is None else state_dict)
        quantizer = getattr(self, "hf_quantizer", None)
        if isinstance(quantizer, BlockFp8Quantizer):
            quantizer.state_dict_to_save = arguments["state_dict"]
            try:
                return self._save_replacing(save_directory, is_main_process, push_to_hub, arguments)
            finally:
                quantizer.state_dict_to_save = None
        return self._save_replacing(save_directory, is_main_process, push_to_hub, arguments)

    def _save_replacing(self, save_directory, is_main_process: bool, push_to_hub: bool, arguments: dict[str, Any]):
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if push_to_hub or distributed or not is_main_process or os.path.isfile(save_directory):
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **arguments)
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".saving-") as staging:
            super().save_pretrained(staging, **arguments)
            _replace_files(Path(staging), Path(save_directory), arguments.get("variant"))

    def gather_sharded_state_dict_for_save(
        self, model_to_save, state_dict: dict[str, Any], distributed_config: Any, *, save_on_this_rank: bool = True
    ) -> dict[str, Any]:
        """As in Transformers, also for FP8 and padded tensors; ranks that write nothing hold one at a time."""
        shapes = {
            f"{name}.{parameter}": (shape, module.fp8_parts[parameter.removesuffix(SCALE_SUFFIX)])
            for name, module in model_to_save.named_modules()
            for parameter, shape in getattr(module, "unpadded_shapes", {}).items()
        }
        sizes = {name: getattr(distributed_config, name, None) or 1 for name in ("tp_size", "dp_size", "fsdp_size")}
        if sizes.pop("tp_size") > 1 and set(sizes.values()) == {1}:
            return gather_state_dict(state_dict, shapes, save_on_this_rank)
        return super().gather_sharded_state_dict_for_save(
            model_to_save, state_dict, distributed_config, save_on_this_rank=save_on_this_rank
        )

    def _with_duplicates(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same and the copies that upstream files hold of some; none of what a caller's own has left out."""
        output = dict(state_dict)
        for duplicate, original in self.mtp_duplicates().items():
            if original not in output or duplicate in output:
                continue
            tensor = output[original]
            if tensor.device.type == "meta":  # offloaded
                tensor = load_offloaded_parameter(self, original)
            output[duplicate] = tensor.detach().clone()  # safetensors refuses tensors that share memory
        return output


def _read_config(cls, path, kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Reads the configuration as `from_pretrained` would; returns it and the arguments that are left."""
    hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    own = {name: kwargs.pop(name) for name in _NOT_CONFIG if name in kwargs}
    config, left = cls.config_class.from_pretrained(path, return_unused_kwargs=True, **kwargs)
    return config, {**hub_arguments, **left, **own}


def _drop_fp8_config(config: PreTrainedConfig) -> None:
    for holder in (config, config.get_text_config()):
        stored = getattr(holder, "quantization_config", None)
        if isinstance(stored, dict) and stored.get("quant_method") == "fp8":
            del holder.quantization_config


def _is_expert_parallel(distributed_config: Any) -> bool:
    by_size = (getattr(distributed_config, "ep_size", None) or 1) > 1
    return by_size or getattr(distributed_config, "enable_expert_parallel", False)


def _refuse_for_fp8(arguments: dict[str, Any]) -> None:
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


def _split_quantization(
    config: PreTrainedConfig, requested: Any, dequantize: bool = False
) -> tuple[PreTrainedConfig, Any]:
    """Takes the stored format out of the configuration where we read it, and settles what is done about it.

    Returns the configuration with `load_options`, and the `quantization_config` for Transformers.
    """
    config = copy.deepcopy(config)
    config.load_options = {**_LOAD_OPTIONS}
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
    elif stored is not None:
        return config, requested
    if method not in (None, "fp8"):
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


def _numbered(name: str) -> str:
    """A module's name as the rules of parallel plans have it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _on_load(name: str, tensor: Any, request: BlockFp8Config) -> Any:
    """The tensor as one that is quantised on load, where it may be a weight at all."""
    if len(tensor.get_shape()) < 2 or not tensor.dtype.is_floating_point:
        return tensor
    parts = 2 if name.endswith("gate_up_proj") else 1
    return QuantizedOnLoad(name, tensor, request.block_size, request.ue8m0, parts)


def _store_fp8(
    model: MoePreTrainedModel,
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
    for name, stem, parameter in _targets(model, tensors, key_mapping):
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


def _targets(
    model: MoePreTrainedModel, names: Iterable[str], key_mapping: dict[str, str] | None
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


def _pad_to_ranks(model: MoePreTrainedModel, tensors: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The tensors to load, those of padded parameters as large as these."""
    padded = {name: module for name, module in model.named_modules() if getattr(module, "unpadded_shapes", None)}
    if not padded:
        return tensors
    output, weights = dict(tensors), [name for name in tensors if name + SCALE_SUFFIX in tensors]
    for weight, stem, parameter in _targets(model, weights, options["key_mapping"]):
        for suffix in ("", SCALE_SUFFIX):
            module, name, target = padded.get(stem), weight + suffix, parameter + suffix
            if module is not None and target in module.unpadded_shapes:
                *_, rows, cols = getattr(module, target).shape
                *leading, height, _ = tensors[name].get_shape()
                share = module.unpadded_shapes[target][-2] // height  # 2: gate or up alone
                parts = module.fp8_parts[parameter] // share
                output[name] = PaddedTensor(tensors[name], (*leading, rows // share, cols), parts)
    return output


def _read_checkpoint(model: MoePreTrainedModel, files: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """The tensors to load, by upstream name, checked against the empty model, which is fitted to them."""
    tensors = plain_tensors(open_files(files), options["decoding"])
    if options["check_names"]:
        stored, tensors = tensors, model.own_tensors(tensors)
        options["renamed"] = tensors is not stored
        model.adapt_to_checkpoint({_stem(name): tuple(tensor.get_shape()) for name, tensor in tensors.items()})
        options["host_weights"] = _take_host_tables(model, tensors, options)
        _fit_model(model, tensors, options)
    return tensors


def _take_host_tables(model: MoePreTrainedModel, tensors: dict[str, Any], options) -> dict[nn.Module, torch.Tensor]:
    """Reads or maps the tensors of host tables, and takes them out of what is left to load."""
    names, weights = {_stem(name): name for name in tensors}, {}
    for stem, table in model.host_tables().items():
        if stem not in names:
            raise CheckpointError(f"{options['source'] or 'The checkpoint'}: tensor model.{stem} is missing.")
        _check_shape(names[stem], tensors, table.shape, options)
        entry = tensors.pop(names[stem]).entry
        weights[table] = entry.map() if table.on_disk else entry.read()
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {re.escape(stem)}
    return weights


def _fit_model(model: MoePreTrainedModel, tensors: dict[str, Any], options: dict[str, Any]) -> None:
    """Checks a checkpoint against the empty model, and gives the model the MTP layers that the checkpoint holds."""
    names = {model.checkpoint_stem(name): name for name in tensors}
    count = model.count_mtp_layers(set(names))
    model.resize_mtp_layers(count)
    for holder in (model.base_model, model):
        holder.name_present_layers()
    for duplicate, original in model.mtp_duplicates().items():
        duplicate, original = names.get(_stem(duplicate)), names.get(_stem(original))
        if duplicate is None:
            continue
        if original is not None and not _same(tensors[duplicate], tensors[original]):
            model.untie_mtp_tensor(duplicate)
    shared = {re.escape(_stem(duplicate)) for duplicate in model.mtp_duplicates()}
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


def _same(left, right) -> bool:
    if isinstance(left, LazyTensor) and isinstance(right, LazyTensor) and left.entry.dtype == right.entry.dtype:
        return left.entry.same_bytes(right.entry)
    return torch.equal(left[...], right[...])


def _stem(name: str) -> str:
    """A tensor name without the prefix that only models with a head have."""
    return name.removeprefix("model.")


def _check_shape(name: str | None, tensors: dict[str, Any], expected: tuple[int, ...], options) -> None:
    if name is None or options["ignore_mismatched_sizes"]:
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
        if getattr(model.base_model, "mtp", None) is not None:  # LongCat's stand in a module of their own
            device_map.setdefault(stem.removesuffix("layers") + "mtp", device_map[last])


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
