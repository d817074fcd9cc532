"""Autograd sees the step: a graph of before it cannot be used after it."""

import pytest
import torch

from graddrop_kernels import FusedGradDropAdamW, GradDrop, LayerGradDrop

POLICIES = {"plain": lambda: None, "graddrop": lambda: GradDrop(0.3), "layer": lambda: LayerGradDrop(0.5, layers=["*"])}


def net():
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))


@pytest.mark.parametrize("mask", POLICIES)
def test_a_stale_graph_is_an_error(mask, backend):
    model = net()
    optimizer = FusedGradDropAdamW(model.named_parameters(), mask=POLICIES[mask](), backend=backend)
    for _ in range(2):  # the second step uses what the first has prepared
        loss = model(torch.ones(1, 3)).sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            loss.backward()
        optimizer.zero_grad()


def test_versions_advance_with_every_step_and_with_no_other(backend):
    model = net()
    optimizer = FusedGradDropAdamW(model.parameters(), mask=None, backend=backend)
    model[0](torch.ones(1, 3)).sum().backward()
    before = [param._version for param in model.parameters()]
    optimizer.step()
    moved = [param._version > version for param, version in zip(model.parameters(), before)]
    assert moved == [True, True, False, False]


def test_a_refused_step_changes_no_version():
    model = net()
    optimizer = FusedGradDropAdamW(model.parameters(), mask=None)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.param_groups[0]["lr"] = -1.0
    before = [param._version for param in model.parameters()]
    with pytest.raises(ValueError):
        optimizer.step()
    assert [param._version for param in model.parameters()] == before


def test_masters_are_stepped_and_parameters_advance():
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = FusedGradDropAdamW([param], mask=None, master_weights=True)
    param.grad, before = torch.ones_like(param), param._version
    optimizer.step()
    assert param._version > before
