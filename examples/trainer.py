"""GradDrop in the Trainer of transformers, its p annealed from epoch to epoch."""

import tempfile

from topics import collate, load, options, report
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from graddrop_kernels import GradDrop, LinearAnneal
from graddrop_kernels.integrations.transformers import GradDropCallback, trainer_optimizer

settings = options(__doc__)
model, rows = load(settings)

with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder, num_train_epochs=settings.epochs, per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr, weight_decay=0.01, seed=settings.seed, lr_scheduler_type="constant",
        max_grad_norm=0.0, train_sampling_strategy="sequential", remove_unused_columns=False, save_strategy="no",
        report_to=[], logging_steps=1, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=rows, data_collator=collate,
        compute_loss_func=lambda outputs, labels, **_: cross_entropy(outputs.logits, labels),
        optimizer_cls_and_kwargs=trainer_optimizer(args, mask=lambda epochs: GradDrop(p=LinearAnneal(epochs))),
        callbacks=[GradDropCallback()],
    )  # fmt: skip
    trainer.train()

report([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.optimizer.optimizer)
