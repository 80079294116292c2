"""Configuration of LongCat-2.0 and LongCat-Flash-Lite-Sparse (model type `longcat`, architecture `LongcatCausalLM`)."""

from typing import Any

from .configuration_longcat_flash_ngram import LongcatFlashNgramConfig

# This class' name of a field to the one of `longcat_flash_ngram`.
_SPELLING = {
    "oe_vocab_size_ratio": "ngram_vocab_size_ratio",
    "oe_neighbor_num": "emb_neighbor_num",
    "oe_split_num": "emb_split_num",
    "mtp_num_layers": "num_nextn_predict_layers",
}


class LongcatConfig(LongcatFlashNgramConfig):
    """Configuration of the releases with sparse attention. Defaults are the values of LongCat-Flash-Lite-Sparse.

    The sparse attention keeps `index_topk` keys of each query, so that dense attention gives the same up to that
    context; the models run there and raise beyond it. Files spell the n-gram keys `oe_*` and may leave them out; both
    spellings are read, and each is written back as it was.
    """

    model_type = "longcat"
    default_theta = 1000000.0
    remote_code_map = {
        "AutoConfig": "configuration_longcat.LongcatConfig",
        "AutoModel": "modeling_longcat.LongcatModel",
        "AutoModelForCausalLM": "modeling_longcat.LongcatCausalLM",
        "AutoModelForSequenceClassification": "modeling_longcat.LongcatForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_longcat.LongcatForTokenClassification",
    }
    architecture_names = ("LongcatCausalLM",)
    own_defaults = {
        **LongcatFlashNgramConfig.own_defaults,
        **dict.fromkeys(("ngram_vocab_size_ratio", "emb_neighbor_num", "emb_split_num")),
        **dict.fromkeys(("index_n_heads", "index_head_dim")),
    }

    max_position_embeddings: int = 983040
    ngram_vocab_size_ratio: float | None = None
    emb_neighbor_num: int | None = None
    emb_split_num: int | None = None
    index_n_heads: int | None = None
    index_head_dim: int | None = None

    def __post_init__(self, **kwargs):
        self._spelled = [key for key in _SPELLING if key in kwargs]
        for key in self._spelled:
            setattr(self, _SPELLING[key], kwargs.pop(key))
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Serialises with the spelling that was read."""
        output = super().to_dict()
        for key in output.pop("_spelled", ()):
            output[key] = getattr(self, _SPELLING[key])
            output.pop(_SPELLING[key], None)
        return output
