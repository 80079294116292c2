"""Kimi-K2 (arXiv 2507.20534): the DeepSeek-V3 classes, under their own names, with the Kimi-K2 configuration.

The published checkpoints name `DeepseekV3ForCausalLM` as their architecture. A saved model names the class that saved
it, so the classes here keep those names, and every engine that reads the published files reads ours.
"""

from transformers.generation import GenerationMixin

from .configuration_kimi_k2 import KimiK2Config
from .modeling_deepseek_v3 import DeepseekV3ForCausalLM as _ForCausalLM
from .modeling_deepseek_v3 import DeepseekV3ForSequenceClassification as _ForSequenceClassification
from .modeling_deepseek_v3 import DeepseekV3ForTokenClassification as _ForTokenClassification
from .modeling_deepseek_v3 import DeepseekV3Model as _Model


class DeepseekV3Model(_Model):
    """The decoder without a head."""

    config_class = KimiK2Config


class DeepseekV3ForCausalLM(_ForCausalLM, GenerationMixin):
    """The decoder with a language model head."""

    config_class = KimiK2Config
    model_class = DeepseekV3Model


class DeepseekV3ForSequenceClassification(_ForSequenceClassification):
    """The decoder with a linear score on each sequence's last token."""

    config_class = KimiK2Config
    model_class = DeepseekV3Model


class DeepseekV3ForTokenClassification(_ForTokenClassification):
    """The decoder with a linear score on every token."""

    config_class = KimiK2Config
    model_class = DeepseekV3Model


__all__ = [
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
    "DeepseekV3Model",
]
