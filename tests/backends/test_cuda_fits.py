"""Whether the CUDA library has code for a GPU and a driver is new enough for it: by faked facts, as there are many."""

import pytest
import torch

from graddrop_kernels.backends import cuda

BOTH = ["sm_80", "sm_90", "compute_90"]


@pytest.mark.parametrize(
    "capability, architectures, built_with, driver",
    [
        ((9, 0), BOTH, 13000, 13000),
        ((9, 0), BOTH, 12080, 12000),  # minor versions of one major are compatible, for machine code
        ((9, 0), BOTH, 12080, 13010),
        ((8, 0), BOTH, 12080, 12080),
        ((8, 9), BOTH, 12080, 12000),  # code for 8.0
        ((10, 0), BOTH, 12080, 12080),  # PTX, compiled by the driver
        ((12, 1), ["sm_120"], 13000, 13000),
        ((9, 0), ["sm_90a"], 13000, 13000),
        ((10, 3), ["compute_100f"], 13000, 13000),
    ],
)
def test_fits(capability, architectures, built_with, driver):
    assert cuda.why_unfit(capability, architectures, built_with, driver) is None


@pytest.mark.parametrize(
    "capability, architectures, built_with, driver, text",
    [
        ((9, 0), BOTH, 13000, 12080, r"up to 12\.8, and _cuda\.so was built with 13\.0; update the driver"),
        ((9, 0), BOTH, 12080, 0, r"up to 0\.0"),
        ((7, 5), BOTH, 12080, 12080, r"for sm_80, sm_90, compute_90, and this GPU has .* 7\.5; .*_ARCHS=75"),
        ((10, 0), ["sm_90"], 12080, 12080, "GRADDROP_CUDA_ARCHS=100"),
        ((8, 0), ["sm_86"], 12080, 12080, "GRADDROP_CUDA_ARCHS=80"),
        ((10, 0), ["sm_90a", "compute_90a"], 13000, 13000, "GRADDROP_CUDA_ARCHS=100"),
        ((12, 0), ["compute_100f"], 13000, 13000, "GRADDROP_CUDA_ARCHS=120"),
        ((10, 0), BOTH, 12080, 12060, r"only PTX for .* 10\.0, from CUDA 12\.8, and the driver .* up to 12\.6"),
    ],
)  # fmt: skip
def test_does_not_fit(capability, architectures, built_with, driver, text):
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(cuda.why_unfit(capability, architectures, built_with, driver))


@pytest.mark.parametrize(
    "capabilities, text", [([(9, 0)], None), ([(7, 0), (9, 0)], None), ([(7, 0)], "capability 7.0")]
)
def test_the_backend_is_there_if_it_fits_one_of_the_gpus(capabilities, text, monkeypatch):
    monkeypatch.setattr(cuda, "_load", lambda: (object(), None))
    monkeypatch.setattr(cuda, "architectures", lambda: BOTH)
    monkeypatch.setattr(cuda, "versions", lambda: (13000, 13000))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    cuda._unfit.cache_clear()
    found = cuda.unavailable()
    cuda._unfit.cache_clear()
    assert found is None if text is None else text in found


@pytest.mark.skipif(cuda._load()[0] is None, reason="no CUDA library: nvcc was not there when the package was built")
def test_the_library_knows_its_versions():
    built_with, driver = cuda.versions()
    assert 11000 <= built_with < 100000 and (driver == 0 or driver >= 10000)
