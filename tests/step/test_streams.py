"""Two parameters that would get the same masks: within one optimizer refused, between two optimizers said."""

import gc
import warnings

import pytest
import torch
from toy import refused

from graddrop_kernels import FusedGradDropAdamW, GradDrop

SAID = "two optimizers are stepped in turn and draw the same masks"


def make(names=None, **options):
    param = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    params = [param] if names is None else [(names, param)]
    return FusedGradDropAdamW(params, **{"mask": GradDrop(0.5), **options})


def in_turn(*optimizers, rounds=3):
    """The warnings of steps of one after the other."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(rounds):
            for optimizer in optimizers:
                optimizer.step()
    return [str(each.message) for each in found if SAID in str(each.message)]


@pytest.mark.parametrize("options", [
    {}, {"mask": None, "stochastic_rounding": True}, {"mask": None, "stochastic_moments": True},
], ids=["masks", "rounding", "rounding of moments"])  # fmt: skip
@pytest.mark.parametrize("names", [None, "weight"])
def test_two_optimizers_with_the_same_streams_are_told(names, options):
    said = in_turn(make(names, **options), make(names, **options))
    assert said and repr(names or "0.0") in said[0]
    assert len(said) == 2, "each optimizer says it once"


@pytest.mark.parametrize("pair", [
    (lambda: make("a"), lambda: make("b")), (lambda: make(seed=1), lambda: make(seed=2)),
    (lambda: make(), lambda: make(mask=None)), (lambda: make(mask=None), lambda: make(mask=None)),
], ids=["other names", "other seeds", "one without masks", "no masks"])  # fmt: skip
def test_independent_optimizers_are_not(pair):
    assert not in_turn(pair[0](), pair[1]())


def test_one_after_the_other_is_no_conflict():
    """A search of hyper-parameters: the first may be alive still, but is not stepped any more."""
    first, second = make(), make()
    assert not in_turn(first) and not in_turn(second) and not in_turn(second)


def test_an_optimizer_that_is_gone_is_forgotten():
    first, second = make(), make()
    in_turn(first, second, rounds=1)
    del first
    gc.collect()
    assert not in_turn(second)


def test_an_optimizer_per_parameter_is_told():
    optimizers = [make() for _ in range(5)]
    assert len(in_turn(*optimizers)) >= len(optimizers) - 1


@pytest.mark.parametrize("mask", [None, GradDrop(0.5)], ids=["plain", "masked"])
def test_two_parameters_of_one_name_are_refused(mask):
    one, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    pairs = [*one.named_parameters(), *other.named_parameters()]
    with refused(ValueError, "two parameters are called 'weight', in parameter groups 0 and 0"):
        FusedGradDropAdamW(pairs, mask=mask)
    optimizer = FusedGradDropAdamW(one.named_parameters(), mask=mask)
    with refused(ValueError, "two parameters are called 'weight', in parameter groups 0 and 1"):
        optimizer.add_param_group({"params": list(other.named_parameters())})
    assert len(optimizer.param_groups) == 1
    wrapped = [(f"module.{name}", param) for name, param in other.named_parameters()]
    with refused(ValueError, "two parameters are called 'weight'"):  # "module." is a wrapper's
        optimizer.add_param_group({"params": wrapped})
