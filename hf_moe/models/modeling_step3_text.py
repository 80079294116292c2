"""Step3's text model (arXiv 2507.19427): decoder layers, the model and its language model head.

Parameter names are those of the upstream checkpoints, apart from the experts, whose stacks are fused in `moe.experts`.
The text part of a vision checkpoint loads as it is: its vision tensors are left in the file.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_step3_text import Step3TextConfig
from .layer_cache import adopt_growing_layers
from .layer_dense import GatedMLP, RMSNorm
from .layer_experts import Experts
from .layer_head import LMHead
from .layer_mask import check_mask, long_mask, may_be_packed
from .layer_mfa import MultiMatrixAttention
from .layer_rope import RotaryEmbedding
from .layer_router import SoftmaxRouter
from .modeling_base import MoePreTrainedModel
from .modeling_causal_lm import CausalLMMixin, MTPCausalLMOutputWithPast
from .modeling_classification import SequenceClassificationMixin, TokenClassificationMixin
from .weights_step3 import VISION_PREFIXES, join_stacks, register_step3_conversions, stack_parts


class Step3MoE(nn.Module):
    """Routed experts. The shared expert stands beside this block in the layer, as in the checkpoints."""

    def __init__(self, config: Step3TextConfig):
        super().__init__()
        self.gate = SoftmaxRouter(config)
        self.experts = Experts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, seq, H) to (batch, seq, H)."""
        _, topk_weights, topk_indices = self.gate(hidden_states)
        tokens = hidden_states.view(-1, hidden_states.shape[-1])  # (T, H)
        return self.experts(tokens, topk_indices, topk_weights).view_as(hidden_states)


class Step3TextDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention, then a dense MLP or routed experts plus a shared one, each with a residual connection."""

    def __init__(self, config: Step3TextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MultiMatrixAttention(config, layer_idx)
        self.is_moe = config.is_moe_layer(layer_idx)
        if self.is_moe:
            self.moe = Step3MoE(config)
            self.share_expert = GatedMLP(config.hidden_size, config.share_expert_dim, config.hidden_act)
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """(batch, seq, hidden) to (batch, seq, hidden)."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if not self.is_moe:
            return hidden_states + self.mlp(normed)
        return hidden_states + (self.moe(normed) + self.share_expert(normed))


class Step3TextPreTrainedModel(MoePreTrainedModel):
    config_class = Step3TextConfig
    experts_key = "moe_num_experts"
    input_modalities = ("text",)
    _no_split_modules = ["Step3TextDecoderLayer"]
    _keys_to_ignore_on_load_unexpected = [rf"^(model\.)?{prefix}\." for prefix in VISION_PREFIXES]
    _can_record_outputs = {
        "hidden_states": Step3TextDecoderLayer,
        "attentions": MultiMatrixAttention,
        "router_logits": OutputRecorder(SoftmaxRouter, index=0),
    }

    @classmethod
    def own_config(cls, config: PreTrainedConfig) -> PreTrainedConfig:
        """The text part of a vision configuration, with what that says about the stored format."""
        text = getattr(config, "text_config", None)
        if text is None:
            return config
        text = copy.deepcopy(text)
        for key in ("quantization_config", "dtype"):
            if getattr(text, key, None) is None and getattr(config, key, None) is not None:
                setattr(text, key, getattr(config, key))
        for key in ("id2label", "label2id", "problem_type"):  # what a caller asks of a head stands outside
            setattr(text, key, getattr(config, key, None))
        return text

    def join_sharded(self, tensors: dict[str, Any]) -> dict[str, Any]:
        return join_stacks(tensors)

    def upstream_parts(self, stem: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        return stack_parts(stem, shape)


class Step3TextModel(Step3TextPreTrainedModel):
    """The decoder without a head. `forward` takes and returns what Transformers' decoders do."""

    def __init__(self, config: Step3TextConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [Step3TextDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """Runs the decoder.

        Args:
            input_ids: (batch, seq) token ids; or `inputs_embeds`, (batch, seq, hidden).
            attention_mask: (batch, context) of ones and zeros, or a prepared 4D mask.
            position_ids: (batch, seq). Positions that restart mark packed sequences, where there is no mask and nothing
                is cached yet.
            past_key_values: a cache to continue from and to extend.
            use_cache: whether to return a cache.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given.
            IndexError: for token ids outside of the vocabulary.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            self._check_token_ids(input_ids)
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            adopt_growing_layers(past_key_values, self.config.num_hidden_layers)
        mask_cache = None if may_be_packed(position_ids, attention_mask, past_key_values) else past_key_values
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)

        mask = self._make_mask(inputs_embeds, attention_mask, mask_cache, position_ids)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:  # assisted generation may ask for fewer
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _make_mask(self, inputs_embeds, attention_mask, past_key_values, position_ids):
        check_mask(attention_mask)
        mask = long_mask(self.config, inputs_embeds, attention_mask, past_key_values)
        if mask is not None:
            return mask
        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )


class Step3TextForCausalLM(CausalLMMixin, Step3TextPreTrainedModel, GenerationMixin):
    """The decoder with a language model head. Reads text checkpoints, and vision checkpoints without their tower."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: Step3TextConfig):
        super().__init__(config)
        self.model = Step3TextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> MTPCausalLMOutputWithPast:
        """Runs the model and its head.

        Args beyond those of `Step3TextModel.forward`:
            labels: (batch, seq); -100 is ignored. `num_items_in_batch` among the keyword arguments divides the sum of
                the token losses, as Trainer asks with gradient accumulation.
            logits_to_keep: compute logits for the last so many positions (0: all), or for the positions in a tensor.
                The loss is that of all labels, which may be given for the last positions alone.
            skip_logits: True leaves `logits` out, False computes them at once. Left open, a training step with labels
                computes them when they are read, from the states: the loss needs no more than a piece at a time.

        Raises:
            ValueError: for labels of another shape, and for `skip_logits` without labels.
            IndexError: for labels outside of the vocabulary.
        """
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
            **kwargs,
        )


class Step3TextForSequenceClassification(SequenceClassificationMixin, Step3TextPreTrainedModel):
    """The decoder with a linear score on each sequence's last token."""

    model_class = Step3TextModel


class Step3TextForTokenClassification(TokenClassificationMixin, Step3TextPreTrainedModel):
    """The decoder with a linear score on every token."""

    model_class = Step3TextModel


register_step3_conversions()

__all__ = [
    "Step3TextForCausalLM",
    "Step3TextForSequenceClassification",
    "Step3TextForTokenClassification",
    "Step3TextModel",
    "Step3TextPreTrainedModel",
]
