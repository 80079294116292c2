"""Configuration of Step3 with vision (model type `step3_vl`): the text part, the vision tower and what joins them."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from .configuration_base import UpstreamConfig
from .configuration_step3_text import Step3TextConfig

# How many copies of the class token lead the image patches, the first one included.
CLASS_TOKENS = 4


class Step3VisionConfig(UpstreamConfig):
    """Configuration of the vision tower. Defaults are the sizes of the released model.

    `intermediate_size` is 15360 there, by the size of its files, whatever other engines have as a default.

    Raises:
        ValueError: for an `image_size` that `patch_size` does not divide, or heads that do not divide the width.
    """

    model_type = "step3_vision_encoder"
    base_config_key = "vision_config"
    derived_keys = ()

    hidden_size: int = 1792
    intermediate_size: int = 15360
    output_hidden_size: int = 4096
    num_hidden_layers: int = 63
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 728
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.check_fields()
        super().__post_init__(**kwargs)

    def check_fields(self) -> None:
        for divisor, number in (("patch_size", "image_size"), ("num_attention_heads", "hidden_size")):
            if getattr(self, number) % getattr(self, divisor):
                raise ValueError(
                    f"`{divisor}={getattr(self, divisor)}` does not divide `{number}={getattr(self, number)}`."
                )


class Step3VLConfig(UpstreamConfig):
    """Configuration of Step3 with vision. `text_config` and `vision_config` may be dictionaries, as in the file.

    Fields:
        image_token_id (`int`): the token whose embeddings are replaced by image features.
        understand_projector_stride (`int`): stride of the first downsampler; 2 in the released file, which gives 169
            tokens for a 728 x 728 view and 81 for a 504 x 504 crop. 1 when the key is absent, as in other engines.
        projector_bias (`bool`): whether the projector has a bias.
    """

    model_type = "step3_vl"
    derived_keys = ()
    fp8_weights = Step3TextConfig.fp8_weights
    sub_configs = {"text_config": Step3TextConfig, "vision_config": Step3VisionConfig}
    keys_to_ignore_at_inference = ["past_key_values", "main_loss", "image_hidden_states"]
    remote_code_map = {
        "AutoConfig": "configuration_step3_vl.Step3VLConfig",
        "AutoModel": "modeling_step3_vl.Step3VLModel",
        "AutoModelForMultimodalLM": "modeling_step3_vl.Step3VLForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_step3_vl.Step3VLForConditionalGeneration",
        # The text model alone, which leaves the vision tensors in the file.
        "AutoModelForCausalLM": "modeling_step3_vl.Step3VLForCausalLM",
        "AutoModelForSequenceClassification": "modeling_step3_vl.Step3VLForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_step3_vl.Step3VLForTokenClassification",
    }
    processor_code_map = {
        "AutoImageProcessor": "image_processing_step3_vl.Step3VLImageProcessor",
        "AutoProcessor": "processing_step3_vl.Step3VLProcessor",
    }

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    image_token_id: int = 128001
    understand_projector_stride: int = 1
    projector_bias: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        for name, config_class in self.sub_configs.items():
            part = getattr(self, name)
            if part is None:
                part = config_class()
            elif isinstance(part, dict):
                part = config_class.from_dict(part)
            setattr(self, name, part)
        super().__post_init__(**kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """As for every configuration; the parts are written in the same way."""
        output = super().to_diff_dict()
        for name in self.sub_configs:
            part = getattr(self, name)
            output[name] = part.to_diff_dict()
            for key in ("auto_map", "transformers_version", "architectures", "torch_dtype", "dtype"):
                if key not in part._upstream_keys and (key != "architectures" or not output[name].get(key)):
                    output[name].pop(key, None)
        return output

    def image_tokens(self, size: int) -> int:
        """Features of a square view of `size` pixels a side, after both downsamplers.

        Raises:
            ValueError: for a view that holds too few patches.
        """
        grid = size // self.vision_config.patch_size
        if grid < 2:
            raise ValueError(f"A view of {size} pixels has fewer than 2 patches of {self.vision_config.patch_size}.")
        first = (grid - 2) // self.understand_projector_stride + 1
        return ((first - 1) // 2 + 1) ** 2


__all__ = ["Step3VLConfig", "Step3VisionConfig"]
