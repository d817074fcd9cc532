"""Options and fixtures: the sample, a fresh seed every run, the backends, the processor's instruction sets, a toy."""

import os
import secrets

# Of a run of several processes: one core each, and for what they start, too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import sampling
import torch
from cases import BACKEND_NAMES, ISAS, require
from toy import build, random_grads, train

from graddrop_kernels.backends import cpu

# In the environment for the processes of this run: pytest-xdist's must draw the same sample.
_SEED = int(os.environ.setdefault("GRADDROP_TEST_SEED", str(secrets.randbits(31))))


def pytest_addoption(parser):
    group = parser.getgroup("graddrop")
    group.addoption("--sample", type=int, metavar="K", help="K drawn cases of each test, and none marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: for the whole suite only; --sample leaves it out")


def pytest_report_header(config):
    part = config.getoption("sample")
    said = f", of each test about {part} cases (--sample {part})" if part else ""
    return f"random inputs of this run{said}: to repeat it, GRADDROP_TEST_SEED={_SEED}"


def pytest_collection_modifyitems(config, items):
    if config.getoption("sample"):
        sampling.select(config, items, config.getoption("sample"), _SEED)


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
