"""FusedGradDropAdamW as an optimizer: the constructor, torch's arithmetic, any memory and dtype, the named backend."""

import inspect
import itertools
import weakref

import pytest
import torch
from cases import assert_same_bits, ulps_apart
from torch import nn
from toy import ROUNDED_ONCE, Encoder, bits, build, every_policy, random_grads, state_bits, train

from graddrop_kernels import FusedGradDropAdamW, GradDrop, backends

# The constructor.


def test_arguments_are_those_of_torch_in_their_order():
    theirs = inspect.signature(torch.optim.AdamW.__init__).parameters
    ours = inspect.signature(FusedGradDropAdamW.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    extra = {name: parameter.default for name, parameter in ours.items() if name not in theirs}
    assert extra == {
        "mask": GradDrop(p=0.2),
        "seed": 0,
        "masked": None,
        "cautious_weight_decay": False,
        "bias_correction": "active",
        "moment_dtype": None,
        "master_weights": False,
        "stochastic_rounding": False,
        "stochastic_moments": False,
        "max_grad_norm": None,
        "norm_after_mask": False,
        "backend": "auto",
        "strict": True,
    }
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in extra)


@pytest.mark.parametrize(
    "arguments, keywords",
    [
        ((), {}),
        ((0.3, (0.7, 0.9), 1e-5, 0.4, True), {}),
        ((), {"lr": 0.2, "maximize": True, "foreach": False, "fused": True}),
        ((), {"fused": False, "amsgrad": True, "capturable": False, "differentiable": False}),
        ((), {"foreach": True}),
    ],
)
def test_a_drop_in_for_torch(arguments, keywords):
    weight = nn.Parameter(torch.ones(3))
    theirs, ours = (
        torch.optim.AdamW([weight], *arguments, **keywords),
        FusedGradDropAdamW([weight], *arguments, **keywords),
    )
    assert isinstance(ours, torch.optim.AdamW)
    for key, value in theirs.defaults.items():
        assert ours.defaults[key] == value, key
    assert ours.param_groups[0]["params"][0] is weight
    for key in theirs.param_groups[0].keys() - {"params"}:
        assert ours.param_groups[0][key] == theirs.param_groups[0][key], key


def test_foreach_and_fused_have_no_effect_on_the_step(seed):
    results = []
    for keywords in ({}, {"fused": True}, {"fused": False}, {"foreach": True}, {"foreach": False}):
        model = Encoder()
        optimizer = FusedGradDropAdamW(model.named_parameters(), lr=0.01, **keywords)
        train(optimizer, model.parameters(), range(3), seed)
        results.append(state_bits(model, optimizer))
        # what GradScaler asks before it leaves the unscaling to step(): test_grad_scaler.py
        assert optimizer._step_supports_amp_scaling == (keywords.get("fused") is True)
    assert all(result == results[0] for result in results)


def test_parameters_in_every_form(seed):
    """A list, a generator, named pairs, group dicts of both, one tensor in a group."""
    model = Encoder(blocks=2)
    named = list(model.named_parameters())
    forms = [
        model.parameters(),
        list(model.parameters()),
        model.named_parameters(),
        [{"params": model.parameters()}],
        [{"params": [param]} for param in model.parameters()],
        [{"params": param} for param in model.parameters()],
        [{"params": named[:3]}, {"params": iter(named[3:]), "lr": 0.5}],
    ]
    for form in forms:
        optimizer = FusedGradDropAdamW(form, lr=0.01, seed=seed)
        assert [param for group in optimizer.param_groups for param in group["params"]] == [param for _, param in named]
        random_grads(model.parameters(), torch.Generator().manual_seed(seed))
        optimizer.step()
        assert all(optimizer.state[param]["step"].item() == 1 for param in model.parameters())


def test_the_callers_groups_are_left_alone():
    group = {"params": [("weight", nn.Parameter(torch.ones(3)))], "lr": 0.5}
    before = dict(group)
    FusedGradDropAdamW([group], mask=GradDrop(p=0.5))
    assert group == before


# The arithmetic is torch's, where every operation is rounded once.



def assert_near(ours, theirs, scale):
    """Within 2 ulp at the magnitude ``scale``, a sum's larger term: a sum that cancels has no ulp of its own."""
    spacing = torch.finfo(torch.float32).eps * 2.0 ** torch.floor(torch.log2(scale.double()))
    assert ((ours.double() - theirs.double()).abs() <= 2 * spacing).all()


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"amsgrad": True},
        {"maximize": True},
        {"amsgrad": True, "maximize": True, "weight_decay": 0.0},
        {"betas": (0.9, 0.999)},
    ],
    ids=repr,
)
def test_without_a_mask_a_step_is_torchs_within_2_ulp(keywords, seed):
    arguments = {"lr": 0.03, "betas": (0.75, 0.96875), "eps": 1e-4, "weight_decay": 0.2, **keywords}
    same_moments = (
        "betas" not in keywords
    )  # 1 - beta2 is rounded at another place for betas that are no binary fractions
    generator = torch.Generator().manual_seed(seed)
    theirs_model, ours_model = Encoder(), Encoder()
    theirs = torch.optim.AdamW(theirs_model.parameters(), fused=True, **arguments)
    ours = FusedGradDropAdamW(ours_model.parameters(), mask=None, backend=ROUNDED_ONCE, **arguments)
    for step in range(8):
        random_grads(theirs_model.parameters(), generator)
        with torch.no_grad():  # the same start for both
            for a, b in zip(theirs_model.parameters(), ours_model.parameters(), strict=True):
                b.copy_(a.abs() + 1.0)  # away from 0, where the ulp of a difference means nothing
                a.copy_(b)
                b.grad = a.grad.clone()
                for key, value in theirs.state[a].items():
                    ours.state[b][key].copy_(value)
        theirs.step()
        ours.step()
        for a, b in zip(theirs_model.parameters(), ours_model.parameters(), strict=True):
            assert ulps_apart(a.detach(), b.detach()).max() <= 2
            assert ours.state[b]["step"].item() == theirs.state[a]["step"].item() == step + 1
            if same_moments:
                assert_near(
                    ours.state[b]["exp_avg"],
                    theirs.state[a]["exp_avg"],
                    torch.maximum(theirs.state[a]["exp_avg"].abs(), a.grad.abs()),
                )
                for key in ("exp_avg_sq", "max_exp_avg_sq") if "amsgrad" in keywords else ("exp_avg_sq",):
                    assert ulps_apart(ours.state[b][key], theirs.state[a][key]).max() <= 2


def test_maximize_is_the_negative_gradient(seed):
    results = []
    for sign, maximize in ((1, True), (-1, False)):
        model, optimizer = build("graddrop", maximize=maximize)
        for step in range(3):
            random_grads(model.parameters(), torch.Generator().manual_seed(seed + step))
            for param in model.parameters():
                param.grad *= sign
            optimizer.step()
        results.append(state_bits(model, optimizer))
    assert results[0] == results[1]


@every_policy
def test_gradients_are_never_written_and_no_generator_is_consumed(policy, seed):
    model, optimizer = build(policy)
    optimizer.set_epoch(1)
    random_state = torch.get_rng_state()
    for _ in range(2):
        random_grads(model.parameters(), torch.Generator().manual_seed(seed))
        grads = [(param.grad, bits(param.grad)) for param in model.parameters()]
        optimizer.step()
        optimizer.mask(next(model.parameters()))
        assert all(
            param.grad is grad and bits(grad) == before
            for param, (grad, before) in zip(model.parameters(), grads, strict=True)
        )
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_gradients_are_gone_after_zero_grad(max_grad_norm, backend, seed):
    """Or they would lie beside those of the next backward pass."""
    model = Encoder()
    optimizer = FusedGradDropAdamW(model.named_parameters(), backend=backend, max_grad_norm=max_grad_norm)
    for _ in range(2):
        random_grads(model.parameters(), torch.Generator().manual_seed(seed))
        grads = [weakref.ref(param.grad) for param in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        assert not any(grad() is not None for grad in grads)


@every_policy
def test_strides_do_not_matter(policy, seed):
    """Transposed and sliced tensors train as contiguous ones: an element's index is its place in contiguous order."""
    model, optimizer = build(policy)
    twin, twins = build(policy)
    with torch.no_grad():
        for name, param in twin.named_parameters():
            if param.dim() == 2:
                param.data = (
                    param.t().contiguous().t()
                    if "layer.1" in name
                    else torch.stack((param, param.new_full(param.shape, 7.0)), -1)[..., 0]
                )
    assert not twin.head.weight.is_contiguous() and not twin.layer[1].linear.weight.is_contiguous()
    for step in range(6):
        for each in (optimizer, twins):
            each.set_epoch(step // 2)
        random_grads(model.parameters(), torch.Generator().manual_seed(seed + step))
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            b.grad = a.grad.t().contiguous().t() if a.dim() == 2 else a.grad.clone()
        optimizer.step()
        twins.step()
        assert state_bits(model, optimizer) == state_bits(twin, twins)
    assert (
        twin.head.weight.as_strided((3, 6), (12, 2), 1) == 7
    ).all()  # the neighbours of a sliced parameter's elements


def test_an_expanded_gradient_is_the_gradient_that_it_shows(seed):
    """sum().backward() gives gradients of stride 0."""
    results = []
    for expanded in (True, False):
        weight = nn.Parameter(torch.linspace(1, 2, 40).view(5, 8))
        optimizer = FusedGradDropAdamW([("weight", weight)], lr=0.01, mask=GradDrop(p=0.4), seed=seed)
        for step in range(3):
            grad = torch.tensor(0.25 * (step + 1)).expand(5, 8)
            weight.grad = grad if expanded else grad.clone(memory_format=torch.contiguous_format)
            optimizer.step()
        results.append((bits(weight), bits(optimizer.state[weight]["exp_avg_sq"])))
    assert results[0] == results[1]


@pytest.mark.parametrize("masked", ["gradient", "frozen"])
def test_a_dropped_inf_or_nan_does_no_harm(masked, seed):
    weight = nn.Parameter(torch.ones(64))
    optimizer = FusedGradDropAdamW([("weight", weight)], mask=GradDrop(p=0.5), masked=masked, seed=seed)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        harm = torch.tensor([float("inf"), float("nan"), float("-inf"), 1e38]).repeat(16)
        weight.grad = torch.where(optimizer.mask(weight), weight.grad, harm)
        optimizer.step()
    assert weight.isfinite().all() and all(value.isfinite().all() for value in optimizer.state[weight].values())


def test_several_dtypes_in_one_optimizer(seed):
    def params():
        generator = torch.Generator().manual_seed(seed)
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float32, torch.bfloat16)
        return [
            (f"weight{i}", nn.Parameter((torch.randn(50 + i, generator=generator) + 3).to(dtype)))
            for i, dtype in enumerate(dtypes)
        ]

    arguments = {"lr": 0.02, "betas": (0.7, 0.9), "weight_decay": 0.1, "mask": GradDrop(p=0.3), "seed": seed}
    together, alone = params(), params()
    optimizers = [
        FusedGradDropAdamW(together, **arguments),
        *(FusedGradDropAdamW([pair], **arguments) for pair in alone),
    ]
    for step in range(4):
        for named in (together, alone):
            random_grads([param for _, param in named], torch.Generator().manual_seed(seed + step))
        for optimizer in optimizers:
            optimizer.step()
    for (name, a), (_, b), optimizer in zip(together, alone, optimizers[1:], strict=True):
        assert bits(a) == bits(b), name
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert bits(optimizers[0].state[a][key]) == bits(optimizer.state[b][key])
        assert optimizers[0].state[a]["exp_avg"].dtype is a.dtype
        assert optimizers[0].state[a]["step"].dtype is torch.float32


@pytest.mark.parametrize(
    "dtype, moments", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)]
)
def test_moment_dtype_float32(dtype, moments):
    weight = nn.Parameter(torch.ones(9, dtype=dtype))
    optimizer = FusedGradDropAdamW([weight], amsgrad=True, moment_dtype=torch.float32)
    weight.grad = torch.full_like(weight, 0.3)
    optimizer.step()
    assert {key: value.dtype for key, value in optimizer.state[weight].items()} == {
        "step": torch.float32, "exp_avg": moments, "exp_avg_sq": moments, "max_exp_avg_sq": moments,
    }  # fmt: skip


def test_empty_and_zero_dimensional_parameters(seed):
    named = [
        ("empty", nn.Parameter(torch.empty(0, 4))),
        ("scalar", nn.Parameter(torch.tensor(2.0))),
        ("usual", nn.Parameter(torch.ones(5))),
    ]
    optimizer = FusedGradDropAdamW(named, mask=GradDrop(p=0.5), seed=seed)
    random_grads([param for _, param in named], torch.Generator().manual_seed(seed))
    optimizer.step()
    assert optimizer.mask("empty").shape == (0, 4) and optimizer.mask("scalar").shape == ()
    assert all(optimizer.state[param]["step"].item() == 1 for _, param in named)
    assert FusedGradDropAdamW([named[0]]).active_fraction() == [1.0]
    weight = nn.Parameter(torch.ones(5))
    weight.grad = torch.ones(5)
    optimizer = FusedGradDropAdamW([{"params": []}, {"params": [weight]}, {"params": []}], mask=GradDrop(p=0.5))
    optimizer.step()
    assert (
        optimizer.active_fraction() == [1.0, 0.5, 1.0] and (weight != 1).all()
    )  # weight decay reaches what is dropped


# Backends.


def test_the_named_backend_is_the_one_that_steps(monkeypatch, seed):
    called = []
    table = tuple(
        backends.Backend(
            **{**vars(row), "masked_adamw_": lambda batch, row=row: (called.append(row.name), row.masked_adamw_(batch))}
        )
        for row in backends.BACKENDS
    )
    monkeypatch.setattr(backends, "BACKENDS", table)
    monkeypatch.setattr(backends, "_BY_NAME", {row.name: row for row in table})
    monkeypatch.delenv("GRADDROP_BACKEND", raising=False)
    for name in ("reference", "exact", *(("cpu",) if "cpu" in backends.available_backends() else ())):
        model, optimizer = build("graddrop", backend=name)
        random_grads(model.parameters(), torch.Generator().manual_seed(seed))
        optimizer.step()
        assert called.pop() == name and not called
    model, optimizer = build("graddrop")
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    optimizer.step()
    assert called.pop() == backends.available_backends()[0]
    monkeypatch.setenv("GRADDROP_BACKEND", "exact")
    optimizer.step()
    assert called == ["exact"]


@every_policy
def test_the_backends_agree(policy, seed):
    """Bit for bit: the compiled one and the reference that rounds every operation once."""
    results = []
    for name in dict.fromkeys(("exact", backends.available_backends()[0])):
        model, optimizer = build(policy, backend=name, seed=seed)
        train(optimizer, model.parameters(), range(10), seed)
        results.append((model, optimizer))
    for (model, optimizer), (other, reference) in itertools.pairwise(results):
        for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
            assert_same_bits(a.detach(), b.detach(), name)
            assert_same_bits(optimizer.state[a]["exp_avg_sq"], reference.state[b]["exp_avg_sq"], name)
