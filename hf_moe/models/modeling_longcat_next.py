"""The text trunk of LongCat-Next: LongCat-Flash-Lite with other n-gram rules and a head for text.

Image and audio tokenizers and their heads are neither loaded nor saved.
"""

import torch
from transformers.generation import GenerationMixin

from .configuration_longcat_next import LongcatNextConfig
from .modeling_longcat_flash_ngram import (
    LongcatFlashNgramForCausalLM,
    LongcatFlashNgramForSequenceClassification,
    LongcatFlashNgramForTokenClassification,
    LongcatFlashNgramModel,
)
from .weights_experts import register_expert_converters

_OTHER_MODALITIES = [r"(visual|audio)_(tokenizer|head)\.", r"(visual|audio)_(embed|bridge|offset)"]


class LongcatNextModel(LongcatFlashNgramModel):
    """The decoder without a head.

    Ids beyond the text vocabulary count as id 0, which ends n-grams and has none of its own: such a position keeps its
    word embedding undivided. A hash of zero adds nothing.
    """

    config_class = LongcatNextConfig
    zero_hash_is_empty = True
    _keys_to_ignore_on_load_unexpected = _OTHER_MODALITIES

    def _hashed_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids.masked_fill(input_ids >= self.config.text_vocab_size, 0)

    def _combine(self, input_ids, word_embeds: torch.Tensor, ngram_ids: torch.Tensor) -> torch.Tensor:
        ignored = self._hashed_tokens(input_ids) == 0
        return torch.where(ignored.unsqueeze(-1), word_embeds, super()._combine(input_ids, word_embeds, ngram_ids))


class LongcatNextForCausalLM(LongcatFlashNgramForCausalLM, GenerationMixin):
    """The decoder with the language model head."""

    config_class = LongcatNextConfig
    model_class = LongcatNextModel
    _keys_to_ignore_on_load_unexpected = _OTHER_MODALITIES
    _tied_weights_keys = {}

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """Returns the table; its size is fixed.

        Raises:
            ValueError: for another size.
        """
        table = self.get_input_embeddings()
        multiple = pad_to_multiple_of or 1
        if -(-(new_num_tokens or table.num_embeddings) // multiple) * multiple != table.num_embeddings:
            raise ValueError(
                "LongCat-Next's vocabulary cannot be resized: behind its text tokens are those of other modalities, "
                "which the head leaves out."
            )
        return table


class LongcatNextForSequenceClassification(LongcatFlashNgramForSequenceClassification):
    """The decoder with a linear score on each sequence's last token."""

    config_class = LongcatNextConfig
    model_class = LongcatNextModel
    _keys_to_ignore_on_load_unexpected = _OTHER_MODALITIES


class LongcatNextForTokenClassification(LongcatFlashNgramForTokenClassification):
    """The decoder with a linear score on every token."""

    config_class = LongcatNextConfig
    model_class = LongcatNextModel
    _keys_to_ignore_on_load_unexpected = _OTHER_MODALITIES


register_expert_converters(
    "LongcatNextModel",
    "LongcatNextForCausalLM",
    "LongcatNextForSequenceClassification",
    "LongcatNextForTokenClassification",
)

__all__ = [
    "LongcatNextForCausalLM",
    "LongcatNextForSequenceClassification",
    "LongcatNextForTokenClassification",
    "LongcatNextModel",
]
