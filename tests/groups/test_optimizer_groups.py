"""The optimizer's groups: masks and values of their own, what is exchanged or added between steps."""


import pytest
import torch
from torch import nn
from toy import (
    POLICIES,
    Encoder,
    assert_train_alike,
    bits,
    build,
    every_policy,
    random_grads,
    refused,
    snapshot,
    state_bits,
    train,
)

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradDropEpoch, TrainRows, param_groups

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


@pytest.mark.parametrize("policy", ["layer", "freeze", "freeze-up"])
def test_per_block_groups_train_alike(policy, seed):
    made = build(policy, seed=seed)
    model = Encoder()
    groups = param_groups(model, weight_decay=0.1, per_block=True)
    values = {key: made[1].defaults[key] for key in ("lr", "betas", "eps", "seed")}
    optimizer = FusedGradDropAdamW(groups, mask=POLICIES[policy](model), **values)
    assert_train_alike(made, (model, optimizer), range(10), seed)
    assert "layer.2_no_decay" in optimizer.describe()
    again = FusedGradDropAdamW(
        param_groups(model, weight_decay=0.1, per_block=True), mask=POLICIES[policy](model), **values
    )
    again.load_state_dict(optimizer.state_dict())
    assert again.active_fraction() == optimizer.active_fraction()


def test_pieces_that_were_refused_are_not_attached():
    """So that the remedy, the shapes, can be given in another call."""
    optimizer = FusedGradDropAdamW([("bias", torch.nn.Parameter(torch.ones(5)))], mask=TrainRows({"bias": [1]}))
    flat = torch.zeros(5)
    optimizer.param_groups[0]["params"] = [flat]
    pieces = {flat: [("bias", 0, 0, 5)]}
    for shapes, part in ((None, "give attach_pieces\\(\\) the shapes"), ({"bias": (1, 5)}, "but there are 1 rows")):
        with refused(ValueError, part, optimizer=optimizer):
            optimizer.attach_pieces(pieces, shapes)
    optimizer.attach_pieces(pieces, {"bias": (5,)})
    flat.grad = torch.ones(5)
    optimizer.step()
    assert (flat != 0).tolist() == [False, True, False, False, False]


def test_the_pieces_of_a_buffer_count_one_step(seed):
    """Also after its step count has been set in place, as a checkpoint does that copies into what is there."""
    buffer = torch.nn.Parameter(torch.randn(40, generator=torch.Generator().manual_seed(seed)))
    optimizer = FusedGradDropAdamW([buffer], mask=GradDrop(0.5), betas=(0.0, 0.9), seed=seed)
    optimizer.attach_pieces({buffer: [("a", 0, 0, 15), ("b", 15, 7, 20)]})
    for _ in range(3):
        buffer.grad = torch.ones(40)
        optimizer.step()
    optimizer.state[buffer]["step"].fill_(0.0)
    expected = optimizer.mask(buffer, step=0)
    optimizer.step()
    assert optimizer.state[buffer]["step"] == 1
    assert torch.equal(optimizer.state[buffer]["exp_avg"] != 0, expected)  # beta1 is 0; the padding has never moved
