"""Stages of a pipeline, each with an optimizer of its own: together they train as one process with the whole model."""

import random
import warnings
import zlib

import pytest
import torch
from torch import nn

from graddrop_kernels import FusedGradDropAdamW, GradFreeze, LayerGradDrop, find_blocks, param_groups

DEPTH = 7


class Layer(nn.Module):
    def __init__(self, size=6):
        super().__init__()
        self.attention, self.feed_forward = nn.Linear(size, size), nn.Linear(size, size)


class Whole(nn.Module):
    """As torchtitan's models: the layers in a dictionary, from which a stage deletes what it does not hold."""

    def __init__(self, numbers=range(DEPTH)):
        super().__init__()
        self.tok_embeddings = nn.Embedding(5, 6) if 0 in numbers else None
        self.layers = nn.ModuleDict({str(number): Layer() for number in numbers})
        self.output = nn.Linear(6, 5) if DEPTH - 1 in numbers else None


POLICIES = {
    "top down": GradFreeze(epochs=4),
    "bottom up": GradFreeze(epochs=3, direction="bottom_up"),
    "by count": GradFreeze(epochs=9, blocks_per_epoch=2),
    "drawn": LayerGradDrop(p=0.5),
}


def names_of(model):
    return [name for name, _ in find_blocks(model)]


def give_gradients(model, seed):
    """Gradients by name, equal in the whole model and in the stage that holds the parameter."""
    for name, param in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
        param.grad = torch.randn(param.shape, generator=generator)


@pytest.mark.parametrize("policy", POLICIES)
def test_stages_follow_the_schedule_of_the_whole(policy, seed):
    cuts = sorted(random.Random(seed).sample(range(1, DEPTH), 2))
    torch.manual_seed(seed)
    whole = Whole()
    stages = [Whole(range(*ends)) for ends in zip((0, *cuts), (*cuts, DEPTH))]
    for stage in stages:
        stage.load_state_dict({name: whole.state_dict()[name] for name in stage.state_dict()})
    names = names_of(whole)
    models = [whole, *stages]
    optimizers = [
        FusedGradDropAdamW(param_groups(model, blocks=names), mask=POLICIES[policy], seed=seed) for model in models
    ]
    for epoch in range(4):
        for model, optimizer in zip(models, optimizers):
            optimizer.set_epoch(epoch)
            for step in range(2):
                give_gradients(model, 10 * epoch + step)
                optimizer.step()
        for stage in stages:
            assert all(torch.equal(value, whole.state_dict()[name]) for name, value in stage.state_dict().items())
    alone = FusedGradDropAdamW(param_groups(Whole()), mask=POLICIES[policy])
    assert [group.get("blocks") for group in alone.param_groups] == [
        group.get("blocks") for group in optimizers[0].param_groups
    ]


def test_a_stage_that_says_nothing_is_warned():
    with pytest.warns(UserWarning, match=r"first block in its list is 'layers\.3', as in a stage.*blocks=\[") as caught:
        groups = param_groups(Whole(range(3, 6)))
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "first block in its list" in FusedGradDropAdamW(groups).describe()
    placeholders = Whole()
    placeholders.layers = nn.ModuleList([nn.Identity(), nn.Identity(), Layer(), Layer()])
    with pytest.warns(UserWarning, match=r"'layers\.2'"):
        param_groups(placeholders)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (Whole(), Whole(range(3)), nn.Sequential(nn.Flatten(), Layer(), Layer())):
            param_groups(model)
        param_groups(Whole(range(3, 6)), blocks=names_of(Whole()))
        param_groups(Whole(range(3, 6)), layers=["layers.*"])


def test_a_stage_without_blocks_is_dense():
    stage = Whole([])
    stage.tok_embeddings = nn.Embedding(5, 6)
    assert [group["name"] for group in param_groups(stage, blocks=names_of(Whole()))] == ["dense"]


@pytest.mark.parametrize(
    ("blocks", "error", "words"),
    [
        (["layers.0", "layers.1"], ValueError, "this stage holds the block 'layers.2', which is not among blocks"),
        (["layers.2", "layers.2"], ValueError, "each block of the whole model once"),
        ([], ValueError, "each block of the whole model once"),
        ("layers.2", TypeError, "names of all blocks"),
        ([2], TypeError, "names of all blocks"),
        (7, TypeError, "names of all blocks"),
    ],
)
def test_names_that_cannot_be_meant(blocks, error, words):
    with pytest.raises(error, match=words):
        param_groups(Whole([2, 3]), blocks=blocks)
    with pytest.raises(ValueError, match="layers and blocks exclude each other"):
        param_groups(Whole(), layers=["layers.*"], blocks=names_of(Whole()))
