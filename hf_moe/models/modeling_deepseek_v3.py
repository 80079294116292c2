"""DeepSeek-V3 (arXiv 2412.19437): decoder layers, the model, its heads and its MTP layers.

Parameter names are those of the upstream checkpoints. MTP layers stand behind the main layers in `model.layers`, at
the indices that upstream gives them, and take no part in the main forward pass.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_deepseek_v3 import DeepseekV3Config
from .generation_mtp import MTPGenerationMixin
from .layer_cache import adopt_growing_layers
from .layer_dense import GatedMLP, RMSNorm
from .layer_experts import MoE
from .layer_head import LMHead
from .layer_mask import may_be_packed
from .layer_mla import LatentAttention
from .layer_mtp import MTPMixin
from .layer_rope import RotaryEmbedding
from .layer_router import TopkRouter
from .modeling_base import MoePreTrainedModel
from .modeling_causal_lm import MTPCausalLMMixin, MTPCausalLMOutputWithPast
from .modeling_classification import SequenceClassificationMixin, TokenClassificationMixin
from .modeling_decoder import LatentDecoderMixin
from .weights_experts import register_expert_converters

logger = logging.get_logger(__name__)


class DeepseekV3DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm latent attention, then a dense MLP or a mixture of experts, each with a residual connection."""

    def __init__(self, config: DeepseekV3Config, layer_idx: int):
        super().__init__()
        self.self_attn = LatentAttention(config, layer_idx)
        is_moe = layer_idx >= config.num_hidden_layers or config.is_moe_layer(layer_idx)
        dense = (config.hidden_size, config.intermediate_size, config.hidden_act)
        self.mlp = MoE(config) if is_moe else GatedMLP(*dense)
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
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class DeepseekV3MTPLayer(MTPMixin, DeepseekV3DecoderLayer):
    """One MTP depth: a decoder layer with experts, and the norms, projection and head that join it to the model."""

    def __init__(self, config: DeepseekV3Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.add_mtp_modules(config)

    def forward(self, hidden_states: torch.Tensor, inputs_embeds: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """States and embeddings to normed states, all (batch, seq, hidden).

        All of the depth is in here: sharding gathers parameters, and checkpointing drops activations, by this call.
        """
        hidden_states = super().forward(self.join(hidden_states, inputs_embeds), *args, **kwargs)
        return self.shared_head.norm(hidden_states)


class DeepseekV3PreTrainedModel(MoePreTrainedModel):
    config_class = DeepseekV3Config
    _no_split_modules = ["DeepseekV3DecoderLayer", "DeepseekV3MTPLayer"]
    _can_record_outputs = {
        "hidden_states": DeepseekV3DecoderLayer,
        "attentions": LatentAttention,
        "router_logits": OutputRecorder(TopkRouter, index=0),
    }

    def resize_mtp_layers(self, count: int) -> None:
        model = self.base_model
        first = self.config.num_hidden_layers
        del model.layers[first + count :]
        with torch.device("meta"):
            for layer_idx in range(len(model.layers), first + count):
                model.layers.append(DeepseekV3MTPLayer(self.config, layer_idx).to(self.dtype))
        self.config.num_nextn_predict_layers = count

    def count_mtp_layers(self, tensor_names: set[str]) -> int:
        # By any of the tensors that only MTP layers have, so that a lost one is noticed as missing.
        own = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
        marked = {int(name.split(".")[1]) for name in tensor_names if name.startswith("layers.") and name.endswith(own)}
        main = self.config.num_hidden_layers
        count = max(0, max(marked, default=-1) + 1 - main)
        wanted = getattr(self.config, "_upstream_num_layers", None) not in (None, main)  # not what the file says
        if wanted and count > (self.config.num_nextn_predict_layers or 0) and min(marked) > main:
            logger.warning("MTP layers are left out: the checkpoint's follow on layer %d.", min(marked) - 1)
            return 0
        return count

    def mtp_duplicates(self) -> dict[str, str]:
        prefix = "" if self.base_model is self else "model."
        duplicates = {}
        for index, layer in self.base_model.mtp_layers():
            if layer.embed_tokens is None:
                duplicates[f"{prefix}layers.{index}.embed_tokens.weight"] = f"{prefix}embed_tokens.weight"
            if layer.shared_head.head is None and self.get_output_embeddings() is not None:
                duplicates[f"{prefix}layers.{index}.shared_head.head.weight"] = "lm_head.weight"
        return duplicates

    def mtp_vocabulary(self) -> list[tuple[nn.Module, str]]:
        layers = [layer for _, layer in self.base_model.mtp_layers()]
        places = [(layer, "embed_tokens") for layer in layers] + [(layer.shared_head, "head") for layer in layers]
        return [(module, name) for module, name in places if getattr(module, name) is not None]

    def untie_mtp_tensor(self, duplicate: str) -> None:
        parts = duplicate.removeprefix("model.").split(".")  # layers, index, embed_tokens | shared_head, ...
        layer = self.base_model.layers[int(parts[1])]
        vocab_size, hidden_size = self.config.vocab_size, self.config.hidden_size
        with torch.device("meta"):
            if parts[2] == "embed_tokens":
                layer.embed_tokens = nn.Embedding(vocab_size, hidden_size, dtype=self.dtype)
            else:
                layer.shared_head.head = LMHead(hidden_size, vocab_size, bias=False, dtype=self.dtype)


class DeepseekV3Model(LatentDecoderMixin, DeepseekV3PreTrainedModel):
    """The decoder without a head. `forward` takes and returns what Transformers' decoders do."""

    def __init__(self, config: DeepseekV3Config):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        main = config.num_hidden_layers
        self.layers = nn.ModuleList(
            [DeepseekV3DecoderLayer(config, layer_idx) for layer_idx in range(main)]
            + [DeepseekV3MTPLayer(config, main + depth) for depth in range(config.num_nextn_predict_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def mtp_layers(self) -> list[tuple[int, DeepseekV3MTPLayer]]:
        """The MTP layers with their upstream layer indices."""
        return list(enumerate(self.layers))[self.config.num_hidden_layers :]

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
        """Runs the main layers.

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

        absorbed = self._choose_order(inputs_embeds, attention_mask, past_key_values)
        mask = self._make_mask(inputs_embeds, attention_mask, mask_cache, position_ids, absorbed)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                absorbed=absorbed,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class DeepseekV3ForCausalLM(MTPCausalLMMixin, DeepseekV3PreTrainedModel, MTPGenerationMixin):
    """The decoder with a language model head and, where the checkpoint has them, MTP layers."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    model_class = DeepseekV3Model

    def __init__(self, config: DeepseekV3Config):
        super().__init__(config)
        self.model = self.model_class(config)
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
        output_mtp_logits: bool = False,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> MTPCausalLMOutputWithPast:
        """Runs the model and its head.

        Args beyond those of `DeepseekV3Model.forward`:
            labels: (batch, seq); -100 is ignored. `num_items_in_batch` among the keyword arguments divides the sums of
                the token losses, main and MTP, as Trainer asks with gradient accumulation. The output has `loss`,
                `main_loss` and, where `config.mtp_loss_weight` is not 0, `mtp_loss`; in training `loss` is
                `main_loss + mtp_loss_weight * mean(mtp_loss)`, in evaluation `main_loss`.
            logits_to_keep: compute logits for the last so many positions (0: all), or for the positions in a tensor.
                The loss is that of all labels, which may be given for the last positions alone.
            output_mtp_logits: also return teacher-forced MTP logits (see `MTPCausalLMOutputWithPast`). Needs
                `input_ids` or `inputs_embeds` of the whole sequence, without a cached past.
            skip_logits: True leaves `logits` out, False computes them at once. Left open, a training step with labels
                computes them when they are read, from the states: the loss needs no more than a piece at a time.

        Raises:
            ValueError: for `output_mtp_logits` without MTP layers or with a past, for labels of another shape, and for
                `skip_logits` without labels.
            IndexError: for labels outside of the vocabulary.
        """
        return self.run_with_head(
            labels,
            logits_to_keep,
            skip_logits,
            output_mtp_logits,
            past_key_values,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )


class DeepseekV3ForSequenceClassification(SequenceClassificationMixin, DeepseekV3PreTrainedModel):
    """The decoder with a linear score on each sequence's last token."""

    model_class = DeepseekV3Model


class DeepseekV3ForTokenClassification(TokenClassificationMixin, DeepseekV3PreTrainedModel):
    """The decoder with a linear score on every token."""

    model_class = DeepseekV3Model


register_expert_converters(
    "DeepseekV3Model",
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
)

__all__ = [
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
    "DeepseekV3Model",
    "DeepseekV3PreTrainedModel",
]
