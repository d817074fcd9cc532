"""top_magnitude, top_gradient, top_change: beside a sort of all scores; exact counts, ties, and what they refuse."""

import copy

import pytest
import torch
from torch import nn
from toy import Encoder

from graddrop_kernels import FixedMask, FusedGradDropAdamW, param_groups, top_change, top_gradient, top_magnitude


def model_of(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(23, 12), nn.Linear(12, 17), nn.LayerNorm(17), nn.Linear(17, 5)).to(dtype)
    model[3].bias.requires_grad_(False)
    return model


def trained(model):
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def by_sorting(scores, density):
    """Masks of the largest scores of all of these tensors, the first of equal ones."""
    flat = torch.cat([score.float().abs().flatten() for score in scores.values()])
    order = sorted(range(flat.numel()), key=lambda i: (-flat[i].item(), i))
    keep = torch.zeros(flat.numel(), dtype=torch.bool)
    keep[order[: round(density * flat.numel())]] = True
    parts = keep.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts)}


def assert_masks(found, scores, density, over):
    expected = by_sorting(scores, density)
    if over == "tensor":
        expected = {name: by_sorting({name: score}, density)[name] for name, score in scores.items()}
    assert found.keys() == expected.keys()
    for name, mask in found.items():
        assert mask.dtype == torch.bool and mask.device.type == "cpu" and torch.equal(mask, expected[name]), name


@pytest.mark.parametrize("over", ["all", "tensor"])
@pytest.mark.parametrize("density", [0.001, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_magnitudes(over, density, dtype, seed):
    model = model_of(seed, dtype)
    masks = top_magnitude(model, density, over)
    assert_masks(masks, trained(model), density, over)
    if over == "all":
        count = sum(param.numel() for param in trained(model).values())
        assert sum(int(mask.sum()) for mask in masks.values()) == round(density * count)
    FusedGradDropAdamW(trained(model).items(), mask=FixedMask(masks))


def test_of_equal_scores_the_first_are_kept(seed):
    """Among them 0, infinity, and numbers that differ in the lower half of their bits only."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, -1.0, 1.0, 1 + 2**-20, -float("inf")])
    drawn = lambda: nn.Parameter(values[torch.randint(5, (9, 7), generator=generator)])
    model = nn.ParameterDict({name: drawn() for name in "abc"})
    for density in (0.1, 0.3, 0.5, 0.7, 0.9):
        for over in ("all", "tensor"):
            assert_masks(top_magnitude(model, density, over), trained(model), density, over)


@pytest.mark.parametrize("over", ["all", "tensor"])
def test_changes(over, seed):
    model = model_of(seed)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for param in model.parameters():
            param += torch.randn_like(param) * 10.0 ** torch.randint(-4, 0, param.shape)
    changes = {name: param.detach() - before[name] for name, param in trained(model).items()}
    assert_masks(top_change(before, model, 0.2, over), changes, 0.2, over)
    wrapped = {f"module.{name}": value for name, value in before.items()}
    assert_masks(top_change(wrapped, model, 0.2, over), changes, 0.2, over)


def test_changes_are_taken_before_they_are_rounded():
    model = nn.Linear(8, 1, bias=False).double()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.weight[0, 3] += 1e-12
    assert top_change(before, model, 0.1)["weight"].nonzero().tolist() == [[0, 3]]
    numbers = nn.ParameterDict({"a": nn.Parameter(torch.tensor([5j, 1, 2, 3]))})
    assert top_magnitude(numbers, 0.3)["a"].tolist() == [True, False, False, False]


def squared_gradients(model, batches):
    sums = {name: torch.zeros_like(param) for name, param in trained(model).items()}
    for batch in batches:
        model.zero_grad()
        model(batch).square().sum().backward()
        for name, param in trained(model).items():
            sums[name] += param.grad.square()
    model.zero_grad()
    return sums


@pytest.mark.parametrize("over", ["all", "tensor"])
def test_gradients(over, seed):
    model = model_of(seed)
    batches = [torch.randint(23, (4,)) for _ in range(3)]
    expected = squared_gradients(model, batches)
    before = copy.deepcopy(model.state_dict())
    found = top_gradient(model, batches, 0.1, over, loss_of=lambda model, batch: model(batch).square().sum())
    assert_masks(found, expected, 0.1, over)
    assert all(param.grad is None and not param._post_accumulate_grad_hooks for param in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_error_in_the_loss_leaves_no_hook(seed):
    model = model_of(seed)
    with pytest.raises(ZeroDivisionError):
        top_gradient(model, [1], 0.1, loss_of=lambda model, batch: 1 / 0)
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


@pytest.mark.parametrize("density", [0, 1, -0.5, 2, float("nan"), True, "0.5", None])
def test_refused_densities(density, seed):
    for build in (lambda model: top_magnitude(model, density), lambda model: top_change(model, model, density),
                  lambda model: top_gradient(model, [torch.tensor([1])], density)):  # fmt: skip
        with pytest.raises(ValueError, match=r"density= must be the share"):
            build(model_of(seed))


@pytest.mark.parametrize("build", [
    lambda model, **more: top_magnitude(model, 0.2, **more),
    lambda model, **more: top_change(Encoder().state_dict(), model, 0.2, **more),
    lambda model, **more: top_gradient(
        model, [torch.ones(2, 3, dtype=torch.long)], 0.2, loss_of=lambda model, ids: model(ids).square().sum(), **more
    ),
])  # fmt: skip
def test_what_param_groups_masks(build, seed):
    model = Encoder()
    with torch.no_grad():
        for param in model.parameters():
            param += torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
    groups = param_groups(model)
    masks = build(model, groups=groups)
    assert masks.keys() == {name for name, _ in model.named_parameters() if name.startswith("layer.")}
    count = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.2 * count)
    optimizer = FusedGradDropAdamW(groups, mask=FixedMask(masks))
    assert optimizer.active_fraction()[-2:] == [1.0, 1.0]
    with pytest.raises(ValueError, match="'embeddings.weight' is in a parameter group with another mask, or none"):
        FusedGradDropAdamW(param_groups(model), mask=FixedMask(build(model)))


def test_what_else_is_refused(seed):
    model = model_of(seed)
    with pytest.raises(ValueError, match="over= must be"):
        top_magnitude(model, 0.5, over="layer")
    with pytest.raises(ValueError, match="no batch"):
        top_gradient(model, [], 0.5)
    with pytest.raises(ValueError, match=r"'1.weight' in the shape \(17, 12\), got None"):
        top_change({"0.weight": model[0].weight}, model, 0.5)
    for over in ("all", "tensor"):
        with pytest.raises(ValueError, match="every score is 0"):
            top_change(model.state_dict(), model, 0.5, over)
        with pytest.raises(ValueError, match="every score is 0"):
            top_gradient(model, [1], 0.5, over, loss_of=lambda model, batch: torch.ones(1, requires_grad=True).sum())
    model[1].weight._is_flat_param = True
    with pytest.raises(ValueError, match="'1.weight' is sharded already"):
        top_magnitude(model, 0.5)
    del model[1].weight._is_flat_param
    with torch.no_grad():
        model[1].weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match="'1.weight' is NaN"):
        top_magnitude(model, 0.5)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        top_magnitude(model.requires_grad_(False), 0.5)
