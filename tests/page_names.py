"""What the pages' examples take for granted, one function a name: a small model, its batches, a Trainer's arguments.

A function's arguments are other names of this file. Nothing is downloaded.
"""

import torch

from graddrop_kernels import FusedGradDropAdamW, param_groups


def model():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    layers = {
        "embeddings": torch.nn.Embedding(50, 16), "encoder": torch.nn.TransformerEncoder(layer, 4),
        "head": torch.nn.Linear(16, 3),
    }  # fmt: skip
    return torch.nn.ModuleDict(layers)


def epochs():
    return 2


def batches():
    """Two steps of two micro-batches: (token ids [4, 6], labels [4])."""
    return [[(torch.randint(50, (4, 6)), torch.randint(3, (4,))) for _ in range(2)] for _ in range(2)]


def loss_of(model):
    def loss(micro_batch):
        ids, labels = micro_batch
        hidden = model["encoder"](model["embeddings"](ids))
        return torch.nn.functional.cross_entropy(model["head"](hidden.mean(1)), labels)

    return loss


def loss(loss_of, batches):
    return loss_of(batches[0][0])


def optimizer(model):
    return FusedGradDropAdamW(param_groups(model), lr=1e-3)


def scaler():
    return torch.amp.GradScaler("cpu")


def Trainer():  # noqa: N802
    import transformers

    return transformers.Trainer


def args():
    import transformers

    return transformers.TrainingArguments(output_dir="trained", num_train_epochs=2, report_to=[], use_cpu=True)


def train_dataset():
    return [{"input_ids": [1, 2, 3], "labels": 0}] * 4
