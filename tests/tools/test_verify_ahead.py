"""Before `verify` runs its cases it compiles their Triton kernels in several processes: all of them, and no case waits
for one. Without a GPU: kernels are compiled for an H100, and launched by a driver that only counts.
"""

import dataclasses
import multiprocessing
import os
import random
import time

import pytest
import torch
from counting_driver import counting_driver

triton = pytest.importorskip("triton")

from graddrop_kernels import backends  # noqa: E402
from graddrop_kernels.backends import triton as triton_backend  # noqa: E402
from graddrop_kernels.backends.triton import ahead, kernels, masks, norm, prologue, update  # noqa: E402
from graddrop_kernels.tools.verify import command as verify  # noqa: E402
from graddrop_kernels.tools.verify.cases import Case  # noqa: E402
from graddrop_kernels.tools.verify.run_case import Engine, launch_case  # noqa: E402

pytestmark = pytest.mark.skipif(triton_backend.interpreted(), reason="the interpreter compiles nothing")
CPU = torch.device("cpu")
CASES = [
    Case("GradDrop", "f32", ("clip",), (33, 1031), 2, "0"),
    Case("GradDropEpoch bit-packed", "bf16", ("amsgrad", "frozen"), (1031,), 3, "1", misaligned=True),
]


@pytest.fixture
def engine(monkeypatch, tmp_path) -> Engine:
    """Triton on CPU tensors, with an empty cache on the disk; it makes the masks too."""
    row = dataclasses.replace(backends._BY_NAME["triton"], devices=("cpu",), unavailable=lambda: None)
    monkeypatch.setattr(backends, "BACKENDS", (row, backends._BY_NAME["exact"]))
    monkeypatch.setattr(backends, "_BY_NAME", {each.name: each for each in backends.BACKENDS})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(masks.mask_kernel, "device_caches", type(masks.mask_kernel.device_caches)(
        masks.mask_kernel.device_caches.default_factory
    ))  # fmt: skip
    return Engine(row, CPU)


@pytest.fixture
def compiled(monkeypatch) -> list[bool]:
    """Of each kernel that this process looks up on the disk: whether it had to be compiled."""
    found: list[bool] = []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda *, cache_hit, **_: found.append(not cache_hit), raising=False
    )
    return found


def test_no_case_waits_for_a_kernel(engine, compiled, monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with counting_driver() as driver:
        verify._compile_ahead(CASES, [engine], time.monotonic(), lambda: False)
        assert not compiled and not driver.launches  # nothing in this process
        for case in CASES:
            launch_case(case, engine)
        assert len(compiled) >= 7 and not any(compiled), compiled
        assert len(driver.launches) > 2 * 2 + 3 * 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{len(compiled)} of {len(compiled)} kernels compiled, ")


@pytest.mark.parametrize("cores, late", [({0}, False), ({0, 1, 2}, True)], ids=["one core", "late"])
def test_nothing_is_compiled_ahead_on_one_core_or_when_the_time_is_over(cores, late, engine, monkeypatch):
    """On one core it would only come earlier. When it is late, the processes end with the kernels they are at."""
    begun = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    monkeypatch.setattr(ahead, "_compile", begun.append)
    monkeypatch.setattr(ahead.Kernels, "compile", lambda self, processes: begun.append(processes) or iter((1, 2, 3)))
    with counting_driver():
        verify._compile_ahead(CASES[:1], [engine], time.monotonic(), lambda: late)
    assert begun == ([] if len(cores) == 1 else [3])


def test_without_processes_kernels_are_compiled_when_they_are_needed(engine, monkeypatch, capsys):
    def none(context):
        raise OSError("no process to be had")

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(ahead.multiprocessing, "get_context", none)
    with counting_driver():
        verify._compile_ahead(CASES[:1], [engine], time.monotonic(), lambda: False)
    assert "kernels are not compiled ahead: no process to be had" in capsys.readouterr().err


class Broken:
    """Stands for a kernel whose compilation does something else."""

    def __init__(self, action):
        self.preload = lambda data: action()


def test_a_kernel_that_fails_or_hangs_costs_no_other(engine):
    """The case itself then tells. No process is left."""
    with counting_driver():
        found = ahead.Kernels()
        with found.wanted():
            launch_case(CASES[0], engine)
        assert len(found) >= 4
        found._found |= {"a": (Broken(lambda: 1 / 0), ""), "b": (Broken(lambda: time.sleep(100)), "")}
        began = time.monotonic()
        assert list(found.compile(2, patience=8.0)) == list(range(1, len(found)))
        assert time.monotonic() - began < 60
    assert not multiprocessing.active_children()


def test_keys_do_not_depend_on_the_kernel_that_is_launched_first(seed):
    """Else a file on the disk, of this process' other runs or of a pack for a GPU machine, would not be found again."""
    modules = map(vars, kernels._CALLEES_FIRST)
    functions = [each for module in modules for each in module.values() if hasattr(each, "cache_key")]
    launched = [update.masked_adamw_kernel, norm.sum_of_squares_kernel, prologue.prologue_kernel, masks.mask_kernel]
    keys = [function.cache_key for function in launched]
    order = random.Random(seed)
    for _ in range(3):
        for function in functions:
            function.hash, function.used_global_vals = None, {}
        order.shuffle(launched)
        kernels.hash_callees_first()
        assert sorted(function.cache_key for function in launched) == sorted(keys)
