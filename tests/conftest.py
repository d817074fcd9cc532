"""Fixtures: a fresh seed every run, the backends, the instruction sets of the processor, a toy training."""

import os
import secrets
from collections import Counter

import pytest
import torch
from cases import BACKEND_NAMES, ISAS, require
from toy import build, random_grads, train

from graddrop_kernels.backends import cpu

_SEED = int(os.environ.get("GRADDROP_TEST_SEED") or secrets.randbits(31))


def pytest_report_header(config):
    return f"random inputs of this run: GRADDROP_TEST_SEED={_SEED}"


def pytest_collection_modifyitems(config, items):
    """GRADDROP_TEST_ONE_IN=4 keeps every fourth case of each test, beginning with another one every run."""
    one_in = int(os.environ.get("GRADDROP_TEST_ONE_IN") or 1)
    seen = Counter()
    kept, others = [], []
    for item in items:
        (kept if (seen[item.function] + _SEED) % one_in == 0 else others).append(item)
        seen[item.function] += 1
    config.hook.pytest_deselected(items=others)
    items[:] = kept


@pytest.fixture
def seed() -> int:
    """A fresh int in [0, 2^31) every run, the same for all of its tests.

    A failure shows it; GRADDROP_TEST_SEED sets it.
    """
    print(f"to repeat: GRADDROP_TEST_SEED={_SEED}")
    return _SEED


@pytest.fixture
def one_thread():
    """Of torch: with more, sums are added up in other orders, those of inductor's embeddings in another every time."""
    used = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(used)


@pytest.fixture(params=BACKEND_NAMES)
def backend(request) -> str:
    """Every backend of this machine that steps CPU tensors; of the others see cases.ENGINES.

    The cpu backend must be there, unless GRADDROP_NO_EXT says that nothing was to be compiled.
    """
    require(request.param)
    return request.param


@pytest.fixture(params=ISAS or ("missing",))
def isa(request):
    """Every instruction set of this processor, portable included, in use during the test."""
    require("cpu")
    with cpu.using_isa(request.param):
        yield request.param


@pytest.fixture(params=["fresh", "after steps"])
def trained(request, seed):
    """(model, optimizer) with gradients, before its first step and after three."""
    model, optimizer = build("graddrop")
    if request.param == "after steps":
        train(optimizer, model.parameters(), range(3), seed)
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    return model, optimizer
