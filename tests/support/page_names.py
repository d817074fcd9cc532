"""Names that the pages' examples take for granted, one function per name: a small model, its batches, Trainer's
arguments.

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
    """Returns two steps of two micro-batches: (token ids [4, 6], labels [4])."""
    return [[(torch.randint(50, (4, 6)), torch.randint(3, (4,))) for _ in range(2)] for _ in range(2)]


def loader(batches):
    return torch.utils.data.DataLoader([micro_batch for batch in batches for micro_batch in batch], batch_size=None)


def loss_of(model):
    """Returns the loss function of a micro-batch. Some examples pass a model before it, which is this one, wrapped."""

    def loss(*arguments):
        ids, labels = arguments[-1]
        hidden = model["encoder"](model["embeddings"](ids))
        return torch.nn.functional.cross_entropy(model["head"](hidden.mean(1)), labels)

    return loss


def loss(loss_of, batches):
    return loss_of(batches[0][0])


def optimizer(model):
    return FusedGradDropAdamW(param_groups(model), lr=1e-3)


def scaler():
    return torch.amp.GradScaler("cpu")


def accelerator():
    import accelerate

    return accelerate.Accelerator(cpu=True)


def lightning():
    import lightning

    return lightning


def module(model, loss_of, lightning):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, micro_batch, _):
            return loss_of(micro_batch)

        def configure_optimizers(self):
            return FusedGradDropAdamW(param_groups(self.model), lr=1e-3)

    return Module()


def Trainer():  # noqa: N802
    import transformers

    return transformers.Trainer


def args():
    import transformers

    return transformers.TrainingArguments(output_dir="trained", num_train_epochs=2, report_to=[], use_cpu=True)


def train_dataset():
    return [{"input_ids": [1, 2, 3], "labels": 0}] * 4
