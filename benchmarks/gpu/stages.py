"""The stages of a run on a GPU and the seconds of each, in two plans, a long and a short one. Imports no torch."""

import sys
from dataclasses import dataclass, field

LONG = 350.0  # seconds of a budget for the longer plan
_LARGE = {"works": ["xlmr_large"]}
_TESTS = "tests/backends/test_"


@dataclass(frozen=True)
class Measurement:
    """A stage in the measuring process. ``call``: "module:function", given a recorder, a timer, the seconds and the
    arguments; it returns the number of failures.
    """

    name: str
    seconds: float
    call: str
    arguments: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A process of its own."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Programs:
    """A stage of processes side by side: they measure nothing, unless there is only one."""

    name: str
    seconds: float
    programs: tuple[Program, ...]


Stage = Measurement | Programs


def plan(budget: float, rehearse: bool, seed: int) -> list[Stage]:
    """Lists the stages for a budget in seconds, what matters most first. ``seed``: of `verify`."""
    long = budget >= LONG
    checks = Programs("tests", 95.0 if long else 85.0, tuple(_checks(long, rehearse, seed)))
    return [checks, *(_long if long else _short)(rehearse)]


def _checks(long: bool, rehearse: bool, seed: int) -> list[Program]:
    pytest = _pytest(rehearse)
    # What only a GPU can show comes first.
    found = [
        Program("test_triton_gpu", (*pytest, f"{_TESTS}triton_gpu.py")),
        Program("info", (*_package, "info")),
        _verify("triton", rehearse, seed, 75.0 if long else 65.0),
        _verify("cuda", rehearse, seed, 75.0 if long else 65.0),
    ]
    if long:
        found += [
            Program("test_cuda_emulation", (*pytest, f"{_TESTS}cuda_emulation.py", "-k", "device")),
            Program("test_triton_kernels", (*pytest, "-n", "4", f"{_TESTS}triton_kernels.py")),
            *(_verify(backend, rehearse, seed, 75.0) for backend in ("reference", "exact")),
        ]
    return found


def _long(rehearse: bool) -> list[Stage]:
    others = {"works": ["xlmr_base", "llama_1b", "one_tensor"]}
    bench = (*_package, "bench", *(("--quick", "--device", "cpu") if rehearse else ()))
    agree = (*_pytest(rehearse), "-n", "8", "--sample", "4", f"{_TESTS}backends_agree.py")
    return [
        _step("XLM-R-large, float32", 30.0, **_LARGE, modes=["float32"]),
        _step("XLM-R-large, bfloat16", 30.0, **_LARGE, modes=["bfloat16"]),
        Measurement("host, launches, graphs", 30.0, "benchmarks.gpu.host:run"),
        Measurement("modes", 40.0, "benchmarks.gpu.modes:run"),
        Measurement("sweeps", 50.0, "benchmarks.gpu.sweeps:run"),
        _step("XLM-R-large, bfloat16, float32 moments", 25.0, **_LARGE, modes=["bfloat16, float32 moments"]),
        Programs("bench", 50.0, (Program("bench", bench),)),
        Programs("test_backends_agree", 50.0, (Program("test_backends_agree", agree, _FUSED),)),
        _step("other models", 45.0, **others),
    ]


def _short(rehearse: bool) -> list[Stage]:
    modes = {"tables": ["clipping", "masters"], "works": 1}
    sweeps = {"sweeps": ["frozen"], "modes": ["float32"]}
    return [
        _step("XLM-R-large, float32", 23.0, **_LARGE, modes=["float32"]),
        _step("XLM-R-large, bfloat16", 22.0, **_LARGE, modes=["bfloat16"]),
        Measurement("host, launches, graphs", 25.0, "benchmarks.gpu.host:run"),
        Measurement("modes: clipping, masters", 25.0, "benchmarks.gpu.modes:run", modes),
        Measurement("sweeps: frozen", 15.0, "benchmarks.gpu.sweeps:run", sweeps),
    ]


_package = (sys.executable, "-m", "graddrop_kernels")
_FUSED = {"GRADDROP_TEST_BACKENDS": "triton cuda"}
_ON_CPU = {"triton": "reference", "cuda": "cpu", "reference": "reference", "exact": "cpu"}  # what a rehearsal verifies


def _pytest(rehearse: bool) -> tuple[str, ...]:
    """A rehearsal collects the tests, as most need a GPU."""
    shown = ("--collect-only", "-q") if rehearse else ("-v", "--tb=short")
    return (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *shown)


def _verify(backend: str, rehearse: bool, seed: int, seconds: float) -> Program:
    device, chosen, seconds = ("cpu", _ON_CPU[backend], 3.0) if rehearse else ("cuda", backend, seconds)
    options = ("--quick", "--device", device, "--backend", chosen, "--seed", str(seed), "--seconds", f"{seconds:.0f}")
    return Program(f"verify {backend}", (*_package, "verify", *options))


def _step(name: str, seconds: float, **arguments) -> Measurement:
    return Measurement(f"step, {name}", seconds, "benchmarks.gpu.step:run", arguments)
