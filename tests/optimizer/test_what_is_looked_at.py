"""What a step looks at: all that a kernel trusts, at every step, and nothing of what is never stepped."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from toy import emulate_cuda, refused

import graddrop_kernels
from graddrop_kernels import FixedMask, FusedGradDropAdamW, GradDrop, GradFreeze, LayerGradDrop
from graddrop_kernels.backends import cuda

POLICIES = {"plain": lambda: None, "graddrop": lambda: GradDrop(0.3), "layer": lambda: LayerGradDrop(0.5, layers=["*"])}


def trained(mask=None, count=3, **options):
    params = [torch.nn.Parameter(torch.randn(17)) for _ in range(count)]
    optimizer = FusedGradDropAdamW([(f"{i}.w", p) for i, p in enumerate(params)], mask=mask, **options)
    for param in params:
        param.grad = torch.randn(17)
    optimizer.step()
    return params, optimizer


def contents(params, optimizer):
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    counts = [(group["completed_steps"], group["epoch"]) for group in optimizer.param_groups]
    return [p.detach().clone() for p in params], states, counts


def assert_same(before, after):
    torch.testing.assert_close(after, before, rtol=0, atol=0)


# Storage that was freed after the first step.


@pytest.mark.parametrize("mask", POLICIES)
@pytest.mark.parametrize("left", [0, 8], ids=["freed", "too short"])
@pytest.mark.parametrize("offset", [0, 64], ids=["whole", "slice of a larger tensor"])
def test_a_gradient_without_its_memory_is_refused_at_every_step(mask, left, offset):
    params, optimizer = trained(POLICIES[mask]())
    for i, param in enumerate(params):
        param.grad = torch.randn(17 + offset)[offset:]
        if i == 1:
            param.grad.untyped_storage().resize_(left)
    before = contents(params, optimizer)
    with refused(ValueError, "the gradient of '1.w' needs .* bytes, but its storage has"):
        optimizer.step()
    assert_same(before, contents(params, optimizer))
    params[1].grad = torch.randn(17)
    optimizer.step()


@pytest.mark.parametrize("what", ["param", "exp_avg", "exp_avg_sq"])
def test_a_parameter_or_a_moment_without_its_memory_is_refused_at_every_step(what):
    params, optimizer = trained(GradDrop(0.3))
    tensor = params[1] if what == "param" else optimizer.state[params[1]][what]
    tensor.untyped_storage().resize_(0)
    with refused(ValueError, "'1.w' needs 68 bytes, but its storage has 0"):
        optimizer.step()


# What is never stepped.

FROZEN = {
    "uint8": lambda: torch.zeros(8, dtype=torch.uint8),
    "int8": lambda: torch.zeros(8, dtype=torch.int8),
    "bool": lambda: torch.zeros(8, dtype=torch.bool),
    "float8": lambda: torch.zeros(8, dtype=torch.float8_e4m3fn),
    "expanded": lambda: torch.zeros(1).expand(8),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "mkldnn": lambda: torch.eye(3).to_mkldnn(),
    "meta": lambda: torch.zeros(8, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], layout=torch.jagged),
    "freed": lambda: torch.zeros(8),
}
FROZEN_POLICIES = {**POLICIES, "freeze": lambda: GradFreeze(2, layers=["*"])}


@pytest.mark.parametrize("mask", FROZEN_POLICIES)
@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested", "ignore:.*set_epoch")
def test_a_frozen_parameter_may_be_of_any_kind(kind, mask):
    frozen, param = torch.nn.Parameter(FROZEN[kind](), requires_grad=False), torch.nn.Parameter(torch.ones(5))
    optimizer = FusedGradDropAdamW([("0.w", frozen), ("1.w", param)], mask=FROZEN_POLICIES[mask]())
    if kind == "freed":
        frozen.untyped_storage().resize_(0)
    for _ in range(2):
        param.grad = torch.ones(5)
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(param.detach(), torch.ones(5)) or mask != "plain"
    assert frozen not in optimizer.state and optimizer.state[param]["step"] == 2 or mask in ("layer", "freeze")
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(optimizer.active_fraction()) == 1
    assert "1.w" in optimizer.describe() or optimizer.describe()


def test_a_frozen_parameter_that_is_trained_later_is_looked_at_then():
    frozen, param = torch.nn.Parameter(torch.zeros(1).expand(8), requires_grad=False), torch.nn.Parameter(torch.ones(5))
    optimizer = FusedGradDropAdamW([param, frozen])
    param.grad, frozen.grad = torch.ones(5), torch.ones(8)
    with refused(ValueError, "parameter '0.1' has overlapping memory"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(5)) and not optimizer.state


def test_integers_with_a_gradient_are_refused_at_the_step():
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)
    optimizer = FusedGradDropAdamW([("w", param)])
    param.grad = torch.ones(3, dtype=torch.int32)
    with refused(TypeError, "parameter 'w' has dtype torch.int32; float32"):
        optimizer.step()


@pytest.mark.parametrize("kind, said", [
    ("sparse", "has the layout torch.sparse_coo"), ("csr", "has the layout torch.sparse_csr"),
    ("mkldnn", "has the layout torch._mkldnn"), ("nested", "has the layout torch.jagged"),
    ("expanded", "has overlapping memory"),
])  # fmt: skip
def test_a_trained_parameter_must_be_dense(kind, said):
    with refused((TypeError, ValueError), f"parameter '0.0' {said}"):
        FusedGradDropAdamW([torch.nn.Parameter(FROZEN[kind]())])


# Groups.


def test_groups_can_be_cleared_and_given_anew():
    params, optimizer = trained(GradDrop(0.3))
    optimizer.set_epoch(3)
    optimizer.param_groups.clear()
    optimizer.state.clear()
    optimizer.step()
    optimizer.add_param_group({"params": [(f"new.{i}", p) for i, p in enumerate(params)]})
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [1, 1, 1]
    assert optimizer.param_groups[0]["completed_steps"] == 1


def test_a_late_failure_of_an_added_group_leaves_everything():
    params, optimizer = trained(LayerGradDrop(0.5, layers=["*"]))
    wrong = {"params": [("3.w", torch.nn.Parameter(torch.ones(3)))], "mask": FixedMask({"unknown": torch.ones(3) > 0})}
    before, groups = contents(params, optimizer), [dict(group) for group in optimizer.param_groups]
    with refused(ValueError, "no parameter is called 'unknown'"):
        optimizer.add_param_group(wrong)
    assert_same(before, contents(params, optimizer))
    assert [dict(group) for group in optimizer.param_groups] == groups
    optimizer.step()


def test_a_policy_put_into_a_group_by_hand_is_explained():
    _, optimizer = trained(GradDrop(0.3))
    optimizer.param_groups[0]["mask"] = GradDrop(0.5)
    with refused(TypeError, r"groups keep policies as text.*group\['mask'\] = GradDrop\(...\).to_json\(\)"):
        optimizer.step()
    optimizer.param_groups[0]["mask"] = GradDrop(0.5).to_json()
    assert optimizer.active_fraction() == [0.5]


def test_a_tensor_taken_out_of_a_named_group_is_explained():
    _, optimizer = trained(GradDrop(0.3))
    del optimizer.param_groups[0]["params"][1]
    with refused(ValueError, r"has 2 tensors but 3 names.*do the same with group\['param_names'\]"):
        optimizer.step()
    del optimizer.param_groups[0]["param_names"][1]
    optimizer.step()


# Devices.

_FACTORIES = (
    r"zeros|ones|empty\w*|full|tensor|arange|range|as_tensor|asarray|scalar_tensor|rand\w*|normal|linspace|logspace|eye|"
    r"tri[lu]_indices|complex|hann_window|from_file|sparse_\w+"
)
MADE = rf"\btorch\.(?!\w+_like\b)({_FACTORIES})\("


def calls(text):
    """The calls of torch's factories in a source text, with their arguments."""
    for found in re.finditer(MADE, text):
        depth = 0
        for end, letter in enumerate(text[found.end() - 1 :], found.end()):
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                yield text[found.start() : end]
                break


def test_every_tensor_of_the_package_is_made_on_a_named_device():
    """Under ``with torch.device(...)`` torch makes it elsewhere. Demo and tools are programs of their own."""
    assert list(calls("x = torch.empty((n(), 2), pin_memory=True), 1")) == ["torch.empty((n(), 2), pin_memory=True)"]
    root, seen = Path(graddrop_kernels.__file__).parent, 0
    for path in root.rglob("*.py"):
        if path.relative_to(root).parts[0] in ("demo", "tools"):
            continue
        for call in calls(re.sub(r"^\s*>>>.*$", "", path.read_text(), flags=re.MULTILINE)):
            assert "device=" in call, f"{path.name}: {call} names no device"
            seen += 1
    assert seen > 30


@pytest.mark.parametrize("backend", ["auto", "reference", "cuda"])
@pytest.mark.parametrize("mask", [*POLICIES, "fixed"])
def test_everything_works_under_another_default_device(mask, backend, monkeypatch):
    """As where a second, large model is being built."""
    if backend == "cuda":
        if cuda._load()[0] is None:
            pytest.skip("no CUDA library: nvcc was not there when the package was built")
        emulate_cuda(monkeypatch)

    def of(mask):
        return FixedMask({"1.w": torch.arange(17, device="cpu") > 3}) if mask == "fixed" else POLICIES[mask]()

    torch.manual_seed(5)
    params, optimizer = trained(of(mask), fused=True, max_grad_norm=0.5, backend=backend)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    saved = optimizer.state_dict()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    named = [(f"{i}.w", p) for i, p in enumerate(twins)]
    twin = FusedGradDropAdamW(named, mask=of(mask), fused=True, max_grad_norm=0.5, backend=backend)
    for own, made, elsewhere in ((params, optimizer, False), (twins, twin, True)):
        with torch.device("meta" if elsewhere else "cpu"):
            made.load_state_dict(saved)
            made.zero_grad()
            for _ in range(2):
                scaler.scale(sum((p * p).sum() for p in own)).backward()
                scaler.step(made)
                scaler.update()
                made.zero_grad()
            assert made.mask(own[0]).device.type == "cpu"
            made.set_epoch(1)
            made.describe()
    assert_same(contents(params, optimizer), contents(twins, twin))


# Tensors without memory.


@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 1.0}, {"master_weights": True}, {"backend": "reference"}], ids=str
)
@pytest.mark.parametrize("mask", POLICIES)
def test_fake_tensors_get_a_state(mask, options):
    """Estimators of memory run the training under FakeTensorMode."""
    with FakeTensorMode():
        model = torch.nn.Sequential(*(torch.nn.Linear(4, n, dtype=torch.bfloat16) for n in (4, 2)))
        optimizer = FusedGradDropAdamW(model.named_parameters(), mask=POLICIES[mask](), **options)
        for _ in range(2):
            model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state[model[0].weight]
        assert type(state["exp_avg"]).__name__ == "FakeTensor" and state["exp_avg"].shape == (4, 4)
        assert ("master_param" in state) == bool(options.get("master_weights"))
        handle = optimizer.step_in_backward() if not options.get("max_grad_norm") else None
        model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
        assert handle is None or model[0].weight.grad is None


@pytest.mark.parametrize("after_steps", [False, True])
@pytest.mark.parametrize("what", ["grad", "exp_avg", "exp_avg_sq"])
def test_a_fake_tensor_beside_real_ones_is_refused(what, after_steps):
    """A kernel would be given its address, which is 0."""
    params, optimizer = trained(GradDrop(0.3))
    if not after_steps:
        optimizer.load_state_dict(optimizer.state_dict())
    with FakeTensorMode():
        fake = torch.zeros(17)
    if what == "grad":
        params[1].grad = fake
    else:
        optimizer.state[params[1]][what] = fake
    before = params[0].detach().clone()
    with refused((TypeError, ValueError), "of '1.w' is a FakeTensor"):
        optimizer.step()
    assert torch.equal(params[0].detach(), before)


def test_parameters_on_the_meta_device_get_torchs_error_at_the_step():
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = FusedGradDropAdamW([param])
    param.grad = torch.ones(3, device="meta")
    with refused(RuntimeError, "`fused=True` requires all the params to be floating point Tensors of supported"):
        optimizer.step()
    assert not optimizer.state
