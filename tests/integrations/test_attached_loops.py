"""attach_mask in other people's loops: Trainer with any optim, Accelerate, Lightning. The bits are a plain loop's."""

import copy

import pytest
import torch
from lazy import Lazy, integration, transformers
from toy import Encoder, bits
from trainer_runs import arguments, model_of, sentences, trainer_of

from graddrop_kernels import GradDrop, GradDropEpoch, GradFreeze, LayerGradDrop, LinearAnneal, attach_mask
from graddrop_kernels.integrations.accelerate import graddrop_optimizer, mask_log, set_epoch

lightning = Lazy("lightning.pytorch")
pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(args, mask, model=None, **more):
    callback = integration.GradDropCallback(mask=mask, **more)
    model = model_of() if model is None else model
    return transformers.Trainer(model=model, args=args, train_dataset=sentences(), callbacks=[callback]), callback


@pytest.mark.parametrize(
    "optim, mask",
    [
        ("adafactor", GradDrop(p=0.3)),
        ("sgd", lambda epochs: GradDrop(LinearAnneal(epochs))),
        ("rmsprop", LayerGradDrop(p=0.5)),
        ("adamw_torch", lambda epochs: GradFreeze(epochs=epochs)),
    ],
)
def test_trainer_masks_the_optimizer_of_any_optim(optim, mask, tmp_path):
    """An unbroken run, one that is resumed in the middle of an epoch, and a run without a mask."""
    args = lambda folder, **more: arguments(tmp_path / folder, optim=optim, **more)
    whole, callback = trainer(args("whole", save_strategy="steps", save_steps=7), mask)
    whole.train()
    handle = callback._optimizer
    groups = handle.optimizer.param_groups
    assert {group["seed"] for group in groups} == {args("").seed}
    assert type(handle.optimizer).__name__.lower().startswith(optim[:5]), optim
    assert {group["completed_steps"] for group in groups} == {12} and {group["epoch"] for group in groups} == {1}
    logged = [entry for entry in whole.state.log_history if "loss" in entry]
    assert [entry["graddrop_epoch"] for entry in logged] == [0] * 6 + [1] * 6
    resumed, _ = trainer(args("resumed"), mask)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))
    plain = transformers.Trainer(model=model_of(), args=args("plain"), train_dataset=sentences())
    plain.train()
    runs = [[bits(param) for param in each.model.parameters()] for each in (whole, resumed, plain)]
    assert runs[0] == runs[1] != runs[2]


def test_trainer_refuses_a_second_mask(tmp_path):
    args = arguments(tmp_path)
    callback = integration.GradDropCallback(mask=GradDrop(p=0.3))
    ours = trainer_of(args, "graddrop", callback=[callback])
    with pytest.raises(ValueError, match="is for other optimizers: give mask= to trainer_optimizer"):
        ours.train()
    frozen, _ = trainer(args, lambda epochs: GradDropEpoch(epochs=epochs))
    with pytest.raises(ValueError, match="GradDropEpoch with masked='frozen'"):
        frozen.train()
    frozen, _ = trainer(args, lambda epochs: GradDropEpoch(epochs=epochs), masked="gradient", seed=5)
    frozen.train()


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(7, (4, 5), generator=generator) for _ in range(5)]


def in_a_plain_loop(seed):
    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    handle = attach_mask(optimizer, GradDrop(LinearAnneal(2)), model=model, seed=4)
    for epoch in range(2):
        handle.set_epoch(epoch)
        for ids in batches(seed):
            optimizer.zero_grad()
            model(ids).square().mean().backward()
            optimizer.step()
    return [bits(param) for param in model.parameters()]


@pytest.mark.parametrize("attached", ["before prepare", "after prepare"])
def test_accelerate(attached, seed):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if attached == "before prepare":
        handle = attach_mask(optimizer, GradDrop(LinearAnneal(2)), model=model, seed=4)
    model, optimizer = accelerator.prepare(model, optimizer)
    if attached == "after prepare":
        handle = attach_mask(optimizer, GradDrop(LinearAnneal(2)), model=model, seed=4)
    assert graddrop_optimizer(optimizer) is handle
    for epoch in range(2):
        set_epoch(optimizer, epoch)
        for ids in batches(seed):
            optimizer.zero_grad()
            accelerator.backward(model(ids).square().mean())
            optimizer.step()
    assert mask_log(optimizer)["graddrop_epoch"] == 1 and 0 < mask_log(optimizer)["graddrop_active_fraction"] < 1
    assert [bits(param) for param in model.parameters()] == in_a_plain_loop(seed)
    with pytest.raises(TypeError, match=r"attach_mask\(\)"):
        set_epoch(torch.optim.SGD(Encoder().parameters()), 0)


@pytest.mark.filterwarnings("ignore")
def test_lightning(seed, tmp_path):
    """Lightning gives step() a closure, which computes the gradients."""
    from graddrop_kernels.integrations.lightning import GradDropCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Encoder()

        def training_step(self, ids, number):
            return self.model(ids).square().mean()

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
            self.handle = attach_mask(optimizer, GradDrop(LinearAnneal(2)), model=self.model, seed=4)
            return optimizer

    module = Module()
    loop = lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[GradDropCallback()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    loop.fit(module, torch.utils.data.DataLoader(batches(seed), batch_size=None))
    assert module.handle.param_groups[0]["completed_steps"] == 10
    assert [bits(param) for param in module.model.parameters()] == in_a_plain_loop(seed)


def test_a_copy_of_an_optimizer_has_no_mask_until_one_is_attached(seed):
    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    handle = attach_mask(optimizer, GradDrop(p=0.5), model=model)
    for ids in batches(seed)[:3]:
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()
    twin, clone = copy.deepcopy((model, optimizer))
    again = attach_mask(clone, GradDrop(p=0.5), model=twin)
    assert torch.equal(again.mask("head.weight"), handle.mask("head.weight"))
