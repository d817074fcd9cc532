"""same_facts, by torch's C++ guards and in plain Python: whatever differs is seen."""

import gc
import weakref

import pytest
import torch

from graddrop_kernels.tensors import guards
from graddrop_kernels.tensors.guards import same_facts

DIFFERENT = {
    "shape": lambda: torch.zeros(3, 4),
    "dimensions": lambda: torch.zeros(12),
    "strides": lambda: torch.zeros(3, 4).t(),
    "dtype": lambda: torch.zeros(4, 3, dtype=torch.float64),
    "16-bit dtype": lambda: torch.zeros(4, 3, dtype=torch.bfloat16),
    "device": lambda: torch.zeros(4, 3, device="meta"),
    "layout": lambda: torch.zeros(4, 3).to_sparse(),
}


@pytest.fixture(params=["guards", "python"])
def way(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(guards, "guards_of", None)
    else:
        assert guards.guards_of is not None, "this torch has no TensorGuards of the known form"


def first_of_two() -> list[torch.Tensor]:
    return [torch.zeros(4, 3), torch.zeros(())]


def test_same_facts_of_other_tensors_are_the_same(way):
    same = same_facts(*first_of_two())
    assert same(torch.ones(13)[1:].view(4, 3), torch.ones(()))  # another place in memory, other values
    assert same_facts()()
    assert same_facts(torch.empty(0))(torch.empty(0))


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_differs_is_seen(way, what):
    assert not same_facts(*first_of_two())(DIFFERENT[what](), torch.zeros(()))


def test_no_tensor_is_kept_alive(way):
    tensor = torch.zeros(3)
    died = weakref.ref(tensor)
    same = same_facts(tensor)
    del tensor
    gc.collect()
    assert died() is None and same(torch.zeros(3))
