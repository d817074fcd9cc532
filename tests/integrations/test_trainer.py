"""The Trainer of transformers, two epochs: the bits of a plain loop over the same batches, and of an unbroken run."""

import contextlib
import os
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lazy import Lazy, integration, transformers
from toy import bits
from trainer_runs import (
    GIVES_NO_MODEL,
    MASKS,
    arguments,
    losses,
    model_of,
    optimizer_in,
    recorded,
    sentences,
    trainer_of,
)

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradDropEpoch, LayerGradDrop, LinearAnneal, param_groups

accelerate_state = Lazy("accelerate.state")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def forgotten_settings():
    """transformers 4 leaves settings in the environment, and Accelerate's are those of the process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    accelerate_state.AcceleratorState._reset_state(reset_partial_state=True)


def plain_loop(batches, averages=False, accumulation=1, mask=None, smoothing=0.0, clip=0.0, autocast=False, scaler=None,
               broken_step=None, prepare=lambda model: model, **options):  # fmt: skip
    """Two epochs; returns (model, optimizer, losses). ``averages``: over the micro-batches of a step; ``broken_step``:
    of which the gradients are infinite.
    """
    model = model_of()
    called = prepare(model)
    options = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "seed": 7, **options}
    optimizer = FusedGradDropAdamW(
        param_groups(model, weight_decay=0.1), mask=MASKS[mask](2) if MASKS[mask] else None, **options
    )
    per_epoch = len(batches) // 2
    ends = {number for number in range(per_epoch) if (number + 1) % accumulation == 0 or number + 1 == per_epoch}
    scheduler = transformers.get_scheduler("linear", optimizer, 0, 2 * len(ends))
    found, step = [], 0
    for number, inputs in enumerate(batches):
        if number % per_epoch == 0:
            optimizer.set_epoch(number // per_epoch)
        labels = inputs.pop("labels") if smoothing else None
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            outputs = called(**inputs)
        smoothed = transformers.trainer_pt_utils.LabelSmoother(smoothing) if smoothing else None
        loss = smoothed(outputs, labels) if smoothed else outputs.loss.float()
        found.append(loss.item())
        if averages:
            start = number % per_epoch // accumulation * accumulation
            loss = loss / min(accumulation, per_epoch - start)
        (scaler.scale(loss) if scaler else loss).backward()
        if number % per_epoch not in ends:
            continue
        if step == broken_step:
            model.classifier.bias.grad.fill_(torch.inf)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scale = scaler.get_scale() if scaler else 1.0
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if not scaler or options.get("fused") or scaler.get_scale() >= scale:
            scheduler.step()
        optimizer.zero_grad()
        step += 1
    return model, optimizer, found


def averages(trainer):
    # Trainer leaves the average over micro-batches to models that take any keyword, whether they do it or not.
    return not trainer.model_accepts_loss_kwargs


def assert_same_training(trainer, plain, found=None):
    model, optimizer, expected = plain
    for (name, a), b in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        assert bits(a) == bits(b), name
        assert bits(optimizer_in(trainer).mask(a)) == bits(optimizer.mask(b)), name
    assert found is None or found == expected


@pytest.mark.parametrize("mask", MASKS)
def test_trainer_is_a_plain_loop(mask, tmp_path):
    """Six batches an epoch in steps of four: the second step of each epoch has two."""
    trainer = trainer_of(arguments(tmp_path, gradient_accumulation_steps=4), mask)
    batches, found = recorded(trainer)
    assert_same_training(trainer, plain_loop(batches, averages(trainer), 4, mask), found)


def inductor(model):
    return torch.compile(model, backend="inductor")


# Arguments of Trainer, and what is the same in a plain loop.
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
SETTINGS = {
    "as it is": ({}, {}),
    "bfloat16": ({"bf16": True, "bf16_full_eval": True, "eval_strategy": "epoch"}, {"autocast": True}),
    "label smoothing": ({"label_smoothing_factor": 0.2}, {"smoothing": 0.2}),
    "clipping": ({"max_grad_norm": 0.05}, {"clip": 0.05}),
    "checkpointing": (CHECKPOINTED, {}),
    "compiled": ({"torch_compile": True, "torch_compile_backend": "eager"}, {}),
    "inductor": ({"torch_compile": True, "torch_compile_backend": "inductor"}, {"prepare": inductor}),
}


# Each pattern of dropped blocks is compiled for itself: with inductor that takes a few seconds each.
@pytest.mark.parametrize("setting, skip_dropped", [
    pytest.param(setting, skip, marks=[pytest.mark.slow] if setting == "inductor" else [])
    for skip in (False, True) for setting in SETTINGS
    if (setting, skip) not in (("inductor", True), ("compiled", False))
])  # fmt: skip
def test_settings_of_trainer(setting, skip_dropped, tmp_path):
    theirs, ours = SETTINGS[setting]
    clipped = setting == "clipping" and skip_dropped  # then by the optimizer
    options = {"max_grad_norm": 0.05, "norm_after_mask": True} if clipped else {}
    theirs, ours = ({}, {}) if clipped else (theirs, ours)
    args, more = arguments(tmp_path, **theirs), {"eval_dataset": sentences(8)}
    trainer = trainer_of(args, "layer", skip_dropped=skip_dropped, more=more, **options)
    frozen = []
    trainer.model.register_forward_pre_hook(
        lambda module, _: frozen.append(sum(not param.requires_grad for param in module.parameters()))
    )
    batches, found = recorded(trainer)
    assert (max(frozen) > 0) == skip_dropped and all(param.requires_grad for param in trainer.model.parameters())
    torch._dynamo.reset()
    assert_same_training(trainer, plain_loop(batches, mask="layer", **ours, **options), found)
    trainer.evaluate()


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler(fused, tmp_path):
    """transformers takes fp16=True on a GPU only; it is a scaler in Accelerate, which can be given one on a CPU too."""

    def trained(name, **more):
        trainer = trainer_of(arguments(tmp_path / name, **more), "layer", fused=fused)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
        trainer.add_callback(Infinite())
        return trainer

    class Infinite(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.classifier.bias.grad.fill_(torch.inf)

    trainer = trained("whole", save_strategy="steps", save_steps=8)
    batches, found = recorded(trainer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    plain = plain_loop(batches, mask="layer", scaler=scaler, broken_step=3, fused=fused)
    assert_same_training(trainer, plain, found)
    assert trainer.accelerator.scaler.get_scale() == scaler.get_scale() == 2.0**11
    assert {group["completed_steps"] for group in optimizer_in(trainer).state_dict()["param_groups"]} == {11}
    resumed = trained("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert_same_training(resumed, plain)


@pytest.mark.parametrize("mask", ["graddrop", "annealed", "layer", "epoch"])
def test_a_resumed_run_is_an_unbroken_one(mask, tmp_path):
    """From a checkpoint late in epoch 1."""
    whole = trainer_of(arguments(tmp_path, save_strategy="steps", save_steps=10), mask)
    whole.train()
    resumed = trainer_of(arguments(tmp_path), mask)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert bits(a) == bits(b), name
    assert [group["epoch"] for group in optimizer_in(resumed).param_groups] == [1, 1, 1, 1]
    assert losses(whole) == losses(resumed)


def test_a_resumed_run_of_bfloat16_weights_with_masters(tmp_path):
    """With accumulation, from the first of two steps of epoch 1."""
    def trained(**more):
        args = arguments(tmp_path, gradient_accumulation_steps=4, **more)
        return trainer_of(args, "annealed", model_of().to(torch.bfloat16), master_weights=True)

    whole, resumed = trained(save_strategy="steps", save_steps=3), trained()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert bits(a) == bits(b), name
        masters = [optimizer_in(each).state[param]["master_param"] for each, param in ((whole, a), (resumed, b))]
        assert masters[0].dtype == torch.float32 and bits(masters[0]) == bits(masters[1]), name


def test_the_example_of_the_documents(tmp_path):
    """Its code block as it is printed, with the three names that it leaves to the reader."""
    page = Path(__file__).resolve().parents[2].joinpath("docs/loops.md").read_text()
    section = page.split("## Trainer\n")[1].split("\n## ")[0]
    [block] = re.findall("```python\n(.*?)```", section, re.DOTALL)
    names = {"model": model_of(), "args": arguments(tmp_path), "train_dataset": sentences()}
    start = [bits(param) for param in names["model"].parameters()]
    if GIVES_NO_MODEL:
        block = block.replace("trainer_optimizer(args,", "trainer_optimizer(args, model=model,")
    exec(block, names)
    names["trainer"].train()
    optimizer = optimizer_in(names["trainer"])
    assert {group["epoch"] for group in optimizer.param_groups} == {1}
    assert [group["mask"] is None for group in optimizer.param_groups] == [False, False, True, True]
    assert all(bits(param) != before for param, before in zip(names["model"].parameters(), start))


# The log.


def expected_fraction(optimizer, step, epoch):
    """Counted in the masks."""
    optimizer.set_epoch(epoch)
    params = [param for group in optimizer.param_groups if group["mask"] is not None for param in group["params"]]
    return sum(float(optimizer.mask(param, step).sum()) for param in params) / sum(param.numel() for param in params)


LENGTHS = {
    "two epochs": ({}, 12), "max_steps": ({"max_steps": 9}, 9), "one epoch and a half": ({"num_train_epochs": 1.5}, 9),
}  # fmt: skip


LOGGED = [
    LayerGradDrop(LinearAnneal(2, start=0.8)), LayerGradDrop(0.4, every="epoch"), GradDrop(LinearAnneal(2)),
    GradDropEpoch(2, toggle=True),
]  # fmt: skip


@pytest.mark.parametrize("mask, length", [
    *((LOGGED[0], length) for length in LENGTHS), *((mask, "one epoch and a half") for mask in LOGGED[1:]),
])  # fmt: skip
def test_the_log_says_what_the_masks_did(mask, length, tmp_path):
    more, steps = LENGTHS[length]
    resume = f"checkpoint-{steps - 2}" if length != "two epochs" else None
    trainer = trainer_of(arguments(tmp_path, save_strategy="steps", save_steps=steps - 2, **more), mask)
    trainer.train()
    if resume:
        trainer = trainer_of(arguments(tmp_path, **more), mask)
        trainer.train(resume_from_checkpoint=str(tmp_path / resume))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["graddrop_epoch"] for entry in logs] == ([0] * 6 + [1] * 6)[:steps]
    optimizer, exact = optimizer_in(trainer), isinstance(mask, LayerGradDrop)
    for step, entry in enumerate(logs):
        epoch = step // 6
        if hasattr(mask, "p"):
            assert entry["graddrop_p"] == (mask.p(epoch) if callable(mask.p) else mask.p)
        tolerance = 1e-9 if exact else 0.03  # of 6,000 elements
        assert entry["graddrop_active_fraction"] == pytest.approx(
            expected_fraction(optimizer, step, epoch), abs=tolerance
        )
    assert not exact or mask.every == "epoch" or len({entry["graddrop_active_fraction"] for entry in logs}) > 1


def test_epochs_that_a_callback_ends(tmp_path):
    class StopsEpochs(transformers.TrainerCallback):
        """Ends each epoch after the first micro-batch of the third step."""

        def __init__(self):
            self.substeps = 0

        def on_epoch_begin(self, args, state, control, **kwargs):
            self.substeps = 0

        def on_substep_end(self, args, state, control, **kwargs):
            self.substeps += 1
            control.should_epoch_stop = self.substeps == 3

    epochs = []
    args = arguments(tmp_path, gradient_accumulation_steps=2, num_train_epochs=3)
    callbacks = [integration.GradDropCallback(), StopsEpochs()]
    trainer = trainer_of(args, LayerGradDrop(0.5, every="epoch"), callback=callbacks)
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: epochs.append(optimizer.param_groups[0]["epoch"]))
    trainer.train()
    assert epochs == [0, 0, 1, 1, 2, 2]


# Errors and warnings.


@pytest.mark.parametrize("mask", ["annealed", "epoch", "freeze"])
def test_a_forgotten_callback(mask, tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=5)
    trainer = trainer_of(args, mask, callback=[])
    before = [bits(param) for param in trainer.model.parameters()]
    with pytest.raises(RuntimeError, match=r"follows epochs.*callbacks=\[GradDropCallback\(\)\]"):
        trainer.train()
    assert [bits(param) for param in trainer.model.parameters()] == before
    trainer_of(args, mask).train()
    with pytest.raises(RuntimeError, match=r"follows epochs.*callbacks=\[GradDropCallback\(\)\]"):
        trainer_of(args, mask, callback=[]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    trainer_of(arguments(tmp_path, max_steps=1), LayerGradDrop(0.5), callback=[]).train()


def test_a_resume_with_another_policy(tmp_path):
    trainer_of(arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=3), GradDrop(0.3)).train()
    with pytest.raises(ValueError, match=r"(?s)GradDrop.*0\.4"):
        trainer_of(arguments(tmp_path), GradDrop(0.4)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_two_optimizers(tmp_path):
    model = model_of()
    optimizer = FusedGradDropAdamW(param_groups(model))
    with pytest.raises(RuntimeError, match="optimizer_cls_and_kwargs"):
        trainer_of(arguments(tmp_path), "layer", model, more={"optimizers": (optimizer, None)})
    more = {"optimizers": (optimizer, None), "callbacks": [integration.GradDropCallback()]}
    transformers.Trainer(model, arguments(tmp_path, max_steps=7), train_dataset=sentences(), **more).train()
    assert optimizer.param_groups[0]["epoch"] == 1


def test_other_errors_and_warnings(tmp_path):
    with pytest.warns(UserWarning, match="drops out activations.*hidden_dropout_prob.*0.1"):
        trainer_of(arguments(tmp_path, max_steps=1), GradDrop(0.3), model_of(dropout=0.1)).train()
    clipping = arguments(tmp_path, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"skip_dropped=True.*max_grad_norm=1.0.*set args.max_grad_norm=0"):
        trainer_of(clipping, "layer", skip_dropped=True).train()
    several = SimpleNamespace(max_grad_norm=0.0, world_size=2)  # of DDP, which callbacks do not see
    optimizer = FusedGradDropAdamW(param_groups(model_of()))
    with pytest.raises(ValueError, match="skip_dropped=True.* with 2 processes needs FSDP2.*skip_dropped=False"):
        integration.GradDropCallback(skip_dropped=True).on_train_begin(several, None, None, model_of(), optimizer)
    with pytest.raises(ValueError, match="max_steps=5.*number of epochs"):
        trainer_of(arguments(tmp_path, max_steps=5), GradDropEpoch).create_optimizer()
    with pytest.warns(UserWarning, match="not a FusedGradDropAdamW.*trainer_optimizer"):
        transformers.Trainer(
            model=model_of(), args=arguments(tmp_path, max_steps=1), train_dataset=sentences(),
            callbacks=[integration.GradDropCallback()],
        ).train()  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="transformers|torch|accelerate")
        trainer_of(arguments(tmp_path, max_steps=1), GradDrop(0.3)).train()


@pytest.mark.skipif(not GIVES_NO_MODEL, reason="transformers 5 gives the model")
def test_a_trainer_that_keeps_the_model_to_itself(tmp_path):
    args = arguments(tmp_path)
    pair = integration.trainer_optimizer(args, GradDrop(0.3))
    with pytest.raises(TypeError, match="trainer_optimizer.*model=model"):
        transformers.Trainer(model_of(), args, train_dataset=sentences(), optimizer_cls_and_kwargs=pair).train()
