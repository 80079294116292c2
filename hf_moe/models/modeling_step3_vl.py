"""Step3 with vision: the tower, the downsamplers and the projector, and their features in the text.

The tower is a ViT with a class token, whose norms stand on the branches (`x + norm(attn(x))`). The class token is
repeated in front of the patches: the copies take part in attention. Every view of an image (crops, then the whole) goes
through the tower by itself; its features replace the embeddings of placeholder tokens.

Shapes: N views, C width, g patches a side, H text width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_step3_text import Step3TextConfig
from .configuration_step3_vl import CLASS_TOKENS, Step3VisionConfig, Step3VLConfig
from .layer_head import LMHead
from .modeling_base import MoePreTrainedModel
from .modeling_causal_lm import CausalLMMixin, DeferredCausalLMOutput, MTPCausalLMOutputWithPast
from .modeling_step3_text import (
    Step3TextForCausalLM,
    Step3TextForSequenceClassification,
    Step3TextForTokenClassification,
    Step3TextModel,
)
from .weights_request import give_text_options
from .weights_step3 import join_stacks, stack_parts

# Inputs that concern images, and only the prompt.
VISION_INPUTS = ("pixel_values", "patch_pixel_values", "num_patches", "patch_newline_mask", "image_embeds")


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Full attention without a mask: (N, heads, T, d) each; softmax in float32. Returns (N, T, heads, d), weights."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class Step3VisionEmbeddings(nn.Module):
    """Patches, class tokens and positions: (N, channels, size, size) pixels to (N, 4 + g g, C)."""

    def __init__(self, config: Step3VisionConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.grid = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(self.grid**2 + 1, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(pixel_values)  # (N, C, g, g)
        grid = patches.shape[-1]
        positions = self._positions(grid)
        patches = patches.flatten(2).transpose(1, 2) + positions[1:]
        class_token = (self.class_embedding + positions[:1]).expand(patches.shape[0], CLASS_TOKENS, -1)
        return torch.cat((class_token, patches), dim=1)

    def _positions(self, grid: int) -> torch.Tensor:
        """The position table (1 + g g, C), resampled in float32 where the view has another grid."""
        table = self.position_embedding.weight
        if grid == self.grid:
            return table
        square = table[1:].float().t().reshape(1, -1, self.grid, self.grid)
        square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False, antialias=True)
        return torch.cat((table[:1], square.flatten(2).squeeze(0).t().to(table.dtype)))


class Step3VisionAttention(nn.Module):
    """Full attention of all tokens of a view, through Transformers' attention interface."""

    def __init__(self, config: Step3VisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(N, T, C) to (N, T, C), and the attention weights where the implementation has them."""
        projected = self.qkv_proj(hidden_states).unflatten(-1, (3, -1, self.head_dim))  # (N, T, 3, heads, d)
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attention(
            self,
            query,
            key,
            value,
            None,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=False,
        )
        return self.out_proj(output.reshape(hidden_states.shape)), weights


class Step3VisionMLP(nn.Module):
    def __init__(self, config: Step3VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act_fn(self.fc1(hidden_states)))


class Step3VisionLayer(GradientCheckpointingLayer):
    """Attention and MLP, each normed before it is added."""

    def __init__(self, config: Step3VisionConfig):
        super().__init__()
        self.self_attn = Step3VisionAttention(config)
        self.mlp = Step3VisionMLP(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.layer_norm1(self.self_attn(hidden_states)[0])
        return hidden_states + self.layer_norm2(self.mlp(hidden_states))


class Step3VisionTransformer(nn.Module):
    """The stack of layers, under the name that the checkpoints give it."""

    def __init__(self, config: Step3VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList([Step3VisionLayer(config) for _ in range(config.num_hidden_layers)])


class Step3VisionModel(PreTrainedModel):
    """The vision tower: pixels to hidden states, without a norm before or behind the layers."""

    config_class = Step3VisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["Step3VisionLayer", "Step3VisionEmbeddings"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Step3VisionLayer, "attentions": Step3VisionAttention}

    def __init__(self, config: Step3VisionConfig):
        super().__init__(config)
        self.embeddings = Step3VisionEmbeddings(config)
        self.transformer = Step3VisionTransformer(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Step3VisionEmbeddings):
            nn.init.normal_(module.class_embedding, std=self.config.initializer_range)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """(N, channels, size, size) normalised pixels to `last_hidden_state` (N, 4 + g g, C), class tokens first.

        Raises:
            ValueError: for pixels that are no square views in whole patches.
        """
        patch = self.config.patch_size
        if pixel_values.dim() != 4 or pixel_values.shape[2] != pixel_values.shape[3] or pixel_values.shape[3] % patch:
            raise ValueError(
                f"Pixels of shape {tuple(pixel_values.shape)}: views must be (views, channels, size, size), with a "
                f"size that `patch_size={patch}` divides."
            )
        hidden_states = self.embeddings(pixel_values)
        for layer in self.transformer.layers:
            hidden_states = layer(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states)


class Step3VLPreTrainedModel(MoePreTrainedModel):
    config_class = Step3VLConfig
    experts_key = "moe_num_experts"
    input_modalities = ("image", "text")
    _no_split_modules = ["Step3TextDecoderLayer", "Step3VisionLayer", "Step3VisionEmbeddings"]

    def checkpoint_stem(self, name: str) -> str:
        return name.removeprefix("model.").removeprefix("language_model.")

    def upstream_name(self, stem: str) -> str:
        return stem if stem.startswith(("vision_model.", "vit_")) else f"model.{stem}"

    def join_sharded(self, tensors: dict[str, Any]) -> dict[str, Any]:
        return join_stacks(tensors)

    def upstream_parts(self, stem: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        return stack_parts(stem, shape)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        PreTrainedModel._init_weights(self, module)


@dataclass
class Step3VLModelOutputWithPast(MoeModelOutputWithPast):
    """Transformers' output with `image_hidden_states`, (placeholders, H): the features in the text's order."""

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class Step3VLCausalLMOutputWithPast(MTPCausalLMOutputWithPast):
    """The output of our language models with `image_hidden_states`, (placeholders, H)."""

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class Step3VLDeferredCausalLMOutput(DeferredCausalLMOutput):
    """The same for a training step, whose logits are computed when they are read."""

    image_hidden_states: torch.FloatTensor | None = None


class Step3VLModel(Step3VLPreTrainedModel):
    """Vision tower, projector and text decoder, without a head."""

    def __init__(self, config: Step3VLConfig):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_model = Step3VisionModel(vision)
        self.vit_downsampler = nn.Conv2d(
            vision.hidden_size, vision.output_hidden_size, kernel_size=2, stride=config.understand_projector_stride
        )
        self.vit_downsampler2 = nn.Conv2d(
            vision.output_hidden_size, 2 * vision.output_hidden_size, kernel_size=3, stride=2, padding=1
        )
        self.vit_large_projector = nn.Linear(
            2 * vision.output_hidden_size, text.hidden_size, bias=config.projector_bias
        )
        self.language_model = Step3TextModel(text)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        patch_pixel_values: torch.Tensor | None = None,
        num_patches: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Features of images, in the order in which they stand in a prompt.

        Args:
            pixel_values: (images, channels, size, size), the whole view of every image.
            patch_pixel_values: (all crops, channels, crop size, crop size), image by image; or `None`.
            num_patches: (images,) crops of every image; `None` for none.

        Returns an output whose `pooler_output` is a tuple of (features of the image, H), crops before the whole view,
        and whose `last_hidden_state` is that of the tower for the whole views.

        Raises:
            ValueError: for counts of crops that contradict the tensors.
        """
        images = pixel_values.shape[0]
        crops = 0 if patch_pixel_values is None else patch_pixel_values.shape[0]
        counts = [0] * images if num_patches is None else torch.as_tensor(num_patches).flatten().tolist()
        if len(counts) != images or sum(counts) != crops or any(count < 0 for count in counts):
            raise ValueError(
                f"`num_patches={counts}` contradicts the pixels: `pixel_values` has {images} images and "
                f"`patch_pixel_values` {crops} crops."
            )
        whole = self.vision_model(pixel_values, return_dict=True, **kwargs)
        features = self._project(whole.last_hidden_state)  # (images, tokens, H)
        if crops:
            cropped = self._project(self.vision_model(patch_pixel_values, return_dict=True).last_hidden_state)
            pieces = cropped.split(counts)
            whole.pooler_output = tuple(torch.cat((piece.flatten(0, 1), view)) for piece, view in zip(pieces, features))
        else:
            whole.pooler_output = tuple(features.unbind(0))
        return whole

    def _project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(N, 4 + g g, C) hidden states of the tower to (N, tokens, H)."""
        patches = hidden_states[:, CLASS_TOKENS:]
        grid = int(patches.shape[1] ** 0.5)
        square = patches.transpose(1, 2).unflatten(2, (grid, grid))
        square = self.vit_downsampler2(self.vit_downsampler(square))
        return self.vit_large_projector(square.flatten(2).transpose(1, 2))

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, num_features: int
    ) -> torch.Tensor:
        """Where features go, (batch, seq, 1) boolean.

        Raises:
            ValueError: for another number of placeholders than of features.
        """
        mask = self.find_placeholders(input_ids, inputs_embeds)
        placeholders = int(mask.sum())
        if placeholders != num_features:
            raise ValueError(
                f"The text has {placeholders} image placeholders (token id {self.config.image_token_id}), but the "
                f"images have {num_features} features. Build text and pixels with the same processor call."
            )
        return mask.unsqueeze(-1)

    def find_placeholders(self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Placeholders of images, (batch, seq) boolean; among embeddings those that equal the placeholder's."""
        if inputs_embeds is None or input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        patch_pixel_values: torch.FloatTensor | None = None,
        num_patches: torch.LongTensor | None = None,
        patch_newline_mask: torch.BoolTensor | None = None,
        image_embeds: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> Step3VLModelOutputWithPast:
        """Runs the tower on the images, if there are any, and the decoder.

        Args beyond those of `Step3TextModel.forward`:
            pixel_values, patch_pixel_values, num_patches: see `get_image_features`. Images belong to the placeholders
                of the batch row by row.
            patch_newline_mask: (all crops,); where the prompt has a line break. Not read here.
            image_embeds: (placeholders, H), finished features instead of pixels.

        Raises:
            ValueError: for another number of placeholders than of features, counts of crops that contradict the
                tensors, and both pixels and features.
            IndexError: for token ids outside of the vocabulary.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and image_embeds is not None:
            raise ValueError("Give `pixel_values` or `image_embeds`, not both.")
        if pixel_values is None and patch_pixel_values is not None and patch_pixel_values.shape[0]:
            raise ValueError("`patch_pixel_values` are crops of images: `pixel_values`, the whole views, are missing.")
        if inputs_embeds is None:
            self._check_token_ids(input_ids)
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, patch_pixel_values, num_patches).pooler_output
            image_embeds = torch.cat(features)
        if image_embeds is not None:
            image_embeds = image_embeds.reshape(-1, image_embeds.shape[-1])
            image_embeds = image_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_embeds.shape[0])
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_embeds)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return Step3VLModelOutputWithPast(**outputs, image_hidden_states=image_embeds)


class Step3VLForConditionalGeneration(CausalLMMixin, Step3VLPreTrainedModel, GenerationMixin):
    """Step3 with vision and a language model head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    output_class = Step3VLCausalLMOutputWithPast
    deferred_output_class = Step3VLDeferredCausalLMOutput

    def __init__(self, config: Step3VLConfig):
        super().__init__(config)
        self.model = Step3VLModel(config)
        self.lm_head = LMHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_image_features(self, pixel_values, patch_pixel_values=None, num_patches=None, **kwargs):
        """See `Step3VLModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, patch_pixel_values, num_patches, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        patch_pixel_values: torch.FloatTensor | None = None,
        num_patches: torch.LongTensor | None = None,
        patch_newline_mask: torch.BoolTensor | None = None,
        image_embeds: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> Step3VLCausalLMOutputWithPast:
        """Runs the model and its head. Arguments are those of `Step3VLModel.forward` and, as in
        `Step3TextForCausalLM.forward`, `labels`, `logits_to_keep` and `skip_logits`."""
        return self.run_with_head(
            labels,
            logits_to_keep,
            skip_logits,
            False,
            past_key_values,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            pixel_values=pixel_values,
            patch_pixel_values=patch_pixel_values,
            num_patches=num_patches,
            image_embeds=image_embeds,
            **kwargs,
        )

    def extra_outputs(self, outputs: Step3VLModelOutputWithPast) -> dict[str, torch.Tensor | None]:
        return {"image_hidden_states": outputs.image_hidden_states}

    # --- generation -------------------------------------------------------------------------------------------------

    # `generate` looks for `inputs_embeds` in the signature.
    def prepare_inputs_for_generation(
        self, input_ids, is_first_iteration: bool = False, inputs_embeds: torch.Tensor | None = None, **kwargs
    ):
        """As in Transformers; the images go in with the prompt only."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, inputs_embeds=inputs_embeds, **kwargs
        )
        if not is_first_iteration and inputs.get("use_cache", True):
            for name in VISION_INPUTS:
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeats the prompts for beams and samples, and with each prompt its own images.

        The rows of the batch are repeated one by one; vision tensors are not by row, so they are taken apart first.
        """
        vision = {name: model_kwargs.pop(name) for name in VISION_INPUTS if model_kwargs.get(name) is not None}
        if expand_size > 1 and vision:
            embeds = model_kwargs.get("inputs_embeds")
            placeholders = self.model.find_placeholders(None if embeds is not None else input_ids, embeds)
            vision = self._repeat_images(vision, placeholders.sum(1).tolist(), expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **vision}

    def _repeat_images(self, vision: dict, placeholders: list[int], times: int) -> dict:
        if "image_embeds" in vision:
            rows = vision["image_embeds"].flatten(0, -2).split(placeholders)
            return {"image_embeds": torch.cat([row for row in rows for _ in range(times)])}
        pixels, crops = vision["pixel_values"], vision.get("patch_pixel_values")
        counts = vision["num_patches"].tolist() if "num_patches" in vision else [0] * pixels.shape[0]
        whole = self.config.image_tokens(pixels.shape[-1])
        cropped = 0 if crops is None else self.config.image_tokens(crops.shape[-1])
        # How many images a row holds: its placeholders are those of whole images.
        per_row, image = [], 0
        for count in placeholders:
            first = image
            while count > 0 and image < len(counts):
                count -= counts[image] * cropped + whole
                image += 1
            per_row.append((first, image))
        starts = [sum(counts[:index]) for index in range(len(counts) + 1)]
        repeated = [span for span in per_row for _ in range(times)]
        output = {"pixel_values": torch.cat([pixels[first:last] for first, last in repeated])}
        for name in ("patch_pixel_values", "patch_newline_mask"):
            if name in vision:
                output[name] = torch.cat([vision[name][starts[first] : starts[last]] for first, last in repeated])
        if "num_patches" in vision:
            output["num_patches"] = torch.cat([vision["num_patches"][first:last] for first, last in repeated])
        return output


class _TextAlone:
    """What an Auto class finds for a vision checkpoint: gives the text model's class, without the tower."""

    config_class = Step3VLConfig
    text_class: type
    auto_class: str

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Loads the text model of a vision checkpoint; the tower stays in the file."""
        # As remote code, only the class that was asked for is marked: mark what the user gets, so that it saves.
        Step3TextConfig.register_for_auto_class("AutoConfig")
        cls.text_class.register_for_auto_class(cls.auto_class)
        if isinstance(kwargs.get("config"), Step3VLConfig):
            kwargs["config"] = cls.text_class.own_config(give_text_options(kwargs["config"], kwargs))
        return cls.text_class.from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        return cls.text_class._from_config(cls.text_class.own_config(config), **kwargs)


class Step3VLForCausalLM(_TextAlone, Step3TextForCausalLM, GenerationMixin):
    """`AutoModelForCausalLM` of a vision checkpoint gives a `Step3TextForCausalLM`."""

    text_class, auto_class = Step3TextForCausalLM, "AutoModelForCausalLM"


class Step3VLForSequenceClassification(_TextAlone, Step3TextForSequenceClassification):
    """`AutoModelForSequenceClassification` of a vision checkpoint gives a `Step3TextForSequenceClassification`."""

    text_class, auto_class = Step3TextForSequenceClassification, "AutoModelForSequenceClassification"


class Step3VLForTokenClassification(_TextAlone, Step3TextForTokenClassification):
    """`AutoModelForTokenClassification` of a vision checkpoint gives a `Step3TextForTokenClassification`."""

    text_class, auto_class = Step3TextForTokenClassification, "AutoModelForTokenClassification"


__all__ = [
    "Step3VLForCausalLM",
    "Step3VLForConditionalGeneration",
    "Step3VLForSequenceClassification",
    "Step3VLForTokenClassification",
    "Step3VLModel",
    "Step3VLPreTrainedModel",
    "Step3VisionModel",
]
