"""BertModel with a linear classifier on the mean of its last hidden states, as e5 was pretrained to be used."""

import torch
from torch import nn
from transformers import BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class BertForMeanPooling(BertPreTrainedModel):
    """Has ``config.num_labels`` outputs and the arguments of BertForSequenceClassification."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask, token_type_ids=None, labels=None) -> SequenceClassifierOutput:
        """Takes int64 (examples, length), mask 0 on padding, labels (examples,). Returns loss and float32 logits."""
        hidden = self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state.float()
        weight = attention_mask.unsqueeze(-1).float()
        # float32 under autocast too: this costs nothing, and only the head has no pretraining.
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.classifier(self.dropout((hidden * weight).sum(1) / weight.sum(1)))
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
