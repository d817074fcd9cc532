"""torch.compile(optimizer.step, fullgraph=True): one graph for the whole training, with the bits of the eager step."""

import copy
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy import Encoder, bits, build, every_policy, random_grads, snapshot, state_bits, through_a_file

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradDropEpoch
from graddrop_kernels.step import graph

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*set_epoch.epoch. was not called"),
    pytest.mark.filterwarnings("ignore:.*GradDropEpoch.*toggle=True"),
]

@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing compiled before, and every recompilation an error; tests that expect one say ``recompiling()``."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def recompiling():
    return torch._dynamo.config.patch(error_on_recompile=False)


def graphs():
    """Graphs compiled in this test."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled(optimizer, backend="eager", fullgraph=True):
    """``eager`` runs the traced graph as it is, ``aot_eager`` hands copies to the operator, ``inductor`` is real."""
    return torch.compile(optimizer.step, fullgraph=fullgraph, backend=backend)


def twice(policy="graddrop", **arguments):
    """Two (model, optimizer) that are alike: one to be compiled, one to be the truth."""
    return [build(policy, Encoder(blocks=2), **copy.deepcopy(arguments)) for _ in range(2)]


def counts(optimizer):
    return [(group["completed_steps"], group["epoch_history"], group["epoch"]) for group in optimizer.param_groups]


def train_both(pairs, step, seed, steps=4, before=lambda optimizer, i: None, grads=lambda model, i: None):
    """Trains one pair by ``step``, the other by its own step; ``before`` and ``grads`` may change what they see."""
    for i in range(steps):
        for (model, optimizer), do in zip(pairs, (step, pairs[1][1].step)):
            random_grads(model.parameters(), torch.Generator().manual_seed(seed + i))
            grads(model, i)
            before(optimizer, i)
            do()
    assert state_bits(*pairs[0]) == state_bits(*pairs[1])
    assert counts(pairs[0][1]) == counts(pairs[1][1])


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


# One graph for everything that changes.


@every_policy
def test_every_policy_has_the_bits_of_the_eager_step(policy, seed):
    pairs = twice(policy)
    step = compiled(pairs[0][1], "aot_eager")
    schedulers = {
        id(optimizer): torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (i + 1)) for _, optimizer in pairs
    }

    def before(optimizer, i):
        if i % 2 == 0:
            optimizer.set_epoch(i // 2)
        if i:
            schedulers[id(optimizer)].step()

    train_both(pairs, step, seed, 9, before)
    assert graphs() == 1
    first, second = (through_a_file(optimizer.state_dict()) for _, optimizer in pairs)
    assert first["param_groups"] == second["param_groups"]
    assert str(first["state"]) == str(second["state"])


@pytest.mark.parametrize("lr", ["float", "tensor"])
def test_a_hundred_steps_are_one_graph(lr, seed):
    """lr changes every step, the epoch and with it p every tenth."""
    pairs = twice("graddrop-callable", lr=torch.tensor(0.02) if lr == "tensor" else 0.02)
    seen = []

    def before(optimizer, i):
        if i % 10 == 0:
            optimizer.set_epoch(i // 10)
            seen.append(optimizer.active_fraction()[0])
        for group in optimizer.param_groups:
            if lr == "tensor":
                group["lr"].mul_(0.97)
            else:
                group["lr"] *= 0.97

    train_both(pairs, compiled(pairs[0][1], "inductor"), seed, 100, before)
    assert graphs() == 1 and len(set(seen)) == 10


def test_inductor_hands_over_the_optimizers_own_tensors(seed, monkeypatch):
    """No copies of parameters or moments: the twin is for copies."""
    monkeypatch.setattr(graph, "_twin", None)
    pairs = twice("layer", lr=torch.tensor(0.02))
    train_both(pairs, compiled(pairs[0][1], "inductor"), seed)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float64, None)])
def test_other_dtypes(dtypes, seed):
    pairs = [build("graddrop", Encoder(2, dtypes[0]), moment_dtype=dtypes[1]) for _ in range(2)]
    train_both(pairs, compiled(pairs[0][1], "aot_eager"), seed)


# Hyper-parameters that are tensors.

LRS = {"0-d": torch.tensor(0.03), "one element": torch.tensor([0.03]), "float64": torch.tensor(0.03).double()}
BETAS = (torch.tensor(0.7), torch.tensor(0.96))


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("arguments", [{"lr": lr} for lr in LRS.values()] + [{"betas": BETAS}], ids=[*LRS, "betas"])
def test_tensor_hyperparameters_mean_their_values(how, arguments, seed):
    numbers = {
        name: tuple(map(float, value)) if name == "betas" else float(value) for name, value in arguments.items()
    }
    pairs = [build("graddrop", Encoder(2), **copy.deepcopy(each)) for each in (arguments, numbers)]
    step = compiled(pairs[0][1]) if how == "compiled" else pairs[0][1].step
    train_both(pairs, step, seed)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("how", ["in place", "in the graph"])
def test_a_tensor_weight_decay_is_one_graph(how, backend, seed):
    """Its value in each step, beside a tensor lr; also where the compiled function changes it."""
    pairs = twice(lr=torch.tensor(0.02))
    decays = [torch.tensor(0.4), torch.tensor(0.4)]
    for (_, optimizer), decay in zip(pairs, decays):
        for group in optimizer.param_groups[::2]:
            group["weight_decay"] = decay

    def step_of(optimizer, decay):
        def step():
            decay.mul_(0.5)
            optimizer.step()

        return step

    steps = [step_of(optimizer, decay) for (_, optimizer), decay in zip(pairs, decays)]
    if how == "in the graph":
        steps[0] = torch.compile(steps[0], fullgraph=True, backend=backend)
    else:
        step = compiled(pairs[0][1], backend)
        steps[0] = lambda: (decays[0].mul_(0.5), step())
    for i in range(3):
        for (model, _), do in zip(pairs, steps):
            random_grads(model.parameters(), torch.Generator().manual_seed(seed + i))
            do()
    assert state_bits(*pairs[0]) == state_bits(*pairs[1])
    assert graphs() == 1 and decays[0] == decays[1] == 0.05


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("first", ["float", "tensor"])
def test_lr_may_become_a_tensor_and_a_float_again(how, first, seed):
    pairs = twice()

    def before(optimizer, i):
        lr = 0.1 / (i + 1)
        as_tensor = optimizer is pairs[0][1] and (i // 2 + (first == "tensor")) % 2
        set_lr(optimizer, torch.tensor(lr, dtype=torch.float64) if as_tensor else lr)

    with recompiling():
        train_both(pairs, compiled(pairs[0][1]) if how == "compiled" else pairs[0][1].step, seed, 8, before)
    assert graphs() <= 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_tensor_lr_that_the_same_graph_changes(backend, seed):
    pairs = twice(lr=torch.tensor(0.02))
    lrs = [[group["lr"] for group in optimizer.param_groups] for _, optimizer in pairs]

    def step_of(optimizer, lrs):
        def step():
            for lr in {id(lr): lr for lr in lrs}.values():
                lr.mul_(0.5)
            optimizer.step()

        return step

    step = torch.compile(step_of(pairs[0][1], lrs[0]), fullgraph=True, backend=backend)
    eager = step_of(pairs[1][1], lrs[1])
    for i in range(3):
        for (model, _), do in zip(pairs, (step, eager)):
            random_grads(model.parameters(), torch.Generator().manual_seed(seed + i))
            do()
    assert state_bits(*pairs[0]) == state_bits(*pairs[1])
    assert lrs[0] == lrs[1]


# Parameters, gradients and state.


def test_the_first_compiled_step_makes_the_state(seed):
    pairs = twice("layer", amsgrad=True)
    assert not pairs[0][1].state
    train_both(pairs, compiled(pairs[0][1], "aot_eager"), seed, steps=1)
    assert len(pairs[0][1].state) == len(list(pairs[0][0].parameters()))


def test_groups_with_policies_and_amsgrad_of_their_own(seed):
    def pair():
        model = Encoder(blocks=2)
        parts = [list(getattr(model, part).named_parameters(part)) for part in ("embeddings", "layer", "head")]
        groups = [
            {"params": parts[0], "mask": None, "amsgrad": True, "lr": 0.5},
            {"params": parts[1], "mask": GradDropEpoch(epochs=3, storage="bitpacked"), "seed": 5},
            {"params": parts[2], "amsgrad": True, "maximize": True},
        ]
        return model, FusedGradDropAdamW(groups, lr=0.01, betas=(0.7, 0.9), mask=GradDrop(0.4))

    pairs = [pair(), pair()]
    train_both(pairs, compiled(pairs[0][1], "aot_eager"), seed, 6, lambda optimizer, i: optimizer.set_epoch(i // 2))


def test_parameters_without_a_gradient_are_left_out(seed):
    pairs = twice("freeze")

    def grads(model, i):
        for position, param in enumerate(model.parameters()):
            if position % 3 == i // 4:
                param.grad = None

    step = compiled(pairs[0][1])
    with recompiling():
        train_both(pairs, step, seed, 12, lambda optimizer, i: optimizer.set_epoch(i // 4), grads)
    assert graphs() == 3  # one for each set of parameters
    pairs[0][1].zero_grad()
    before = snapshot(pairs[0][1])
    with recompiling():
        step()
    assert snapshot(pairs[0][1]) == before


def test_expanded_gradients(seed):
    pairs = twice()

    def grads(model, i):
        for param in model.parameters():
            param.grad = torch.tensor(0.1 + i).expand(param.shape)

    train_both(pairs, compiled(pairs[0][1], "aot_eager"), seed, grads=grads)


def test_loaded_and_replaced_state_is_the_state_that_is_stepped(seed):
    pairs = twice("layer")
    step = compiled(pairs[0][1])
    train_both(pairs, step, seed)
    for _, optimizer in pairs:
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    train_both(pairs, step, seed + 10)
    for model, optimizer in pairs:
        for param in model.parameters():
            optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"] * 2
    train_both(pairs, step, seed + 20)
    assert graphs() == 1
    for _, optimizer in pairs:
        optimizer.state.clear()
    with recompiling():
        train_both(pairs, step, seed + 30)


def test_groups_in_another_list_are_refused(seed):
    pairs = twice("layer")
    step = compiled(pairs[0][1])
    train_both(pairs, step, seed)
    optimizer = pairs[0][1]
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(RuntimeError, match="param_groups was set to another list"):
        step()


def test_eager_and_compiled_steps_take_turns(seed):
    pairs = twice("layer-epoch")
    step = compiled(pairs[0][1])
    for turn in range(3):
        train_both(pairs, step, seed + turn, 2)
        train_both(pairs, pairs[0][1].step, seed + turn + 100, 2)


def test_the_question_of_distributed_checkpoint_is_no_step(seed):
    """lr 0 and zero gradients on a fresh optimizer."""
    pairs = twice("layer")
    step = compiled(pairs[0][1])
    for (model, optimizer), do in zip(pairs, (step, pairs[1][1].step)):
        set_lr(optimizer, 0.0)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        do(closure=None)
        set_lr(optimizer, 0.02)
        assert optimizer.param_groups[0]["completed_steps"] == 0
    with recompiling():  # closure=None by name
        train_both(pairs, step, seed)


def test_two_optimizers_and_a_copy_have_graphs_of_their_own(seed):
    pairs = twice("layer")
    step = compiled(pairs[0][1])
    train_both(pairs, step, seed)
    other, alike = copy.deepcopy(pairs)
    with recompiling():
        train_both([other, alike], compiled(other[1]), seed + 9)
        train_both(pairs, step, seed + 9)
        train_both(pairs, step, seed + 19)
    assert state_bits(*pairs[0]) != state_bits(*other)
    assert graphs() == 2


# What comes around a step.


def test_step_hooks_run(seed):
    pairs, ran = twice(), torch.zeros(())
    for model, optimizer in pairs:
        params = list(model.parameters())

        def clip(optimizer, args, kwargs, params=params):
            for param in params:
                param.grad.clamp_(-0.5, 0.5)

        optimizer.register_step_pre_hook(clip)
        optimizer.register_step_post_hook(lambda optimizer, args, kwargs: ran.add_(1))
    train_both(pairs, compiled(pairs[0][1], "aot_eager"), seed, 3)
    assert ran == 6 and graphs() == 1
    assert all(param.grad.abs().max() <= 0.5 for param in pairs[0][0].parameters())


def test_a_scheduler_sees_the_compiled_step(seed):
    (model, optimizer), _ = twice()
    step = compiled(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (i + 1))
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        step()
        scheduler.step()


def test_a_scheduler_made_before(seed):
    """Its wrapper around step is a graph break, as for torch's own optimizers; the step inside is still one graph."""
    pairs = twice()
    schedulers = {id(optimizer): torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9) for _, optimizer in pairs}
    step = compiled(pairs[0][1], fullgraph=False)
    train_both(pairs, step, seed, 12, lambda optimizer, i: i and schedulers[id(optimizer)].step())
    assert graphs() == 1


def test_a_grad_scaler_unscales_in_the_compiled_step(seed):
    pairs = twice("layer", fused=True)
    pairs[0][1].step = compiled(pairs[0][1], "aot_eager")
    losses = torch.rand(6, generator=torch.Generator().manual_seed(seed)) + 0.5
    losses[2] = torch.inf
    for model, optimizer in pairs:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for loss in losses:
            optimizer.zero_grad()
            scaler.scale(model(torch.arange(6).view(2, 3)).square().sum() * loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.state_dict()  # settles the skipped steps
    assert state_bits(*pairs[0]) == state_bits(*pairs[1])
    assert counts(pairs[0][1]) == counts(pairs[1][1]) and pairs[0][1].param_groups[0]["completed_steps"] == 5
    grads = [[bits(param.grad) for param in model.parameters()] for model, _ in pairs]
    assert grads[0] == grads[1]
    assert graphs() == 1


@pytest.mark.parametrize("grad_scale", [None, torch.tensor(4.0)])
def test_a_step_says_that_it_writes_gradients_when_it_does(grad_scale, seed):
    called = []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if "graddrop" in str(node.target))
        return graph.forward

    (model, optimizer), _ = twice(fused=True)
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    optimizer.grad_scale = grad_scale
    compiled(optimizer, backend)()
    assert called == ["graddrop.step_.default" if grad_scale is None else "graddrop.step_.unscale"]


def test_a_training_step_as_one_function(seed):
    """backward() and zero_grad() are graph breaks of torch's; nothing is compiled anew from step to step."""
    pairs = twice("graddrop")
    batch = torch.arange(6).view(2, 3)

    def training_step(model, optimizer):
        def step():
            loss = model(batch).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step

    step, eager = torch.compile(training_step(*pairs[0]), backend="eager"), training_step(*pairs[1])
    for _ in range(4):
        assert bits(step()) == bits(eager())
    assert state_bits(*pairs[0]) == state_bits(*pairs[1])


# What is refused.


def test_a_closure_is_refused_in_a_full_graph_and_runs_uncompiled_otherwise(seed):
    (model, optimizer), (twin, eager) = twice()
    for each in (model, twin):
        random_grads(each.parameters(), torch.Generator().manual_seed(seed))
    before = snapshot(optimizer)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="call the closure first"):
        compiled(optimizer)(lambda: torch.tensor(5.0))
    assert snapshot(optimizer) == before
    assert compiled(optimizer, fullgraph=False)(lambda: torch.tensor(5.0)) == 5
    eager.step()
    assert state_bits(model, optimizer) == state_bits(twin, eager)


@pytest.mark.parametrize("change", ["lr", "epoch"])
def test_groups_changed_in_the_same_graph(change, seed):
    """The operator would see the old values: a graph break, hence an error in a full graph."""
    pairs = twice("epoch")

    def step_of(optimizer):
        def step(i):
            if change == "epoch":
                optimizer.set_epoch(i)
            else:
                for group in optimizer.param_groups:
                    group["lr"] = 0.1 / (i + 1)
            optimizer.step()

        return step

    for model, _ in pairs:
        random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    before = snapshot(pairs[0][1])
    message = "change lr and the like outside" if change == "lr" else "set_epoch"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        torch.compile(step_of(pairs[0][1]), fullgraph=True, backend="eager")(0)
    assert snapshot(pairs[0][1]) == before
    step, eager = torch.compile(step_of(pairs[0][1]), backend="eager"), step_of(pairs[1][1])
    with recompiling():
        for i in range(3):
            step(i)
            eager(i)
    assert state_bits(*pairs[0]) == state_bits(*pairs[1])
    assert counts(pairs[0][1]) == counts(pairs[1][1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_errors_come_out_as_they_are(backend, seed):
    (model, optimizer), _ = twice()
    step = compiled(optimizer, backend)
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    step()
    set_lr(optimizer, -1.0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="lr of parameter group 0 must be a finite number >= 0"):
        step()
    assert snapshot(optimizer) == before and torch.is_grad_enabled()


def test_a_sparse_gradient_is_refused_by_the_step_where_no_full_graph_is_asked_for(seed):
    """Nothing of the eager step is traced when torch.compile gives up."""
    (model, optimizer), _ = twice()
    for param in model.parameters():
        param.grad = torch.ones_like(param).to_sparse()
    with pytest.raises(RuntimeError, match="is sparse .*use sparse=False"):
        compiled(optimizer, fullgraph=False)()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a sparse gradient is refused by the step"):
        compiled(optimizer)()  # seen before dynamo looks at a gradient
    torch._dynamo.reset()
    for param in model.parameters():
        param.grad = param.grad.to_dense()
    before = snapshot(optimizer)
    compiled(optimizer, fullgraph=False)()
    assert snapshot(optimizer) != before


# The operator itself.


def arguments(optimizer, overload="default", hypers=()):
    """The operator's arguments for a step of this optimizer; ``hypers``: a tensor lr for group 0."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [optimizer.state[param] for param in params]
    maxima = [state["max_exp_avg_sq"] for state in states if "max_exp_avg_sq" in state]
    scalars = (torch.tensor(2.0), torch.tensor(0.0)) if overload == "unscale" else (None, None)
    tensors = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
    masters = [state["master_param"] for state in states if "master_param" in state]
    steps = [state["step"] for state in states]
    return (
        params, [param.grad for param in params], *tensors, maxima, masters, steps, list(hypers),
        *scalars, list(range(len(params))), [0, 0] * len(hypers), optimizer._graph.handle, True,
    )  # fmt: skip


def stepped_once(policy, seed, **keywords):
    """(model, optimizer) after a step, with the gradients of the next."""
    model, optimizer = build(policy, Encoder(blocks=2), **keywords)
    for i in range(2):
        random_grads(model.parameters(), torch.Generator().manual_seed(seed + i))
        if i == 0:
            optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("overload", ["default", "unscale"])
@pytest.mark.parametrize("policy", ["graddrop", "epoch-bitpacked"])
def test_opcheck(overload, policy, seed):
    """torch's own checks: it writes what its schema says and nothing else, in fake tensors and in graphs too."""
    _, optimizer = stepped_once(policy, seed, amsgrad=True)
    function = getattr(torch.ops.graddrop.step_, overload)
    torch.library.opcheck(function, arguments(optimizer, overload, [torch.tensor(0.3)]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "mode", [{"master_weights": True}, {"stochastic_rounding": True}, {"max_grad_norm": 0.5}], ids=str
)
def test_modes_of_16_bits_and_clipping(mode, backend, seed):
    """The masters are written, and the norm of the last step is the optimizer's."""
    dtype = torch.float32 if "max_grad_norm" in mode else torch.bfloat16
    pairs = [build("graddrop", Encoder(blocks=2, dtype=dtype), **mode) for _ in range(2)]
    train_both(pairs, compiled(pairs[0][1], backend), seed)
    assert graphs() == 1
    if "max_grad_norm" in mode:
        assert bits(pairs[0][1].grad_norm) == bits(pairs[1][1].grad_norm)
    else:
        assert ("master_param" in pairs[0][1].state[next(pairs[0][0].parameters())]) == ("master_weights" in mode)


def test_copies_are_stepped_in_place_of_the_optimizers_tensors(seed):
    """What functionalization asks for. The counts are the optimizer's, so they advance."""
    pairs = [stepped_once("layer", seed) for _ in range(2)]
    (model, optimizer), (twin, eager) = pairs
    before = state_bits(model, optimizer)
    copies = copy.deepcopy(arguments(optimizer, hypers=[torch.tensor(0.3)]))
    torch.ops.graddrop.step_(*copies)
    assert state_bits(model, optimizer) == before
    eager.param_groups[0]["lr"] = torch.tensor(0.3)
    eager.step()
    own = arguments(eager)
    assert [bits(tensor) for tensors in copies[:6] for tensor in tensors] == [
        bits(tensor) for tensors in own[:6] for tensor in tensors
    ]
    assert counts(optimizer) == counts(eager)


def test_the_lr_that_the_operator_is_given_is_used(seed):
    """Not the group's, which a graph may change at another time."""
    (model, optimizer), (twin, eager) = (stepped_once("graddrop", seed) for _ in range(2))
    torch.ops.graddrop.step_(*arguments(optimizer, hypers=[torch.tensor(0.3)]))
    eager.param_groups[0]["lr"] = torch.tensor(0.3)
    eager.step()
    assert state_bits(model, optimizer) == state_bits(twin, eager)


def test_the_operator_of_an_optimizer_that_is_gone(seed):
    _, optimizer = stepped_once("graddrop", seed)
    with pytest.raises(RuntimeError, match="the optimizer that this step was compiled for is gone"):
        torch.ops.graddrop.step_(*arguments(optimizer)[:-2], "no such handle", True)
    handle = optimizer._graph.handle
    assert graph._graph_steps[handle] is optimizer._graph
    del optimizer
    assert handle not in graph._graph_steps


def test_the_operator_is_kept_out_of_cuda_graphs():
    """They would replay the lr, the counts and the masks of one step."""
    for overload in torch.ops.graddrop.step_.overloads():
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.graddrop.step_, overload).tags


def test_the_eager_step_does_not_go_through_the_operator(seed):
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(str(function))
            return function(*args, **(kwargs or {}))

    model, optimizer = build("graddrop")
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    called = set()
    with Calls():
        optimizer.step()
    assert called and not any("graddrop" in name for name in called)
