"""The Trainer of transformers, two epochs: the bits of a plain loop over the same batches, and of an unbroken run."""

import copy
import warnings

import pytest
from toy import bits
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from graddrop_kernels import (
    FusedGradDropAdamW,
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    param_groups,
)
from graddrop_kernels.demo import sib200
from graddrop_kernels.integrations.transformers import GradDropCallback, trainer_optimizer

LENGTH = 32
MASKS = {
    "graddrop": lambda epochs: GradDrop(0.3),
    "annealed": lambda epochs: GradDrop(LinearAnneal(epochs)),
    "layer": lambda epochs: LayerGradDrop(0.5),
    "epoch": GradDropEpoch,
    "freeze": GradFreeze,
    "none": None,
}


def model_of(dropout=0.0):
    set_seed(3)
    return BertForSequenceClassification(
        BertConfig(
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
    return TrainingArguments(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=3e-3, adam_beta1=0.8,
        adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1, max_grad_norm=0.0, lr_scheduler_type="linear",
        logging_steps=1, report_to=[], disable_tqdm=True, seed=7, use_cpu=True, **{"save_strategy": "no", **more},
    )  # fmt: skip


def trainer_of(args, mask, model=None, **optimizer):
    return Trainer(
        model=model or model_of(), args=args, train_dataset=sentences(), callbacks=[GradDropCallback()],
        optimizer_cls_and_kwargs=trainer_optimizer(args, MASKS[mask] if isinstance(mask, str) else mask, **optimizer),
    )  # fmt: skip


def optimizer_in(trainer) -> FusedGradDropAdamW:
    return trainer.optimizer.optimizer


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_is_a_plain_loop(mask, accumulation, tmp_path):
    trainer = trainer_of(arguments(tmp_path, gradient_accumulation_steps=accumulation), mask)
    batches, rates = [], []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(copy.deepcopy(kwargs)), with_kwargs=True
    )
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.train()

    model = model_of()
    policy = MASKS[mask](2) if MASKS[mask] else None
    optimizer = FusedGradDropAdamW(
        param_groups(model, weight_decay=0.1), lr=3e-3, betas=(0.8, 0.95), eps=1e-6, mask=policy, seed=7
    )
    # Trainer leaves the average over micro-batches to models that take any keyword, whether they do it or not.
    divisor = 1 if trainer.model_accepts_loss_kwargs else accumulation
    per_epoch = len(batches) // 2
    for number, inputs in enumerate(batches):
        if number % per_epoch == 0:
            optimizer.set_epoch(number // per_epoch)
        (model(**inputs).loss / divisor).backward()
        if (number + 1) % accumulation == 0:
            for group in optimizer.param_groups:
                group["lr"] = rates[number // accumulation]
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(trainer.model.named_parameters(), model.parameters()):
        assert bits(a) == bits(b), name
        assert bits(optimizer_in(trainer).mask(a)) == bits(optimizer.mask(b)), name


@pytest.mark.parametrize("mask", ["graddrop", "annealed", "layer", "epoch"])
def test_a_resumed_run_is_an_unbroken_one(mask, tmp_path):
    """From a checkpoint late in epoch 1."""
    whole = trainer_of(arguments(tmp_path / "whole"), mask)
    whole.train()
    broken = trainer_of(arguments(tmp_path / "broken", save_strategy="steps", save_steps=10), mask)
    broken.train()
    resumed = trainer_of(arguments(tmp_path / "broken"), mask)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-10"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert bits(a) == bits(b), name
    assert [group["epoch"] for group in optimizer_in(resumed).param_groups] == [1, 1, 1, 1]


@pytest.mark.parametrize("mask", ["layer", "freeze"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_dropped_blocks_are_skipped(mask, accumulation, tmp_path):
    def trained(skip):
        args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
        trainer = Trainer(
            model=model_of(), args=args, train_dataset=sentences(), callbacks=[GradDropCallback(skip_dropped=skip)],
            optimizer_cls_and_kwargs=trainer_optimizer(args, MASKS[mask]),
        )  # fmt: skip
        untrained = []
        trainer.model.register_forward_pre_hook(
            lambda module, _: untrained.append(sum(not param.requires_grad for param in module.parameters()))
        )
        trainer.train()
        return trainer.model, max(untrained)

    (plain, none), (skipping, some) = trained(False), trained(True)
    assert none == 0 < some
    for (name, a), b in zip(plain.named_parameters(), skipping.parameters()):
        assert bits(a) == bits(b), name
        assert b.requires_grad, name


def test_the_log_says_what_the_masks_do(tmp_path):
    trainer = trainer_of(arguments(tmp_path), "annealed")
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["graddrop_epoch"] for entry in logs] == [0] * 6 + [1] * 6
    assert {entry["graddrop_p"] for entry in logs[:6]} == {0.9} and {entry["graddrop_p"] for entry in logs[6:]} == {0.4}
    for entry in logs:
        assert entry["graddrop_active_fraction"] == pytest.approx(1 - entry["graddrop_p"], abs=1e-5)


def test_warnings_and_errors(tmp_path):
    with pytest.warns(UserWarning, match="drops out activations.*hidden_dropout_prob.*0.1"):
        trainer_of(arguments(tmp_path, max_steps=1), GradDrop(0.3), model_of(dropout=0.1)).train()
    clipping = arguments(tmp_path)
    clipping.max_grad_norm = 1.0
    with pytest.raises(ValueError, match=r"skip_dropped=True.*max_grad_norm=1.0.*set args.max_grad_norm=0"):
        Trainer(
            model=model_of(), args=clipping, train_dataset=sentences(), callbacks=[GradDropCallback(skip_dropped=True)],
            optimizer_cls_and_kwargs=trainer_optimizer(clipping, LayerGradDrop(0.5)),
        ).train()  # fmt: skip
    with pytest.raises(ValueError, match="max_steps=5.*number of epochs"):
        trainer_optimizer(arguments(tmp_path, max_steps=5), GradDropEpoch)
    with pytest.warns(UserWarning, match="not a FusedGradDropAdamW.*trainer_optimizer"):
        Trainer(
            model=model_of(), args=arguments(tmp_path, max_steps=1), train_dataset=sentences(),
            callbacks=[GradDropCallback()],
        ).train()  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="transformers|torch|accelerate")
        trainer_of(arguments(tmp_path, max_steps=1), GradDrop(0.3)).train()
