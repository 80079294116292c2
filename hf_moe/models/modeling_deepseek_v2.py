"""DeepSeek-V2 (arXiv 2405.04434): the classes of DeepSeek-V3 with the V2 configuration.

Softmax routing, group-limited greedy choice and the absence of MTP layers follow from the configuration.
"""

from transformers.generation import GenerationMixin

from .configuration_deepseek_v2 import DeepseekV2Config
from .modeling_deepseek_v3 import (
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
    DeepseekV3Model,
)
from .weights_experts import register_expert_converters


class DeepseekV2Model(DeepseekV3Model):
    """The decoder without a head."""

    config_class = DeepseekV2Config


class DeepseekV2ForCausalLM(DeepseekV3ForCausalLM, GenerationMixin):
    """The decoder with a language model head."""

    config_class = DeepseekV2Config
    model_class = DeepseekV2Model


class DeepseekV2ForSequenceClassification(DeepseekV3ForSequenceClassification):
    """The decoder with a linear score on each sequence's last token."""

    config_class = DeepseekV2Config
    model_class = DeepseekV2Model


class DeepseekV2ForTokenClassification(DeepseekV3ForTokenClassification):
    """The decoder with a linear score on every token."""

    config_class = DeepseekV2Config
    model_class = DeepseekV2Model


register_expert_converters(
    "DeepseekV2Model",
    "DeepseekV2ForCausalLM",
    "DeepseekV2ForSequenceClassification",
    "DeepseekV2ForTokenClassification",
)

__all__ = [
    "DeepseekV2ForCausalLM",
    "DeepseekV2ForSequenceClassification",
    "DeepseekV2ForTokenClassification",
    "DeepseekV2Model",
]
