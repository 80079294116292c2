"""Sequence and token classification, for any decoder: `model_class` of the class that takes a mixin."""

from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

# The generic constructors are passed over: they ask the Auto classes for the model, which remote code may not be part
# of.


class SequenceClassificationMixin(GenericForSequenceClassification):
    """The decoder with a linear score on each sequence's last token that is no padding."""

    model_class: type

    def __init__(self, config):
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = self.model_class(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class TokenClassificationMixin(GenericForTokenClassification):
    """The decoder with a linear score on every token."""

    model_class: type

    def __init__(self, config):
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = self.model_class(config)
        dropout = getattr(config, "classifier_dropout", None)
        dropout = getattr(config, "hidden_dropout", 0.1) if dropout is None else dropout
        self.dropout = nn.Dropout(dropout or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
