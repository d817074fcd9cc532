"""optimizer.skip_dropped(): the training of a run that skips nothing, with less work; what would not be is refused."""

import contextlib
import copy
import io
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from toy import Encoder, bits, refused, state_bits

from graddrop_kernels import (
    FusedGradDropAdamW,
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    param_groups,
)
from graddrop_kernels.step import stepper

POLICIES = {
    "layer": (lambda: LayerGradDrop(0.5), {}),
    "layer, by epoch": (lambda: LayerGradDrop(0.5, every="epoch"), {}),
    "layer, annealed": (lambda: LayerGradDrop(LinearAnneal(epochs=3, start=0.9)), {}),
    "layer, frozen": (lambda: LayerGradDrop(0.5), {"masked": "frozen"}),
    "layer, frozen, global": (lambda: LayerGradDrop(0.5), {"masked": "frozen", "bias_correction": "global"}),
    "freeze": (lambda: GradFreeze(4), {}),
    "freeze bottom-up": (lambda: GradFreeze(4, direction="bottom_up"), {"masked": "gradient"}),
    # no block of these is dropped as a whole
    "elements": (lambda: GradDrop(0.5), {}),
    "buckets": (lambda: GradDropEpoch(4), {}),
    "plain": (lambda: None, {}),
}
DROPS = [name for name in POLICIES if name not in ("elements", "buckets", "plain")]
STEPS, STEPS_AN_EPOCH = 12, 3
IDS = (4, 5)  # of a micro-batch


class Net(Encoder):
    """With parameters that the loss does not depend on, in every block and outside."""

    def __init__(self, blocks=4, dtype=torch.float32):
        super().__init__(blocks, dtype)
        self.unused = nn.Parameter(torch.ones(5, dtype=dtype))
        for block in self.layer:
            block.unused = nn.Parameter(torch.ones(4, dtype=dtype))


def make(policy="layer", seed=0, model=None, **arguments):
    model = Net() if model is None else model
    mask, more = POLICIES[policy]
    arguments = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4, **more, **arguments}
    groups = param_groups(model, weight_decay=0.1)
    return model, FusedGradDropAdamW(groups, mask=mask(), seed=seed, **arguments)


def loss_of(model, seed):
    return model(torch.randint(7, IDS, generator=torch.Generator().manual_seed(seed))).square().mean()


def nothing(model=None):
    return contextlib.nullcontext()


def run(pair, skipping, seed, steps=range(STEPS), micro_batches=2, forward=loss_of, step=None):
    """Trains (model, optimizer); returns in how many (step, parameter) a gradient was spared.

    ``skipping``: False, True, or what makes the context.
    """
    model, optimizer = pair
    context = optimizer.skip_dropped if skipping is True else skipping or nothing
    spared = 0
    for i in steps:
        optimizer.set_epoch(i // STEPS_AN_EPOCH)
        optimizer.zero_grad()
        with context():
            for batch in range(micro_batches):
                forward(model, seed + 10 * i + batch).backward()
        spared += sum(param.grad is None for name, param in model.named_parameters() if "unused" not in name)
        (step or optimizer.step)()
    return spared


def everything(model, optimizer):
    """Parameters, state, counters and the next masks."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    masks = [bits(optimizer.mask(param)) for group in optimizer.param_groups for param in group["params"]]
    return state_bits(model, optimizer), groups, masks, [param.requires_grad for param in model.parameters()]


def assert_alike(skipping, other):
    for mine, expected in zip(everything(*skipping), everything(*other)):
        assert mine == expected


def block_names(model):
    return [f"layer.{i}" for i in range(len(model.layer))]


def dropped_blocks(model, optimizer):
    """Of the next step."""
    return [name for name in block_names(model) if not optimizer.mask(f"{name}.linear.weight").any()]


def until(model, optimizer, wanted, seed):
    """Trains, one step at least, until the next step drops blocks as wanted; returns those."""
    for i in range(200):
        optimizer.set_epoch(i // STEPS_AN_EPOCH)
        optimizer.zero_grad()
        loss_of(model, seed + i).backward()
        optimizer.step()
        if wanted(found := dropped_blocks(model, optimizer)):
            return found
    pytest.fail("no such step in 200")


# The same training.


@pytest.mark.parametrize("policy", POLICIES)
def test_the_training_is_that_of_a_run_that_skips_nothing(policy, backend, seed):
    skipping, other = (make(policy, seed, backend=backend) for _ in range(2))
    spared, none = run(skipping, True, seed), run(other, False, seed)
    assert none == 0 and (spared > 0) == (policy in DROPS)
    assert_alike(skipping, other)
    assert not any(skipping[1].state.get(param) for name, param in skipping[0].named_parameters() if "unused" in name)
    for pair in (skipping, other):  # and on without it
        run(pair, False, seed, range(STEPS, STEPS + 2))
    assert_alike(skipping, other)


HALF = {"dtype": torch.bfloat16}
MODES = {
    "amsgrad": ({}, {"amsgrad": True}),
    "maximize": ({}, {"maximize": True}),
    "clipped": ({}, {"max_grad_norm": 0.05, "norm_after_mask": True}),
    "bfloat16": (HALF, {}),
    "float32 moments": (HALF, {"moment_dtype": torch.float32}),
    "master weights": (HALF, {"master_weights": True}),
    "stochastic rounding": (HALF, {"stochastic_rounding": True, "stochastic_moments": True}),
    "master weights, clipped": (HALF, {"master_weights": True, "max_grad_norm": 0.05, "norm_after_mask": True}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["layer", "layer, frozen"])
def test_in_every_mode(policy, mode, backend, seed):
    of_model, arguments = MODES[mode]
    skipping, other = (make(policy, seed, Net(**of_model), backend=backend, **arguments) for _ in range(2))
    for i in range(STEPS):  # the norm of every step
        assert run(other, False, seed, [i]) == 0
        run(skipping, True, seed, [i])
        norms = [bits(optimizer.grad_norm) for _, optimizer in (skipping, other)]
        assert norms[0] == norms[1] and (norms[0] is None) == ("max_grad_norm" not in arguments)
    assert_alike(skipping, other)


@pytest.mark.parametrize("policy", ["layer", "layer, frozen"])
def test_float64(policy, seed):
    skipping, other = (make(policy, seed, Net(dtype=torch.float64)) for _ in range(2))
    assert run(skipping, True, seed) > 0 and run(other, False, seed) == 0
    assert_alike(skipping, other)


class Turn(nn.Module):
    """A complex parameter."""

    def __init__(self, start):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.factor = nn.Parameter(torch.polar(torch.ones(6), torch.linspace(0, start, 6)))

    def forward(self, x):
        return torch.view_as_real(torch.fft.ifft(torch.fft.fft(self.linear(x)) * self.factor))[..., 0].tanh()


def turning():
    model = Encoder(3)
    for i, block in enumerate(model.layer):
        model.layer[i] = Turn(1.0 + i)
        model.layer[i].linear = block.linear
    return model


def by_columns():
    """Weights that are not stored row by row."""
    model = Net()
    for block in model.layer:
        block.linear.weight = nn.Parameter(block.linear.weight.detach().t().contiguous().t())
    assert not model.layer[0].linear.weight.is_contiguous()
    return model


@pytest.mark.parametrize("backend", ["auto", "reference", "exact"])
@pytest.mark.parametrize("policy", ["layer", "layer, frozen"])
@pytest.mark.parametrize("model", [turning, by_columns])
def test_complex_parameters_and_other_strides(model, policy, backend, seed):
    skipping, other = (make(policy, seed, model(), backend=backend) for _ in range(2))
    assert run(skipping, True, seed) > 0 and run(other, False, seed) == 0
    assert_alike(skipping, other)


@pytest.mark.parametrize("model", [Net, by_columns])
@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("policy", ["layer", "layer, frozen"])
def test_a_grad_scaler_writes_no_parameter(policy, fused, model, backend, seed):
    """The fused step divides gradients by the scale where they lie; where there are none, nothing may be divided."""
    pairs = [make(policy, seed, model(), backend=backend, fused=fused) for _ in range(2)]
    for skipping, pair in zip((True, False), pairs):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

        def step(pair=pair, scaler=scaler):
            scaler.step(pair[1])
            scaler.update()

        scaled = lambda model, seed, scaler=scaler: scaler.scale(loss_of(model, seed))
        assert (run(pair, skipping, seed, forward=scaled, step=step) > 0) == skipping
    assert_alike(*pairs)


@pytest.mark.parametrize("fused", [True, None])
def test_a_step_that_a_grad_scaler_skips_draws_no_other_blocks(fused, seed):
    pairs = [make("layer", seed, fused=fused) for _ in range(2)]
    for skipping, (model, optimizer) in zip((True, False), pairs):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for i in range(8):
            with (optimizer.skip_dropped if skipping else nothing)():
                scaler.scale(loss_of(model, seed + i)).backward()
            if i in (0, 3, 4):
                model.head.weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
    assert_alike(*pairs)


def test_steps_that_the_device_left_out_are_not_counted(seed):
    """On a GPU only the device knows that a step found infinities; the plan must wait for it."""
    model, optimizer = make("layer", seed)
    until(model, optimizer, any, seed)
    expected, count = dropped_blocks(model, optimizer), optimizer.param_groups[0]["completed_steps"]
    for found in range(8):  # steps counted that were none
        for group in optimizer.param_groups:
            group["completed_steps"] = count + found
        optimizer._stepper.voided = {i: torch.tensor(found) for i in range(len(optimizer.param_groups))}
        with optimizer.skip_dropped():
            frozen = [name for name in block_names(model) if not model.get_submodule(name).linear.weight.requires_grad]
        assert frozen == expected


def test_steps_in_the_backward_pass(backend, seed):
    skipping, other = (make("layer", seed, backend=backend) for _ in range(2))
    handle = skipping[1].step_in_backward()
    with refused(RuntimeError, r"step_in_backward\(\) inside of skip_dropped\(\)"), other[1].skip_dropped():
        other[1].step_in_backward()
    run(skipping, True, seed, micro_batches=1)
    run(other, False, seed, micro_batches=1)
    assert_alike(skipping, other)
    handle.remove()


def test_one_context_a_micro_batch_and_one_around_the_closure(seed):
    pairs = [make("layer", seed) for _ in range(3)]
    for i in range(STEPS):
        for (model, optimizer), context in zip(pairs, (nothing, pairs[1][1].skip_dropped, pairs[2][1].skip_dropped)):

            def closure(model=model, optimizer=optimizer, context=context, i=i):
                optimizer.zero_grad()
                for batch in range(2):
                    with context():
                        loss_of(model, seed + 10 * i + batch).backward()

            if optimizer is pairs[1][1]:
                closure()
                optimizer.step()
            else:
                optimizer.step(closure)
    assert_alike(pairs[1], pairs[0])
    assert_alike(pairs[2], pairs[0])


def test_where_every_parameter_is_dropped_the_loss_still_has_a_backward_pass(seed):
    """No dense parameters, and one block: half of the steps train nothing."""

    def make_one():
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.linspace(-1, 1, param.numel()).view(param.shape))
        model.forward = lambda ids: nn.Sequential.forward(model, ids[..., None].float().expand(*ids.shape, 6))
        mask = LayerGradDrop(0.5, layers=["*"])
        return model, FusedGradDropAdamW(model.named_parameters(), lr=0.02, mask=mask, seed=seed)

    skipping, other = make_one(), make_one()
    assert run(skipping, True, seed) > 0 and run(other, False, seed) == 0
    assert_alike(skipping, other)


def test_a_resumed_run_skips_at_once(seed):
    whole, first = make("layer", seed), make("layer", seed)
    run(whole, False, seed)
    run(first, True, seed, range(6))
    file = io.BytesIO()
    torch.save((first[0].state_dict(), first[1].state_dict()), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    second = make("layer", seed)
    second[0].load_state_dict(loaded[0])
    second[1].load_state_dict(loaded[1])
    expected = sum(4 for _ in dropped_blocks(*second))  # of a block: weight and bias, twice
    assert run(second, True, seed, [6]) == expected
    run(second, True, seed, range(7, STEPS))
    assert_alike(second, whole)


def test_the_first_step_is_run_in_full(seed):
    """Only it shows which parameters have gradients."""
    model, optimizer = make("freeze", seed)
    assert len(dropped_blocks(model, optimizer)) == 3
    assert run((model, optimizer), True, seed, [0]) == 0
    assert run((model, optimizer), True, seed, [1]) == 3 * 4


def test_what_the_user_has_frozen_stays_so(seed):
    pairs = [make("layer", seed) for _ in range(2)]
    for model, _ in pairs:
        model.layer[1].linear.weight.requires_grad_(False)
        model.embeddings.weight.requires_grad_(False)
    for (model, optimizer), skipping in zip(pairs, (True, False)):
        frozen = [param for param in model.parameters() if not param.requires_grad]
        for i in range(STEPS):
            optimizer.zero_grad()
            with (optimizer.skip_dropped if skipping else nothing)():
                loss_of(model, seed + i).backward()
            assert [param for param in model.parameters() if not param.requires_grad] == frozen
            optimizer.step()
    assert_alike(*pairs)
    assert not pairs[0][1].state.get(pairs[0][0].layer[1].linear.weight)


def test_a_dropped_gradient_takes_no_memory(seed):
    model, optimizer = make("layer", seed)
    until(model, optimizer, any, seed)
    optimizer.zero_grad()
    with optimizer.skip_dropped():
        loss_of(model, seed).backward()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    grads = optimizer._skip_dropped.complete(params, [param.grad for param in params], None, False)
    assert any(param.grad is None for param in params if param in optimizer._skip_dropped.missing)
    for param, grad in zip(params, grads):
        assert grad is param.grad if param.grad is not None else grad is None or grad.data_ptr() == param.data_ptr()


def test_other_blocks_need_no_other_tables(seed, monkeypatch):
    """What was prepared for one step serves the next, whichever blocks it drops."""
    model, optimizer = make("layer", seed)
    prepared = []
    prepare = stepper.prepare
    monkeypatch.setattr(stepper, "prepare", lambda *args: prepared.append(args) or prepare(*args))
    assert run((model, optimizer), True, seed) > 0
    assert len(prepared) == 1


# The work.


def flops_of(model, optimizer, skipping, seed, **of_loss):
    optimizer.zero_grad()
    with FlopCounterMode(display=False) as counter, (optimizer.skip_dropped if skipping else nothing)():
        loss_of(model, seed, **of_loss).backward()
    return counter.get_total_flops()


def weight_flops(model, blocks):
    """Of the weight gradients: 2 a token and element."""
    tokens = IDS[0] * IDS[1]
    return sum(2 * tokens * model.get_submodule(name).linear.weight.numel() for name in blocks)


@pytest.mark.parametrize("policy", DROPS)
def test_dropped_weight_gradients_cost_nothing(policy, seed):
    model, optimizer = make(policy, seed)
    dropped = until(model, optimizer, lambda found: 0 < len(found) < 4, seed)
    dense, skipped = (flops_of(model, optimizer, skipping, seed) for skipping in (False, True))
    assert dense - skipped == weight_flops(model, dropped) > 0


def test_the_backward_pass_ends_above_blocks_that_are_dropped_or_frozen(seed):
    """With frozen embeddings the lowest blocks pass no gradient on, either."""
    model, optimizer = make("freeze", seed)
    model.embeddings.weight.requires_grad_(False)
    run((model, optimizer), True, seed, [0])
    dense, skipped = (flops_of(model, optimizer, skipping, seed) for skipping in (False, True))
    below = block_names(model)[:3]
    assert dropped_blocks(model, optimizer) == below
    # The gradient of a Linear's input costs as much as that of its weight; the dense run has one for three of four.
    assert dense - skipped == 2 * weight_flops(model, below)


# Plans that do not fit.


def spoil(what, model, optimizer, seed):
    if what == "set_epoch":
        optimizer.set_epoch(3)
    elif what == "a second step":
        optimizer.step()
    else:
        other = make("freeze", seed)
        run(other, False, seed, range(9, 11))
        optimizer.load_state_dict(other[1].state_dict())


@pytest.mark.parametrize("what", ["set_epoch", "load_state_dict", "a second step"])
def test_a_plan_that_no_longer_fits_is_refused(what, seed):
    policy = "layer" if what == "a second step" else "freeze"
    model, optimizer = make(policy, seed)
    run((model, optimizer), True, seed, [0])
    if policy == "layer":
        until(model, optimizer, any, seed)
    optimizer.zero_grad()
    with optimizer.skip_dropped():
        loss_of(model, seed).backward()
    spoil(what, model, optimizer, seed)
    with contextlib.ExitStack() as stack:
        for _ in range(40 if policy == "layer" else 1):  # as long as the plan is the same, the step is right
            missing = [name for name in block_names(model) if model.get_submodule(name).linear.weight.grad is None]
            if set(missing) - set(dropped_blocks(model, optimizer)):
                stack.enter_context(
                    refused(
                        RuntimeError, r"'layer\.\d\.\S+' was skipped", "this step does not drop it",
                        r"optimizer\.zero_grad\(\)", optimizer=optimizer, params=model.parameters(),
                    )
                )  # fmt: skip
            optimizer.step()
        pytest.fail("never refused")
    optimizer.zero_grad()  # the remedy
    with optimizer.skip_dropped():
        loss_of(model, seed).backward()
    optimizer.step()


def test_a_forgotten_step_is_refused_only_when_its_gradients_are_there_still(seed):
    model, optimizer = make("freeze", seed)
    run((model, optimizer), True, seed, [0])
    for zeroed in (optimizer.zero_grad, model.zero_grad, lambda: optimizer.zero_grad(set_to_none=False), None):
        optimizer.set_epoch(0)
        optimizer.zero_grad()
        with optimizer.skip_dropped():
            loss_of(model, seed).backward()
        optimizer.set_epoch(2)  # and no step
        if zeroed:
            zeroed()
        with optimizer.skip_dropped():
            loss_of(model, seed).backward()
        with contextlib.nullcontext() if zeroed else refused(RuntimeError, "was skipped", optimizer=optimizer):
            optimizer.step()


def test_gradients_zeroed_inside(seed):
    skipping, other = make("layer", seed), make("layer", seed)
    for model, optimizer in (skipping, other):
        for i in range(STEPS):
            with (optimizer.skip_dropped if optimizer is skipping[1] else nothing)():
                optimizer.zero_grad()
                loss_of(model, seed + i).backward()
            optimizer.step()
    assert_alike(skipping, other)


@pytest.mark.parametrize("where", ["before", "after"])
def test_an_exception_inside_leaves_everything_as_it_was(where, seed):
    skipping, other = make("layer", seed), make("layer", seed)
    for model, optimizer in (skipping, other):
        for i in range(STEPS):
            optimizer.zero_grad()
            with pytest.raises(KeyError), (optimizer.skip_dropped if optimizer is skipping[1] else nothing)():
                if where == "after":
                    loss_of(model, seed - 1).backward()
                raise KeyError
            assert all(param.requires_grad for param in model.parameters())
            if where == "before":
                optimizer.step()  # no gradients: nothing happens
            optimizer.zero_grad()
            with (optimizer.skip_dropped if optimizer is skipping[1] else nothing)():
                loss_of(model, seed + i).backward()
            optimizer.step()
    assert_alike(skipping, other)


# What is refused.


@pytest.mark.parametrize(
    "what",
    ["skip_dropped", "step", "load_state_dict", "set_epoch", "step_in_backward", "a copy"],
)
def test_inside_of_it(what, seed):
    model, optimizer = make("layer", seed)
    run((model, optimizer), True, seed, [0])
    saved = optimizer.state_dict()
    actions = {
        "load_state_dict": lambda: optimizer.load_state_dict(saved),
        "set_epoch": lambda: optimizer.set_epoch(2),
        "a copy": lambda: copy.deepcopy(optimizer),
        "skip_dropped": lambda: optimizer.skip_dropped().__enter__(),
    }
    with optimizer.skip_dropped(), refused(RuntimeError, what, "leave the with block first", params=model.parameters()):
        actions.get(what, getattr(optimizer, what, None))()
    assert all(param.requires_grad for param in model.parameters())


def test_a_checkpoint_inside_of_it(seed):
    """As a signal asks for one: it is that of the completed steps, before it and after it."""
    model, optimizer = make("layer", seed)
    until(model, optimizer, any, seed)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    with optimizer.skip_dropped():
        loss_of(model, seed).backward()
        assert str(optimizer.state_dict()) == str(before) and not all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "arguments, change, kind, word",
    [
        ({"max_grad_norm": 1.0}, {}, ValueError, r"max_grad_norm=1\.0 .* norm_after_mask=True"),
        ({}, {"max_grad_norm": 0.5}, ValueError, r"max_grad_norm=0\.5"),
        ({"differentiable": True}, {}, ValueError, "differentiable"),
        ({}, {"captured": ["a step"]}, RuntimeError, "CUDA graph"),
    ],
)
def test_what_needs_the_gradients(arguments, change, kind, word, seed):
    model, optimizer = make("layer", seed, **arguments)
    for name, value in change.items():
        setattr(optimizer._stepper if name == "captured" else optimizer, name, value)
    with refused(kind, word, optimizer=optimizer), optimizer.skip_dropped():
        pytest.fail("inside")


def test_a_norm_that_is_asked_for_after_the_backward_pass(seed):
    model, optimizer = make("layer", seed)
    until(model, optimizer, any, seed)
    optimizer.zero_grad()
    with optimizer.skip_dropped():
        loss_of(model, seed).backward()
    optimizer.max_grad_norm = 2.0
    with refused(ValueError, r"max_grad_norm=2\.0", optimizer=optimizer, params=model.parameters()):
        optimizer.step()


def test_a_compiled_step(seed):
    model, optimizer = make("layer", seed)
    until(model, optimizer, any, seed)
    optimizer.zero_grad()
    with optimizer.skip_dropped():
        loss_of(model, seed).backward()
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"optimizer\.step\(\) outside of torch\.compile"):
        step()  # a graph that raises does not give the grad mode back
    torch.compiler.reset()


def test_it_does_not_keep_the_optimizer_alive(seed):
    model, optimizer = make("layer", seed)
    run((model, optimizer), True, seed)
    gone = weakref.ref(optimizer)
    del optimizer
    assert gone() is None, "it must not wait for the garbage collector, with its moments"


# Checkpointing and compilers.


class Checkpointed(Net):
    def forward(self, ids):
        x = self.embeddings(ids)
        for block in self.layer:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x.mean(1))


def test_activation_checkpointing(seed):
    skipping, other = make("layer", seed, Checkpointed()), make("layer", seed)
    assert run(skipping, True, seed) > 0
    run(other, False, seed)
    assert_alike(skipping, other)


def test_reentrant_checkpointing_is_refused_where_the_model_shows_it():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

    for impl in CheckpointImpl:
        model, optimizer = make()
        model.layer[0] = checkpoint_wrapper(model.layer[0], checkpoint_impl=impl)
        reentrant = impl is CheckpointImpl.REENTRANT
        with refused(RuntimeError, r"'layer\.0'", "use_reentrant=False") if reentrant else nothing():  # noqa: SIM117
            with optimizer.skip_dropped(model):
                assert not reentrant


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_of_transformers(reentrant):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertForSequenceClassification(config)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    _, optimizer = make(model=model)
    with refused(RuntimeError, r"module 'bert", "use_reentrant=False") if reentrant else nothing():  # noqa: SIM117
        with optimizer.skip_dropped(model):
            assert not reentrant


def test_blocks_that_are_compiled_are_compiled_twice_at_most(seed):
    """Once as trained, once as dropped: not once a pattern of blocks."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    skipping, other = make("layer", seed, Encoder(4)), make("layer", seed, Encoder(4))
    for block in skipping[0].layer:
        block.compile(backend=count)
    assert run(skipping, True, seed) > 0
    run(other, False, seed)
    assert_alike(skipping, other)
    assert 2 <= len(graphs) <= 4  # twice that where the input needs no gradient, as here it does
    torch.compiler.reset()


# Wrappers.


@pytest.mark.parametrize(
    "find_unused, static, word",
    [(False, False, "find_unused_parameters=True"), (True, True, "static_graph"), (True, False, None)],
)
def test_distributed_data_parallel(find_unused, static, word):
    """Around a part of the model, too. It cannot be made without a process group: test_skip_backward_ranks.py."""
    inner = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(inner)
    inner.find_unused_parameters, inner.static_graph = find_unused, static
    _, optimizer = make()
    with refused(RuntimeError, r"module '0'", word) if word else nothing():  # noqa: SIM117
        with optimizer.skip_dropped(nn.Sequential(inner)):
            assert word is None


def test_several_processes_must_show_the_model(monkeypatch):
    model, optimizer = make()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with refused(RuntimeError, r"optimizer\.skip_dropped\(model\)", optimizer=optimizer), optimizer.skip_dropped():
        pytest.fail("inside")
    with optimizer.skip_dropped(model):
        pass


def test_the_example_of_the_guide(seed):
    text = (Path(__file__).resolve().parents[2] / "docs/guide.md").read_text()
    (example,) = re.findall(r"```python\n([^`]*skip_dropped[^`]*)```", text)
    model, optimizer = make(seed=seed)
    batches = [[torch.randint(7, IDS)] for _ in range(5)]
    forward = lambda ids: model(ids).square().mean()
    names = {"optimizer": optimizer, "batches": batches, "loss_of": forward}
    exec(example, names)
    assert optimizer.param_groups[0]["completed_steps"] == 5


def test_steps_that_the_device_left_out_do_not_decide_what_was_skipped(seed):
    """A step that a GradScaler made a no-op, then the same blocks again: what was skipped is still what is dropped."""
    model, optimizer = make("layer", seed)
    until(model, optimizer, any, seed)
    optimizer.zero_grad()
    with optimizer.skip_dropped():
        loss_of(model, seed).backward()
    count = optimizer.param_groups[0]["completed_steps"]
    for voided in range(1, 9):  # as Stepper.count() leaves it where found_inf is on a GPU
        for group in optimizer.param_groups:
            group["completed_steps"] = count + voided
        optimizer._stepper.voided = {i: torch.tensor(voided) for i in range(len(optimizer.param_groups))}
        params = [param for group in optimizer.param_groups for param in group["params"]]
        optimizer._skip_dropped.complete(params, [param.grad for param in params], None, False)
        assert optimizer.param_groups[0]["completed_steps"] == count
