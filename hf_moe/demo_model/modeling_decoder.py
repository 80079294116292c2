"""What decoders with latent attention share beside their layers: masks and the evaluation order."""

import torch
from transformers.masking_utils import create_causal_mask

from .layer_mla import absorbed_is_cheaper


class _BooleanMaskConfig:
    """What `create_causal_mask` reads of a configuration, asking for boolean masks."""

    def __init__(self, is_causal: bool):
        self._attn_implementation = "sdpa"
        self.is_causal = is_causal


class LatentDecoderMixin:
    """Methods of a model that has `config`, `embed_tokens` and layers with `LatentAttention`."""

    def _choose_order(self, inputs_embeds, attention_mask, past_key_values) -> bool:
        """Whether this call evaluates attention in the absorbed order."""
        if self.config.mla_mode != "auto":
            return self.config.mla_mode == "absorbed"
        if past_key_values is None or not (attention_mask is None or isinstance(attention_mask, torch.Tensor)):
            return False  # nothing cached to spare, or a block mask, which only the attention interface reads
        num_queries = inputs_embeds.shape[1]
        context, _ = past_key_values.get_mask_sizes(num_queries, 0)
        return absorbed_is_cheaper(self.config, num_queries, context)

    def _make_mask(self, inputs_embeds, attention_mask, past_key_values, position_ids, absorbed: bool):
        """The mask in the form that the evaluation order reads."""
        config = self.config
        if absorbed:
            # Absorbed attention reads boolean masks, whatever the attention implementation of the expanded order is.
            config = _BooleanMaskConfig(getattr(config, "is_causal", True))
        return create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            # Only a single query may go without a mask: it sees all there is.
            **({"allow_is_causal_skip": inputs_embeds.shape[1] == 1} if absorbed else {}),
        )
