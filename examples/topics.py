"""Shared by most examples: multilingual-e5-small on English sentences. Which of seven topics is each one about?"""

import argparse
import zlib

import torch
from torch import nn
from transformers import BertModel

from graddrop_kernels.demo import e5_small, sib200
from graddrop_kernels.demo.classifier import PREFIX, MeanPoolingClassifier, set_dropout


def options(description: str, layers: int = 12, sentences: int = 192, lr: float = 3e-4) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--layers", type=int, default=layers, help="blocks of the model (default: %(default)s)")
    parser.add_argument("--sentences", type=int, default=sentences, help="to train on (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=lr, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of head and masks (default: %(default)s)")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[nn.Module, list[dict]]:
    """Returns the model, without dropout of activations, and rows of ``input_ids`` and ``labels``."""
    split = sib200.load("en", "train")
    texts = [PREFIX + text for text in split.texts[: args.sentences]]
    pretrained, tokenizer = e5_small.load(texts)
    config = pretrained.config
    config.num_hidden_layers = args.layers
    set_dropout(config, 0.0)
    bert = BertModel(config, add_pooling_layer=False)
    bert.load_state_dict({name: pretrained.state_dict()[name] for name in bert.state_dict()})
    torch.manual_seed(args.seed)
    model = MeanPoolingClassifier(bert, len(sib200.LABELS))
    ids = tokenizer(texts, truncation=True, max_length=48)["input_ids"]
    return model, [{"input_ids": torch.tensor(row), "labels": label} for row, label in zip(ids, split.labels)]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Makes a padded batch."""
    ids = [row["input_ids"] for row in rows]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=e5_small.PAD)
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": padded, "attention_mask": (padded != e5_small.PAD).long(), "labels": labels}


def loss_of(model: nn.Module, batch: dict) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits, batch["labels"])


def report(losses: list[float], optimizer) -> None:
    """Prints losses and a mask. In every loop the same model, sentences and seed have the same masks, thus the same
    last line.
    """
    quarter = max(len(losses) // 4, 1)
    first, last = (sum(part) / quarter for part in (losses[:quarter], losses[-quarter:]))
    print(f"loss {first:.3f} in the first quarter of {len(losses)} steps, {last:.3f} in the last")
    name = optimizer.param_groups[0]["param_names"][0]
    mask = optimizer.mask(name)
    kept, checksum = 100 * mask.float().mean(), zlib.crc32(mask.numpy().tobytes())
    print(f"next mask of {name}: {kept:.1f} % kept, crc32 {checksum:08x}")
