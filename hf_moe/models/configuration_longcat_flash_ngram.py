"""Configuration of LongCat-Flash-Lite (model type `longcat_flash_ngram`)."""

from typing import Any

from .configuration_base import choose
from .configuration_longcat_flash import LongcatFlashConfig

NGRAM_TABLES = ("model", "cpu", "disk")


class LongcatFlashNgramConfig(LongcatFlashConfig):
    """Configuration of LongCat-Flash with n-gram input embedding. Defaults are the values of LongCat-Flash-Lite.

    See `LongcatFlashConfig` for the other fields and for what is checked.

    Fields beyond upstream, written to `config.json` only when they differ from the default:
        ngram_tables (`str`, default `"model"`): where the n-gram tables are, half of the bytes of Lite. `"model"`:
            parameters like all others. `"cpu"`: in main memory, whatever the device of the model, not trained.
            `"disk"`: as `"cpu"`, mapped from the checkpoint's file and read row by row. Give it to `from_pretrained`.
        ngram_vocab_size (`int`, *optional*): the vocabulary's size as n-grams are hashed and their tables sized, where
            the vocabulary was resized since.

    Raises:
        ValueError: also for an n-gram order below 2, and tables that do not divide `hidden_size`.
    """

    model_type = "longcat_flash_ngram"
    default_theta = 5000000.0
    remote_code_map = {
        "AutoConfig": "configuration_longcat_flash_ngram.LongcatFlashNgramConfig",
        "AutoModel": "modeling_longcat_flash_ngram.LongcatFlashNgramModel",
        "AutoModelForCausalLM": "modeling_longcat_flash_ngram.LongcatFlashNgramForCausalLM",
        "AutoModelForSequenceClassification": "modeling_longcat_flash_ngram.LongcatFlashNgramForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_longcat_flash_ngram.LongcatFlashNgramForTokenClassification",
    }
    architecture_names = ("LongcatFlashNgramForCausalLM",)
    ngram_tables_padded = False  # whether files may have more rows than the hashes reach
    own_defaults = {**LongcatFlashConfig.own_defaults, "ngram_tables": "model", "ngram_vocab_size": None}

    hidden_size: int = 3072
    ffn_hidden_size: int = 6144
    expert_ffn_hidden_size: int = 1024
    num_layers: int = 14
    num_attention_heads: int = 32
    max_position_embeddings: int = 327680
    n_routed_experts: int = 256
    zero_expert_num: int | None = 128
    # N-gram embedding
    ngram_vocab_size_ratio: float | None = 78
    emb_neighbor_num: int | None = 4
    emb_split_num: int | None = 4
    ngram_tables: str = "model"
    ngram_vocab_size: int | None = None

    def check_fields(self) -> None:
        super().check_fields()
        choose("ngram_tables", self.ngram_tables, NGRAM_TABLES)
        if not self.has_ngrams:
            return
        if self.emb_neighbor_num < 2 or self.emb_split_num < 1:
            raise ValueError(
                f"`emb_neighbor_num={self.emb_neighbor_num}` must be at least 2 and "
                f"`emb_split_num={self.emb_split_num}` at least 1."
            )
        if self.hidden_size % self.num_ngram_tables:
            raise ValueError(
                f"{self.num_ngram_tables} n-gram tables, `(emb_neighbor_num - 1) * emb_split_num`, do not divide "
                f"`hidden_size={self.hidden_size}`."
            )

    @property
    def has_ngrams(self) -> bool:
        """Whether there are n-gram tables at all; files of the `longcat` type may leave them out."""
        return bool(self.ngram_vocab_size_ratio and self.emb_neighbor_num and self.emb_split_num)

    @property
    def num_ngram_tables(self) -> int:
        """One table for each order and hash function."""
        return (self.emb_neighbor_num - 1) * self.emb_split_num

    @property
    def mtp_cache_index(self) -> int:
        """Index of the first MTP layer in a cache: behind the main layers and the layer of token ids."""
        return self.num_hidden_layers + 1

    @property
    def ngram_base(self) -> int:
        """Base of the hash, and what `ngram_vocab_size_ratio` multiplies."""
        return self.vocab_size if self.ngram_vocab_size is None else self.ngram_vocab_size

    @property
    def ngram_table_size(self) -> int:
        """m; table i has m + 2i + 1 rows. The ratio may be fractional."""
        return int(self.ngram_vocab_size_ratio * self.ngram_base)

    @property
    def ngram_boundaries(self) -> list[int]:
        """Tokens that end the n-gram context of those behind them."""
        eos = self.eos_token_id
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    def _reject_other_architectures(self, extra: dict[str, Any]) -> None:
        super()._reject_other_architectures(
            {key: value for key, value in extra.items() if "vocab_size_ratio" not in key}
        )
