"""plot_mask(): the pictures are the masks of the next step, and of large tensors only a part is made."""

import pytest
import torch
from pictures import image, tick_labels
from torch import nn
from toy import Encoder, build, every_policy, train

from graddrop_kernels import (
    FixedMask,
    FusedGradDropAdamW,
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    backends,
    describe,
    param_groups,
    plot_mask,
)
from graddrop_kernels.inspection.mask_plot import CROP, SAMPLE


@every_policy
@pytest.mark.parametrize("epoch", [0, 2])
def test_the_picture_of_the_masks_is_the_masks(policy, epoch, seed):
    """Tensors of up to SAMPLE elements are counted whole."""
    model, optimizer = build(policy, Encoder(blocks=4), seed=seed)
    train(optimizer, model.parameters(), range(3), seed)
    optimizer.set_epoch(epoch)
    figure = plot_mask(optimizer, param="layer.3.linear.weight")
    kinds, blocks = tick_labels(figure.axes[0])
    assert blocks == ["0", "1", "2", "3", "outside"] and figure.axes[0].get_xlabel() == "block of layer"
    shares = image(figure)
    assert shares.shape == (len(kinds), 5)
    shown = set()
    for name, _ in model.named_parameters():
        block, kind = (name.split(".")[1], name.split(".", 2)[2]) if name.startswith("layer") else ("outside", name)
        place = kinds.index(kind), blocks.index(block)
        assert shares[place] == pytest.approx(optimizer.mask(name).double().mean().item()), name
        shown.add(place)
    assert all(bool(shares.mask[i, j]) == ((i, j) not in shown) for i in range(len(kinds)) for j in range(5))
    assert torch.equal(torch.tensor(image(figure, 1).data).bool(), optimizer.mask("layer.3.linear.weight"))
    assert "layer.3.linear.weight" in figure.axes[1].get_title() and "6 x 6" in figure.axes[1].get_title()
    assert f"epoch {epoch}, 3 completed steps" in figure.get_suptitle()


LARGE = {
    "graddrop": GradDrop(p=0.3),
    "graddrop-epoch": GradDrop(p=0.7, every="epoch"),
    "epoch": GradDropEpoch(epochs=4),
    "bitpacked": GradDropEpoch(epochs=4, toggle=True, storage="bitpacked"),
    "columns": FixedMask({"weight": (torch.arange(1030) % 103 == 5).expand(300, 1030)}),
}


@pytest.mark.parametrize("policy", LARGE)
def test_of_large_tensors_a_part_is_made(policy, seed, monkeypatch):
    weight = nn.Parameter(torch.zeros(300, 1030))
    optimizer = FusedGradDropAdamW([("weight", weight)], mask=LARGE[policy], seed=seed)
    optimizer.set_epoch(1)
    made, keep_mask = [], backends.keep_mask
    monkeypatch.setattr(
        backends, "keep_mask", lambda *question: made.append(question[4]) or keep_mask(*question)
    )  # question[4]: numel
    figure = plot_mask(optimizer, param=weight)
    assert sum(made) <= SAMPLE + CROP**2 and not optimizer._groups._words
    monkeypatch.undo()
    keep = optimizer.mask(weight)
    assert torch.equal(torch.tensor(image(figure, 1).data).bool(), keep[:256, :256])
    share, exact = image(figure).item(), keep.double().mean().item()
    if policy == "columns":
        assert share == exact
    else:
        assert abs(share - exact) < 6 * (exact * (1 - exact) / SAMPLE) ** 0.5
        runs = keep.flatten().unfold(0, SAMPLE // 4, weight.numel() // 4)[:4]
        assert share == pytest.approx(runs.double().mean().item())


@pytest.mark.parametrize(
    "shape, rows, columns",
    [((), 1, 1), ((1000,), 1, 256), ((7, 1), 7, 1), ((1, 5000), 1, 256), ((6, 40, 9), 6, 256), ((500, 33), 256, 33)],
)
@pytest.mark.parametrize("fixed", [False, True])
def test_the_mask_of_any_shape(shape, rows, columns, fixed, seed):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    policy = FixedMask({"weight": keep}) if fixed else GradDrop(p=0.4)
    optimizer = FusedGradDropAdamW([("weight", nn.Parameter(torch.zeros(shape)))], mask=policy, seed=seed)
    shown = torch.tensor(image(plot_mask(optimizer, param="weight"), 1).data).bool()
    keep = optimizer.mask("weight")
    keep = keep.reshape(keep.shape[0] if keep.dim() > 1 else 1, -1)
    assert shown.shape == (rows, columns) and torch.equal(shown, keep[:rows, :columns])


def test_the_parameter_shown_by_default_is_the_largest_with_a_policy():
    model = Encoder(blocks=2)
    optimizer = FusedGradDropAdamW(param_groups(model), mask=GradDrop(p=0.4))
    assert plot_mask(optimizer).axes[1].get_title().startswith("layer.0.linear.weight\n")
    optimizer = FusedGradDropAdamW(param_groups(model), mask=None)
    assert plot_mask(optimizer).axes[1].get_title().startswith("embeddings.weight\n")


def test_rows_and_columns_without_param_groups():
    """Blocks by a policy's layers, by numbers in names, and tensors without names; experts in one row."""
    model = Encoder(blocks=3)
    optimizer = FusedGradDropAdamW(model.named_parameters(), mask=GradFreeze(epochs=3, layers=["layer.*"]))
    assert tick_labels(plot_mask(optimizer).axes[0])[1] == ["0", "1", "2", "outside"]
    optimizer = FusedGradDropAdamW(model.named_parameters(), mask=GradDrop(p=0.4))
    kinds, blocks = tick_labels(plot_mask(optimizer).axes[0])
    assert blocks == ["0", "1", "2", "outside"] and "linear.weight" in kinds and "head.bias" in kinds
    optimizer = FusedGradDropAdamW([{"params": model.layer.parameters()}, {"params": model.head.parameters()}])
    assert tick_labels(plot_mask(optimizer).axes[0]) == (["group 0", "group 1"], ["outside"])
    experts = [(f"layer.1.experts.{i}.w", nn.Parameter(torch.ones(2 + i))) for i in range(3)]
    optimizer = FusedGradDropAdamW(experts, mask=FixedMask({"layer.1.experts.0.w": torch.zeros(2, dtype=torch.bool)}))
    figure = plot_mask(optimizer)
    assert tick_labels(figure.axes[0]) == (["experts.*.w"], ["1"]) and image(figure).item() == pytest.approx(7 / 9)


def test_bad_arguments_of_a_picture_of_masks():
    model, optimizer = build("graddrop")
    with pytest.raises(KeyError, match="no.such.weight"):
        plot_mask(optimizer, param="no.such.weight")
    with pytest.raises(KeyError, match="not a parameter"):
        plot_mask(optimizer, param=torch.ones(3))
    with pytest.raises(ValueError, match="no parameters"):
        plot_mask(FusedGradDropAdamW([{"params": []}]))
    empty = FusedGradDropAdamW([("empty", nn.Parameter(torch.ones(0, 3))), ("some", nn.Parameter(torch.ones(4)))])
    with pytest.raises(ValueError, match=r"no elements, shape \(0, 3\)"):
        plot_mask(empty, param="empty")
    assert image(plot_mask(empty)).shape == (1, 1)  # the empty one has no share
    for function in (describe, plot_mask):
        with pytest.raises(TypeError, match=rf"{function.__name__}.*FusedGradDropAdamW, got AdamW"):
            function(torch.optim.AdamW(model.parameters()))
