"""plot_schedule(): the curves and pictures are what an optimizer does in those epochs."""

import math
import re

import pytest
from cases import PAST_THE_LAST_EPOCH
from pictures import image, tick_labels
from toy import BLOCK_POLICIES, POLICIES, Encoder, build, half

from graddrop_kernels import (
    FusedGradDropAdamW,
    GaussianGradDrop,
    GradDrop,
    GradFreeze,
    LayerGradDrop,
    param_groups,
    plot_schedule,
)


@pytest.mark.filterwarnings(PAST_THE_LAST_EPOCH)
@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in (*BLOCK_POLICIES, "rows", "skip-update")])
def test_curves_of_element_policies_are_the_optimizers(policy):
    model, optimizer = build(policy)
    mask = POLICIES[policy](model)
    axis = plot_schedule(mask, epochs=7).axes[0]
    active, *others = axis.get_lines()
    assert list(active.get_xdata()) == list(range(7))
    curves = {line.get_label(): list(line.get_ydata()) for line in others}
    for epoch in range(7):
        optimizer.set_epoch(epoch)
        expected = optimizer.active_fraction()[0]
        if policy == "fixed":  # of the tensors with a mask: three matrices of 24 of 36, three vectors of 4 of 6
            expected = 2 / 3
        assert active.get_ydata()[epoch] == pytest.approx(expected, rel=1e-12)
        if hasattr(mask, "p"):
            p = round((mask.p(epoch) if callable(mask.p) else mask.p) * 65536) / 65536
            assert curves["drop probability p"][epoch] == p
            if isinstance(mask, GaussianGradDrop):
                assert curves["standard deviation of the factor"][epoch] == pytest.approx(math.sqrt(p / (1 - p)))
    assert len(curves) == hasattr(mask, "p") + isinstance(mask, GaussianGradDrop)
    assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] >= max(active.get_ydata())


@pytest.mark.parametrize("policy", ["freeze", "freeze-up", "layer-epoch"])
def test_the_picture_of_blocks_is_what_the_masks_keep(policy, seed):
    model, optimizer = build(policy, Encoder(blocks=5), seed=seed)
    names = [f"layer.{i}" for i in range(5)]
    figure = plot_schedule(POLICIES[policy](model), epochs=6, blocks=names, seed=seed)
    shares = image(figure)
    assert shares.shape == (5, 6)
    for epoch in range(6):
        optimizer.set_epoch(epoch)
        for row, name in enumerate(names):
            assert shares[row, epoch] == optimizer.mask(f"{name}.norm.bias").all(), (name, epoch)
    axis = figure.axes[0]
    assert axis.get_ylim()[0] < axis.get_ylim()[1], "the first block is at the bottom"
    assert tick_labels(axis) == (list("01234"), list("012345")) and axis.get_ylabel() == "block of layer"
    if policy != "layer-epoch":
        assert (image(plot_schedule(POLICIES[policy](model), epochs=6, blocks=5)) == shares).all()


def test_the_picture_of_blocks_that_are_drawn_every_step(seed):
    mask, names, steps = LayerGradDrop(p=half), [f"layer.{i}" for i in range(4)], 9
    optimizer = FusedGradDropAdamW(param_groups(Encoder(blocks=4)), mask=mask, seed=seed)
    shares = image(plot_schedule(mask, 3, blocks=names, steps_per_epoch=steps, seed=seed))
    for epoch in range(3):
        optimizer.set_epoch(epoch)
        for row, name in enumerate(names):
            kept = [
                optimizer.mask(f"{name}.linear.bias", step=epoch * steps + step).all().item() for step in range(steps)
            ]
            assert shares[row, epoch] == pytest.approx(sum(kept) / steps)
    for probabilities in (image(plot_schedule(mask, 3, blocks=names)), image(plot_schedule(mask, 3, blocks=4))):
        assert probabilities.shape == (4, 3)
        assert probabilities.tolist() == [[0.5, 0.75, 1 - round(0.5 / 3 * 65536) / 65536]] * 4
    assert image(plot_schedule(LayerGradDrop(p=half, every="epoch"), 3, blocks=4)).tolist() == probabilities.tolist()


@pytest.mark.parametrize(
    "kind, arguments, parts",
    [
        (TypeError, {"policy": "GradDrop"}, ("policy", "'GradDrop'")),
        (ValueError, {"epochs": 0}, ("epochs", "got 0")),
        (ValueError, {"epochs": 2.0}, ("epochs", "got 2.0")),
        (ValueError, {"blocks": 0}, ("blocks", "got 0")),
        (ValueError, {"blocks": True}, ("blocks", "got True")),
        (ValueError, {"blocks": []}, ("blocks", r"got \[\]")),
        (ValueError, {"blocks": "layer.0"}, ("blocks", "got 'layer.0'")),
        (ValueError, {"steps_per_epoch": 0}, ("steps_per_epoch", "got 0")),
        (ValueError, {"steps_per_epoch": 1.5}, ("steps_per_epoch", "got 1.5")),
        (ValueError, {"seed": -1}, ("seed", "got -1")),
        (ValueError, {"seed": 2**64}, ("seed", f"got {2**64}")),
        (ValueError, {"policy": GradDrop(p=lambda epoch: epoch / 2)}, ("epoch 2", "got 1.0")),
    ],
)
def test_bad_arguments_of_a_schedule(kind, arguments, parts):
    with pytest.raises(kind) as error:
        plot_schedule(**{"policy": GradFreeze(epochs=3), "epochs": 3, **arguments})
    for part in parts:
        assert re.search(part, str(error.value)), error.value
