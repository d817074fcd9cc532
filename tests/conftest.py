"""Fixtures: a fresh seed every run, the backends, the instruction sets of the processor."""

import os
import secrets

import pytest
from cases import BACKEND_NAMES, ISAS, instruction_set, require

_SEED = int(os.environ.get("GRADDROP_TEST_SEED") or secrets.randbits(31))


def pytest_report_header(config):
    return f"random inputs of this run: GRADDROP_TEST_SEED={_SEED}"


@pytest.fixture
def seed() -> int:
    """A fresh int in [0, 2^31) every run, the same for all of its tests.

    A failure shows it; GRADDROP_TEST_SEED sets it.
    """
    print(f"to repeat: GRADDROP_TEST_SEED={_SEED}")
    return _SEED


@pytest.fixture(params=BACKEND_NAMES)
def backend(request) -> str:
    """Every backend of this machine.

    The cpu backend must be there, unless GRADDROP_NO_EXT says that nothing was to be compiled.
    """
    require(request.param)
    return request.param


@pytest.fixture(params=ISAS or ("missing",))
def isa(request):
    """Every instruction set of this processor, portable included, in use during the test."""
    require("cpu")
    with instruction_set(request.param):
        yield request.param
