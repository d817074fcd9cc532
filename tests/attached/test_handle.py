"""The handle of attach_mask(): what the optimizer's groups keep, resume, remove, what is refused, and scalers."""

import copy
import gc
import weakref

import pytest
import torch
from cases import assert_same_bits
from torch import nn
from toy import POLICIES, Encoder, bits, half, refused, snapshot, through_a_file, warned

from graddrop_kernels import (
    CycleBlocks,
    FixedMask,
    FusedGradDropAdamW,
    GaussianGradDrop,
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    RandomMask,
    SampleBlocks,
    TrainRows,
    attach_mask,
    describe,
    param_groups,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*GradDropEpoch.*toggle=True", "ignore:two optimizers are stepped")


def give(model, seed, step):
    generator = torch.Generator().manual_seed(seed + step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def train(model, optimizer, handle, steps, seed):
    for step in steps:
        if step % 4 == 0:
            handle.set_epoch(step // 4)
        give(model, seed, step)
        optimizer.step()


def built(policy, kind=torch.optim.AdamW, **arguments):
    model = Encoder()
    optimizer = kind(param_groups(model, weight_decay=0.1), lr=0.02, **arguments)
    return model, optimizer, policy


def attach(optimizer, policy, name):
    masked = "gradient" if policy.masked == "frozen" and not policy.needs_blocks else None
    return attach_mask(optimizer, policy, seed=3, masked=masked)


# --- state dicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["attach, load", "load, attach"])
@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("rows", "plain", "skip-update")])
def test_a_resumed_run_goes_on_bit_for_bit(name, order, seed):
    """In the middle of an epoch, through a file of plain values."""
    policy = POLICIES[name](Encoder())
    model, optimizer, _ = built(policy)
    train(model, optimizer, attach(optimizer, policy, name), range(13), seed)
    first, early, _ = built(policy)
    train(first, early, attach(early, policy, name), range(6), seed)
    saved = through_a_file(early.state_dict())
    later, resumed, _ = built(policy)
    later.load_state_dict(first.state_dict())
    if order == "attach, load":
        handle = attach(resumed, policy, name)
        resumed.load_state_dict(saved)
    else:
        resumed.load_state_dict(saved)
        handle = attach(resumed, policy, name)
    train(later, resumed, handle, range(6, 13), seed)
    assert [bits(param) for param in later.parameters()] == [bits(param) for param in model.parameters()]
    assert [dict(group, params=0) for group in resumed.param_groups] == [
        dict(group, params=0) for group in optimizer.param_groups
    ]


def test_a_state_dict_does_not_change_with_later_steps(seed):
    model, optimizer, policy = built(GradDrop(p=0.3))
    handle = attach_mask(optimizer, policy)
    train(model, optimizer, handle, range(3), seed)
    saved = optimizer.state_dict()["param_groups"]
    before = copy.deepcopy(saved)
    train(model, optimizer, handle, range(3, 9), seed)
    assert saved == before


def test_a_run_of_the_fused_optimizer_goes_on_under_torchs(seed):
    """The same masks: the groups have the same keys, and the counts of parameters are in its state."""
    model, ours = Encoder(), None
    ours = FusedGradDropAdamW(param_groups(model), lr=0.02, mask=GradDrop(p=0.3), seed=3)
    for step in range(5):
        give(model, seed, step)
        ours.step()
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.02)
    optimizer.load_state_dict(ours.state_dict())
    handle = attach_mask(optimizer, GradDrop(p=0.3), seed=3)
    for name, param in model.named_parameters():
        assert torch.equal(handle.mask(name), ours.mask(param))
    assert optimizer.param_groups[0]["param_steps"][0] == 5


@pytest.mark.parametrize("change", [{"mask": GradDrop(p=0.4)}, {"seed": 4}, {"masked": "gradient"}])
def test_another_mask_is_refused(change, seed):
    first = {"mask": GradDrop(p=0.3), "seed": 3}
    model, optimizer, _ = built(None)
    train(model, optimizer, attach_mask(optimizer, **first), range(2), seed)
    saved = optimizer.state_dict()
    _, other, _ = built(None)
    attach_mask(other, **{**first, **change})
    with refused(ValueError, "parameter group 0 has gone 2 steps under mask=", "attach that one", optimizer=other):
        other.load_state_dict(saved)
    _, other, _ = built(None)
    other.load_state_dict(saved)
    with refused(ValueError, "parameter group 0 has gone 2 steps under mask=", "attach that one", optimizer=other):
        attach_mask(other, **{**first, **change})
    attach_mask(other, **first)


def test_a_state_dict_without_a_mask_is_loaded_before(seed):
    model, optimizer, _ = built(None)
    give(model, seed, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group.pop("mask", None)
    _, other, _ = built(None)
    attach_mask(other, GradDrop(p=0.3))
    with refused(ValueError, "saved without attach_mask: load it before", optimizer=other):
        other.load_state_dict(saved)


def test_a_file_of_parameters_in_another_order_is_refused(seed):
    model = Encoder()
    named = list(model.named_parameters())
    optimizers = [torch.optim.SGD(each, lr=0.1) for each in (named, named[::-1])]
    for optimizer in optimizers:
        attach_mask(optimizer, GradDrop(p=0.5))
    with refused(ValueError, "in another order", optimizer=optimizers[1]):
        optimizers[1].load_state_dict(optimizers[0].state_dict())


def test_a_mask_that_is_changed_in_a_group_is_noticed(seed):
    model, optimizer, policy = built(GradDrop(p=0.3))
    attach_mask(optimizer, policy)
    optimizer.param_groups[0]["seed"] = 5
    give(model, seed, 0)
    with refused(ValueError, "parameter group 0", "seed=5", optimizer=optimizer):
        optimizer.step()


def test_a_checkpoint_that_only_asks_for_the_state_is_no_step(seed):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer, policy = built(GradDrop(p=0.3))
    handle = attach_mask(optimizer, policy)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state and not any(any(group["param_steps"]) for group in optimizer.param_groups)
    assert all(group["completed_steps"] == 0 for group in optimizer.param_groups)
    assert torch.equal(handle.mask("head.weight"), handle.mask("head.weight", step=0))


# --- the handle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [lambda model: model.parameters(), param_groups], ids=["plain", "scope"])
def test_remove_leaves_the_optimizer_as_it_was(groups, seed):
    model, other = Encoder(), Encoder()
    optimizer, plain = torch.optim.SGD(groups(model), lr=0.1), torch.optim.SGD(groups(other), lr=0.1)
    before = [dict(group) for group in optimizer.param_groups]
    handle = attach_mask(optimizer, LayerGradDrop(p=0.5), model=model)
    handle.remove()
    assert [dict(group) for group in optimizer.param_groups] == before
    for step in range(2):
        give(model, seed, step)
        give(other, seed, step)
        optimizer.step()
        plain.step()
    for param, expected in zip(model.parameters(), other.parameters()):
        assert_same_bits(param, expected)
    attach_mask(optimizer, GradDrop(p=0.5), model=model).remove()


def test_remove_after_a_resume(seed):
    """The keys of the file go too. A dense group stays one."""
    model, optimizer, policy = built(GradDrop(p=0.3))
    train(model, optimizer, attach_mask(optimizer, policy), range(2), seed)
    _, other, _ = built(policy)
    other.load_state_dict(optimizer.state_dict())
    attach_mask(other, policy).remove()
    assert [group.get("mask", "") for group in other.param_groups] == ["", "", None, None]
    assert not any({"seed", "epoch", "param_steps"} & group.keys() for group in other.param_groups)
    assert attach_mask(other, GradDrop(p=0.9)).active_fraction()[2:] == [1.0, 1.0]


def test_it_frees_the_optimizer(seed):
    """No circle holds its moments until garbage is collected."""
    model, optimizer, policy = built(GradDrop(p=0.3))
    handle = attach_mask(optimizer, policy)
    train(model, optimizer, handle, range(2), seed)
    alive = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="is gone"):
        handle.set_epoch(1)


def test_what_it_tells():
    model = Encoder()
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1, momentum=0.9)
    handle = attach_mask(optimizer, LayerGradDrop(p=0.5), seed=4)
    twin = FusedGradDropAdamW(param_groups(Encoder()), lr=0.1, mask=LayerGradDrop(p=0.5), seed=4)
    assert handle.active_fraction() == twin.active_fraction()
    text, expected = handle.describe().splitlines(), twin.describe().splitlines()
    assert [line for line in expected if not line.startswith(("backend", "memory"))] == [
        line.replace("None: plain SGD", "None: plain AdamW") for line in text
    ]
    assert handle.optimizer is optimizer and handle.param_groups is optimizer.param_groups
    assert "None: plain SGD" in handle.describe()
    assert describe(twin) == twin.describe()


def test_a_new_group_takes_the_mask(seed):
    model = Encoder()
    named = list(model.named_parameters())
    optimizer = torch.optim.SGD(named[:3], lr=0.1)
    handle = attach_mask(optimizer, GradDrop(p=0.5), seed=2)
    handle.set_epoch(3)
    give(model, seed, 0)
    optimizer.step()
    optimizer.add_param_group({"params": named[3:], "mask": GradDrop(p=0.25)})
    give(model, seed, 1)
    optimizer.step()
    assert [group["param_steps"] for group in optimizer.param_groups] == [[2] * 3, [1] * (len(named) - 3)]
    assert optimizer.param_groups[1]["epoch"] == 3 and handle.active_fraction()[1] == 0.75


def test_warnings():
    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach_mask(optimizer, GradDrop(p=half))
    give(model, 1, 0)
    assert any("set_epoch(epoch) was not called" in text for text in warned(optimizer.step))
    handle.set_epoch(0)
    give(model, 1, 1)
    assert not warned(optimizer.step)


# --- closures, compilation, scalers -----------------------------------------------------------------------------------


def test_a_closure_computes_the_gradients_that_are_masked(seed):
    runs = []
    for with_closure in (False, True):
        model, optimizer, policy = built(GradDrop(p=0.3))
        attach_mask(optimizer, policy)
        for step in range(3):
            ids = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(seed + step))

            def closure(model=model, optimizer=optimizer, ids=ids):
                optimizer.zero_grad()
                loss = model(ids).square().mean()
                loss.backward()
                return loss

            if with_closure:
                loss = optimizer.step(closure) if step else optimizer.step(closure=closure)
                assert loss.requires_grad
            else:
                closure()
                optimizer.step()
        runs.append([bits(param) for param in model.parameters()])
    assert runs[0] == runs[1]


class Twice(torch.optim.SGD):
    def step(self, closure=None):
        closure()
        return closure()


class Never(torch.optim.SGD):
    def step(self, closure=None):
        return None


def test_closures_that_cannot_be_right_are_refused(seed):
    model = Encoder()

    def closure():
        give(model, seed, 0)
        return 0.0

    for kind, message in ((Twice, "calls its closure more than once"), (Never, "did not call the closure")):
        optimizer = kind(model.parameters(), lr=0.1)
        attach_mask(optimizer, GradDrop(p=0.5))
        with pytest.raises(RuntimeError, match=message):
            optimizer.step(closure)


@pytest.mark.filterwarnings("ignore:.*Profiler")
def test_a_compiled_step_is_masked(seed):
    torch._dynamo.reset()
    runs = []
    for compiled in (False, True):
        model, optimizer, policy = built(GradDrop(p=0.3), torch.optim.SGD)
        attach_mask(optimizer, policy)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for number in range(4):
            give(model, seed, number)
            step()
        runs.append([bits(param) for param in model.parameters()])
        assert optimizer.param_groups[0]["param_steps"][0] == 4
    assert runs[0] == runs[1]


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler(fused, seed):
    """Scales are powers of two, which masks commute with. A step with an inf is none, and its mask comes again."""
    runs = []
    for scaling in (False, True):
        model = Encoder()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=fused)
        handle = attach_mask(optimizer, GradDrop(p=0.3), model=model)
        scaler = torch.amp.GradScaler("cpu", enabled=scaling, init_scale=2.0**10, growth_interval=100)
        masks = []
        for step in range(6):
            give(model, seed, step)
            masks.append(bits(handle.mask("head.weight")))
            if scaling:
                scaler.scale(torch.ones(()))
                scale = scaler.get_scale()
                for param in model.parameters():
                    param.grad *= scale
                if step == 3:
                    model.head.weight.grad[0, 0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
            elif step != 3:
                optimizer.step()
        assert masks[3] == masks[4] != masks[5]
        assert optimizer.param_groups[0]["completed_steps"] == 5
        assert set(optimizer.param_groups[0]["param_steps"]) == {5}
        runs.append([bits(param) for param in model.parameters()])
    assert runs[0] == runs[1]


def test_scaled_float16_gradients_are_refused(seed):
    weight = nn.Parameter(torch.ones(5, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
    attach_mask(optimizer, GradDrop(p=0.5))
    weight.grad = torch.ones_like(weight)
    optimizer.grad_scale = torch.tensor(8.0)
    with refused(RuntimeError, "leaves these float16 gradients scaled", "fused=False", optimizer=optimizer):
        optimizer.step()


# --- gradients --------------------------------------------------------------------------------------------------------


def test_a_gradient_is_masked_once(seed):
    model, optimizer, policy = built(GradDrop(p=0.3), torch.optim.SGD)
    attach_mask(optimizer, policy)
    give(model, seed, 0)
    optimizer.step()
    with refused(RuntimeError, "masked already", "zero_grad", optimizer=optimizer):
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    for param in model.parameters():
        param.grad.add_(1.0)
    optimizer.step()


class Raises(torch.optim.SGD):
    fails = True

    def step(self, closure=None):
        if self.fails:
            raise MemoryError("planted")
        return super().step(closure)


def test_a_step_that_raises_loses_nothing_of_frozen_blocks(seed):
    model = Encoder()
    optimizer = Raises(param_groups(model), lr=0.1)
    handle = attach_mask(optimizer, GradFreeze(epochs=3))
    handle.set_epoch(0)
    give(model, seed, 0)
    with pytest.raises(MemoryError, match="planted"):
        optimizer.step()
    assert any(param.grad is None for param in model.parameters())
    optimizer.fails = False
    optimizer.step()
    assert all(param.grad is not None for param in model.parameters())
    assert all(group["completed_steps"] == 1 for group in optimizer.param_groups)


def test_gradients_that_cannot_be_masked_are_refused(seed):
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    attach_mask(optimizer, GradDrop(p=0.5))
    embedding(torch.tensor([1])).sum().backward()
    with refused(RuntimeError, "sparse", "needs dense gradients", optimizer=optimizer):
        optimizer.step()
    one, two = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = torch.optim.SGD([one, two], lr=0.1)
    attach_mask(optimizer, GradDrop(p=0.5))
    one.grad = two.grad = torch.ones(4)
    with refused(ValueError, "the same tensor for a gradient", "clone", optimizer=optimizer):
        optimizer.step()
    one.grad, two.grad = torch.ones(()).expand(4), torch.ones(4)
    with refused(ValueError, "overlapping memory", optimizer=optimizer):
        optimizer.step()


def test_a_flat_tensor_that_takes_the_place_of_parameters_is_refused(seed):
    """As DeepSpeed puts it into the groups of an optimizer without names."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(10, 10))], lr=0.1)
    attach_mask(optimizer, GradDrop(p=0.5))
    flat = torch.zeros(100, requires_grad=True)
    flat.grad = torch.ones(100)
    optimizer.param_groups[0]["params"] = [flat]
    with refused(TypeError, "is a flat buffer of a wrapper", optimizer=optimizer):
        optimizer.step()


def test_a_captured_step_is_refused(seed, monkeypatch):
    model, optimizer, policy = built(GradDrop(p=0.3))
    attach_mask(optimizer, policy)
    give(model, seed, 0)
    monkeypatch.setattr("graddrop_kernels.attached.checks.capture.capturing", lambda device: True)
    with refused(RuntimeError, "CUDA graph", "outside of the graph", optimizer=optimizer):
        optimizer.step()


# --- arguments --------------------------------------------------------------------------------------------------------


def _fixed():
    return FixedMask({"head.weight": torch.ones(3, 6, dtype=torch.bool)})


@pytest.mark.parametrize(
    "mask, arguments, parts",
    [
        (GradDrop(p=0.5), {"masked": "frozen"}, ["GradDrop with masked='frozen'", "FusedGradDropAdamW", "'gradient'"]),
        (GradDropEpoch(epochs=3), {}, ["GradDropEpoch with masked='frozen'"]),
        (RandomMask(density=0.1), {}, ["RandomMask with masked='frozen'"]),
        (_fixed(), {}, ["FixedMask with masked='frozen'"]),
        (TrainRows({"embeddings.weight": [1]}), {"masked": "gradient"}, ["TrainRows"]),
        (GradDrop(p=0.5), {"masked": "update"}, ["masked='update'", "FusedGradDropAdamW"]),
        (LayerGradDrop(p=0.5), {"masked": "update"}, ["masked='update'"]),
        (GaussianGradDrop(p=0.5), {"masked": "gradient"}, ["does not apply to GaussianGradDrop"]),
        (SampleBlocks(k=1, every=2, idle_state="drop"), {}, ["idle_state='drop' of SampleBlocks"]),
        (SampleBlocks(k=9, every=2), {}, ["k=9"]),
        (CycleBlocks(every=2, idle_state="drop"), {}, ["idle_state='drop' of CycleBlocks"]),
        (GradDrop(p=0.5), {"seed": -1}, ["seed of parameter group 0 must be an int"]),
        (GradDrop(p=0.5), {"seed": True}, ["seed of parameter group 0 must be an int"]),
        (GradDrop(p=0.5), {"model": 3}, ["model must be a torch.nn.Module"]),
        (GradDrop(p=0.5), {"model": nn.Linear(2, 2)}, ["parameters of the optimizer are not among the named ones"]),
        (GradDrop(p=0.5), {"model": nn.Linear(2, 2), "named_parameters": []}, ["not both"]),
        (GradDrop(p=0.5), {"backend": "fast"}, ["backend='fast' is unknown"]),
        ("GradDrop", {}, ["is not a mask policy"]),
        (0.5, {}, ["mask= must be a policy"]),
    ],
)  # fmt: skip
def test_arguments_that_cannot_work_are_refused(mask, arguments, parts):
    model = Encoder()
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
    for group in optimizer.param_groups:
        group.pop("mask", None)
        group.setdefault("blocks", [f"layer.{i}" for i in range(3)])
        group.setdefault("param_blocks", [None] * len(group["params"]))
    with refused((TypeError, ValueError), *parts, optimizer=optimizer):
        attach_mask(optimizer, mask, **arguments)


def test_a_policy_that_masks_in_another_way_by_itself_is_refused(monkeypatch):
    model = Encoder()
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
    for kind in (GradDrop, LayerGradDrop):
        monkeypatch.setattr(kind, "masked", "update")
        with refused(ValueError, "masked='update' of parameter group 0", optimizer=optimizer):
            attach_mask(optimizer, kind(p=0.5))


def test_optimizers_that_cannot_be_masked_are_refused():
    weight = nn.Parameter(torch.ones(3))
    attach = lambda optimizer: attach_mask(optimizer, GradDrop(p=0.5))
    with pytest.raises(TypeError, match="FusedGradDropAdamW masks inside"):
        attach(FusedGradDropAdamW([weight]))
    with pytest.raises(TypeError, match=r"needs a torch.optim.Optimizer, got Linear"):
        attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LBFGS"):
        attach(torch.optim.LBFGS([weight]))
    with pytest.raises(ValueError, match=r"differentiable=True of parameter group 0"):
        attach(torch.optim.SGD([weight], differentiable=True))
    optimizer = torch.optim.SGD([weight])
    attach(optimizer)
    with refused(ValueError, "attached to this optimizer already", optimizer=optimizer):
        attach(optimizer)
    outside = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    with pytest.raises(ValueError, match="steps flat tensors"):
        attach(outside)
    weight._is_flat_param, weight.grad = True, torch.ones(3)
    optimizer = torch.optim.SGD([weight])
    attach(optimizer)
    with refused(TypeError, "call graddrop_kernels.attach_fsdp1", optimizer=optimizer):
        optimizer.step()


def test_two_parameters_of_one_name_are_refused():
    named = [("weight", nn.Parameter(torch.ones(3))), ("module.weight", nn.Parameter(torch.ones(3)))]
    optimizer = torch.optim.SGD([param for _, param in named])
    with refused(ValueError, "two parameters are called 'weight'", optimizer=optimizer):
        attach_mask(optimizer, GradDrop(p=0.5), named_parameters=named)


def test_block_policies_need_blocks():
    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with refused(ValueError, "drops whole transformer blocks", optimizer=optimizer):
        attach_mask(optimizer, LayerGradDrop(p=0.5), named_parameters=model.named_parameters())
    attach_mask(optimizer, LayerGradDrop(p=0.5), model=model)
    assert optimizer.param_groups[0]["blocks"] == ["layer.0", "layer.1", "layer.2"]


def test_wrappers_that_step_the_optimizer_inside(seed):
    accelerate = pytest.importorskip("accelerate")
    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer)
    handle = attach_mask(wrapped, GradDrop(p=0.5), model=model)
    assert handle.optimizer is optimizer
    give(model, seed, 0)
    wrapped.step()
    assert optimizer.param_groups[0]["completed_steps"] == 1
    assert any((param.grad == 0).any() for param in model.parameters())


def test_nothing_of_an_optimizer_changes_when_it_is_looked_at(seed):
    model, optimizer, policy = built(GradDrop(p=0.3))
    handle = attach_mask(optimizer, policy)
    train(model, optimizer, handle, range(2), seed)
    before = snapshot(optimizer)
    handle.describe(), handle.active_fraction(), handle.mask("head.weight"), handle.mask("head.weight", step=0)
    assert snapshot(optimizer) == before
