"""Loading, saving and defaults that every family shares, on top of Transformers' `PreTrainedModel`."""

import os
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import PreTrainedModel

from .layer_experts import Experts
from .layer_fp8 import Fp8Module
from .layer_linear import use_plain_linears
from .layer_router import TopkRouter, ZeroExpertRouter
from .layer_shards import fit_fp8_to_ranks
from .modeling_fp8 import Fp8ModelMixin
from .modeling_shards import pad_to_ranks, take_experts_from_plans, unpadded_shapes
from .op_experts import TRITON_BACKEND_NAME
from .op_moe import BACKEND_NAME
from .weights_checkpoint import extend_device_map, name_stem, read_checkpoint
from .weights_experts import defer_experts, inherit_converters, upstream_parts
from .weights_fp8 import BlockFp8Config, BlockFp8Quantizer
from .weights_lazy import LazyTensor
from .weights_request import LOAD_OPTIONS, give_text_options, read_config, refuse_for_fp8, split_quantization
from .weights_safetensors import check_folder, raise_caught
from .weights_saving import drop_fp8_config, replaced_when_complete, with_duplicates
from .weights_shards import gather_state_dict

ADAPTER_CONFIG = "adapter_config.json"


class MoePreTrainedModel(Fp8ModelMixin, PreTrainedModel):
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

    # --- defaults -------------------------------------------------------------------------------------------------

    def post_init(self):
        """As in Transformers; see `name_present_layers`, and `use_plain_linears` for other libraries' quantisation.

        What stays in float32 goes by the tensors that there are: not every router has a correction bias.
        """
        super().post_init()
        inherit_converters(type(self))
        if (getattr(self.config, "load_options", None) or LOAD_OPTIONS)["foreign_quantization"]:
            use_plain_linears(self)
        names = [name for tensors in (self.named_parameters(), self.named_buffers()) for name, _ in tensors]
        strict = self._keep_in_fp32_modules_strict
        self._keep_in_fp32_modules_strict = {part for part in strict if any(part in name for name in names)}
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
        """Checks ids (batch, seq) of any integer dtype.

        Raises:
            ValueError: for ids that are no such tensor, or none at all.
            IndexError: for ids outside of the vocabulary.
        """
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
            what = type(input_ids).__name__
            if isinstance(input_ids, torch.Tensor):
                what = f"{tuple(input_ids.shape)} of {input_ids.dtype}"
            raise ValueError(f"`input_ids` must be integers of shape (batch, seq), got {what}.")
        # On an accelerator the check waits for the device: there only prompts are checked, not training or decoding.
        on_cpu = input_ids.device.type == "cpu"
        is_prompt = input_ids.shape[-1] > 1 and not self.training
        if torch.compiler.is_compiling() or input_ids.device.type == "meta":
            return
        if not input_ids.numel():
            raise ValueError(f"`input_ids` of shape {tuple(input_ids.shape)} holds no token.")
        capturing = input_ids.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if on_cpu or (is_prompt and not capturing):
            low, high = (bound.item() for bound in input_ids.aminmax())
            # A table under an adapter does not say.
            vocab_size = self.config.get_text_config().vocab_size
            entries = getattr(self.get_input_embeddings(), "num_embeddings", vocab_size)
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
        return name_stem(name)

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

    def mtp_vocabulary(self) -> list[tuple[nn.Module, str]]:
        """Tables and heads that MTP layers have of their own, as modules and names of their attributes."""
        return []

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """As in Transformers; the tables and heads that MTP layers have of their own get as many rows."""
        table = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for module, name in self.mtp_vocabulary():
            old = getattr(module, name)
            resize = self._get_resized_embeddings if isinstance(old, nn.Embedding) else self._get_resized_lm_head
            new = resize(old, table.num_embeddings, mean_resizing=mean_resizing)
            setattr(module, name, new.requires_grad_(old.weight.requires_grad))
        return table

    # --- what a family may add to loading ---------------------------------------------------------------------------

    def own_tensors(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Of a checkpoint's tensors those of this model, under upstream names (wrappers put theirs beside them)."""
        return tensors

    def adapt_to_checkpoint(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Fits the empty model to the shapes of a checkpoint's tensors, by upstream name without `model.`."""

    def host_tables(self) -> dict[str, nn.Module]:
        """Modules whose `weight` is no parameter and stays off the model's device, by upstream name of the tensor."""
        return {}

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
                config, kwargs = read_config(cls, path if config is None else config, kwargs)
        if isinstance(config, PreTrainedConfig):
            config = cls.own_config(give_text_options(config, kwargs))
            config, quantization_config = split_quantization(
                config, kwargs.pop("quantization_config", None), kwargs.pop("dequantize", False)
            )
            if isinstance(quantization_config, BlockFp8Config):
                refuse_for_fp8(kwargs)
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
        take_experts_from_plans(model, distributed_config)
        return model

    # The one private hook: the model is still empty here, and the files are known. `tests/test_tree.py` fails
    # when its signature changes.
    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        if expected_keys is not None:  # files of an adapter, which goes into a model that is there
            return PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, expected_keys
            )
        options = model.config.__dict__.pop("load_options", None) or {**LOAD_OPTIONS}
        quantizer = load_config.hf_quantizer
        if state_dict is None and checkpoint_files and not getattr(quantizer, "pre_quantized", False):
            tensors = quantizer.tensors if isinstance(quantizer, BlockFp8Quantizer) else None
            if tensors is None:
                tensors = read_checkpoint(model, checkpoint_files, options)
            extend_device_map(model, load_config.device_map)
            to_disk = "disk" in (load_config.device_map or {}).values()
            as_stored = all(isinstance(tensor, LazyTensor) for tensor in tensors.values())
            if options.get("renamed") or not as_stored or not (to_disk or is_deepspeed_zero3_enabled()):
                # Offloading to disk refers to plain files where they lie, and ZeRO-3 reads them itself.
                state_dict, checkpoint_files = defer_experts(pad_to_ranks(model, tensors, options["key_mapping"])), None
                if any(hasattr(parameter, "placements") for parameter in model.parameters()):
                    state_dict = model.join_sharded(state_dict)
        info = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config)
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
            drop_fp8_config(self.config)  # of a model that was made from the configuration of an FP8 checkpoint
        elif kwargs.get("distributed_checkpoint"):
            raise ValueError("FP8 weights are not written by each rank for itself: leave out `distributed_checkpoint`.")
        arguments = {"is_main_process": is_main_process, "state_dict": state_dict, **kwargs}
        if getattr(self, "_hf_peft_config_loaded", False) or kwargs.get("distributed_checkpoint"):
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **arguments)
        if kwargs.get("save_original_format", True):
            arguments["state_dict"] = with_duplicates(self, self.state_dict() if state_dict is None else state_dict)
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
        with replaced_when_complete(save_directory, arguments.get("variant")) as staging:
            super().save_pretrained(staging, **arguments)

    def gather_sharded_state_dict_for_save(
        self, model_to_save, state_dict: dict[str, Any], distributed_config: Any, *, save_on_this_rank: bool = True
    ) -> dict[str, Any]:
        """As in Transformers, also for FP8 and padded tensors; ranks that write nothing hold one at a time."""
        sizes = {name: getattr(distributed_config, name, None) or 1 for name in ("tp_size", "dp_size", "fsdp_size")}
        if sizes.pop("tp_size") > 1 and set(sizes.values()) == {1}:
            return gather_state_dict(state_dict, unpadded_shapes(model_to_save), save_on_this_rank)
        return super().gather_sharded_state_dict_for_save(
            model_to_save, state_dict, distributed_config, save_on_this_rank=save_on_this_rank
        )
