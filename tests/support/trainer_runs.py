"""Trainers of transformers on a toy BERT and real sentences, for the tests of the integration."""

import copy
from importlib.metadata import version

from lazy import integration, transformers

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradDropEpoch, GradFreeze, LayerGradDrop, LinearAnneal
from graddrop_kernels.demo import sib200

LENGTH = 32
MASKS = {
    "graddrop": lambda epochs: GradDrop(0.3),
    "annealed": lambda epochs: GradDrop(LinearAnneal(epochs)),
    "layer": lambda epochs: LayerGradDrop(0.5),
    "epoch": GradDropEpoch,
    "freeze": GradFreeze,
    "none": None,
}
GIVES_NO_MODEL = int(version("transformers").split(".")[0]) < 5


def model_of(dropout=0.0):
    transformers.set_seed(3)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=257, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=LENGTH, hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0, num_labels=7,
        )
    )  # fmt: skip


def sentences(count=24):
    split = sib200.load("en", "train")
    rows = []
    for text, label in list(zip(split.texts, split.labels))[:count]:
        ids = (list(text.encode()) + [256] * LENGTH)[:LENGTH]
        rows.append({"input_ids": ids, "labels": label})
    return rows


def arguments(folder, **more):
    """Makes arguments for two epochs of six batches of four sentences, with none of the optimizer's defaults."""
    values = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "adam_beta1": 0.8,
        "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.1, "max_grad_norm": 0.0,
        "lr_scheduler_type": "linear", "logging_steps": 1, "report_to": [], "disable_tqdm": True, "seed": 7,
        "use_cpu": True, "save_strategy": "no", "dataloader_pin_memory": False, **more,
    }  # fmt: skip
    return transformers.TrainingArguments(output_dir=str(folder), **values)


def trainer_of(args, mask, model=None, rows=None, callback=None, skip_dropped=False, more=None, **optimizer):
    """Makes a Trainer. ``mask``: a name out of MASKS, or what trainer_optimizer() takes. ``more``: arguments of
    Trainer.
    """
    model = model_of() if model is None else model
    if GIVES_NO_MODEL:
        optimizer["model"] = model
    callbacks = [integration.GradDropCallback(skip_dropped=skip_dropped)] if callback is None else callback
    policy = MASKS[mask] if isinstance(mask, str) else mask
    return transformers.Trainer(
        model=model, args=args, train_dataset=sentences() if rows is None else rows, callbacks=callbacks,
        optimizer_cls_and_kwargs=integration.trainer_optimizer(args, policy, **optimizer),
        **(more or {}),
    )  # fmt: skip


def optimizer_in(trainer) -> FusedGradDropAdamW:
    return trainer.optimizer.optimizer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def recorded(trainer):
    """Trains. Returns the batches that the model was given and its losses."""
    batches, found = [], []
    compute_loss = trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        if model.training:
            batches.append(copy.deepcopy(dict(inputs)))
        loss = compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            found.append(loss.item())
        return loss

    trainer.compute_loss = recording
    trainer.train()
    trainer.compute_loss = compute_loss
    return batches, found
