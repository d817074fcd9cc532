"""FixedMask takes every name that the optimizer takes."""

import pytest
import torch
from torch import nn

from graddrop_kernels import FixedMask, FusedGradDropAdamW


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_names_of_wrapped_models(prefix, wrapped):
    model = nn.Sequential(nn.Linear(3, 2))
    mask = torch.tensor([[True, False, True], [False, True, False]])
    policy = FixedMask({f"{prefix}0.weight": mask})
    assert policy == FixedMask({"0.weight": mask}) and policy.to_json() == FixedMask({"0.weight": mask}).to_json()
    outer = nn.DataParallel(model) if wrapped else model  # its names begin with module.
    optimizer = FusedGradDropAdamW(outer.named_parameters(), mask=policy)
    assert torch.equal(optimizer.mask("0.weight"), mask) and torch.equal(optimizer.mask("module.0.weight"), mask)


def test_one_parameter_under_two_names():
    mask = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="names a parameter twice"):
        FixedMask({"0.bias": mask, "module.0.bias": mask})
