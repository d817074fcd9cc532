"""`python -m graddrop_kernels verify`: every backend of this machine against "exact": masks by bits, values in ulp.

Needs nothing but the package, so that an installed wheel can be asked on the machine that is to train.
"""

import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ... import backends
from ...backends import Backend, cpu, triton
from .bounds import BOUNDS, norm_limit
from .cases import COLUMNS, DTYPES, Case, make_cases
from .run_case import Engine, Findings, launch_case, run_case

_FAILURES_SHOWN = 3  # per engine and policy
_BY_OPERATION = ("reference", "exact")  # they launch a kernel for each operation, thousands for a case


def verify(
    device: str | None = None, backend: str | None = None, seed: int | None = None, quick: bool = False,
    seconds: float | None = None,
) -> int:  # fmt: skip
    """Prints each failure when it is met, with the first index and both values, and at the end, or when it is stopped,
    a table of backend x policy.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; default: the CPU, and the GPU where torch sees one.
        backend: this one only, a name of ``backends.BACKENDS``; default: all that run here.
        seed: what everything random is drawn from; default: a fresh one, which is printed.
        quick: one case instead of many for each policy and column of the table.
        seconds: no case begins later.

    Returns:
        The exit code: 0, or 1 on any failure and where nothing could be compared.
    """
    started = time.monotonic()
    seed = secrets.randbits(31) if seed is None else seed
    devices = [torch.device(device)] if device else [torch.device(name) for name in _default_devices()]
    engines, absent = _engines(devices, backend)
    for name, reason in absent.items():
        print(f"not verified: {name}: {reason}")
    if not engines:
        print("FAIL: nothing to compare")
        return 1
    print(f"against 'exact', --seed {seed}: {', '.join(map(str, engines))}", flush=True)
    cases = make_cases(seed, quick, [device for device in devices if device.type != "cpu"])
    findings: dict[Engine, dict[str, Findings]] = {engine: {} for engine in engines}
    late: Callable[[], bool] = lambda: seconds is not None and time.monotonic() - started > seconds
    done = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GradDropEpoch.*toggle=True")  # some cases go past the last epoch
        warnings.filterwarnings("ignore", message="two optimizers are stepped in turn")  # to the same bits, on purpose
        try:
            _compile_ahead(cases, engines, started, late)
            for case in cases:
                if late():
                    break
                _progress(done, len(cases), "cases", time.monotonic() - started)
                taking = [engine for engine in engines if _takes(engine, case)]
                own = {engine: findings[engine].setdefault(case.policy, Findings()) for engine in taking}
                before = {engine: len(found.failures) for engine, found in own.items()}
                try:
                    run_case(case, taking, own)
                finally:
                    for engine, found in own.items():
                        for failure in found.failures[before[engine] : _FAILURES_SHOWN]:
                            print(failure, flush=True)
                done += 1
        finally:  # also when it is interrupted
            _progress(done, len(cases), "cases", time.monotonic() - started)
            print(_table(findings))
            status = _verdict(findings, done, len(cases), time.monotonic() - started)
    return status


def _compile_ahead(cases: list[Case], engines: list[Engine], started: float, late: Callable[[], bool]) -> None:
    """Compiles the Triton kernels of all cases in a process per core, where there are several. A first case of each
    kernel would wait for it on one core.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    engine = next((each for each in engines if each.backend.name == "triton"), None)
    if engine is None or cores < 2 or triton.interpreted():
        return
    from ...backends.triton.ahead import Kernels

    kernels = Kernels()
    for case in cases:
        if _takes(engine, case):
            try:
                with kernels.wanted():
                    launch_case(case, engine)
            except Exception:  # the case itself will tell
                continue
    try:
        for done in kernels.compile(cores):
            if late():
                break
            _progress(done, len(kernels), "kernels compiled", time.monotonic() - started)
    except OSError as error:  # no processes to be had: each kernel is compiled when it is needed
        print(f"kernels are not compiled ahead: {error}", file=sys.stderr)


def _default_devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _engines(devices: list[torch.device], only: str | None) -> tuple[list[Engine], dict[str, str]]:
    """Returns (engines to verify, {name of a backend that is left out: why})."""
    engines, absent = [], {}
    for backend in backends.BACKENDS:
        if only not in (None, backend.name):
            continue
        reason = backend.unavailable()
        fitting = [device for device in devices if backend.devices is None or device.type in backend.devices]
        if reason is None and not fitting:
            reason = f"works on {' and '.join(backend.devices or ())} tensors, not on {' or '.join(map(str, devices))}"
        if reason is not None:
            absent[backend.name] = reason
            continue
        for device in fitting:
            if (backend.name, device.type) != ("exact", "cpu"):  # exact on the CPU is what the others are compared with
                isas = cpu.available_isas() if backend.name == "cpu" else (None,)
                engines += [Engine(backend, device, isa) for isa in isas]
    return engines, absent


def _takes(engine: Engine, case: Case) -> bool:
    if engine.device.type != "cpu" and engine.backend.name in _BY_OPERATION and not case.eager:
        return False
    if case.reference.type != "cpu" and (engine.device != case.reference or engine.backend.name == "exact"):
        return False
    return engine.backend.misfit(engine.device, *DTYPES[case.dtypes].mode) is None


def _progress(done: int, of: int, what: str, seconds: float) -> None:
    """Prints a line: on a terminal over the last one, else at every tenth."""
    line = f"{done} of {of} {what}, {seconds:.0f} s"
    if sys.stderr.isatty():
        print(f"\r{line}{'':10}", end="\n" if done == of else "", file=sys.stderr, flush=True)
    elif done == of or done * 10 // of != (done - 1) * 10 // of:
        print(line, file=sys.stderr, flush=True)


def _merged(findings: dict[Engine, dict[str, Findings]]) -> dict[tuple[Backend, torch.device, str], list[Findings]]:
    """Groups the findings by backend, device and policy, so that instruction sets share a row."""
    rows: dict[tuple[Any, ...], list[Findings]] = {}
    for engine, by_policy in findings.items():
        for policy, found in by_policy.items():
            rows.setdefault((engine.backend, engine.device, policy), []).append(found)
    return rows


def _total(group: list[Findings], name: str) -> int:
    return sum(getattr(found, name) for found in group)


def _table(findings: dict[Engine, dict[str, Findings]]) -> str:
    lines = [("backend", "device", "policy", "cases", "masks", *COLUMNS, "elements that differ", "")]
    for (backend, device, policy), group in _merged(findings).items():
        total = partial(_total, group)
        worst = {column: [found.ulp[column] for found in group if column in found.ulp] for column in COLUMNS}
        masks = f"{total('masks') - total('wrong_masks')}/{total('masks')}" if total("masks") else "-"
        failed = sum(len(found.failures) for found in group)
        lines.append((
            backend.name, str(device), policy, str(total("cases")), masks,
            *(f"{max(ulps):.3g}" if ulps else "-" for ulps in worst.values()),
            f"{total('differing')} of {total('elements')}", f"FAIL {failed}" if failed else "PASS",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines)]
    align: Callable[[int, str], str] = lambda i, cell: cell.ljust(widths[i]) if i < 3 else cell.rjust(widths[i])
    table = "\n".join("  ".join(align(i, cell) for i, cell in enumerate(line)).rstrip() for line in lines)
    bounds = "; ".join(
        f"{name} {bound.param:g} (parameters), {bound.moments:g} (moments), {bound.gaussian:g} (Gaussian)"
        for name, bound in BOUNDS.items()
    )
    modes = "; ".join(
        f"{column}: {', '.join(name.removesuffix(column).strip() for name in names)}"
        for column, names in COLUMNS.items()
        if names != [column]
    )
    return (
        f"{table}\nmasks: cases whose masks were right. By dtypes (parameters/moments): the largest distance in ulp.\n"
        f"{modes}. Rounded stochastically: parameters in stochastic, moments or both in moments.\n"
        f"Allowed is 0, but relative to a step's operands in float32: {bounds}; and then 1 in 16 bits.\n"
        f"The norm of a clipped step may be {norm_limit(False)} ulp off ({norm_limit(True)} after a Gaussian mask); "
        "where it is, the rest of the step is not compared."
    )


def _verdict(findings: dict[Engine, dict[str, Findings]], done: int, cases: int, seconds: float) -> int:
    """Prints how many failures were not shown, and the last line. Returns the exit code."""
    count = 0
    for engine, by_policy in findings.items():
        for policy, found in by_policy.items():
            count += len(found.failures)
            if len(found.failures) > _FAILURES_SHOWN:
                print(f"     and {len(found.failures) - _FAILURES_SHOWN} more of {engine}, {policy}")
    compared = sum(found.cases for by_policy in findings.values() for found in by_policy.values())
    passed = "PASS" if done == cases else "PASS so far"
    outcome = f"FAIL: {count} failures" if count else passed if compared else "FAIL: nothing was compared"
    part = f"{done} of {cases}" if done < cases else f"{cases}"
    print(f"{outcome}: {part} cases on {len(findings)} engines, {compared} comparisons in {seconds:.0f} s", flush=True)
    return 0 if compared and not count else 1
