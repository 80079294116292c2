"""Configuration of the text trunk of LongCat-Next (model type `longcat_next`)."""

from typing import Any

from .configuration_longcat_flash_ngram import LongcatFlashNgramConfig


class LongcatNextConfig(LongcatFlashNgramConfig):
    """Configuration of LongCat-Next, of which the text model is built: the trunk of Lite, and a head for text.

    `vocab_size` counts image and audio codes as well. N-grams are over the first `text_vocab_size` ids; the head
    scores `text_vocab_plus_multimodal_special_token_size` ids.
    """

    model_type = "longcat_next"
    remote_code_map = {
        "AutoConfig": "configuration_longcat_next.LongcatNextConfig",
        "AutoModel": "modeling_longcat_next.LongcatNextModel",
        "AutoModelForCausalLM": "modeling_longcat_next.LongcatNextForCausalLM",
        "AutoModelForSequenceClassification": "modeling_longcat_next.LongcatNextForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_longcat_next.LongcatNextForTokenClassification",
    }
    architecture_names = ("LongcatNextForCausalLM",)
    ngram_tables_padded = True

    vocab_size: int = 282624
    text_vocab_size: int = 131072
    text_vocab_plus_multimodal_special_token_size: int = 131125

    @property
    def head_size(self) -> int:
        """Rows of `lm_head`."""
        return self.text_vocab_plus_multimodal_special_token_size

    @property
    def ngram_base(self) -> int:
        return self.text_vocab_size

    @property
    def ngram_boundaries(self) -> list[Any]:
        return [*super().ngram_boundaries, 0]
