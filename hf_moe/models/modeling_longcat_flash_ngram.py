"""LongCat-Flash-Lite: LongCat-Flash with n-gram input embedding."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import GenerationMixin
from transformers.utils import logging

from .configuration_longcat_flash_ngram import LongcatFlashNgramConfig
from .layer_cache import new_tokens
from .layer_mask import may_be_packed
from .layer_ngram import (
    PADDING,
    UNKNOWN,
    HostTable,
    NgramHash,
    NgramTables,
    embed_ngrams,
    masked_preceding_tokens,
    preceding_tokens,
    token_layer,
)
from .modeling_longcat_flash import (
    LongcatFlashForCausalLM,
    LongcatFlashForSequenceClassification,
    LongcatFlashForTokenClassification,
    LongcatFlashModel,
    LongcatFlashPreTrainedModel,
)
from .weights_experts import register_expert_converters

logger = logging.get_logger(__name__)


class LongcatFlashNgramPreTrainedModel(LongcatFlashPreTrainedModel):
    config_class = LongcatFlashNgramConfig

    @property
    def _fp8_modules_to_not_convert(self) -> tuple[str, ...]:
        # FP8 releases leave n-gram tables and their projections in bfloat16.
        model = self.base_model
        projections = set(model.ngram_modules()[1]) if model.ngram_hash is not None else ()
        return ("lm_head", *(name for name, module in model.named_modules() if module in projections))

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """As in Transformers; n-grams are hashed as before."""
        base = self.config.ngram_base
        table = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if self.config.ngram_base != base:
            self.config.ngram_vocab_size = base
        return table

    def host_tables(self) -> dict[str, nn.Module]:
        model = self.base_model
        return {f"{name}.weight": table for name, table in model.named_modules() if isinstance(table, HostTable)}

    def adapt_to_checkpoint(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if not self.config.ngram_tables_padded:
            return
        for name, table in self.base_model.named_modules():
            rows = shapes.get(f"{name}.weight", (0,))[0]
            if isinstance(table, HostTable) and rows > table.shape[0]:
                table.shape = (rows, table.shape[1])
            elif name.startswith("ngram_embeddings.embedders.") and rows > table.num_embeddings:
                table.num_embeddings = rows
                table.weight = nn.Parameter(table.weight.new_empty(rows, table.embedding_dim))


class LongcatFlashNgramModel(LongcatFlashNgramPreTrainedModel, LongcatFlashModel):
    """The decoder without a head. With `inputs_embeds`, those are taken as they are.

    A cache holds the token ids of its context as one more layer, so that n-grams reach across calls. Tokens that were
    only given as embeddings are not known to later ones: n-grams end at them.
    """

    zero_hash_is_empty = False

    def _add_input_modules(self, config: LongcatFlashNgramConfig) -> None:
        self.ngram_hash: NgramHash | None = None
        if config.has_ngrams:
            self.ngram_hash = NgramHash(
                config.ngram_base,
                config.ngram_table_size,
                config.emb_neighbor_num,
                config.emb_split_num,
                config.ngram_boundaries,
            )
            self._add_ngram_tables(self.ngram_hash.moduli, config.hidden_size, config.ngram_tables)

    def _add_ngram_tables(self, rows: list[int], hidden_size: int, place: str) -> None:
        self.ngram_embeddings = NgramTables(rows, hidden_size, place)

    def ngram_modules(self) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
        """The tables and their projections."""
        return self.ngram_embeddings.embedders, self.ngram_embeddings.post_projs

    def ngram_ids(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.LongTensor:
        """Rows of the tables, (batch, seq, tables) int64, as `forward` looks them up; notes the ids in the cache."""
        tokens = self._hashed_tokens(input_ids)
        return self.ngram_hash(tokens, self._preceding(tokens, attention_mask, position_ids, past_key_values))

    def _embed(self, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values) -> torch.Tensor:
        if self.ngram_hash is None:
            return super()._embed(input_ids, inputs_embeds, attention_mask, position_ids, past_key_values)
        if inputs_embeds is not None:
            if past_key_values is not None:
                unknown = torch.full(inputs_embeds.shape[:2], UNKNOWN, device=inputs_embeds.device)
                self._preceding(unknown, attention_mask, None, past_key_values)
            return inputs_embeds
        ngram_ids = self.ngram_ids(input_ids, attention_mask, position_ids, past_key_values)
        return self._combine(input_ids, self.embed_tokens(input_ids), ngram_ids)

    def _combine(self, input_ids, word_embeds: torch.Tensor, ngram_ids: torch.Tensor) -> torch.Tensor:
        return embed_ngrams(word_embeds, ngram_ids, *self.ngram_modules(), zero_is_empty=self.zero_hash_is_empty)

    def _hashed_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids as the hash takes them."""
        return input_ids

    def _preceding(self, tokens, attention_mask, position_ids, past_key_values) -> torch.Tensor:
        """The n - 1 tokens before each of `tokens` (batch, seq), nearest first: (batch, seq, n - 1).

        Padding is passed over wherever it stands, also where a mask of a later call first declares it.
        """
        batch, seq = tokens.shape
        count = self.ngram_hash.order - 1
        visible = attention_mask.to(tokens.device) if isinstance(attention_mask, torch.Tensor) else attention_mask
        is_2d = isinstance(visible, torch.Tensor) and visible.dim() == 2
        if is_2d:
            cached = past_key_values.get_seq_length() if past_key_values is not None else 0
            tokens = tokens.masked_fill(~new_tokens(visible, cached, seq).bool(), PADDING)
        packed = may_be_packed(position_ids, attention_mask, past_key_values)
        past, length, slots = None, 0, tokens
        if past_key_values is not None:
            past, length, slots = self._remember(tokens, past_key_values)
        if isinstance(visible, BlockMask):
            visible = create_mask(visible.mask_mod, batch, 1, seq, slots.shape[1], device=tokens.device)
        if isinstance(visible, torch.Tensor) and visible.dim() == 4:
            visible = visible if visible.dtype == torch.bool else visible >= 0  # additive: 0 or very low
            visible = visible[:, 0].expand(batch, -1, -1)
            return masked_preceding_tokens(slots, visible, length, count)
        if past is not None and is_2d:
            known = min(past.shape[1], visible.shape[1])
            hidden = nn.functional.pad(~visible[:, :known].bool(), (0, past.shape[1] - known))
            past = past.masked_fill(hidden, PADDING)
        segments = None
        if packed:
            starts = position_ids[:, 1:] != position_ids[:, :-1] + 1  # positions that restart: packed sequences
            segments = nn.functional.pad(starts.long().cumsum(-1), (1, 0))
        return preceding_tokens(tokens, count, past, segments)

    def _remember(self, tokens: torch.Tensor, cache: Cache):
        """Notes ids (batch, seq) in the cache; returns the ids before them, their number, and all slots."""
        layer = token_layer(cache, self.config.num_hidden_layers)
        static = isinstance(layer, StaticLayer)
        length = cache.get_seq_length()
        if static:
            length = length + 0  # a tensor that the layer's update changes in place
        else:
            missing = length - layer.get_seq_length()
            if missing > 0:
                logger.warning_once(
                    "The cache holds tokens whose ids are not known, so that n-grams end there. Fill it with this "
                    "model, from `input_ids`."
                )
                gap = tokens.new_full((tokens.shape[0], 1, missing, 1), UNKNOWN)
                layer.update(gap, gap[..., :0])
        states = tokens.view(tokens.shape[0], 1, -1, 1)
        slots, _ = layer.update(states, states[..., :0])
        slots = slots[:, 0, :, 0]  # (batch, slots)
        if static:
            # Slots not yet written, or written just now, are no past.
            unused = torch.arange(slots.shape[1], device=slots.device) >= length
            return slots.masked_fill(unused, PADDING), length, slots
        return slots[:, :length], length, slots


class LongcatFlashNgramForCausalLM(LongcatFlashNgramPreTrainedModel, LongcatFlashForCausalLM, GenerationMixin):
    """The decoder with a language model head and, where the checkpoint has them, MTP layers."""

    model_class = LongcatFlashNgramModel


class LongcatFlashNgramForSequenceClassification(
    LongcatFlashNgramPreTrainedModel, LongcatFlashForSequenceClassification
):
    """The decoder with a linear score on each sequence's last token."""

    model_class = LongcatFlashNgramModel


class LongcatFlashNgramForTokenClassification(LongcatFlashNgramPreTrainedModel, LongcatFlashForTokenClassification):
    """The decoder with a linear score on every token."""

    model_class = LongcatFlashNgramModel


register_expert_converters(
    "LongcatFlashNgramModel",
    "LongcatFlashNgramForCausalLM",
    "LongcatFlashNgramForSequenceClassification",
    "LongcatFlashNgramForTokenClassification",
)

__all__ = [
    "LongcatFlashNgramForCausalLM",
    "LongcatFlashNgramForSequenceClassification",
    "LongcatFlashNgramForTokenClassification",
    "LongcatFlashNgramModel",
]
