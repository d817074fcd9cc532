"""What transformers' Trainer is told reaches the optimizer, also for a run that is not the one that was saved."""

import copy
import warnings

import pytest
from lazy import Lazy, transformers
from toy import bits
from trainer_runs import GIVES_NO_MODEL, arguments, losses, model_of, optimizer_in, sentences, trainer_of

from graddrop_kernels import GradDrop, GradDropEpoch, GradFreeze, LinearAnneal

accelerate_state = Lazy("accelerate.state")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def forgotten_settings():
    """Accelerate's settings are those of the process."""
    yield
    accelerate_state.AcceleratorState._reset_state(reset_partial_state=True)


def at_the_first_step(trainer, look):
    """Returns a list that gets what ``look(optimizer)`` returns when the first step begins."""
    found = []

    class Looks(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            if not found:
                found.append(look(optimizer.optimizer))

    trainer.add_callback(Looks())
    return found


# Arguments.


@pytest.mark.skipif(GIVES_NO_MODEL, reason="transformers 4 needs the model beforehand")
@pytest.mark.parametrize("mask", [GradDropEpoch, lambda epochs: GradDrop(LinearAnneal(epochs))])
def test_a_search_for_hyper_parameters(mask, tmp_path):
    """Each trial changes the arguments, and makes its optimizer from them."""
    trainer = trainer_of(arguments(tmp_path), mask, model=model_of())
    trainer.model_init, found = lambda: model_of(), []
    trials = [{"num_train_epochs": 3, "learning_rate": 1e-3}, {"num_train_epochs": 1, "learning_rate": 1e-4}]
    for trial in trials:
        vars(trainer.args).update(trial)
        trainer.train()
        optimizer = optimizer_in(trainer)
        assert optimizer.param_groups[0]["mask"] == mask(trial["num_train_epochs"]).to_json()
        assert optimizer.param_groups[0]["initial_lr"] == trial["learning_rate"]
        assert optimizer.param_groups[0]["epoch"] == trial["num_train_epochs"] - 1
        found.append(optimizer.active_fraction()[0])
    assert mask is not GradDropEpoch or found == [1, 1]  # the last epoch trains all


IGNORED = {
    "optim": ({"optim": "adafactor"}, {}, r"args\.optim='adafactor' has no effect.*optimizer_cls_and_kwargs"),
    "optim_args": ({"optim_args": "eps=1e-3"}, {}, r"args\.optim_args='eps=1e-3' has no effect"),
    "targets": ({"optim_target_modules": "all-linear"}, {}, r"args\.optim_target_modules='all-linear' has no effect"),
    "clipping": ({"max_grad_norm": 1.0}, {"max_grad_norm": 2.0}, r"clipped twice.*max_grad_norm=1\.0.*=2\.0"),
}


@pytest.mark.parametrize("what", IGNORED)
def test_arguments_without_effect(what, tmp_path):
    theirs, ours, match = IGNORED[what]
    with pytest.warns(UserWarning, match=match):
        trainer_of(arguments(tmp_path, **theirs), GradDrop(0.3), **ours).create_optimizer()


@pytest.mark.parametrize("more", [{}, {"optim": "adamw_torch"}, {"optim": "adamw_torch_fused"}, {"max_grad_norm": 1.0}])
def test_arguments_that_say_nothing_else(more, tmp_path):
    trainer = trainer_of(arguments(tmp_path, **more), GradDrop(0.3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.create_optimizer()


# Checkpoints of another run.

RATES = {
    "linear": {}, "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-4}},
    "reduce_lr_on_plateau": {"lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0}},  # after every epoch
}  # fmt: skip


@pytest.mark.parametrize("schedule", RATES)
@pytest.mark.parametrize("mask", ["graddrop", "epoch", "layer", "none"])
def test_a_plain_run_goes_on_with_a_mask(schedule, mask, tmp_path):
    """State and weight decay by name, though Trainer's AdamW has two groups without names."""
    more = {"lr_scheduler_type": schedule, **RATES[schedule]}
    more |= {"eval_strategy": "epoch"} if schedule == "reduce_lr_on_plateau" else {}
    args = arguments(tmp_path / "plain", num_train_epochs=1, save_strategy="epoch", **more)
    plain = transformers.Trainer(model_of(), args, train_dataset=sentences(), eval_dataset=sentences(8))
    plain.train()
    moments = {
        name: {key: bits(value) for key, value in plain.optimizer.optimizer.state[param].items()}
        for name, param in plain.model.named_parameters()
    }
    weights = {name: bits(param) for name, param in plain.model.named_parameters()}
    resume = str(tmp_path / "plain" / "checkpoint-6")
    args = arguments(tmp_path / "masked", **more)
    with pytest.raises(ValueError, match="strict=False"):
        trainer_of(args, mask, more={"eval_dataset": sentences(8)}).train(resume_from_checkpoint=resume)
    trainer = trainer_of(args, mask, more={"eval_dataset": sentences(8)}, strict=False)

    def look(optimizer):
        return copy.deepcopy(
            [(name, bits(param), {key: bits(value) for key, value in optimizer.state[param].items()},
              group["weight_decay"], group["lr"])
             for group in optimizer.param_groups for name, param in zip(group["param_names"], group["params"])]
        )  # fmt: skip

    found = at_the_first_step(trainer, look)
    trainer.train(resume_from_checkpoint=resume)
    [rows] = found
    assert len(rows) == len(weights)
    for name, param, state, decay, rate in rows:
        assert (param, state) == (weights[name], moments[name]), name
        assert decay == (0.0 if "bias" in name or "LayerNorm" in name else 0.1), name
        assert rate == rows[0][-1] and (schedule != "linear" or rate == 1.5e-3)
    optimizer = optimizer_in(trainer)
    assert {float(state["step"]) for state in optimizer.state.values()} <= {12.0} | (
        {float(number) for number in range(6, 13)} if mask in ("epoch",) else set()
    )
    assert len({group["lr"] for group in optimizer.param_groups}) == 1 and trainer.state.global_step == 12
    assert any(bits(param) != weights[name] for name, param in trainer.model.named_parameters())
    if schedule == "linear":
        assert [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry][6:] == pytest.approx(
            [3e-3 * (12 - step) / 12 for step in range(6, 12)]
        )


@pytest.mark.parametrize("mask", [GradFreeze, GradDropEpoch, lambda epochs: GradDrop(LinearAnneal(epochs))])
def test_more_epochs_than_planned(mask, tmp_path):
    trainer_of(arguments(tmp_path, save_strategy="epoch"), mask).train()
    resume = str(tmp_path / "checkpoint-12")
    args = arguments(tmp_path, num_train_epochs=4)
    with pytest.raises(ValueError, match="strict=False"):
        trainer_of(args, mask).train(resume_from_checkpoint=resume)
    trainer = trainer_of(args, mask, strict=False)
    trainer.train(resume_from_checkpoint=resume)
    group = optimizer_in(trainer).param_groups[0]
    assert (group["mask"], group["epoch"], group["completed_steps"]) == (mask(4).to_json(), 3, 24)
    assert [entry["graddrop_epoch"] for entry in trainer.state.log_history if "loss" in entry][12:] == [2] * 6 + [3] * 6
    assert len(losses(trainer)) == 24


def test_a_state_that_was_loaded_past_trainer_goes_on_from_its_epoch(tmp_path):
    """By a run whose counter begins at 0. A second training with the same optimizer begins anew."""
    first = trainer_of(arguments(tmp_path), "annealed")
    first.train()
    saved = copy.deepcopy(optimizer_in(first).state_dict())
    trainer = trainer_of(arguments(tmp_path), "annealed")
    trainer.create_optimizer().load_state_dict(saved)
    for expected in ([1] * 6 + [2] * 6, [0] * 6 + [1] * 6):
        trainer.train()
        assert [entry["graddrop_epoch"] for entry in trainer.state.log_history if "loss" in entry] == expected
