"""Wrong calls of mask() and set_epoch(), and what is warned of once."""

import re
from math import nan

import pytest
import torch
from toy import Encoder, build, named_params, random_grads, refused, train, warned

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradDropEpoch

# mask(), set_epoch().


def test_mask_of_an_unknown_parameter(trained):
    _, optimizer = trained
    with refused(KeyError, "'layer.9.linear.weight' is not a parameter of this optimizer", optimizer=optimizer):
        optimizer.mask("layer.9.linear.weight")
    with refused(KeyError, "this tensor is not a parameter of this optimizer", optimizer=optimizer):
        optimizer.mask(torch.ones(6, 6))


@pytest.mark.parametrize("epoch", [-1, 1.0, True, "1", None, nan], ids=repr)
def test_set_epoch(epoch):
    _, optimizer = build("epoch")
    with refused(
        ValueError,
        r"set_epoch\(epoch\) needs the number of the epoch, an int >= 0, got ",
        re.escape(repr(epoch)),
        optimizer=optimizer,
    ):
        optimizer.set_epoch(epoch)


def test_a_schedule_without_a_usable_p_at_an_epoch():
    named = named_params("a", "b")
    optimizer = FusedGradDropAdamW(
        [
            {"params": named[:1], "mask": GradDropEpoch(epochs=9)},
            {"params": named[1:], "mask": GradDrop(p=lambda epoch: 0.3 * epoch)},
        ]
    )
    optimizer.set_epoch(3)
    with refused(ValueError, r"p at epoch 4 must be a drop probability in \[0, 1\), got 1.2", optimizer=optimizer):
        optimizer.set_epoch(4)


@pytest.mark.parametrize(
    "policy",
    ["graddrop-epoch", "graddrop-anneal", "graddrop-callable", "gaussian", "layer-epoch", "epoch", "toggle", "freeze"],
)
def test_an_epoch_policy_without_set_epoch_warns_exactly_once(policy, seed):
    model, optimizer = build(policy)
    messages = warned(lambda: train(optimizer, model.parameters(), range(9), seed, set_epoch=False))
    assert len(messages) == 1
    assert "set_epoch(epoch) was not called" in messages[0] and "at the start of every epoch, 0 first" in messages[0]
    model, optimizer = build(policy)
    assert not warned(lambda: train(optimizer, model.parameters(), range(9), seed))


def test_a_warning_is_shown_at_the_line_that_caused_it():
    optimizer = FusedGradDropAdamW(named_params("a"), mask=GradDropEpoch(epochs=9))
    optimizer.param_groups[0]["params"][0].grad = torch.ones_like(optimizer.param_groups[0]["params"][0])
    with pytest.warns(UserWarning, match="set_epoch") as caught:
        optimizer.step()
    assert caught[0].filename == __file__


@pytest.mark.parametrize("policy", ["plain", "graddrop", "layer", "fixed"])
def test_other_policies_need_no_set_epoch(policy, seed):
    model, optimizer = build(policy)
    assert not warned(lambda: train(optimizer, model.parameters(), range(3), seed, set_epoch=False))


@pytest.mark.parametrize("world_size, expected", [(1, 0), (2, 1)])
def test_masks_without_names_warn_once_where_several_processes_train(monkeypatch, world_size, expected):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)
    model = Encoder()

    def two_steps(params, **arguments):
        optimizer = FusedGradDropAdamW(params, **arguments)
        for _ in range(2):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
            optimizer._forget_caches()

    groups = [{"params": list(part.parameters())} for part in (model.layer, model.head)]
    messages = warned(lambda: two_steps(groups))
    assert len(messages) == expected and all("pass model.named_parameters()" in message for message in messages)
    assert not warned(lambda: FusedGradDropAdamW(groups))  # attach_zero() may still give it names
    assert not warned(lambda: two_steps(model.named_parameters()))
    assert not warned(lambda: two_steps(model.parameters(), mask=None))


def test_toggle_past_its_end_warns_once(seed):
    model, optimizer = build("toggle")

    def two_epochs_too_many():
        for epoch in (3, 4, 4, 4):
            optimizer.set_epoch(epoch)
            random_grads(model.parameters(), torch.Generator().manual_seed(seed))
            optimizer.step()

    messages = warned(two_epochs_too_many)
    assert len(messages) == 1 and "after the last epoch of GradDropEpoch(epochs=4, toggle=True)" in messages[0]
    _, optimizer = build("toggle")
    assert len(warned(lambda: [optimizer.set_epoch(epoch) for epoch in range(10)])) == 1
