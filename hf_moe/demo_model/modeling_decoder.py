"""What decoders with latent attention share beside their layers: masks, the evaluation order and MTP depths."""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from .layer_cache import GrowingLayer
from .layer_mask import check_mask, long_mask
from .layer_mla import absorbed_is_cheaper


class _BooleanMaskConfig:
    """What `create_causal_mask` reads of a configuration, asking for boolean masks."""

    def __init__(self, is_causal: bool):
        self._attn_implementation = "sdpa"
        self.is_causal = is_causal


def _grown(cache: Cache | None) -> int:
    """Tokens in a cache that holds all of them and nothing else; 0 for any other one."""
    layer = next(iter(getattr(cache, "layers", ())), None)
    return layer.get_seq_length() if type(layer) is GrowingLayer else 0


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
        check_mask(attention_mask)
        config, seq = self.config, inputs_embeds.shape[1]
        past = _grown(past_key_values) if attention_mask is None else 0
        if past and seq == 1:
            return None  # a single query sees all there is
        if absorbed:
            # Absorbed attention reads boolean masks, whatever the attention implementation of the expanded order is.
            config = _BooleanMaskConfig(getattr(config, "is_causal", True))
        elif (mask := long_mask(config, inputs_embeds, attention_mask, past_key_values)) is not None:
            return mask
        if past and config._attn_implementation == "sdpa" and getattr(config, "is_causal", True):
            # What Transformers would make, in a fifth of the time: a tenth of what a small MTP layer takes.
            return torch.ones((1, 1, seq, past + seq), dtype=torch.bool, device=inputs_embeds.device).tril(past)
        return create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            # Only a single query may go without a mask: it sees all there is.
            **({"allow_is_causal_skip": seq == 1} if absorbed else {}),
        )

    def mtp_forward(
        self,
        layer: nn.Module,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """One MTP depth: states and embeddings (batch, seq, hidden) to normed states.

        Position i joins the state at i with the embedding that `inputs_embeds` has there (that of a later token),
        and attends to positions up to i. With `past_key_values`, a cache of this layer alone, the sequence continues
        what it holds, and `attention_mask` covers both.
        """
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        absorbed = past_key_values is not None and self._choose_order(hidden_states, attention_mask, past_key_values)
        mask = self._make_mask(hidden_states, attention_mask, past_key_values, position_ids, absorbed)
        return layer(
            hidden_states,
            inputs_embeds,
            position_embeddings=self.rotary_emb(hidden_states, position_ids),
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            absorbed=absorbed,
            **kwargs,
        )
