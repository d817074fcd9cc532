"""One small step for every backend, policy and dtype, by pytest-benchmark: `pytest benchmarks`."""

import pytest
import torch
from step_cpu import CASES, DTYPES, attach, make_tensors

from graddrop_kernels import available_backends

NUMEL = 100_000  # 400 tensors: in the cache, so the host's share shows
ROUNDS = {"cpu": 50}
SLOW_ROUNDS = 2  # the reference takes half a second a step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(", ", "-").replace(" ", "-"))
@pytest.mark.parametrize("backend", [name for name in available_backends() if name != "exact"])
def test_step(benchmark, backend, case, dtype):
    benchmark.group = f"{backend}, {dtype}"
    tensors = make_tensors("layers", NUMEL, DTYPES[dtype])
    optimizer = attach(case.optimizer(tensors, backend=backend), tensors)
    case.enter_last_epoch(optimizer)
    before = [param.detach().clone() for _, param in tensors.named]
    benchmark.pedantic(optimizer.step, rounds=ROUNDS.get(backend, SLOW_ROUNDS), warmup_rounds=1)
    assert any(not torch.equal(param, old) for (_, param), old in zip(tensors.named, before))
