"""Lightning, Accelerate and PEFT on two blocks of the demo's real model, two epochs of real sentences: the bits of a
plain loop over the same batches, and of an unbroken run.
"""

import contextlib
import copy
import functools
import importlib
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lazy import Lazy, transformers
from ranks import run_ranks
from torch import nn
from toy import bits

from graddrop_kernels import (
    FusedGradDropAdamW,
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    param_groups,
)
from graddrop_kernels.demo import e5_small, sib200
from graddrop_kernels.demo.classifier import PREFIX, MeanPoolingClassifier, set_dropout
from graddrop_kernels.demo.train import collate
from graddrop_kernels.integrations.accelerate import graddrop_optimizer, mask_log, set_epoch
from graddrop_kernels.masks.philox import DOMAIN_ELEMENT, stream_key, uniform16

peft = Lazy("peft")
pytestmark = pytest.mark.usefixtures("one_thread")
EPOCHS, BATCH = 2, 4
SENTENCES, PER_EPOCH = 5 * BATCH, 5  # with two micro-batches a step, an epoch's last step has one
MASKS = {
    "annealed": GradDrop(LinearAnneal(EPOCHS)),
    "layer": LayerGradDrop(0.5),
    "epoch": GradDropEpoch(EPOCHS),
    "freeze": GradFreeze(EPOCHS),
}


@pytest.fixture(scope="module")
def task():
    """(makes a model of the head's seed, the batches of an epoch)"""
    split = sib200.load("en", "train")
    texts = [PREFIX + text for text in split.texts[:SENTENCES]]
    bert, tokenizer = e5_small.load(texts)
    set_dropout(bert.config, 0.0)
    bert.config.num_hidden_layers = 2
    weights, bert = bert.state_dict(), transformers.BertModel(bert.config, add_pooling_layer=False)
    bert.load_state_dict({name: weights[name] for name in bert.state_dict()})
    ids = tokenizer(texts, truncation=True, max_length=14)["input_ids"]
    batches = []
    for start in range(0, SENTENCES, BATCH):
        batch = collate(ids[start : start + BATCH], tokenizer.pad_token_id, torch.device("cpu"))
        batches.append({**batch, "labels": torch.tensor(split.labels[start : start + BATCH])})

    def model_of(seed):
        torch.manual_seed(seed)
        return MeanPoolingClassifier(copy.deepcopy(bert), len(sib200.LABELS))

    return model_of, batches


def loss_of(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return nn.functional.cross_entropy(model(**inputs).logits.float(), batch["labels"])


def optimizer_of(model, mask, seed, **more):
    arguments = {"lr": 3e-4, "betas": (0.8, 0.95), "eps": 1e-6, "seed": seed, **more}
    return FusedGradDropAdamW(param_groups(model, weight_decay=0.1), mask=MASKS[mask], **arguments)


def schedule_of(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def plain_loop(model, batches, mask, seed, accumulation=1, dtype=None, until=None, **more):
    """(the optimizer, the losses)"""
    optimizer = optimizer_of(model, mask, seed, **more)
    schedule, losses = schedule_of(optimizer), []
    for epoch in range(EPOCHS):
        optimizer.set_epoch(epoch)
        for number, batch in enumerate(batches, start=1):
            with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
                loss = loss_of(model, batch)
            (loss / accumulation).backward()
            losses.append(loss.item())
            if number % accumulation == 0 or number == len(batches):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return optimizer, losses


def assert_same_training(model, optimizer, other, its_optimizer):
    """Parameters, moments, counts and the masks of the next step."""
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert bits(a) == bits(b), name
        assert (a in optimizer.state) == (b in its_optimizer.state), name
        for key, value in optimizer.state.get(a, {}).items():
            assert bits(value) == bits(its_optimizer.state[b][key]), (name, key)
        if a.requires_grad:
            assert bits(optimizer.mask(a)) == bits(its_optimizer.mask(b)), name
    for ours, theirs in zip(optimizer.param_groups, its_optimizer.param_groups, strict=True):
        for key in ("epoch", "completed_steps", "epoch_history", "lr"):
            assert ours[key] == theirs[key], key


def shares_of_blocks(optimizer, steps):
    """The share of the two blocks, which are equal in size, that each step kept."""
    names = [f"bert.encoder.layer.{number}.output.dense.weight" for number in range(2)]
    return [sum(bool(optimizer.mask(name, step=step).all()) for name in names) / 2 for step in range(steps)]


# Lightning.


class Batches:
    """A loader that a checkpoint of Lightning holds the place of."""

    def __init__(self, batches):
        self.batches, self.next = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.next %= len(self.batches)
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


class Kept:
    """A logger's metrics: [(step, {name: value})]."""

    def __init__(self, package):
        logger = importlib.import_module(f"{package}.loggers.logger").Logger

        class Logger(logger):
            name, version, seen = "kept", 0, []

            def log_hyperparams(self, *_, **__):
                pass

            def log_metrics(self, metrics, step):
                self.seen.append((step, metrics))

        self.logger = Logger()
        self.logger.seen = []

    def __getitem__(self, name):
        return [metrics[name] for _, metrics in self.logger.seen if name in metrics]


PACKAGES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}


def callback_of(package, **arguments):
    return importlib.import_module(f"graddrop_kernels.integrations.{package}").GradDropCallback(**arguments)


def lightning_module(package, model, mask, seed, **more):
    class Module(importlib.import_module(PACKAGES[package]).LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch, _):
            loss = loss_of(self.model, batch)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            optimizer = optimizer_of(self.model, mask, seed, **more)
            return [optimizer], [{"scheduler": schedule_of(optimizer), "interval": "step"}]

    return Module()


def lightning_trainer(package, folder, callbacks, **more):
    module = importlib.import_module(PACKAGES[package])
    arguments = {"logger": False, "enable_checkpointing": False, "log_every_n_steps": 1, "max_epochs": EPOCHS, **more}
    return module.Trainer(
        accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=callbacks, **arguments,
    )  # fmt: skip


@pytest.mark.parametrize(
    "package, mask, accumulation, precision",
    [
        ("lightning", "annealed", 1, "32-true"),
        ("lightning", "epoch", 2, "bf16-mixed"),
        ("pytorch_lightning", "layer", 2, "32-true"),
    ],
)
def test_lightning_is_a_plain_loop(package, mask, accumulation, precision, task, seed, tmp_path):
    model_of, batches = task
    module, kept = lightning_module(package, model_of(seed), mask, seed), Kept(PACKAGES[package])
    trainer = lightning_trainer(
        package, tmp_path, [callback_of(package)], accumulate_grad_batches=accumulation, precision=precision,
        logger=kept.logger,
    )  # fmt: skip
    trainer.fit(module, Batches(batches))
    model = model_of(seed)
    dtype = torch.bfloat16 if precision == "bf16-mixed" else None
    optimizer, losses = plain_loop(model, batches, mask, seed, accumulation, dtype)
    assert module.losses == losses and len(set(losses)) == len(losses)  # it trains
    assert_same_training(module.model, trainer.optimizers[0], model, optimizer)
    steps = -(-PER_EPOCH // accumulation)
    assert kept["graddrop_epoch"] == [0] * steps + [1] * steps
    if mask == "annealed":
        assert kept["graddrop_p"] == pytest.approx([0.9] * steps + [0.4] * steps)
        assert kept["graddrop_active_fraction"] == pytest.approx([0.1] * steps + [0.6] * steps, abs=1e-4)
    if mask == "epoch":
        assert kept["graddrop_active_fraction"] == pytest.approx([0.5] * steps + [1.0] * steps, abs=1e-4)
    if mask == "layer":
        assert kept["graddrop_active_fraction"] == shares_of_blocks(optimizer, 2 * steps)


@pytest.mark.parametrize(
    "package, mask, accumulation, steps_at",
    [("lightning", "annealed", 1, {3: 3, 5: 5, 7: 7}), ("pytorch_lightning", "epoch", 2, {4: 7})],
)
def test_lightning_resumes(package, mask, accumulation, steps_at, task, seed, tmp_path):
    """From the middle of epoch 0, its end, and the middle of epoch 1; ``steps_at``: {step: batches before its end}."""
    model_of, batches = task
    saving = importlib.import_module(PACKAGES[package]).callbacks.ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False
    )
    saving._should_skip_saving_checkpoint = lambda trainer: (  # each has 16 MB
        trainer.global_step not in steps_at or trainer.global_step == saving._last_global_step_saved
    )
    broken = lightning_module(package, model_of(seed), mask, seed)
    common = {"accumulate_grad_batches": accumulation}
    trainer = lightning_trainer(package, tmp_path, [callback_of(package), saving], enable_checkpointing=True, **common)
    trainer.fit(broken, Batches(batches))
    a_epoch = -(-PER_EPOCH // accumulation)
    for step, batches_before in steps_at.items():
        resumed, kept = lightning_module(package, model_of(seed + 1), mask, seed), Kept(PACKAGES[package])
        again = lightning_trainer(package, tmp_path, [callback_of(package)], logger=kept.logger, **common)
        again.fit(resumed, Batches(batches), ckpt_path=str(tmp_path / f"{step}.ckpt"))
        assert again.global_step == EPOCHS * a_epoch and resumed.losses == broken.losses[batches_before:]
        assert_same_training(resumed.model, again.optimizers[0], broken.model, trainer.optimizers[0])
        assert kept["graddrop_epoch"] == [0] * max(a_epoch - step, 0) + [1] * min(a_epoch, 2 * a_epoch - step)


def test_the_epoch_of_a_resume_is_the_trainers(seed, tmp_path):
    """Not that of a checkpoint that knows of no epochs, in the middle of one."""
    saving = importlib.import_module("lightning.pytorch.callbacks").ModelCheckpoint(tmp_path, "half", save_top_k=-1)
    saving._should_skip_saving_checkpoint = lambda trainer: trainer.global_step != PER_EPOCH + 2
    saving._every_n_train_steps = 1
    module = lightning_module("lightning", Tiny(), "annealed", seed)
    fit = lambda module, *callbacks, path=None, **more: lightning_trainer(
        "lightning", tmp_path, list(callbacks), **more
    ).fit(module, Batches(tiny_batches(seed)), ckpt_path=path)
    with pytest.warns(UserWarning, match="GradDrop follows epochs, but set_epoch.* was not called"):
        fit(module, saving, enable_checkpointing=True)
    kept = Kept(PACKAGES["lightning"])
    module = lightning_module("lightning", Tiny(), "annealed", seed)
    fit(module, callback_of("lightning"), path=str(tmp_path / "half.ckpt"), logger=kept.logger)
    assert kept["graddrop_epoch"] == [1] * 3 and kept["graddrop_p"] == pytest.approx([0.4] * 3)


@pytest.mark.parametrize("mask", ["layer", "freeze"])
def test_lightning_skips_dropped_blocks(mask, task, seed, tmp_path):
    model_of, batches = task
    module = lightning_module("lightning", model_of(seed), mask, seed)
    untrained = []
    module.model.register_forward_pre_hook(
        lambda model, _: untrained.append(sum(not param.requires_grad for param in model.parameters()))
    )
    callback = callback_of("lightning", skip_dropped=True)
    trainer = lightning_trainer("lightning", tmp_path, [callback], accumulate_grad_batches=2)
    trainer.fit(module, Batches(batches))
    model = model_of(seed)
    optimizer, losses = plain_loop(model, batches, mask, seed, accumulation=2)
    in_blocks = [name for name, _ in model.named_parameters() if ".layer." in name]
    dropped = lambda step: sum(not optimizer.mask(name, step=step).any() for name in in_blocks)
    by_step = [0, *map(dropped, range(1, 6))] if mask == "layer" else [0, *[len(in_blocks) // 2] * 2, 0, 0, 0]
    assert untrained == [by_step[step] for step in (0, 0, 1, 1, 2, 3, 3, 4, 4, 5)]
    assert module.losses == losses
    assert_same_training(module.model, trainer.optimizers[0], model, optimizer)
    assert all(param.requires_grad for param in module.parameters())


class Tiny(nn.Module):
    """A classifier of three blocks that needs no task."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(3)
        config = transformers.BertConfig(
            vocab_size=31, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=8, hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.model = MeanPoolingClassifier(transformers.BertModel(config, add_pooling_layer=False), 7)

    def forward(self, **inputs):
        return self.model(**inputs)


def tiny_batches(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(31, (PER_EPOCH, BATCH, 8), generator=generator)
    labels = torch.randint(7, (PER_EPOCH, BATCH), generator=generator)
    return [{"input_ids": a, "attention_mask": torch.ones_like(a), "labels": b} for a, b in zip(ids, labels)]


def refused_fit(module, callback, folder, seed, match, **more):
    with pytest.raises(ValueError, match=match):
        lightning_trainer("lightning", folder, [callback], **more).fit(module, Batches(tiny_batches(seed)))


def test_lightning_warns_and_refuses(seed, tmp_path):
    fit = lambda module, *callbacks: lightning_trainer("lightning", tmp_path, list(callbacks), max_steps=1).fit(
        module, Batches(tiny_batches(seed))
    )
    with pytest.warns(UserWarning, match="drops out activations.*hidden_dropout_prob.*0.1"):
        fit(lightning_module("lightning", Tiny(dropout=0.1), "annealed", seed), callback_of("lightning"))
    with pytest.warns(UserWarning, match="GradDropEpoch follows epochs, but set_epoch.* was not called"):
        fit(lightning_module("lightning", Tiny(), "epoch", seed))
    other = lightning_module("lightning", Tiny(), "epoch", seed)
    other.configure_optimizers = lambda: torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"\['SGD'\], none of them a FusedGradDropAdamW.*configure_optimizers"):
        fit(other, callback_of("lightning", skip_dropped=True))
    skipping = lambda: callback_of("lightning", skip_dropped=True)
    module = lightning_module("lightning", Tiny(), "layer", seed)
    match = r"gradient_clip_val=0.5.*set gradient_clip_val=None"
    refused_fit(module, skipping(), tmp_path, seed, match, gradient_clip_val=0.5)
    module = lightning_module("lightning", Tiny(), "layer", seed)
    module.automatic_optimization = False
    refused_fit(module, skipping(), tmp_path, seed, "automatic_optimization=False.*training_step")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="lightning|torch")
        fit(lightning_module("lightning", Tiny(), "layer", seed), skipping())


def test_two_optimizers_and_an_exception(seed, tmp_path):
    """Both are told the epoch, and logged; a batch that raises leaves no parameter untrained."""
    module, kept = lightning_module("lightning", Tiny(), "annealed", seed), Kept(PACKAGES["lightning"])
    module.second, module.automatic_optimization = Tiny(), False
    names = {"annealed": module.model, "layer": module.second}
    module.configure_optimizers = lambda: [optimizer_of(model, mask, seed) for mask, model in names.items()]

    def training_step(batch, batch_idx):
        for optimizer, model in zip(module.optimizers(), names.values()):
            optimizer.zero_grad()
            module.manual_backward(loss_of(model, batch))
            optimizer.step()

    module.training_step = training_step
    trainer = lightning_trainer("lightning", tmp_path, [callback_of("lightning")], logger=kept.logger)
    trainer.fit(module, Batches(tiny_batches(seed)))
    assert kept["graddrop_p_0"] == pytest.approx([0.9] * PER_EPOCH + [0.4] * PER_EPOCH)
    assert kept["graddrop_p_1"] == [0.5] * (2 * PER_EPOCH) and kept["graddrop_epoch_1"] == kept["graddrop_epoch_0"]

    failing = lightning_module("lightning", Tiny(), "freeze", seed)

    def fail(module, _):
        if failing.global_step == 2:
            assert not all(param.requires_grad for param in module.parameters())
            raise KeyboardInterrupt("in the forward pass")

    failing.model.register_forward_pre_hook(fail)
    trainer = lightning_trainer("lightning", tmp_path, [callback_of("lightning", skip_dropped=True)])
    with pytest.raises(BaseException), contextlib.suppress(ValueError):  # noqa: B017 (Lightning exits)
        trainer.fit(failing, Batches(tiny_batches(seed)))
    assert failing.global_step == 2 and all(param.requires_grad for param in failing.parameters())


def test_a_module_that_ends_its_epochs_early(seed, tmp_path):
    """Between the callbacks' and the end of a batch, which then has none. Nothing is left frozen in between."""
    module = lightning_module("lightning", Tiny(), "freeze", seed)
    frozen = []
    module.on_train_batch_start = lambda batch, batch_idx: -1 if batch_idx == 3 else None
    module.on_train_epoch_end = lambda: frozen.append(sum(not param.requires_grad for param in module.parameters()))
    callback = callback_of("lightning", skip_dropped=True)
    trainer = lightning_trainer("lightning", tmp_path, [callback])
    trainer.fit(module, torch.utils.data.DataLoader(tiny_batches(seed), batch_size=None))
    assert frozen == [0, 0] and trainer.global_step == 6 and all(param.requires_grad for param in module.parameters())


def test_a_checkpoint_in_the_middle_of_a_batch(seed, tmp_path):
    """As the handler of a cluster's signal saves one: with the state of the completed steps."""
    module, saved = lightning_module("lightning", Tiny(), "freeze", seed), []

    def save(model, _):
        if not saved and not all(param.requires_grad for param in model.parameters()):
            saved.append(copy.deepcopy(trainer.optimizers[0].state_dict()))
            trainer.save_checkpoint(tmp_path / "signal.ckpt")

    module.model.register_forward_pre_hook(save)
    trainer = lightning_trainer("lightning", tmp_path, [callback_of("lightning", skip_dropped=True)])
    trainer.fit(module, Batches(tiny_batches(seed)))
    [in_file] = torch.load(tmp_path / "signal.ckpt", weights_only=False)["optimizer_states"]
    assert saved and str(in_file) == str(saved[0])
    assert all(bits(value) == bits(in_file["state"][number][key])
               for number, state in saved[0]["state"].items() for key, value in state.items())  # fmt: skip


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_state_that_was_loaded_past_lightning_goes_on_from_its_epoch(epochs, seed, tmp_path):
    """In a run of its own, whose trainer counts from 0. An optimizer that goes on without a load begins anew."""
    first = lightning_module("lightning", Tiny(), "annealed", seed)
    lightning_trainer("lightning", tmp_path, [callback_of("lightning")], max_epochs=epochs).fit(
        first, Batches(tiny_batches(seed))
    )
    saved = copy.deepcopy(first.optimizers().optimizer.state_dict())
    module, optimizers, callback = lightning_module("lightning", Tiny(), "annealed", seed), [], callback_of("lightning")

    def configure_optimizers():
        if not optimizers:
            optimizers.append(optimizer_of(module.model, "annealed", seed))
            optimizers[0].load_state_dict(saved)
        return optimizers

    module.configure_optimizers = configure_optimizers
    for expected in ([epochs - 1, epochs], [0, 1]):
        kept = Kept(PACKAGES["lightning"])
        trainer = lightning_trainer("lightning", tmp_path, [callback], logger=kept.logger)
        trainer.fit(module, Batches(tiny_batches(seed)))
        assert kept["graddrop_epoch"] == [epoch for epoch in expected for _ in range(PER_EPOCH)]


def fitted_by_ddp(seed, folder, skip):
    """Each rank sees the same batches, so that the mean of gradients is that of each."""
    module = lightning_module("lightning", Tiny(), "layer", seed)
    strategy = importlib.import_module("lightning.pytorch.strategies").DDPStrategy(
        find_unused_parameters=skip, process_group_backend="gloo"
    )
    callback = callback_of("lightning", skip_dropped=skip)
    trainer = importlib.import_module("lightning.pytorch").Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=EPOCHS, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, Batches(tiny_batches(seed)))
    return [param.detach() for param in module.model.parameters()]


# Accelerate.


def accelerator_of(accumulation=1, **more):
    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation, **more)


def accelerated(accelerator, model, optimizer, loader, schedule, start=(0, 0), save=None, folder=None):
    """(losses, learning rates, logs); ``save``: (epoch, batch) before which the state is saved in ``folder``."""
    import accelerate

    losses, rates, logs = [], [], []
    for epoch in range(start[0], EPOCHS):
        set_epoch(optimizer, epoch)
        first = start[1] if epoch == start[0] else 0
        rest = accelerate.skip_first_batches(loader, first) if first else loader
        for number, batch in enumerate(rest, start=first):
            if (epoch, number) == save:
                accelerator.save_state(folder)
            with accelerator.accumulate(model):
                loss = loss_of(model, batch)
                accelerator.backward(loss)
                losses.append(loss.item())
                if accelerator.sync_gradients:
                    rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    logs.append(mask_log(optimizer))
    return losses, rates, logs


def prepared(accelerator, model, batches, mask, seed):
    optimizer = optimizer_of(model, mask, seed)
    rows = [{name: value[row] for name, value in batch.items()} for batch in batches for row in range(BATCH)]
    loader = torch.utils.data.DataLoader(rows, batch_size=BATCH)
    return accelerator.prepare(model, optimizer, loader, schedule_of(optimizer))


@pytest.mark.parametrize(
    "mask, accumulation, precision", [("annealed", 2, "no"), ("epoch", 1, "bf16"), ("layer", 2, "no")]
)
def test_accelerate_is_a_plain_loop(mask, accumulation, precision, task, seed, tmp_path):
    """And goes on from save_state() in the middle of epoch 1."""
    model_of, batches = task
    accelerator = accelerator_of(accumulation, mixed_precision=precision)
    parts = prepared(accelerator, model_of(seed), batches, mask, seed)
    losses, rates, logs = accelerated(accelerator, *parts, save=(1, 2), folder=tmp_path)
    model = model_of(seed)
    dtype = torch.bfloat16 if precision == "bf16" else None
    optimizer, plain_losses = plain_loop(model, batches, mask, seed, accumulation, dtype)
    assert losses == plain_losses
    assert_same_training(parts[0], graddrop_optimizer(parts[1]), model, optimizer)
    steps = -(-PER_EPOCH // accumulation)
    assert rates == [3e-4 * (1 / (1 + step)) for step in range(2 * steps)]
    assert [log["graddrop_epoch"] for log in logs] == [0] * steps + [1] * steps
    if mask == "layer":
        shares = shares_of_blocks(optimizer, 2 * steps)
    else:
        shares = [share for share in {"annealed": (0.1, 0.6), "epoch": (0.5, 1.0)}[mask] for _ in range(steps)]
    assert [log["graddrop_active_fraction"] for log in logs] == pytest.approx(shares, abs=1e-4)

    accelerator = accelerator_of(accumulation, mixed_precision=precision)
    again = prepared(accelerator, model_of(seed + 1), batches, mask, seed)
    accelerator.load_state(tmp_path)
    assert accelerated(accelerator, *again, start=(1, 2))[0] == losses[PER_EPOCH + 2 :]
    assert_same_training(again[0], graddrop_optimizer(again[1]), model, optimizer)


def test_accelerate_skips_dropped_blocks(seed):
    accelerator = accelerator_of()
    model, optimizer, _, _ = prepared(accelerator, Tiny(), tiny_batches(seed), "freeze", seed)
    for batch in tiny_batches(seed):
        set_epoch(optimizer, 0)
        with graddrop_optimizer(optimizer).skip_dropped(model):
            accelerator.backward(loss_of(model, batch))
        skipped = sum(param.grad is None for param in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    plain = Tiny()
    its_optimizer = optimizer_of(plain, "freeze", seed)
    its_optimizer.set_epoch(0)
    for batch in tiny_batches(seed):
        loss_of(plain, batch).backward()
        its_optimizer.step()
        its_optimizer.zero_grad()
    assert skipped > 0
    assert_same_training(model, graddrop_optimizer(optimizer), plain, its_optimizer)


def test_accelerate_warns_and_refuses(seed):
    accelerator = accelerator_of()
    model, optimizer, _, _ = prepared(accelerator, Tiny(), tiny_batches(seed), "epoch", seed)
    accelerator.backward(loss_of(model, tiny_batches(seed)[0]))
    with pytest.warns(UserWarning, match="GradDropEpoch follows epochs, but set_epoch.* was not called"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"int >= 0, got 0\.5"):
        set_epoch(optimizer, 0.5)
    assert mask_log(optimizer)["graddrop_epoch"] == 0
    other = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    for call in (functools.partial(set_epoch, other, 0), functools.partial(mask_log, other)):
        with pytest.raises(TypeError, match="no FusedGradDropAdamW in this AcceleratedOptimizer: pass"):
            call()


def whole_params(model):
    return [
        (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()
        for param in model.parameters()
    ]


def accelerated_by_ranks(kind, mask, seed, folder):
    """(parameters, the resumed run's, learning rates); each rank sees the same batches."""
    import accelerate

    def started(of):
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["BertLayer"],
            cpu_ram_efficient_loading=False, state_dict_type="SHARDED_STATE_DICT",
        ) if kind == "fsdp2" else None  # fmt: skip
        accelerator = accelerator_of(accumulation=2, fsdp_plugin=plugin)
        if plugin:  # which Accelerate leaves out, without a word, on CPUs
            accelerate.PartialState().distributed_type = accelerate.DistributedType.FSDP
            accelerator.state.distributed_type = accelerate.DistributedType.FSDP
            accelerator.state.fsdp_plugin = plugin
        optimizer = optimizer_of(of, mask, seed)
        model, optimizer, schedule = accelerator.prepare(of, optimizer, schedule_of(optimizer))
        return accelerator, model, optimizer, Accumulating(accelerator, tiny_batches(seed)), schedule

    accelerator, *parts = started(Tiny())
    _, rates, _ = accelerated(accelerator, *parts, save=(1, 2), folder=folder)
    other = Tiny()
    with torch.no_grad():
        for param in other.parameters():
            param.add_(1)
    accelerator, *again = started(other)
    accelerator.load_state(folder)
    again[2].first = 2
    set_epoch(again[1], 1)
    accelerated(accelerator, *again, start=(1, 0))
    return whole_params(parts[0]), whole_params(again[0]), rates


class Accumulating:
    """Tells Accelerate where an epoch ends, as its own loader does, but gives every rank all batches."""

    def __init__(self, accelerator, batches):
        self.accelerator, self.batches, self.first = accelerator, batches, 0
        self.end_of_dataloader, self.remainder, self.use_stateful_dataloader = False, -1, False

    def __iter__(self):
        self.accelerator.gradient_state._add_dataloader(self)
        for number in range(self.first, len(self.batches)):
            self.end_of_dataloader = number == len(self.batches) - 1
            yield self.batches[number]
        self.accelerator.gradient_state._remove_dataloader(self)
        self.first = 0


def trained_by_ranks(seed, folder):
    """One call for all: what the ranks import takes longer than what they do."""
    return {
        "lightning": fitted_by_ddp(seed, folder, skip=False),
        "lightning, skipping": fitted_by_ddp(seed, folder, skip=True),
        "accelerate ddp": accelerated_by_ranks("ddp", "layer", seed, folder / "ddp"),
        "accelerate fsdp2": accelerated_by_ranks("fsdp2", "annealed", seed, folder / "fsdp2"),
    }


def without_schedule(mask, seed, micro_batches, rate):
    """(parameters, rates) of a plain loop; ``rate``: of each step."""
    model, rates = Tiny(), []
    optimizer = optimizer_of(model, mask, seed)
    batches = tiny_batches(seed)
    for epoch in range(EPOCHS):
        optimizer.set_epoch(epoch)
        for start in range(0, len(batches), micro_batches):
            rates.append(rate(len(rates)))
            for group in optimizer.param_groups:
                group["lr"] = rates[-1]
            for batch in batches[start : start + micro_batches]:
                (loss_of(model, batch) / micro_batches).backward()
            optimizer.step()
            optimizer.zero_grad()
    return whole_params(model), rates


def test_two_ranks_are_a_plain_loop(seed, tmp_path):
    """Accelerate's schedule goes two steps on at each: it takes it for one of the batches of all ranks."""
    by_lightning, _ = without_schedule("layer", seed, 1, lambda step: 3e-4 * (1 / (1 + step)))
    for rank in run_ranks(2, trained_by_ranks, seed, tmp_path, timeout=240):
        for skipping in ("lightning", "lightning, skipping"):
            assert all(map(torch.equal, rank[skipping], by_lightning)), skipping
        for kind, mask in {"ddp": "layer", "fsdp2": "annealed"}.items():
            expected, rates = without_schedule(mask, seed, 2, lambda step: 3e-4 * (1 / (1 + 2 * step)))
            params, resumed, its_rates = rank[f"accelerate {kind}"]
            assert its_rates == rates, kind
            assert all(map(torch.equal, params, expected)), kind
            assert all(map(torch.equal, resumed, expected)), kind


# What is set on a wrapper reaches the step.


def fabric_of():
    return importlib.import_module("lightning.fabric").Fabric(accelerator="cpu", devices=1)


def in_fabric(model, optimizer):
    return fabric_of().setup(model, optimizer)


def in_lightning(model, optimizer):
    """As LightningModule.optimizers() returns it."""
    wrapper = importlib.import_module("lightning.pytorch.core.optimizer").LightningOptimizer(optimizer)
    wrapper._strategy = SimpleNamespace(optimizer_step=lambda optimizer, closure: optimizer.step(closure))
    return model, wrapper


def in_accelerate(model, optimizer):
    return accelerator_of().prepare(model, optimizer)


def set_attribute(optimizer, name, value):
    setattr(optimizer, name, value)


def set_in_groups(optimizer, name, value):
    for group in optimizer.param_groups:
        group[name] = value


WRAPPED = [
    (in_fabric, set_attribute), (in_fabric, set_in_groups), (in_lightning, set_attribute),
    (in_lightning, set_in_groups), (in_accelerate, set_in_groups),
]  # fmt: skip


@pytest.mark.parametrize("wrap, set_option", WRAPPED, ids=lambda part: part.__name__)
def test_options_set_on_a_wrapper_reach_the_step(wrap, set_option, seed):
    """The norm limit, which side of the mask it counts, and a group that is added afterwards has them too."""

    def trained(wrap, set_option):
        model = Tiny()
        model.added = nn.Linear(3, 2)
        optimizer = inner = optimizer_of(model.model, "layer", seed, max_grad_norm=1e9)
        model, optimizer = wrap(model, optimizer)
        found = []
        for number, batch in enumerate(tiny_batches(seed)):
            if number == 1:
                set_option(optimizer, "max_grad_norm", 0.01)
            if number == 2:
                set_option(optimizer, "norm_after_mask", True)
                optimizer.add_param_group({"params": list(model.added.named_parameters()), "mask": None})
            if number == 4:
                set_option(optimizer, "max_grad_norm", None)
            optimizer.zero_grad()
            (loss_of(model, batch) + sum(param.sum() for param in model.added.parameters())).backward()
            optimizer.step()
            found.append((inner.max_grad_norm, inner.norm_after_mask, inner.grad_norm.item()))
        return [bits(param) for param in model.parameters()], found

    params, found = trained(wrap, set_option)
    limits = [1e9, 0.01, 0.01, 0.01, None]
    assert [entry[:2] for entry in found] == list(zip(limits, [False, False, True, True, True]))
    assert (params, found) == trained(lambda *parts: parts, set_attribute)


def test_limits_that_differ_between_groups(seed):
    model = Tiny()
    optimizer = optimizer_of(model, "annealed", seed, max_grad_norm=1.0)
    optimizer.param_groups[2]["max_grad_norm"] = 2.0
    loss_of(model, tiny_batches(seed)[0]).backward()
    before = [bits(param) for param in model.parameters()]
    with pytest.raises(ValueError, match=r"max_grad_norm=2.0 of parameter group 2 .* group 0, 1.0.*every group"):
        optimizer.step()
    assert [bits(param) for param in model.parameters()] == before
    with pytest.raises(ValueError, match="max_grad_norm must be a number > 0"):
        optimizer.max_grad_norm = -1


def test_steps_in_the_backward_pass_through_fabric(seed):
    model = Tiny()
    inner = optimizer_of(model, "annealed", seed)
    inner.set_epoch(0)
    fabric = fabric_of()
    wrapped, optimizer = fabric.setup(model, inner)
    optimizer.step_in_backward()
    for batch in tiny_batches(seed):
        fabric.backward(loss_of(wrapped, batch))
        assert all(param.grad is None for param in model.parameters())
        optimizer.step()
    plain = Tiny()
    its_optimizer = optimizer_of(plain, "annealed", seed)
    its_optimizer.set_epoch(0)
    for batch in tiny_batches(seed):
        loss_of(plain, batch).backward()
        its_optimizer.step()
        its_optimizer.zero_grad()
    assert_same_training(model, inner, plain, its_optimizer)


# PEFT.


def lora_of(model, seed):
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_dropout=0.0, target_modules=["query", "value"], modules_to_save=["classifier"])
    return peft.get_peft_model(model, config)


def test_lora_is_masked_and_the_saved_head_is_not(task, seed):
    """p = 0.9 in epoch 0: masks by docs/semantics.md; the step, that of AdamW on gradients masked by hand."""
    model_of, batches = task
    model = lora_of(model_of(seed), seed)
    optimizer = optimizer_of(model, "annealed", seed)
    twin = lora_of(model_of(seed), seed)
    trained = {name: param for name, param in twin.named_parameters() if param.requires_grad}
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    frozen = {name: bits(param) for name, param in model.named_parameters() if not param.requires_grad}
    by_hand = FusedGradDropAdamW(param_groups(twin, weight_decay=0.1), lr=3e-4, betas=(0.8, 0.95), eps=1e-6, mask=None)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named) == 2 * 2 * 2 + 2
    set_epoch(optimizer, 0)
    threshold = round(0.9 * 65536)
    for number, batch in enumerate(batches):
        for its_model in (model, twin):
            loss_of(its_model, batch).backward()
        for name, param in trained.items():
            keep = torch.ones(param.shape, dtype=torch.bool)
            if ".encoder.layer." in name:
                draws = uniform16(stream_key(name, seed), number, DOMAIN_ELEMENT, 0, param.numel())
                keep = (draws >= threshold).view(param.shape)
                scale = 65536 / (65536 - threshold)
                param.grad = torch.where(keep, param.grad * torch.tensor(scale, dtype=torch.float32), 0.0)
            else:
                assert ".classifier.modules_to_save." in name
            assert torch.equal(optimizer.mask(name), keep), name
        for its_optimizer in (optimizer, by_hand):
            its_optimizer.step()
            its_optimizer.zero_grad()
        for name, param in named.items():
            assert bits(param) == bits(trained[name]), (number, name)
    assert frozen == {name: bits(param) for name, param in model.named_parameters() if name in frozen}
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("mask", ["layer", "epoch"])
def test_lora_resumes_from_its_adapter(mask, task, seed, tmp_path):
    model_of, batches = task
    model = lora_of(model_of(seed), seed)
    optimizer, losses = plain_loop(model, batches, mask, seed)

    half = lora_of(model_of(seed), seed)
    its_optimizer = optimizer_of(half, mask, seed)
    schedule = schedule_of(its_optimizer)
    its_optimizer.set_epoch(0)
    for number in range(2 * PER_EPOCH):
        if number == PER_EPOCH + 2:
            half.save_pretrained(tmp_path)
            torch.save([its_optimizer.state_dict(), schedule.state_dict()], tmp_path / "optimizer.pt")
            half = peft.PeftModel.from_pretrained(model_of(seed), tmp_path, is_trainable=True)
            its_optimizer = optimizer_of(half, mask, seed)
            schedule = schedule_of(its_optimizer)
            for part, state in zip((its_optimizer, schedule), torch.load(tmp_path / "optimizer.pt")):
                part.load_state_dict(state)
        if number == PER_EPOCH:
            its_optimizer.set_epoch(1)
        loss = loss_of(half, batches[number % PER_EPOCH])
        assert loss.item() == losses[number]
        loss.backward()
        its_optimizer.step()
        its_optimizer.zero_grad()
        schedule.step()
    assert_same_training(model, optimizer, half, its_optimizer)


# What docs/loops.md shows.


def test_the_lines_of_the_documents(seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sections = (Path(__file__).resolve().parents[2] / "docs/loops.md").read_text().split("## Lightning\n")[1]
    in_lightning, in_accelerate = re.findall(r"```python\n(.*?)```", sections, re.DOTALL)
    module, batches = lightning_module("lightning", Tiny(), "annealed", seed), tiny_batches(seed)
    names = {"lightning": importlib.import_module("lightning"), "epochs": EPOCHS, "module": module, "loader": batches}
    exec(in_lightning, {**names, "loader": Batches(batches)})
    expected, _ = without_schedule("annealed", seed, 1, lambda step: 3e-4 * (1 / (1 + step)))
    assert all(map(torch.equal, whole_params(module.model), expected))
    model, logs = Tiny(), []
    accelerator = accelerator_of()
    accelerator.log = logs.append
    rows = [{name: value[row] for name, value in batch.items()} for batch in batches for row in range(BATCH)]
    names |= {"accelerator": accelerator, "model": model, "optimizer": optimizer_of(model, "annealed", seed)}
    exec(in_accelerate, {**names, "loader": torch.utils.data.DataLoader(rows, batch_size=BATCH), "loss_of": loss_of})
    expected, _ = without_schedule("annealed", seed, 1, lambda step: 3e-4)
    assert all(map(torch.equal, whole_params(model), expected))
    assert [log["graddrop_p"] for log in logs] == pytest.approx([0.9, 0.4])
