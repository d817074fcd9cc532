"""However a training by transformers' Trainer ends, no parameter is left frozen, and no checkpoint is lost or torn."""

import os
import signal

import pytest
from lazy import Lazy, integration, transformers
from toy import bits
from trainer_runs import GIVES_NO_MODEL, arguments, losses, model_of, optimizer_in, trainer_of

from graddrop_kernels import GradDrop, LayerGradDrop, param_groups

accelerate_state = Lazy("accelerate.state")
pytestmark = pytest.mark.usefixtures("one_thread")
MASK = LayerGradDrop(0.6)  # of three blocks, in every step from the third on


@pytest.fixture(autouse=True)
def forgotten_settings():
    """Accelerate's settings are those of the process."""
    yield
    accelerate_state.AcceleratorState._reset_state(reset_partial_state=True)


def frozen(model):
    return sum(not param.requires_grad for param in model.parameters())


class Interrupt(BaseException):
    pass


def interrupted(model, where, seen):
    """Lets the first pass that has frozen blocks end by an Interrupt."""

    def stop(*_):
        if frozen(model):
            seen.append(frozen(model))
            if where == "a signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise Interrupt

    if where == "the backward pass":
        model.register_forward_hook(lambda module, _, outputs: outputs.logits.register_hook(stop) and None)
    else:
        model.register_forward_pre_hook(stop)


@pytest.mark.parametrize("where", ["the forward pass", "the backward pass", "a signal"])
def test_an_interrupt(where, tmp_path):
    trainer, seen = trainer_of(arguments(tmp_path, gradient_accumulation_steps=2), MASK, skip_dropped=True), []
    interrupted(trainer.model, where, seen)

    def handler(*_):
        raise Interrupt

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Interrupt):
            trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen and not frozen(trainer.model)
    # Another training of the model trains all of it; one with this trainer skips once, and is not wrapped twice.
    assert sum(len(group["params"]) for group in param_groups(trainer.model)) == len(list(trainer.model.parameters()))
    trainer.model._forward_pre_hooks.clear()
    trainer.model._forward_hooks.clear()
    trainer.train()
    assert not frozen(trainer.model) and "training_step" not in vars(trainer)


def callback_that(event, act):
    """Makes a callback that acts at this event, first in step 3, once."""

    class Acts(transformers.TrainerCallback):
        pass

    acted = []

    def on_event(self, args, state, control, model=None, **kwargs):
        if state.global_step >= 3 and not acted:
            acted.append(frozen(model))
            act(control)

    setattr(Acts, event, on_event)
    return Acts(), acted


def stop_training(control):
    control.should_training_stop = True


def stop_epoch(control):
    control.should_epoch_stop = True


def fail(control):
    raise Interrupt


# Of three epochs of three steps, if the training ends there or the second epoch (of on_step_end: the first).
STEPS = {"on_substep_end": (3, 6), "on_step_begin": (3, 6), "on_pre_optimizer_step": (4, 7), "on_step_end": (3, 9)}


@pytest.mark.parametrize("act", [stop_training, stop_epoch, fail])
@pytest.mark.parametrize("event", STEPS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_callback_that_ends_it(event, act, order, tmp_path):
    """Such as a time limit, between the micro-batches of a step too. It sees nothing frozen either."""
    other, acted = callback_that(event, act)
    callbacks = [integration.GradDropCallback(skip_dropped=True)]
    callbacks.insert(0 if order == "before" else 1, other)
    args = arguments(tmp_path, gradient_accumulation_steps=2, num_train_epochs=3)
    trainer = trainer_of(args, MASK, callback=callbacks)
    if act is fail:
        with pytest.raises(Interrupt):
            trainer.train()
    else:
        trainer.train()
        assert trainer.state.global_step == STEPS[event][act is stop_epoch]
    assert acted == [0] and not frozen(trainer.model)


@pytest.mark.skipif(GIVES_NO_MODEL, reason="transformers 4 saves none on a signal")
@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
@pytest.mark.parametrize("skip_dropped", [True, False])
def test_a_checkpoint_that_is_asked_for(event, skip_dropped, tmp_path):
    """Trainer saves one when the machine is taken back (SIGTERM). A run that goes on from it is an unbroken one."""
    more = {"gradient_accumulation_steps": 2, "num_train_epochs": 3}
    whole = trainer_of(arguments(tmp_path / "whole", **more), MASK, skip_dropped=skip_dropped)
    whole.train()
    args = arguments(tmp_path, enable_jit_checkpoint=True, **more)
    other, acted = callback_that(event, lambda _: setattr(jit.jit_manager, "is_checkpoint_requested", True))
    trainer = trainer_of(args, MASK, callback=[other, integration.GradDropCallback(skip_dropped=skip_dropped)])
    [jit] = [each for each in trainer.callback_handler.callbacks if type(each).__name__ == "JITCheckpointCallback"]
    trainer.callback_handler.callbacks.remove(jit)
    trainer.callback_handler.callbacks.append(jit)  # so that it acts at this event, not at the next
    trainer.train()
    folder = tmp_path / "checkpoint-3"
    names = os.listdir(folder)
    assert acted == [0] and "optimizer.pt" in names and "checkpoint-is-incomplete.txt" not in names
    resumed = trainer_of(arguments(tmp_path / "resumed", **more), MASK, skip_dropped=skip_dropped)
    resumed.train(resume_from_checkpoint=str(folder))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert bits(a) == bits(b), name
    assert losses(whole)[3:] == losses(resumed)[-6:] and len(losses(whole)) == 9


def test_a_second_training_steps_everything(tmp_path):
    """After one that a time limit has ended within a step."""
    model = model_of()
    other, _ = callback_that("on_substep_end", stop_training)
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer_of(args, MASK, model, callback=[integration.GradDropCallback(skip_dropped=True), other]).train()
    second = trainer_of(args, GradDrop(0.2), model)
    second.train()
    stepped = [param for group in optimizer_in(second).param_groups for param in group["params"]]
    assert len(stepped) == len(list(model.parameters()))


def test_the_trainers_own_step_comes_back(tmp_path):
    """One that somebody has put on the trainer too."""
    trainer, calls = trainer_of(arguments(tmp_path, max_steps=3), MASK, skip_dropped=True), []
    own = trainer.training_step

    def counting(*args, **kwargs):
        calls.append(frozen(trainer.model))
        return own(*args, **kwargs)

    trainer.training_step = counting
    trainer.train()
    assert trainer.training_step is counting and len(calls) == 3 and max(calls) > 0
    assert trainer.train().global_step == 3 and len(calls) == 6


def test_a_callback_without_a_trainer(tmp_path):
    args, model = arguments(tmp_path), model_of()
    optimizer = trainer_of(args, MASK, model).create_optimizer()
    with pytest.raises(RuntimeError, match="no Trainer of transformers"):
        integration.GradDropCallback(skip_dropped=True).on_train_begin(args, None, None, model, optimizer)
