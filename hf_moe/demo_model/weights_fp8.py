"""Block FP8 as a quantisation method of Transformers: what `from_pretrained` asks at which moment.

The method is registered under a name of our own, so that Transformers' own `fp8` method, which serves its own models,
stays as it is. On disk and in `config.quantization_config` is what upstream writes.
"""

from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .weights_experts import with_scale_converters
from .weights_lazy import is_block_size

# With the name of the module: every bundle of remote code brings its own copy, which serves its own models.
METHOD = f"block_fp8.{__name__}"


class BlockFp8Config(QuantizationConfigMixin):
    """What the loader is to do with FP8 weights.

    Attributes:
        stored: the `quantization_config` that belongs into `config.json`.
        on_load: quantise plain weights while they are loaded; otherwise keep those that are FP8 in the files.
        in_text_config: whether `stored` belongs into the text model's configuration inside of a larger one.
    """

    def __init__(self, stored: dict[str, Any], on_load: bool = False, in_text_config: bool = False):
        self.quant_method = METHOD
        self.stored, self.on_load, self.in_text_config = stored, on_load, in_text_config

    @property
    def block_size(self) -> tuple[int, int]:
        return tuple(self.stored["weight_block_size"])

    @property
    def ue8m0(self) -> bool:
        return self.stored.get("scale_fmt") == "ue8m0"

    @property
    def dynamic(self) -> bool:
        return self.stored.get("activation_scheme", "dynamic") == "dynamic"


def upstream_fp8_config(requested: Any) -> dict[str, Any]:
    """A `FineGrainedFP8Config` (or its dictionary) in the spelling of published checkpoints.

    Raises:
        ValueError: for one that asks for something else than dynamic block FP8 in e4m3, or for blocks of no size.
    """
    fields = requested if isinstance(requested, dict) else requested.to_dict()
    scheme, block_size = fields.get("activation_scheme", "dynamic"), fields.get("weight_block_size", (128, 128))
    extra, expert_dtype = fields.get("modules_to_convert"), fields.get("expert_dtype", "fp8")
    if block_size is not None and not is_block_size(block_size):
        raise ValueError(f"weight_block_size is {block_size!r}: FP8 needs the rows and columns of a block, [128, 128].")
    if scheme != "dynamic" or block_size is None or extra or expert_dtype != "fp8":
        raise ValueError(
            "Quantising to FP8 on load makes block FP8 weights for dynamic activations; got "
            f"activation_scheme={scheme!r}, weight_block_size={block_size!r}, modules_to_convert={extra!r}, "
            f"expert_dtype={expert_dtype!r}."
        )
    output = {"activation_scheme": scheme, "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(block_size)}
    if fields.get("modules_to_not_convert"):
        output["modules_to_not_convert"] = list(fields["modules_to_not_convert"])
    if fields.get("scale_fmt") == "ue8m0":
        output["scale_fmt"] = "ue8m0"
    return output


class BlockFp8Quantizer(HfQuantizer):
    """Hands the moments of loading to the model, which knows its modules and tensors (`prepare_fp8`)."""

    requires_calibration = False
    tensors: dict[str, Any] | None = None  # of the checkpoint, as the prepared model takes them
    state_dict_to_save: dict[str, torch.Tensor] | None = None

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        self.tensors = model.prepare_fp8(self.quantization_config, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        self.tensors = None
        del model.config.quantization_config
        holder = model.config.get_text_config() if self.quantization_config.in_text_config else model.config
        holder.quantization_config = self.quantization_config.stored
        model.freeze_fp8()
        return model

    def update_weight_conversions(self, weight_conversions, *args):
        """Scales are stacked as their weights are; decoding is done by the tensors."""
        return with_scale_converters(weight_conversions)

    def remove_quantization_config(self, model):
        """Leaves a model without FP8 weights as if it never had any."""
        model.config.get_text_config().__dict__.pop("quantization_config", None)
        super().remove_quantization_config(model)

    def _dequantize(self, model, dtype=None):
        if isinstance(dtype, str):  # as `save_pretrained` leaves that of the configuration, which is the default
            dtype = getattr(torch, dtype)
        return model.store_dequantized(dtype)

    def get_state_dict_and_metadata(self, model):
        """What `save_pretrained` of our models was given to save."""
        return self.state_dict_to_save, {}

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


AUTO_QUANTIZER_MAPPING.pop(METHOD, None)  # importing the module again replaces the class
register_quantizer(METHOD)(BlockFp8Quantizer)
