"""What PyTorch's own tests check of every optimizer, of ours: on its inputs for AdamW, on every backend, with masks.

Where torch.optim.AdamW does the same, it does it beside ours: the order of the hooks, the values a scheduler sets.
"""

import copy
import itertools
import pickle

import pytest
import torch
from test_torch_optimizer_inputs import INFO, accepted, inputs, label
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.testing._internal.common_optimizers import optim_db
from torch.utils._pytree import tree_map_only
from toy import bits, random_grads, snapshot, through_a_file

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradDropEpoch, GradFreeze

MASKS = {
    "none": lambda: None,
    "graddrop": lambda: GradDrop(0.3),
    "epoch": lambda: GradDropEpoch(3),
    "freeze": lambda: GradFreeze(3, layers=["layers.*"]),
}
every_mask = pytest.mark.parametrize("mask", MASKS)
ACCEPTED = {label(accepted(kwargs)): accepted(kwargs) for kwargs in inputs(torch.float32)}
every_input = pytest.mark.parametrize("given", ACCEPTED)


class Problem:
    """torch's: |W x + b|^2 of a (10, 5) matrix and a vector, contiguous or every second element of a larger tensor."""

    def __init__(
        self, seed, given="default", mask="none", backend="auto", contiguous=True, cls=FusedGradDropAdamW, **more
    ):
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(size, generator=generator)[..., 0] for size in ((10, 5, 2), (10, 2))]
        if contiguous:
            values = [value.contiguous() for value in values]
        self.weight, self.bias = (torch.nn.Parameter(value) for value in values)
        self.x = torch.randn(5, generator=generator)
        self.named = [("layers.0.weight", self.weight), ("layers.1.bias", self.bias)]
        kwargs = {**copy.deepcopy(ACCEPTED[given]), **more}
        if cls is FusedGradDropAdamW:
            kwargs |= {"mask": MASKS[mask](), "backend": backend, "seed": seed}
        self.optimizer = cls(kwargs.pop("params", self.named), **kwargs)
        if cls is FusedGradDropAdamW:
            self.optimizer.set_epoch(1)  # of three: some elements, some blocks are trained

    def closure(self):
        self.optimizer.zero_grad()
        loss = (self.weight.mv(self.x) + self.bias).square().sum()
        loss.backward()
        return loss

    def step(self, count=1):
        for _ in range(count):
            self.optimizer.step(self.closure)

    def bits(self):
        state = [
            {key: bits(value) for key, value in self.optimizer.state[p].items()}
            for _, p in self.named
            if p in self.optimizer.state
        ]
        return [bits(param) for _, param in self.named], state


def plain(state_dict):
    """A state dict as values to compare with ==."""
    return tree_map_only(torch.Tensor, lambda tensor: (tensor.dtype, tensor.shape, bits(tensor)), state_dict)


# The direction, with torch's schedulers.

OF_ADAM = next(info for info in optim_db if info.optim_cls is torch.optim.Adam).scheduler_inputs


@every_input
@every_mask
@pytest.mark.parametrize("contiguous", [True, False])
def test_it_goes_in_the_right_direction(given, mask, contiguous, backend, seed):
    problem = Problem(seed, given, mask, backend, contiguous)
    first = problem.closure().item()
    problem.step(10)
    assert (problem.closure().item() > first) == bool(ACCEPTED[given].get("maximize"))


@every_mask
@pytest.mark.parametrize("index", range(len(OF_ADAM)))
def test_it_goes_in_the_right_direction_with_a_scheduler(mask, index, seed):
    problem = Problem(seed, mask=mask)
    first, chain = problem.closure().item(), [make(problem.optimizer) for make in OF_ADAM[index]]
    for _ in range(10):
        loss = problem.optimizer.step(problem.closure)
        for schedule in chain:
            schedule.step(loss) if isinstance(schedule, schedulers.ReduceLROnPlateau) else schedule.step()
    assert problem.closure().item() < first


# Schedulers set what they set on torch's.

SCHEDULES = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: step / 5),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: schedulers.StepLR(o, 3),
    "multi-step": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "constant": lambda o: schedulers.ConstantLR(o, 0.4, 4),
    "linear": lambda o: schedulers.LinearLR(o, 0.4, 1.0, 4),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 7),
    "polynomial": lambda o: schedulers.PolynomialLR(o, 5),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.001, 0.1, 3),
    "one-cycle": lambda o: schedulers.OneCycleLR(o, 0.05, 20),
    "chained": lambda o: schedulers.ChainedScheduler([schedulers.LinearLR(o, 0.5), schedulers.ExponentialLR(o, 0.8)]),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.8)], [3]
    ),
    "swa": lambda o: SWALR(o, 0.05, 3),
}
LRS = {"float": lambda: 0.02, "0-d": lambda: torch.tensor(0.02), "1-d": lambda: torch.tensor([0.02])}


@pytest.mark.parametrize("lr", LRS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedulers_set_what_they_set_on_torchs(schedule, lr, seed):
    """Numbers and kinds alike, momentum too; with one tensor for several groups as well, which some step twice."""
    runs = []
    for cls in (torch.optim.AdamW, FusedGradDropAdamW):
        problem = Problem(seed, cls=cls, lr=LRS[lr]())
        extra, generator = torch.nn.Parameter(torch.ones(3)), torch.Generator().manual_seed(seed)
        problem.optimizer.add_param_group({"params": [("layers.2.extra", extra)]})
        values = []
        try:
            driver = SCHEDULES[schedule](problem.optimizer)
            for _ in range(9):
                random_grads([problem.weight, problem.bias, extra], generator)
                problem.optimizer.step()
                driver.step()
                for group in problem.optimizer.param_groups:
                    kind = group["lr"].shape if isinstance(group["lr"], torch.Tensor) else None
                    values.append((kind, float(group["lr"]), tuple(map(float, group["betas"]))))
        except Exception as error:  # some schedulers cannot drive a tensor: then they say so here as there
            values.append((type(error), str(error)))
        runs.append((values, [param.detach() for _, param in problem.named] + [extra.detach()]))
    assert runs[0][0] == runs[1][0]
    for theirs, ours in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.allclose(theirs, ours, rtol=0, atol=9 * 2**-22)  # 9 steps, numbers up to 4


@every_mask
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_lr_that_becomes_a_float_again(mask, shape, backend, seed):
    """Each step takes what is there: a tensor, the same tensor with another value, a float, a tensor again."""
    problem, twin = (Problem(seed, mask=mask, backend=backend) for _ in range(2))
    tensor = torch.full(shape, 0.25)
    for lr, number in ((tensor, 0.25), (tensor, 0.125), (0.5, 0.5), (torch.full(shape, 0.0625), 0.0625), (1, 1.0)):
        if lr is tensor:
            tensor.fill_(number)
        problem.optimizer.param_groups[0]["lr"], twin.optimizer.param_groups[0]["lr"] = lr, number
        problem.step()
        twin.step()
        assert problem.bits() == twin.bits(), lr


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averages_of_the_weights(average, seed):
    runs = []
    for cls in (torch.optim.AdamW, FusedGradDropAdamW):
        problem = Problem(seed, cls=cls, lr=0.03)
        model = torch.nn.Module()
        model.weight, model.bias = problem.weight, problem.bias
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8) if average == "ema" else None)
        for _ in range(6):
            problem.step()
            averaged.update_parameters(model)
        assert averaged.module.weight is not problem.weight and not torch.equal(averaged.module.weight, problem.weight)
        runs.append([param.detach() for param in averaged.parameters()])
    for theirs, ours in zip(*runs, strict=True):
        assert torch.allclose(theirs, ours, rtol=0, atol=6 * 2**-22)


# State dicts.


@every_input
@every_mask
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_state_dict_is_deterministic_and_stays_what_it_is(given, mask, contiguous, backend, seed):
    one = Problem(seed, given, mask, backend, contiguous)
    one.step(3)
    saved = copy.deepcopy(one.optimizer.state_dict())
    assert plain(one.optimizer.state_dict()) == plain(saved) == plain(through_a_file(saved))
    other = Problem(seed, given, mask, backend, contiguous)
    with torch.no_grad():
        for (_, a), (_, b) in zip(one.named, other.named, strict=True):
            b.copy_(a)
    before = plain(saved)
    other.optimizer.load_state_dict(saved)
    assert plain(saved) == before
    for _ in range(3):
        one.step()
        other.step()
        assert one.bits() == other.bits()
    assert plain(one.optimizer.state_dict()) == plain(other.optimizer.state_dict())
    other.optimizer.param_groups.extend(other.optimizer.param_groups)  # a group twice is one group in the file
    assert plain(one.optimizer.state_dict()["param_groups"][-1]) == plain(
        other.optimizer.state_dict()["param_groups"][-1]
    )


@every_mask
@pytest.mark.parametrize("flag", [*INFO.not_og_supported_flags, "amsgrad", "decoupled_weight_decay", "all"])
def test_an_older_state_dict_can_be_loaded(mask, flag, seed):
    """Files of before torch had the flag: it keeps its value here."""
    one, other = (Problem(seed, mask=mask, lr=0.05, maximize=True, amsgrad=True) for _ in range(2))
    for problem in (one, other):
        problem.step(2)
    saved = other.optimizer.state_dict()
    flags = [*INFO.not_og_supported_flags, "amsgrad", "decoupled_weight_decay"] if flag == "all" else [flag]
    for group, name in itertools.product(saved["param_groups"], flags):
        del group[name]
    for state in saved["state"].values():
        state["step"] = state["step"].item() if flag == "all" else state["step"]
    other.optimizer.load_state_dict(saved)
    for problem in (one, other):
        problem.step(2)
    assert one.bits() == other.bits()
    assert plain(one.optimizer.state_dict()) == plain(other.optimizer.state_dict())


@pytest.mark.parametrize(
    "mask, saved_named, named",
    [case for case in itertools.product(MASKS, (True, False), (True, False)) if "freeze" not in case or all(case)],
)
def test_named_and_nameless_state_dicts(mask, saved_named, named, seed):
    """GradFreeze finds its blocks by name, and so never has nameless parameters. Masks that would go on by name are
    refused after masks by position.
    """
    kind = lambda has_names, problem: problem.named if has_names else [param for _, param in problem.named]
    one, other = Problem(seed, mask="none"), Problem(seed, mask="none")
    for problem, has_names in ((one, saved_named), (other, named)):
        problem.optimizer = FusedGradDropAdamW(kind(has_names, problem), lr=0.05, mask=MASKS[mask](), seed=seed)
        problem.optimizer.set_epoch(1)
    one.step(2)
    saved = through_a_file(one.optimizer.state_dict())
    if named and not saved_named and mask != "none":
        with pytest.raises(ValueError, match="has no names"):
            other.optimizer.load_state_dict(saved)
        other.optimizer.load_state_dict(saved, strict=False)
    else:
        other.optimizer.load_state_dict(saved)
    assert one.bits()[1] == other.bits()[1]
    assert ("param_names" in other.optimizer.param_groups[0]) == (named or saved_named)
    other.step()
    assert all(state["step"].item() == 3 for state in other.optimizer.state.values())


@every_mask
def test_copies_have_all_public_attributes(mask, seed):
    problem = Problem(seed, mask=mask)
    problem.step(2)
    public = lambda optimizer: {name for name in vars(optimizer) if not name.startswith("_")}
    for again in (copy.deepcopy(problem.optimizer), pickle.loads(pickle.dumps(problem.optimizer))):
        ours = {"backend", "strict", "grad_norm"}
        assert public(again) == public(problem.optimizer) == public(torch.optim.AdamW([problem.weight])) | ours
        assert plain(again.state_dict()) == plain(problem.optimizer.state_dict())
        assert repr(again) == repr(problem.optimizer)


@every_mask
def test_loaded_state_is_on_the_parameters_device_and_its_own(mask, seed):
    problem, other = Problem(seed, mask=mask), Problem(seed, mask=mask)
    problem.step()
    saved = problem.optimizer.state_dict()
    before = plain(saved)
    other.optimizer.load_state_dict(copy.deepcopy(saved))
    other.step()
    assert plain(saved) == before
    for param, state in other.optimizer.state.items():
        assert {value.device for value in state.values()} == {param.device}
        assert state["step"].dtype is torch.float32 and state["step"].shape == ()


# Steps that do nothing.


@every_input
@every_mask
def test_no_gradients_and_zero_gradients(given, mask, backend, seed):
    problem = Problem(seed, given, mask, backend, weight_decay=0.0)
    before = snapshot(problem.optimizer)
    assert problem.optimizer.step() is None
    assert snapshot(problem.optimizer) == before  # no gradient anywhere
    params = [bits(param) for _, param in problem.named]
    for _, param in problem.named:
        param.grad = torch.zeros_like(param)
    problem.optimizer.step()
    assert [bits(param) for _, param in problem.named] == params
    steps = [int(state["step"]) for state in problem.optimizer.state.values()]
    # GradFreeze has the first of the two blocks off; frozen units count no steps
    assert steps == ([1, 1] if mask != "freeze" else steps) and len(steps) == 2
    problem.optimizer.zero_grad()
    problem.bias.grad = torch.ones_like(problem.bias)
    weight = bits(problem.weight), bits(problem.optimizer.state[problem.weight]["exp_avg"])
    problem.optimizer.step()  # one of the two has none
    assert weight == (bits(problem.weight), bits(problem.optimizer.state[problem.weight]["exp_avg"]))
    assert [int(state["step"]) for state in problem.optimizer.state.values()][0] == steps[0]


# Groups.


@every_mask
@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_a_group_has_its_own_options(option, mask, backend, seed):
    """A learning rate of 0 moves nothing but state, in that group alone; decay alone shrinks what has no gradient."""
    problem = Problem(seed, mask=mask, backend=backend, lr=0.1, weight_decay=0.0)
    extra = torch.nn.Parameter(torch.full((64,), 2.0))
    problem.optimizer.add_param_group(
        {"params": [("layers.1.extra", extra)], **({"lr": 0.0} if option == "lr" else {"weight_decay": 0.5})}
    )
    start = bits(problem.bias)
    problem.closure()
    extra.grad = torch.ones(64) if option == "lr" else torch.zeros(64)
    problem.optimizer.step()
    assert bits(problem.bias) != start
    if option == "lr":
        assert (extra == 2).all()
    else:
        moved = extra != 2
        assert (extra[moved] == 2 - 0.1 * 0.5 * 2).all()
        # "gradient" masks leave the decay to all; "frozen" ones to what is trained
        assert moved.all() if mask in ("none", "graddrop") else torch.equal(moved, problem.optimizer.mask(extra))


# Hooks and closures.


def called(problem):
    """The order of everything that torch calls in two steps, a save and a load, and what each sees."""
    optimizer, calls = problem.optimizer, []
    seen = lambda: calls.append("changed" if bits(problem.bias) != start else "same")
    note = lambda name: lambda *args: (calls.append(name), calls.append(args[0] is optimizer), seen(), None)[-1]
    start = bits(problem.bias)
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        *(optimizer.register_step_pre_hook(note(f"pre {i}")) for i in range(2)),
        *(optimizer.register_step_post_hook(note(f"post {i}")) for i in range(2)),
        optimizer.register_state_dict_pre_hook(note("save pre")),
        optimizer.register_state_dict_pre_hook(note("save pre first"), prepend=True),
        optimizer.register_state_dict_post_hook(note("save post")),
        optimizer.register_load_state_dict_pre_hook(note("load pre")),
        optimizer.register_load_state_dict_pre_hook(note("load pre first"), prepend=True),
        optimizer.register_load_state_dict_post_hook(note("load post")),
        optimizer.register_load_state_dict_post_hook(note("load post first"), prepend=True),
    ]
    try:
        for _ in range(2):
            calls.append(bool(optimizer.step(lambda: (calls.append("closure"), problem.closure())[1]) > 0))
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        for handle in handles:
            handle.remove()
    problem.step()
    return calls


@every_mask
def test_hooks_run_once_and_in_torchs_order(mask, seed):
    expected = called(Problem(seed, cls=torch.optim.AdamW))
    assert called(Problem(seed, mask=mask)) == expected
    assert expected.count("closure") == 2 and expected.count("post 1") == 2 and expected.count("load post") == 1


@every_mask
def test_hooks_may_change_what_they_get(mask, seed):
    """A step's pre-hook its arguments, the hooks of saving and loading the state dict."""
    problem, twin = Problem(seed, mask=mask), Problem(seed, mask=mask)
    handle = problem.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: ((optimizer, problem.closure), {})
    )
    loss = problem.optimizer.step()
    handle.remove()
    assert loss == twin.optimizer.step(twin.closure) and problem.bits() == twin.bits()

    def with_note(optimizer, state_dict):
        state_dict["note"] = "saved"
        return state_dict

    def smaller(optimizer, state_dict):
        state_dict["param_groups"] = [{**group, "lr": 0.5} for group in state_dict["param_groups"]]
        return state_dict

    problem.optimizer.register_state_dict_post_hook(with_note)
    saved = problem.optimizer.state_dict()
    assert saved["note"] == "saved" and "note" not in twin.optimizer.state_dict()
    twin.optimizer.register_load_state_dict_pre_hook(smaller)
    twin.optimizer.load_state_dict(saved)
    assert twin.optimizer.param_groups[0]["lr"] == 0.5


@every_mask
@pytest.mark.parametrize("returns", [None, 3.5, torch.tensor(2.0)], ids=str)
def test_step_returns_what_the_closure_returns(mask, returns, backend, seed):
    problem = Problem(seed, mask=mask, backend=backend)
    assert problem.optimizer.step(lambda: (problem.closure(), returns)[1]) is returns
    assert problem.optimizer.step() is None
