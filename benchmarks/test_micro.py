"""One small step for every backend, policy and dtype, by pytest-benchmark: `pytest benchmarks`.

Timed on the CPU by the host's clock, on the GPU by CUDA events (common/timers.py) with a cold L2 cache and rotated
buffers.
"""

import os

import pytest
import torch

from graddrop_kernels.backends import BACKENDS

from .common.cases import CASES, MEANINGS, make_optimizer
from .common.shapes import encoder, xlm_roberta
from .common.tensors import MODES, bytes_per_param, make_tensors
from .common.timers import GpuClock, copies_past_l2, make_timer, rotate

NUMEL = 100_000  # 400 tensors that fit into the cache, so that the host's share shows
GPU_HIDDEN = 128  # 24 layers of 0.2M parameters
ROUNDS = {"cpu": 50}
SLOW_ROUNDS = 2  # the reference takes half a second per step
REHEARSAL = os.environ.get("GRADDROP_REHEARSE", "0") not in ("", "0")  # the GPU's cases on CPU tensors
CPU = torch.device("cpu")
ON_CPU = [row.name for row in BACKENDS if row.name != "exact" and row.misfit(CPU, *MODES["float32"]) is None]
ON_GPU = [row.name for row in BACKENDS if row.name not in MEANINGS and "cuda" in (row.devices or ())]
CLOCK = GpuClock()


def short(case) -> str:
    return case.name.replace(", ", "-").replace(" ", "-")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=short)
@pytest.mark.parametrize("backend", ON_CPU)
def test_step(benchmark, backend, case, dtype):
    benchmark.group = f"{backend}, {dtype}"
    tensors = make_tensors(encoder(NUMEL), dtype)
    optimizer = make_optimizer(case, tensors, backend)
    case.enter_last_epoch(optimizer)
    before = [param.detach().clone() for _, param in tensors.named]
    benchmark.pedantic(optimizer.step, rounds=ROUNDS.get(backend, SLOW_ROUNDS), warmup_rounds=1)
    assert any(not torch.equal(param, old) for (_, param), old in zip(tensors.named, before))


@pytest.fixture(scope="module")
def timer():
    if not torch.cuda.is_available() and not REHEARSAL:
        pytest.skip("torch sees no GPU")
    return make_timer(REHEARSAL)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=short)
@pytest.mark.parametrize("backend", ["cpu"] if REHEARSAL else ON_GPU)
def test_gpu_step(benchmark, timer, backend, case, mode):
    benchmark.group = f"{backend}, {mode}"
    row = next(row for row in BACKENDS if row.name == backend)
    if reason := row.misfit(timer.device, *MODES[mode]):
        pytest.skip(f"{backend}: {reason}")
    shapes = xlm_roberta(2, 8, 50) if REHEARSAL else xlm_roberta(24, GPU_HIDDEN, 1000)
    one = make_tensors(shapes, mode, timer.device)
    copies = copies_past_l2(one.numel * bytes_per_param(mode), timer.l2_bytes)
    sets = [one, *(make_tensors(shapes, mode, timer.device) for _ in range(copies - 1))]
    optimizers = [make_optimizer(case, tensors, backend) for tensors in sets]
    for optimizer in optimizers:
        case.enter_last_epoch(optimizer)
    before = [param.detach().clone() for param in one.params]
    step = rotate([optimizer.step for optimizer in optimizers])
    benchmark.pedantic(CLOCK.run, (timer, step), rounds=10 * copies, warmup_rounds=copies)
    assert any(not torch.equal(param, old) for param, old in zip(one.params, before))
