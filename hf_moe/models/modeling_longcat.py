"""LongCat-2.0 and LongCat-Flash-Lite-Sparse, where their sparse attention equals dense attention.

The indexers that choose keys beyond that are loaded and saved, and take no part. N-gram tables and projections stand
directly in the model, with their number in the name.
"""

from torch import nn
from transformers.generation import GenerationMixin

from .configuration_longcat import LongcatConfig
from .layer_dense import RMSNorm
from .layer_linear import Linear
from .layer_ngram import make_table
from .modeling_longcat_flash_ngram import (
    LongcatFlashNgramForCausalLM,
    LongcatFlashNgramForSequenceClassification,
    LongcatFlashNgramForTokenClassification,
    LongcatFlashNgramModel,
)
from .weights_experts import register_expert_converters


class LongcatIndexer(nn.Module):
    """The weights of a layer's key selection, as upstream names them. Not evaluated."""

    def __init__(self, config: LongcatConfig):
        super().__init__()
        width = config.index_head_dim
        self.wq_b = Linear(config.q_lora_rank, config.index_n_heads * width, bias=False)
        self.wk = Linear(config.hidden_size, width, bias=False)
        self.k_norm = RMSNorm(width)
        self.weights_proj = Linear(config.hidden_size, config.index_n_heads, bias=False)


class LongcatModel(LongcatFlashNgramModel):
    """The decoder without a head; raises for contexts longer than `index_topk`."""

    config_class = LongcatConfig

    def __init__(self, config: LongcatConfig):
        super().__init__(config)
        if config.index_n_heads and config.index_head_dim:
            for layer in self.layers:  # the second attention reuses what the first one selects
                layer.self_attn[0].indexer = LongcatIndexer(config)
            self.post_init()

    def _add_ngram_tables(self, rows: list[int], hidden_size: int, place: str) -> None:
        width = hidden_size // len(rows)
        for index, count in enumerate(rows):
            setattr(self, f"oe_embed_tokens{index}", make_table(count, width, place))
            setattr(self, f"oe_embed_proj{index}", Linear(width, hidden_size, bias=False))

    def is_optional_tensor(self, stem: str) -> bool:
        return ".indexer." in stem  # not evaluated

    def ngram_modules(self):
        indices = range(self.config.num_ngram_tables)
        return (
            [getattr(self, f"oe_embed_tokens{index}") for index in indices],
            [getattr(self, f"oe_embed_proj{index}") for index in indices],
        )


class LongcatCausalLM(LongcatFlashNgramForCausalLM, GenerationMixin):
    """The decoder with a language model head and, where the checkpoint has them, MTP layers."""

    config_class = LongcatConfig
    model_class = LongcatModel


class LongcatForSequenceClassification(LongcatFlashNgramForSequenceClassification):
    """The decoder with a linear score on each sequence's last token."""

    config_class = LongcatConfig
    model_class = LongcatModel


class LongcatForTokenClassification(LongcatFlashNgramForTokenClassification):
    """The decoder with a linear score on every token."""

    config_class = LongcatConfig
    model_class = LongcatModel


register_expert_converters(
    "LongcatModel",
    "LongcatCausalLM",
    "LongcatForSequenceClassification",
    "LongcatForTokenClassification",
)

__all__ = [
    "LongcatCausalLM",
    "LongcatForSequenceClassification",
    "LongcatForTokenClassification",
    "LongcatModel",
]
