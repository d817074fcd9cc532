"""FusedGradDropAdamW as an optimizer: torch's interface, groups, closures, hooks, schedulers, copies, mask()."""

import copy
import inspect
import itertools
import pickle
import warnings

import pytest
import torch
from cases import assert_same_bits, ulps_apart
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from graddrop_kernels import (
    ExponentialAnneal,
    FixedMask,
    FusedGradDropAdamW,
    GaussianGradDrop,
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    backends,
    param_groups,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return x + self.norm(self.linear(x)).tanh()


class Encoder(nn.Module):
    """Embeddings, blocks ``layer.0`` ..., a head; always the same start values, none of them near 0."""

    def __init__(self, blocks=3, dtype=torch.float32):
        super().__init__()
        self.embeddings = nn.Embedding(7, 6)
        self.layer = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(6, 3)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.rand(param.shape, generator=generator) + 0.5)
        self.to(dtype)

    def forward(self, ids):
        x = self.embeddings(ids)
        for block in self.layer:
            x = block(x)
        return self.head(x.mean(1))


def random_grads(params, generator):
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def bits(tensor):
    """A value that is equal exactly when dtype, shape and every bit are, NaN included."""
    if tensor is None:
        return None
    if tensor.layout is not torch.strided:
        return tensor.layout, bits(tensor._indices()), bits(tensor._values())
    if tensor.is_complex():
        return tensor.dtype, bits(torch.view_as_real(tensor))
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).flatten()
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def snapshot(optimizer):
    """Everything that a step can change, as a value to compare."""

    def plain(value):
        return bits(value) if isinstance(value, torch.Tensor) else copy.deepcopy(value)

    groups = [
        {key: plain(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    params = [
        [(id(param), bits(param), bits(param.grad)) for param in group["params"]] for group in optimizer.param_groups
    ]
    state = {
        id(param): {key: plain(value) for key, value in values.items()} for param, values in optimizer.state.items()
    }
    return groups, params, state


def train(optimizer, params, steps, seed, set_epoch=True):
    """Steps ``steps`` of a training of four steps an epoch, with gradients that depend on seed and step only."""
    params = list(params)
    for step in steps:
        if step % 4 == 0 and set_epoch:
            optimizer.set_epoch(step // 4)
        random_grads(params, torch.Generator().manual_seed(seed + step))
        optimizer.step()


def half(epoch):
    return 0.5 / (epoch + 1)


def keep_some(model):
    return {
        name: torch.arange(param.numel()).view(param.shape) % 3 != 0
        for name, param in model.named_parameters()
        if "linear" in name
    }


# One of every policy, for what must hold for each: (policy for a model, the optimizer's own arguments).
POLICIES = {
    "plain": lambda model: None,
    "graddrop": lambda model: GradDrop(p=0.3),
    "graddrop-epoch": lambda model: GradDrop(p=0.3, every="epoch"),
    "graddrop-anneal": lambda model: GradDrop(p=LinearAnneal(epochs=4)),
    "graddrop-callable": lambda model: GradDrop(p=half),
    "gaussian": lambda model: GaussianGradDrop(p=ExponentialAnneal(0.6, 0.8)),
    "layer": lambda model: LayerGradDrop(p=0.4),
    "layer-epoch": lambda model: LayerGradDrop(p=half, every="epoch"),
    "epoch": lambda model: GradDropEpoch(epochs=4),
    "epoch-bitpacked": lambda model: GradDropEpoch(epochs=5, storage="bitpacked"),
    "toggle": lambda model: GradDropEpoch(epochs=4, toggle=True),
    "freeze": lambda model: GradFreeze(epochs=4),
    "freeze-up": lambda model: GradFreeze(epochs=4, direction="bottom_up", blocks_per_epoch=1),
    "fixed": lambda model: FixedMask(keep_some(model), scale=1.25),
}
every_policy = pytest.mark.parametrize("policy", POLICIES)


def build(policy, model=None, **arguments):
    """(model, optimizer) over the paper's scope, with none of the defaults."""
    model = Encoder() if model is None else model
    arguments = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "seed": 11, **arguments}
    return model, FusedGradDropAdamW(param_groups(model, weight_decay=0.1), mask=POLICIES[policy](model), **arguments)


def state_bits(model, optimizer):
    """Parameters and their state by name, for comparison."""
    state = lambda param: {key: bits(value) for key, value in optimizer.state.get(param, {}).items()}
    return {name: (bits(param), state(param)) for name, param in model.named_parameters()}


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
        "bias_correction": "active",
        "moment_dtype": None,
        "backend": "auto",
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
        assert not hasattr(
            optimizer, "_step_supports_amp_scaling"
        )  # else GradScaler would leave the unscaling to step()
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

ROUNDED_ONCE = "cpu" if "cpu" in backends.available_backends() else "exact"


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
                b.copy_(a + 1.0)  # away from 0, where the ulp of a difference means nothing
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


# Groups.


def test_groups_with_their_own_masks_and_values(seed):
    weights = [nn.Parameter(torch.ones(3000)) for _ in range(4)]
    optimizer = FusedGradDropAdamW(
        [
            {"params": [("a", weights[0])]},
            {"params": [("b", weights[1])], "mask": None, "lr": 0.5},
            {"params": [("c", weights[2])], "mask": GradDrop(p=0.9), "seed": seed + 1},
            {"params": [("d", weights[3])], "mask": GradDropEpoch(epochs=4), "bias_correction": "global"},
        ],
        lr=0.01, weight_decay=0.0, mask=GradDrop(p=0.5), seed=seed,
    )  # fmt: skip
    optimizer.set_epoch(0)
    shares = [optimizer.mask(name).double().mean().item() for name in "abcd"]
    for share, expected in zip(shares, (0.5, 1.0, 0.1, 0.25)):
        assert abs(share - expected) <= 5 * (expected * (1 - expected) / 3000) ** 0.5
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    for weight, name, lr in zip(weights, "abcd", (0.01, 0.5, 0.01, 0.01)):
        moved = (1 - weight.detach()).abs()
        keep = optimizer.mask(name, step=0)
        assert torch.allclose(
            moved[keep], torch.tensor(lr), rtol=1e-4
        )  # Adam's first step is of size lr, whatever the scale
        assert (moved[~keep] == 0).all()


def test_the_seed_and_the_name_decide_the_stream(seed):
    def masks(**arguments):
        named = [("a", nn.Parameter(torch.ones(64, 64))), ("b", nn.Parameter(torch.ones(64, 64)))]
        optimizer = FusedGradDropAdamW(named, mask=GradDrop(p=0.5), **arguments)
        return optimizer.mask("a"), optimizer.mask("b")

    same, again, other = masks(seed=seed), masks(seed=seed), masks(seed=seed + 2**32)
    assert torch.equal(same[0], again[0]) and torch.equal(same[1], again[1])
    for one, two in ((same[0], same[1]), (same[0], other[0]), (same[1], other[1])):
        assert abs((one == two).double().mean() - 0.5) < 5 * 0.5 / 64
    masks(seed=2**64 - 1)


def test_without_names_the_place_is_the_name():
    weights = [nn.Parameter(torch.ones(40, 40)) for _ in range(3)]
    nameless = FusedGradDropAdamW([{"params": weights[:2]}, {"params": weights[2:]}], mask=GradDrop(p=0.5))
    named = FusedGradDropAdamW(
        zip(("0.0", "0.1", "1.0"), (nn.Parameter(torch.ones(40, 40)) for _ in range(3))), mask=GradDrop(p=0.5)
    )
    for weight, name in zip(weights, ("0.0", "0.1", "1.0")):
        assert torch.equal(nameless.mask(weight), named.mask(name)) and torch.equal(
            nameless.mask(name), named.mask(name)
        )


def test_param_groups_mask_the_blocks_only(seed):
    model, optimizer = build("graddrop")
    names = {name for name, param in model.named_parameters() if not optimizer.mask(param, step=seed % 1000).all()}
    assert {name for name in names if not name.startswith("layer.")} == set()
    assert {
        name for name, param in model.named_parameters() if name.startswith("layer.") and param.numel() > 30
    } <= names
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1, 0.0]


def test_none_gradients_are_skipped(seed):
    model, optimizer = build("graddrop")
    idle, busy = model.layer[0].linear.weight, model.layer[1].linear.weight
    for step in range(3):
        random_grads(model.parameters(), torch.Generator().manual_seed(seed + step))
        idle.grad = None
        before = bits(idle)
        optimizer.step()
        assert bits(idle) == before and idle not in optimizer.state
    first_mask = optimizer.mask(idle)
    random_grads([idle, busy], torch.Generator().manual_seed(seed))
    optimizer.step()
    assert (optimizer.state[idle]["step"].item(), optimizer.state[busy]["step"].item()) == (1, 4)
    assert torch.equal(optimizer.state[idle]["exp_avg"] != 0, first_mask)
    optimizer.zero_grad()
    before = snapshot(optimizer)
    optimizer.step()  # no gradient anywhere: nothing at all happens
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("policy", ["graddrop", "layer", "epoch-bitpacked", "fixed"])
@pytest.mark.parametrize(
    "what", ["all state", "one state", "one moment", "strides", "parameter", "parameter of the same memory"]
)
def test_what_is_exchanged_between_steps_is_seen(policy, what, seed):
    """State that is deleted or exchanged, and a parameter put in another's place: each step sees what is there now."""
    model, optimizer = build(policy, amsgrad=True)
    twin, reference = build(policy, amsgrad=True)
    for each, those in ((model, optimizer), (twin, reference)):
        train(those, each.parameters(), range(4), seed)
        those.set_epoch(3)
    chosen, other = model.layer[2].linear.weight, twin.layer[2].linear.weight
    if what == "all state":
        optimizer.state.clear()
        for param in twin.parameters():
            for value in reference.state[param].values():
                value.zero_()
    elif what == "strides":
        chosen.data, other.data = chosen.data.t(), other.data.t().contiguous()
    elif what == "one moment":
        optimizer.state[chosen]["max_exp_avg_sq"] = torch.full_like(chosen, 3.0)
        reference.state[other]["max_exp_avg_sq"].fill_(3.0)
    else:
        if what == "one state":
            del optimizer.state[chosen]
        else:
            new = nn.Parameter(chosen.data if "memory" in what else chosen.detach().clone())
            model.layer[2].linear.weight = new
            group = optimizer.param_groups[0]
            group["params"] = [new if param is chosen else param for param in group["params"]]
            chosen = new
        for value in reference.state[other].values():
            value.zero_()
    for each, those in ((model, optimizer), (twin, reference)):
        train(those, each.parameters(), range(13, 16), seed)
    assert state_bits(model, optimizer) == state_bits(twin, reference)
    assert optimizer.state[chosen]["step"].item() == (
        7 if what in ("one moment", "strides") else 3
    ) or policy.startswith("layer")


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", 2**40),
        ("mask", GradDrop(p=0.9).to_json()),
        ("mask", None),
        ("mask", GradDropEpoch(2).to_json()),
        ("amsgrad", True),
    ],
    ids=["seed", "p", "none", "epoch", "amsgrad"],
)
def test_what_is_changed_in_a_group_between_steps_is_seen(key, value, seed):
    model, optimizer = build("graddrop")
    train(optimizer, model.parameters(), range(2), seed)
    before = optimizer.mask("layer.0.linear.weight")
    for group in optimizer.param_groups[:2]:
        group[key] = value
    told = {name: optimizer.mask(name) for name, _ in model.named_parameters()}
    assert torch.equal(told["layer.0.linear.weight"], before) == (key == "amsgrad")
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e6)
    optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(optimizer.state[param]["exp_avg"] > 1e5, told[name])
        assert ("max_exp_avg_sq" in optimizer.state[param]) == (key == "amsgrad" and name.startswith("layer."))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_that_changes_its_dtype_between_steps(dtype, seed):
    """model.bfloat16() after some steps: the moments stay as they are and go on."""
    model, optimizer = build("graddrop")
    train(optimizer, model.parameters(), range(2), seed)
    model.to(dtype)
    train(optimizer, model.parameters(), range(2, 4), seed)
    for param in model.parameters():
        assert optimizer.state[param]["step"].item() == 4 and optimizer.state[param]["exp_avg"].dtype is torch.float32
        assert param.dtype is dtype and param.isfinite().all()


@every_policy
def test_add_param_group_after_steps(policy, seed):
    model, optimizer = build(policy)
    train(optimizer, model.parameters(), range(3), seed)
    extra, plain = nn.Parameter(torch.ones(300)), nn.Parameter(torch.ones(300))
    optimizer.add_param_group({"params": [("extra", extra)], "mask": GradDrop(p=0.5), "lr": 0.5})
    optimizer.add_param_group({"params": [("plain", plain)], "mask": None})
    assert 50 < optimizer.mask(extra).sum() < 250
    twin, reference = build(policy)
    train(reference, twin.parameters(), range(5), seed)
    for step in range(3, 5):
        if step == 4:
            optimizer.set_epoch(1)
        random_grads(model.parameters(), torch.Generator().manual_seed(seed + step))
        extra.grad, plain.grad = torch.ones_like(extra), torch.ones_like(plain)
        optimizer.step()
    assert state_bits(model, optimizer) == state_bits(
        twin, reference
    )  # the older groups go on as if nothing had happened
    assert optimizer.state[extra]["step"].item() == 2


def test_a_group_without_a_mask_of_its_own_takes_the_optimizers():
    optimizer = FusedGradDropAdamW(
        [("a", nn.Parameter(torch.ones(3)))], mask=GradDrop(p=0.7), seed=3, masked="frozen", bias_correction="global"
    )
    optimizer.add_param_group({"params": [("b", nn.Parameter(torch.ones(3)))]})
    for key in ("mask", "seed", "masked", "bias_correction", "lr", "betas"):
        assert optimizer.param_groups[1][key] == optimizer.param_groups[0][key], key


def test_a_group_added_in_a_later_epoch_is_in_that_epoch():
    optimizer = FusedGradDropAdamW([("a", nn.Parameter(torch.ones(3)))], mask=GradDropEpoch(epochs=4))
    optimizer.set_epoch(3)
    late = nn.Parameter(torch.ones(1000))
    optimizer.add_param_group({"params": [("late", late)]})
    assert optimizer.mask(late).all()  # epoch 3 is the last: everything is trained


def test_two_callables_of_one_name_stay_apart():
    """Two lambdas of one function have the same qualified name."""
    groups = [
        {"params": [("a", nn.Parameter(torch.ones(3)))], "mask": GradDrop(p=lambda epoch: 0.25)},
        {"params": [("b", nn.Parameter(torch.ones(3)))], "mask": GradDrop(p=lambda epoch: 0.75)},
    ]
    try:
        optimizer = FusedGradDropAdamW(groups)
    except ValueError as refused:
        assert "two_callables_of_one_name" in str(
            refused
        )  # refusing them by name is fine; taking one for the other is not
    else:
        assert optimizer.active_fraction() == [0.75, 0.25]


# step(): closures and hooks.


def test_closure_is_called_once_with_gradients_enabled(seed):
    model, optimizer = build("graddrop")
    twin, reference = build("graddrop")
    ids = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(seed))
    seen = []

    def closure():
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(ids).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        loss = optimizer.step(closure)
        reference.zero_grad()
        expected = twin(ids).square().mean()
        expected.backward()
        assert reference.step() is None
        assert torch.equal(loss, expected) and loss.requires_grad
    assert seen == [True] * 3
    assert state_bits(model, optimizer) == state_bits(twin, reference)
    with torch.no_grad():
        optimizer.step(closure)
    assert seen[-1]


def test_every_hook_runs_exactly_once_a_step(seed):
    model, optimizer = build("graddrop")
    calls = []
    handles = [
        optimizer.register_step_pre_hook(
            lambda opt, args, kwargs: calls.append(("pre", opt is optimizer, bits(model.head.weight)))
        ),
        optimizer.register_step_post_hook(
            lambda opt, args, kwargs: calls.append(("post", opt is optimizer, bits(model.head.weight)))
        ),
        register_optimizer_step_pre_hook(
            lambda opt, args, kwargs: calls.append(("global pre", opt is optimizer, None))
        ),
        register_optimizer_step_post_hook(
            lambda opt, args, kwargs: calls.append(("global post", opt is optimizer, None))
        ),
    ]
    try:
        random_grads(model.parameters(), torch.Generator().manual_seed(seed))
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(name for name, _, _ in calls) == ["global post", "global pre", "post", "pre"]
    assert all(ours for _, ours, _ in calls)
    weights = {name: weight for name, _, weight in calls}
    assert weights["pre"] != weights["post"] == bits(model.head.weight)
    optimizer.step()
    assert len(calls) == 4


def test_zero_grad():
    model, optimizer = build("graddrop")
    random_grads(model.parameters(), torch.Generator().manual_seed(0))
    optimizer.zero_grad(set_to_none=False)
    assert all((param.grad == 0).all() for param in model.parameters())
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


def test_it_can_be_printed():
    _, optimizer = build("layer")
    assert "FusedGradDropAdamW" in repr(optimizer) and "LayerGradDrop" in repr(optimizer)


# mask() and active_fraction().


@every_policy
@pytest.mark.parametrize("masked", ["gradient", "frozen"])
def test_mask_tells_beforehand_what_the_step_uses(policy, masked, seed):
    if policy in ("plain", "gaussian"):
        masked = None
    model, optimizer = build(policy, masked=masked, seed=seed)
    for step in range(10):
        optimizer.set_epoch(step // 3)
        told = {name: optimizer.mask(param) for name, param in model.named_parameters()}
        before = {
            name: optimizer.state[param]["exp_avg"].clone() if param in optimizer.state else None
            for name, param in model.named_parameters()
        }
        for param in model.parameters():
            param.grad = torch.full_like(
                param, 1e3 * 4.0**step
            )  # larger than all before: no kept element can be mistaken for a decaying one
        optimizer.step()
        for name, param in model.named_parameters():
            assert (
                told[name].dtype is torch.bool and told[name].shape == param.shape and told[name].device == param.device
            )
            exp_avg = optimizer.state[param]["exp_avg"]
            used = exp_avg.abs() > (torch.zeros_like(exp_avg) if before[name] is None else before[name].abs())
            if policy != "gaussian":  # whose factor may be small or negative, and never drops
                assert torch.equal(used, told[name]), (step, name)
            else:
                assert told[name].all()


@every_policy
def test_mask_of_another_step(policy, seed):
    """mask(step=k) before, at and after step k is the mask of step k; of the current epoch where epochs matter."""
    model, optimizer = build(policy, seed=seed)
    optimizer.set_epoch(0)
    steps = range(6)
    before = {name: [optimizer.mask(name, step=step) for step in steps] for name, _ in model.named_parameters()}
    for step in steps:
        for name, param in model.named_parameters():
            assert torch.equal(optimizer.mask(param), before[name][step])
        random_grads(model.parameters(), torch.Generator().manual_seed(seed + step))
        optimizer.step()
    for name, param in model.named_parameters():
        for step in steps:
            assert torch.equal(optimizer.mask(param, step=step), before[name][step])


@every_policy
def test_asking_changes_nothing(policy, seed):
    model, optimizer = build(policy)
    train(optimizer, model.parameters(), range(3), seed)
    before = snapshot(optimizer)
    for name, param in model.named_parameters():
        optimizer.mask(param)
        optimizer.mask(name, step=17)
    optimizer.active_fraction()
    assert snapshot(optimizer) == before


def test_mask_by_a_wrapped_name():
    _, optimizer = build("graddrop")
    assert torch.equal(
        optimizer.mask("module.layer.0._orig_mod.linear.weight"), optimizer.mask("layer.0.linear.weight")
    )


@every_policy
def test_active_fraction_is_the_share_of_the_next_mask(policy, seed):
    model, optimizer = build(policy, Encoder(blocks=8), seed=seed)
    for step in range(8):
        optimizer.set_epoch(step // 2)
        for group, fraction in zip(optimizer.param_groups, optimizer.active_fraction(), strict=True):
            numel = sum(param.numel() for param in group["params"])
            kept = sum(int(optimizer.mask(param).sum()) for param in group["params"])
            random = policy.startswith(("graddrop", "epoch", "toggle")) and group["mask"] is not None
            assert abs(fraction - kept / numel) <= (6 * (fraction * (1 - fraction) / numel) ** 0.5 if random else 1e-12)
        random_grads(model.parameters(), torch.Generator().manual_seed(step))
        optimizer.step()


def test_active_fraction_numbers():
    model = Encoder(blocks=4)
    fractions = lambda mask, epoch=0, **arguments: _fractions(model, mask, epoch, **arguments)
    assert fractions(GradDrop(p=0.2)) == [1 - 13107 / 65536] * 2 + [1.0, 1.0]
    assert fractions(None) == [1.0] * 4
    assert fractions(GradFreeze(epochs=4), 2) == [0.75, 0.75, 1.0, 1.0]
    assert fractions(GradFreeze(epochs=4), 9) == [1.0] * 4
    assert fractions(GradDropEpoch(epochs=4), 1) == [0.5, 0.5, 1.0, 1.0]
    assert fractions(GradDropEpoch(epochs=4, toggle=True), 1) == [0.25, 0.25, 1.0, 1.0]
    assert fractions(GradDropEpoch(epochs=3)) == [21846 / 65536] * 2 + [
        1.0,
        1.0,
    ]  # ceil(65536 / 3) of the 16-bit draws fall into bucket 0
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[0, :3] = True
    assert fractions(FixedMask({"layer.2.linear.weight": mask})) == [1 - 33 / 144, 1.0, 1.0, 1.0]


def _fractions(model, mask, epoch):
    optimizer = FusedGradDropAdamW(param_groups(model), mask=mask)
    optimizer.set_epoch(epoch)
    return optimizer.active_fraction()


# FixedMask.


def test_an_optimizer_over_a_fixed_mask(seed):
    masks = {"weight": torch.rand(20, 30, generator=torch.Generator().manual_seed(seed)) < 0.3}
    named = {name: nn.Parameter(torch.ones(shape)) for name, shape in (("weight", (20, 30)), ("bias", (20,)))}
    dense = {name: nn.Parameter(torch.ones(shape)) for name, shape in (("weight", (20, 30)), ("bias", (20,)))}
    optimizer = FusedGradDropAdamW(named.items(), lr=0.02, mask=FixedMask(masks, scale=3.0))
    plain = FusedGradDropAdamW(dense.items(), lr=0.02, mask=None)
    assert torch.equal(optimizer.mask("weight"), masks["weight"]) and optimizer.mask("bias").all()
    for step in range(4):
        random_grads(named.values(), torch.Generator().manual_seed(seed + step))
        dense["weight"].grad, dense["bias"].grad = named["weight"].grad * 3.0, named["bias"].grad.clone()
        optimizer.step()
        plain.step()
    assert bits(named["bias"]) == bits(dense["bias"])  # no entry: dense, and unscaled
    keep = masks["weight"]
    assert bits(named["weight"][keep]) == bits(dense["weight"][keep])
    assert (named["weight"][~keep] == 1).all() and (optimizer.state[named["weight"]]["exp_avg_sq"][~keep] == 0).all()


# Learning rates.


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: step / 5),  # a warm-up from 0
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=20),  # moves beta1 too
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=4),
        lambda opt: torch.optim.lr_scheduler.SequentialLR(
            opt,
            [torch.optim.lr_scheduler.LinearLR(opt, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(opt, 0.8)],
            milestones=[3],
        ),
    ],
    ids=["lambda", "one-cycle", "restarts", "sequential"],
)
def test_torchs_schedulers_drive_it_as_they_drive_torchs(scheduler, seed):
    runs = []
    for cls, arguments in ((torch.optim.AdamW, {}), (FusedGradDropAdamW, {"mask": None, "backend": ROUNDED_ONCE})):
        model = Encoder()
        optimizer = cls(model.parameters(), lr=0.03, **arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()" would be one
            schedule = scheduler(optimizer)
            values = []
            for step in range(10):
                random_grads(model.parameters(), torch.Generator().manual_seed(seed + step))
                optimizer.step()
                schedule.step()
                values.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
        runs.append((values, list(model.parameters())))
    assert runs[0][0] == runs[1][0]
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.allclose(a, b, rtol=2e-6, atol=0)  # ten steps of 2 ulp
    assert any((a - b).abs().max() > 0.01 for a, b in zip(runs[1][1], Encoder().parameters()))


def test_reduce_on_plateau():
    model, optimizer = build("layer")
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(3):
        schedule.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005] * 4


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_as_lr(shape, seed):
    results = []
    for lr in (torch.full(shape, 0.03), float(torch.tensor(0.03))):
        model, optimizer = build("graddrop", lr=lr)
        assert optimizer.param_groups[0]["lr"] is lr
        for step in range(3):
            random_grads(model.parameters(), torch.Generator().manual_seed(seed + step))
            optimizer.step()
            if isinstance(lr, torch.Tensor):
                lr.mul_(0.5)
            else:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5
        results.append(state_bits(model, optimizer))
    assert results[0] == results[1]


def test_a_grad_scaler_skips_the_step_that_overflowed(seed):
    """The scaler unscales and looks for infinities; a skipped step counts nowhere."""
    model, optimizer = build("layer")
    twin, reference = build("layer")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ids = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(seed))
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(model(ids).square().mean()).backward()
        if step == 2:
            model.head.weight.grad[0, 0] = float("inf")
        before = snapshot(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert snapshot(optimizer)[0] == before[0] and snapshot(optimizer)[2] == before[2]
            continue
        reference.zero_grad()
        twin(ids).square().mean().backward()
        reference.step()
    assert state_bits(model, optimizer) == state_bits(twin, reference)  # a power of two unscales exactly


# Copies.


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


@every_policy
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_continue_bit_for_bit(policy, copied, seed):
    model, optimizer = build(policy, backend="exact" if policy == "layer" else "auto")
    train(optimizer, model.parameters(), range(6), seed)
    twin, again = copied((model, optimizer))
    assert (
        type(again) is FusedGradDropAdamW
        and again.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]
    )
    untouched = state_bits(twin, again)
    train(optimizer, model.parameters(), range(6, 11), seed)
    assert state_bits(twin, again) == untouched  # nothing is shared
    train(again, twin.parameters(), range(6, 11), seed)
    assert state_bits(twin, again) == state_bits(model, optimizer)
    assert again._backend == optimizer._backend
    again.add_param_group({"params": [("extra", nn.Parameter(torch.ones(3)))], "mask": GradDrop(p=0.1)})
    assert again.param_groups[-1]["seed"] == 11  # the defaults came along


@every_policy
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_remembers_that_set_epoch_was_called(policy, copied, seed):
    model, optimizer = build(policy)
    optimizer.set_epoch(0)
    twin, again = copied((model, optimizer))
    random_grads(twin.parameters(), torch.Generator().manual_seed(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.step()


def test_set_epoch_reaches_an_optimizer_behind_a_wrapper(seed):
    """Lightning hands out an object with a copy of the optimizer's __dict__: what is set on it is lost."""
    model, optimizer = build("epoch")
    wrapper = object.__new__(type("Wrapped", (FusedGradDropAdamW,), {}))
    wrapper.__dict__ = dict(optimizer.__dict__)
    wrapper.set_epoch(1)
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    assert 0.3 < optimizer.active_fraction()[0] < 0.7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_pickle_of_an_older_version_gets_the_keys_that_are_new(seed):
    """Pickles skip the constructor; a key that a version has added is missing in them."""
    model, optimizer = build("plain")
    state = optimizer.__getstate__()
    ours = {"mask", "seed", "masked", "bias_correction", "moment_dtype", "epoch", "completed_steps", "epoch_history"}
    state["param_groups"] = [{k: v for k, v in group.items() if k not in ours} for group in state["param_groups"]]
    again = FusedGradDropAdamW.__new__(FusedGradDropAdamW)
    again.__setstate__(state)
    assert all(ours <= set(group) for group in again.param_groups)
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    again.step()


def test_a_lambda_can_be_deepcopied(seed):
    model = Encoder()
    optimizer = FusedGradDropAdamW(model.named_parameters(), mask=GradDrop(p=lambda epoch: 0.5))
    twin, again = copy.deepcopy((model, optimizer))
    for one, other in ((model, optimizer), (twin, again)):
        train(other, one.parameters(), range(3), seed)
    assert state_bits(model, optimizer) == state_bits(twin, again)


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
