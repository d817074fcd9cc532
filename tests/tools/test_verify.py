"""`verify`: it passes what is right and catches what is planted, with the line that says where; it needs no pytest."""

import dataclasses
import itertools
import os
import random
import re
import subprocess
import sys
from collections import Counter
from unittest import mock

import pytest
import torch
from cases import ISAS

from graddrop_kernels import backends, policies
from graddrop_kernels.backends.batch import ROUND_PARAMS
from graddrop_kernels.backends.reference import step as reference
from graddrop_kernels.masks import rule
from graddrop_kernels.masks.philox import DOMAIN_MOMENTS, DOMAIN_ROUNDING, words32
from graddrop_kernels.tools import cli
from graddrop_kernels.tools.verify import bounds
from graddrop_kernels.tools.verify import cases as verify_cases
from graddrop_kernels.tools.verify import command as verify
from graddrop_kernels.tools.verify import run_case as side_by_side
from graddrop_kernels.tools.verify.bounds import Bound
from graddrop_kernels.tools.verify.cases import (
    COLUMNS,
    DTYPES,
    POLICIES,
    SIZES,
    SMALL_SIZES,
    SWITCHES,
    Case,
    make_cases,
)
from graddrop_kernels.tools.verify.run_case import Engine, Findings, Training

EXACT = backends._BY_NAME["exact"]
CPU = torch.device("cpu")
MODES = len(COLUMNS)  # of which a policy has a case each
CASES = len(POLICIES) * MODES


@pytest.fixture
def plant(monkeypatch):
    """plant(step, name): a backend of this name whose ``masked_adamw_`` is ``step``; one that is there is replaced.

    ``more``: other fields of it.
    """

    def plant_(step, name="planted", **more):
        row = dataclasses.replace(backends._BY_NAME.get(name, EXACT), name=name, masked_adamw_=step, **more)
        table = (*(row for row in backends.BACKENDS if row.name != name), row)
        monkeypatch.setattr(backends, "BACKENDS", table)
        monkeypatch.setattr(backends, "_BY_NAME", {row.name: row for row in table})
        return row

    return plant_


@pytest.fixture
def only(monkeypatch):
    """only(policy, ...): leaves the other policies out of the cases, for the sake of time."""

    def only_(*policies):
        monkeypatch.setattr(verify_cases, "POLICIES", {name: POLICIES[name] for name in policies})

    return only_


def run(capsys, seed, *arguments, name="planted"):
    """(exit code, lines of the output) of `verify --quick` on one backend."""
    capsys.readouterr()  # what the fixtures have printed
    code = cli.main(["verify", "--quick", "--device", "cpu", "--backend", name, "--seed", str(seed), *arguments])
    return code, capsys.readouterr().out.splitlines()


def failures(lines):
    """The failures shown and, as the last of them, the verdict."""
    return [line for line in lines if line.startswith(("FAIL ", "FAIL:"))]


# What is right passes.


def test_a_backend_with_the_exact_bits_passes(capsys, plant, seed):
    plant(EXACT.masked_adamw_)
    code, lines = run(capsys, seed)
    assert code == 0 and not failures(lines), lines
    assert lines[0] == f"against 'exact', --seed {seed}: planted on cpu"
    for policy in POLICIES:
        row = next(line for line in lines if line.startswith("planted ") and f"cpu     {policy}  " in line)
        cells = row.split(policy)[1].split()
        masks = "-" if policy == "GaussianGradDrop" else f"{MODES}/{MODES}"
        assert cells[:2] == [str(MODES), masks] and cells[2 : 2 + MODES] == ["0"] * MODES, row
        assert re.search(r" 0 of [1-9][0-9]{5,}  PASS$", row), row
    assert lines[-1].startswith(f"PASS: {CASES} cases on 1 engines, {CASES} comparisons in ")


@pytest.mark.slow
def test_every_backend_that_runs_here_passes_in_a_process_without_pytest(seed):
    """As in an installed wheel. The instruction sets of the cpu backend are engines of their own."""
    code = (
        "import sys; sys.modules['pytest'] = sys.modules['hypothesis'] = None; "
        "from graddrop_kernels.tools.cli import main; "
        f"sys.exit(main(['verify', '--quick', '--device', 'cpu', '--seed', '{seed}']))"
    )
    # One thread: on a busy machine several wait for each other at every one of thousands of small calls.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    engines = next(line for line in lines if line.startswith("against")).split(": ")[1].split(", ")
    assert engines[: len(ISAS)] == [f"cpu/{isa} on cpu" for isa in ISAS]
    assert "reference on cpu" in engines and not any(engine.startswith("exact") for engine in engines)
    for backend in backends.BACKENDS:
        if backend.name != "exact" and (backend.unavailable() or "cpu" not in (backend.devices or ("cpu",))):
            assert any(line.startswith(f"not verified: {backend.name}: ") for line in lines)
    assert re.fullmatch(rf"{CASES} of {CASES} cases, \d+ s", result.stderr.splitlines()[-1])


# What is planted is found.


@pytest.fixture
def on_gradients(monkeypatch):
    """No masks of updates, which moments do not show."""
    masked_of = verify_cases._masked_of
    monkeypatch.setattr(verify_cases, "_masked_of", lambda policy: masked_of(policy)[:2])


def nudge(tensors, size, index, ulps):
    """Moves one element of the tensor of this size by so many floating-point numbers."""
    for tensor in tensors:
        if tensor is not None and tensor.numel() == size:
            bounds.bits(tensor.detach())[index] += ulps


def flip_one_bit(plan, key, completed_steps, layout, numel, *rest):
    keep, bucket = reference_mask(plan, key, completed_steps, layout, numel, *rest)
    if numel == 1031 and keep is not None:
        keep[700] = ~keep[700]
    return keep, bucket


reference_mask, reference_draws = rule.keep_and_bucket, rule.uniform16


def test_one_flipped_mask_bit(capsys, plant, only, on_gradients, seed):
    def step(batch):
        with mock.patch.object(reference, "keep_and_bucket", flip_one_bit):
            EXACT.masked_adamw_(batch)

    plant(step)
    only("GradDrop", "GradDrop every epoch", "mask=None")
    code, lines = run(capsys, seed)
    assert code == 1
    found = failures(lines)
    assert len(found) == 2 * 3 + 1 and lines[-1] == found[-1]
    assert found[-1].startswith(f"FAIL: {2 * MODES} failures: {3 * MODES} cases")
    for line in found[:-1]:
        assert re.search(
            r"planted on cpu: GradDrop( every epoch)?, .*: step 0, epoch \d: mask, by what it did: 1 of \d+ elements "
            r"are wrong, the first layers\.3\.weight7\[700\] of 1031: (trained, not dropped|dropped, not trained)$",
            line,
        ), line
    assert sum(f"and {MODES - 3} more of planted on cpu, GradDrop" in line for line in lines) == 2
    assert any(re.search(rf"GradDrop +{MODES} +0/{MODES} .* FAIL {MODES}$", line) for line in lines)
    assert any(re.search(rf"mask=None +{MODES} +{MODES}/{MODES} .* PASS$", line) for line in lines)


def test_a_draw_that_is_off_by_one(capsys, plant, only, on_gradients, seed):
    def step(batch):
        with mock.patch.object(rule, "uniform16", lambda key, draw, *rest: reference_draws(key, draw + 1, *rest)):
            EXACT.masked_adamw_(batch)

    plant(step)
    only("GradDrop every epoch", "FixedMask")
    code, lines = run(capsys, seed)
    assert code == 1 and any(re.search(rf"FixedMask +{MODES} +{MODES}/{MODES} .* PASS$", line) for line in lines)
    for line in failures(lines)[:3]:
        wrong, of = map(int, re.search(r"mask, by what it did: (\d+) of (\d+) elements are wrong", line).groups())
        assert wrong > 0.01 * of


def with_hyper(masked_adamw_=EXACT.masked_adamw_, **factors):
    """A step with some hyper-parameters multiplied."""

    def step(batch):
        hypers = batch.hypers
        batch.hypers = [
            dataclasses.replace(hyper, **{name: getattr(hyper, name) * factor for name, factor in factors.items()})
            for hyper in hypers
        ]
        masked_adamw_(batch)
        batch.hypers = hypers

    return step


def test_a_wrong_decay_fails_where_there_is_decay(capsys, plant, only, seed):
    plant(with_hyper(weight_decay=1.001))
    only("GradDrop", "LayerGradDrop", "mask=None")
    code, lines = run(capsys, seed)
    decaying = sum("decay" in case.switches for case in make_cases(seed, True, []))
    found = failures(lines)[:-1]
    assert (code == 1) == (decaying > 0) and bool(found) == (decaying > 0)
    for line in found:
        assert ", decay" in line and re.search(r"param: \d+ of \d+ elements are more than 0 ulp apart, ", line)
        actual, expected = re.search(r": (\S+) is not (\S+) \(\S+ ulp\)$", line).groups()
        assert float(actual) != float(expected)


@pytest.mark.parametrize("key", ["params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"])
def test_one_ulp_in_one_element(key, capsys, plant, only, seed):
    def step(batch):
        EXACT.masked_adamw_(batch)
        nudge(getattr(batch, key), 65537, 65000, 1)

    plant(step)
    only("mask=None")
    code, lines = run(capsys, seed)
    cases = make_cases(seed, True, [])
    hit = sum(key != "max_exp_avg_sqs" or "amsgrad" in case.switches for case in cases)
    assert code == (1 if hit else 0)
    found = failures(lines)[:-1]
    assert len(found) == min(hit, 3)
    for line in found:
        name = key[:-1] if key != "params" else "master_param" if "masters" in line else "param"
        assert f"step 0, epoch {line.split('epoch ')[1][0]}: {name}: 1 of 66645 elements are more than 0 ulp" in line
        assert "the first layers.0.weight8[65000] of 65537: " in line
        assert re.search(r"\((1|0\.5) ulp\)$", line), line  # half of one past a power of two


def test_a_step_count_that_is_wrong_names_the_tensor(capsys, plant, only, seed):
    def step(batch):
        EXACT.masked_adamw_(batch)
        for param, count in zip(batch.params, batch.steps):
            if param.numel() == 0:
                count += 1

    plant(step)
    only("GradDropEpoch toggle")
    code, lines = run(capsys, seed)
    assert code == 1
    assert all("step: 1 of 9 elements are more than 0 ulp apart, the first layers.0.weight0: 2.0 is not 1.0" in line
               for line in failures(lines)[:-1])  # fmt: skip


def test_a_backend_that_raises_or_gives_nan(capsys, plant, only, seed):
    def step(batch):
        if batch.param_dtype is torch.bfloat16:
            raise MemoryError("no room for it")
        EXACT.masked_adamw_(batch)
        batch.params[4].fill_(torch.nan)

    plant(step)
    only("mask=None")
    code, lines = run(capsys, seed)
    text = "\n".join(failures(lines))
    assert code == 1 and f"FAIL: {MODES} failures" in text
    assert "raised MemoryError: no room for it" in text and "layers.0.weight4[0] of 5: nan is not " in text
    assert re.search(rf"mask=None +{MODES} +{MODES}/{MODES} +inf +inf +-", "\n".join(lines))


# What is planted in a mode is found, also where a backend has a bound.

either_name = pytest.mark.parametrize("name", ["planted", "reference"])


@either_name
def test_gradients_that_attach_mask_masks_otherwise(name, capsys, plant, only, seed):
    def masks(batch):
        EXACT.mask_gradients_(batch)
        for grad in batch.grads:
            if grad.numel() == 65537:
                grad[777] += 1

    plant(EXACT.masked_adamw_, name, mask_gradients_=masks)
    only("GradDrop")
    code, lines = run(capsys, seed, name=name)
    [*found, verdict] = failures(lines)
    assert code == 1 and verdict.startswith(f"FAIL: {MODES} failures: {MODES} cases") and found
    assert all("attach_mask, epoch" in line and ": gradient: 1 of 66645 elements" in line for line in found)
    assert "layers.0.weight8[777]" in found[0]


@either_name
@pytest.mark.parametrize("shifted_domain", [DOMAIN_ROUNDING, DOMAIN_MOMENTS], ids=["parameters", "moments"])
def test_another_draw_of_the_stochastic_rounding(shifted_domain, name, capsys, plant, only, seed):
    """Every element stays within one ulp of bfloat16: what shows it beside a bound is how many are off."""

    def step(batch):
        shifted = lambda key, draw, domain, *run: words32(key, draw + (domain == shifted_domain), domain, *run)
        with mock.patch.object(reference, "words32", shifted):
            EXACT.masked_adamw_(batch)

    plant(step, name)
    only("mask=None")
    code, lines = run(capsys, seed, name=name)
    [*found, verdict] = failures(lines)
    of_params = shifted_domain == DOMAIN_ROUNDING
    tensor, modes = ("param", ["stochastic", "bf16 both moments"]) if of_params else ("exp_avg", ["moments"])
    assert code == 1 and verdict.startswith(f"FAIL: {len(found)} failures: {MODES} cases") and 1 <= len(found) <= 2
    for line in found:
        assert any(mode in line.split(": ")[1] for mode in modes), line
        off, of = map(int, re.search(rf": {tensor}: (\d+) of (\d+) elements are ", line).groups())
        share = bounds.TIPPED if tensor == "param" else bounds.TIPPED_MOMENTS
        assert of == 66645 and off > share * of
        assert (f"rounded to another number, more than 1 in {1 / share:.0f}" in line) == (name == "reference")


@either_name
def test_masters_that_are_not_written(name, capsys, plant, only, seed):
    def step(batch):
        masters = [param.clone() for param in batch.params]
        EXACT.masked_adamw_(batch)
        for param, master in zip(batch.params, masters):
            param.copy_(master if batch.copies else param.clone())

    plant(step, name)
    only("mask=None")
    code, lines = run(capsys, seed, name=name)
    [line, verdict] = failures(lines)
    assert code == 1 and verdict.startswith(f"FAIL: 1 failures: {MODES} cases")
    # Beside a bound the parameter is compared with the rounding of the backend's own masters, and comes first.
    assert re.search(r"mask=None, b?f16 masters.*: step \d, epoch \d: (master_)?param: \d+ of 66645 elem", line), line
    assert ("master_param: " in line) == (name == "planted")


def test_a_copy_that_is_cut_off_instead_of_rounded(capsys, plant, only, seed):
    """Within one ulp of the right one: a backend with a bound for its masters has none for their rounding."""

    def step(batch):
        EXACT.masked_adamw_(batch)
        for param, copy in zip(batch.params, batch.copies):
            bits = bounds.bits(copy)
            bits -= (copy.float().abs() > param.abs()).to(bits.dtype)

    for name in ("planted", "reference"):
        plant(step, name)
        only("GradDrop")
        code, lines = run(capsys, seed, name=name)
        [line, verdict] = failures(lines)
        assert code == 1 and verdict.startswith(f"FAIL: 1 failures: {MODES} cases")
        assert re.search(r"f16 masters.*: param: \d+ of \d+ elements are more than 0 ulp apart", line), line


@either_name
def test_a_clip_factor_that_is_not_applied(name, capsys, plant, only, seed):
    def step(batch):
        batch.clip_factor = None
        EXACT.masked_adamw_(batch)

    plant(step, name)
    only("mask=None")  # with a mask the norm may be small enough for a factor of 1
    code, lines = run(capsys, seed, name=name)
    clipping = sum("clip" in case.switches for case in make_cases(seed, True, []))
    found = failures(lines)
    assert code == bool(clipping) and all(", clip" in line for line in found[:-1])
    assert not clipping or found[-1].startswith(f"FAIL: {clipping} failures"), lines


def test_a_norm_that_is_wrong(capsys, plant, only, seed):
    plant(EXACT.masked_adamw_, sum_of_squares=lambda *batch: EXACT.sum_of_squares(*batch) * (1 + 2**-19))
    only("mask=None")
    code, lines = run(capsys, seed)
    clipping = [case for case in make_cases(seed, True, []) if "clip" in case.switches]
    found = failures(lines)[:-1]
    assert code == bool(clipping) and len(found) == min(3, len(clipping))
    for line in found:
        assert ", clip" in line and re.search(r": grad_norm: \S+ is not \S+ \(\S+ ulp\), more than 2 ulp$", line)


def test_a_norm_that_rounds_otherwise_is_let_pass_for_its_step(capsys, plant, only, seed):
    """Another factor gives other bits: that step shows nothing but its masks, and the next begins where "exact" is."""

    def sums(batch, masked):
        return EXACT.sum_of_squares(batch, masked) * (1 + 2**-22 * (max(batch.steps) == 0))

    plant(EXACT.masked_adamw_, sum_of_squares=sums)
    only("mask=None", "FixedMask")
    code, lines = run(capsys, seed)
    assert code == 0, lines
    clipping = [case for case in make_cases(seed, True, []) if "clip" in case.switches]
    for policy in ("mask=None", "FixedMask"):
        norms = sum(case.policy == policy for case in clipping)
        wanted = rf" {policy} +{MODES} +{MODES}/{MODES} .* {norms} of \d+ +PASS$"
        assert any(re.search(wanted, line) for line in lines), lines


def test_a_frozen_element_that_moves_is_seen_where_exact_moves_it_too(plant, seed):
    def step(batch):
        before = [moment.clone() for moment in batch.exp_avgs]
        EXACT.masked_adamw_(batch)
        for param, moment, old in zip(batch.params, batch.exp_avgs, before):
            param.detach()[moment == old] *= 0.99

    plant(step, "exact")
    engine, found = Engine(plant(step), CPU), Findings()
    case = Case("FixedMask", "f32", ("frozen",), (1031,) * 4, 1, str(seed))
    side_by_side.run_case(case, [engine], {engine: found})
    assert "param: a frozen element moved, layers." in found.failures[0]


def test_a_backend_without_a_dtype_is_not_asked_for_it(seed):
    cases = make_cases(seed, True, [])
    assert {case.column for case in cases if verify._takes(Engine(EXACT, CPU), case)} == {*COLUMNS}
    row = dataclasses.replace(EXACT, name="planted", dtypes=((torch.float32, torch.float32),))  # the masters' dtype
    assert {case.column for case in cases if verify._takes(Engine(row, CPU), case)} == {"f32", "masters"}


# Bounds.


@pytest.mark.parametrize("name, ulps, passes", [("reference", 8, True), ("other", 1, False)])
def test_bounds_belong_to_names(name, ulps, passes, capsys, plant, only, seed):
    """Within its bound a backend passes; any other must have the bits."""

    def step(batch):
        EXACT.masked_adamw_(batch)
        if batch.param_dtype is torch.float32 and not batch.copies:
            nudge(batch.params, 65537, 65000, ulps)

    plant(step, name)
    only("mask=None")
    code, lines = run(capsys, seed, name=name)
    assert (code == 0) == passes, lines


@pytest.mark.parametrize("part, ulps", [("params", 20), ("exp_avgs", 20)])
def test_more_than_the_bound_is_a_failure(part, ulps, capsys, plant, only, seed):
    def step(batch):
        EXACT.masked_adamw_(batch)
        for tensor in getattr(batch, part):
            if tensor.numel() == 65537 and tensor.dtype is torch.float32:
                index = int(tensor.detach().abs().argmax())
                bounds.bits(tensor.detach())[index] += ulps

    plant(step, "reference")
    only("mask=None")
    code, lines = run(capsys, seed, name="reference")
    assert code == 1 and f"more than {8 if part == 'params' else 2} ulp" in failures(lines)[0]


@pytest.mark.parametrize("ulps, passes", [(1, True), (128, False)])
def test_a_stochastic_rounding_may_tip_by_one_ulp(ulps, passes, capsys, plant, only, seed):
    def step(batch):
        EXACT.masked_adamw_(batch)
        for param in batch.params if batch.stochastic & ROUND_PARAMS else ():
            if param.numel() == 65537:
                bounds.bits(param.detach())[::1000] += ulps

    plant(step, "reference")
    only("mask=None")
    code, lines = run(capsys, seed, name="reference")
    assert (code == 0) == passes, lines
    # An ulp is that of the step's largest operand, which may be far larger than the parameter: three could hide.
    assert passes or re.search(r"param: [1-9]\d? of 66645 elements are more than 1.001 ulp apart", failures(lines)[0])


@pytest.mark.parametrize(
    "factors", [{"lr": 1 + 3e-4}, {"beta1": 1 + 1e-5}, {"beta2": 1 - 1e-5}, {"eps": 1.01}], ids=lambda one: [*one][0]
)
def test_the_references_bound_hides_no_wrong_formula(factors, capsys, plant, only, seed):
    plant(with_hyper(reference.masked_adamw_, **factors), "reference")
    only("GradDrop", "FixedMask")
    assert run(capsys, seed, name="reference")[0] == 1


def test_operand_sizes_by_hand():
    """m: 0.5 * 8 + 0.5 * g = 0.25, so that g = -7.5; v: 0.5 * 4 + 0.5 * 7.5^2; the update is 1, decay 0.3."""
    before = {"param": torch.tensor([3.0]), "exp_avg": torch.tensor([8.0]), "exp_avg_sq": torch.tensor([4.0])}
    after = {"param": torch.tensor([1.7]), "exp_avg": torch.tensor([0.25]), "exp_avg_sq": torch.tensor([30.125])}
    sizes = bounds.operand_sizes(before, after, 0.5, 0.1, True, False, None)
    assert [round(sizes[key].item(), 5) for key in ("param", "exp_avg", "exp_avg_sq")] == [3.0, 8.0, 56.25]
    update = 1.0 * (8 / 0.25) * (56.25 / 30.125)
    sizes = bounds.operand_sizes(before, after, 0.5, 0.1, False, False, None)
    assert abs(sizes["param"].item() - update) < 1e-4
    # Cautious decay goes by the sign of a moment that has cancelled.
    cancelled = {**after, "param": torch.tensor([2.7]), "exp_avg": torch.tensor([2.0**-21])}
    for exact, cautious, size in ((False, True, 2**24 * 0.3), (False, False, 3.0), (True, True, 3.0)):
        sizes = bounds.operand_sizes(before, cancelled, 0.5, 0.1, exact, cautious, None)
        assert sizes["param"].item() == pytest.approx(size, rel=0.1)
    sizes = bounds.operand_sizes(before, after, 0.5, 0.1, True, False, torch.tensor([20.0]))
    assert (sizes["exp_avg"].item(), sizes["exp_avg_sq"].item()) == (20.0, 400.0)
    # With masters it is they that are stepped; and a result beyond both operands is rounded at its own size.
    before, after = ({**each, "master_param": each["param"], "param": torch.tensor([7.0])} for each in (before, after))
    after["master_param"] = torch.tensor([4.5])
    sizes = bounds.operand_sizes(before, after, 0.5, 0.1, True, False, None)
    assert sizes["master_param"].item() == 4.5 and "param" not in sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_ulp_is_the_distance_to_the_next_number(dtype):
    below = torch.tensor([0.0, 1.0, 1.5, 3.9, 65000.0, 1e-7, torch.finfo(dtype).smallest_normal / 4])
    below = below.to(dtype)
    above = (bounds.bits(below) + 1).view(dtype)
    assert torch.equal(bounds.ulp_at(below.abs(), dtype), above.double() - below.double())


def test_a_bound_in_16_bits_is_one_ulp_and_a_little():
    bound = Bound(param=4, moments=0, gaussian=16)
    assert bounds.in_dtype(bound.of("param", False), torch.float32) == 4
    assert 1 < bounds.in_dtype(bound.of("param", False), torch.float16) < 1.001
    assert bounds.in_dtype(bound.of("exp_avg", False), torch.bfloat16) == 0
    assert bound.of("max_exp_avg_sq", True) == 16 and bound.of("step", True) == 0


# What is stepped.


def test_the_cases_cover_the_table(seed):
    cases = make_cases(seed, False, [])
    for policy, (column, names) in itertools.product(POLICIES, COLUMNS.items()):
        own = [case for case in cases if (case.policy, case.column) == (policy, column)]
        switches = {tuple(name for name in case.switches if name not in ("clip", "cautious")) for case in own}
        meanings = {"mask=None": 1, "GaussianGradDrop": 1, "SkipUpdate": 1}.get(policy, 3)
        if column == "f32":
            assert len(switches) == 8 * meanings == len(own)
        else:
            assert len(switches) >= 4 and len(own) == max(4, 2 * len(names))
        assert {(case.dtypes, case.sizes) for case in own} == {*itertools.product(names, (SIZES, SMALL_SIZES))}
    assert sum(COLUMNS.values(), []) == [*DTYPES]
    assert 0.3 < sum("clip" in case.switches for case in cases) / len(cases) < 0.7
    assert {*SIZES} >= {0, 1, 3, 4, 5, 31, 33, 1031, 65537}
    assert {name for case in cases for name in case.switches} == {*SWITCHES}
    assert 0.1 < sum(case.misaligned for case in cases) / len(cases) < 0.5
    quick = make_cases(seed, True, [])
    assert len(quick) == len(POLICIES) * len(COLUMNS) and all(case.sizes == SIZES for case in quick)


def test_a_seed_repeats_a_run_and_another_does_not(seed):
    assert make_cases(seed, False, []) == make_cases(seed, False, []) != make_cases(seed + 1, False, [])


def test_every_policy_of_the_package_and_of_the_readme_is_stepped(seed):
    rng, named = random.Random(seed), [(f"layers.{i}.w", torch.ones(3)) for i in range(4)]
    made = {type(make(rng, named)).__name__ for make in POLICIES.values()}
    # A step of TrainRows is a plain one, of parts of the tensors: tests/step/test_stepped_rows.py.
    assert made == {*policies.POLICIES, "NoneType"} - {"TrainRows"}


def test_misaligned_tensors_are(seed):
    values = [("layers.0.weight0", torch.ones(40)), ("layers.1.weight1", torch.ones(9))]
    arguments = {"amsgrad": True, "mask": None, "master_weights": True}
    kept = (*side_by_side._MOMENTS, "master_param")
    for misaligned in (False, True):
        case = Case("mask=None", "bf16 masters", (), (40, 9), 1, str(seed), misaligned)
        training = Training(case, values, Engine(EXACT, CPU), arguments | {"moment_dtype": torch.float32})
        training.step((torch.ones(40), torch.ones(9)))
        tensors = [
            tensor
            for param in training.params
            for tensor in (param, param.grad, *(training.optimizer.state[param][key] for key in kept))
        ]
        assert all((tensor.data_ptr() % 64 != 0) == misaligned for tensor in tensors)
        assert all((tensor.storage_offset() > 0) == misaligned for tensor in tensors)
        assert len({tensor.storage_offset() for tensor in tensors}) == (7 if misaligned else 1)


def test_a_gpu_is_given_a_long_tensor_of_every_policy(seed):
    """Stepped on the GPU itself by "exact", which a small case of each policy compares with the CPU's."""
    gpu = torch.device("cuda")
    large = [case for case in make_cases(seed, True, [gpu]) if case.reference == gpu]
    assert [case.policy for case in large] == list(POLICIES) and all(case.sizes[0] == 2**22 + 3 for case in large)
    row = dataclasses.replace(EXACT, name="planted", devices=("cuda",), unavailable=lambda: None)
    assert verify._takes(Engine(row, gpu), large[0])
    assert not verify._takes(Engine(row, CPU), large[0]) and not verify._takes(Engine(EXACT, gpu), large[0])
    small = next(case for case in make_cases(seed, True, [gpu]) if case.eager)
    assert verify._takes(Engine(EXACT, gpu), small) and verify._takes(Engine(row, gpu), small)


def test_the_instruction_set_of_a_run_is_the_one_asked_for_and_is_put_back(capsys, monkeypatch, only, seed):
    cpu = backends._BY_NAME["cpu"]
    if cpu.unavailable():
        pytest.skip(cpu.unavailable())
    used, before = set(), backends.cpu.isa()
    spy = lambda batch: used.add(backends.cpu.isa()) or cpu.masked_adamw_(batch)
    row = dataclasses.replace(cpu, masked_adamw_=spy)
    monkeypatch.setattr(backends, "BACKENDS", (row, EXACT))
    monkeypatch.setattr(backends, "_BY_NAME", {"cpu": row, "exact": EXACT})
    only("LayerGradDrop")
    assert run(capsys, seed, name="cpu")[0] == 0
    assert used == {*ISAS} and backends.cpu.isa() == before


# The command.


def test_nothing_to_compare_is_a_failure(capsys, plant, seed):
    row = plant(EXACT.masked_adamw_)
    lame = dataclasses.replace(row, unavailable=lambda: "its library is missing; install it")
    with mock.patch.object(backends, "BACKENDS", (lame, EXACT)):
        code, lines = run(capsys, seed)
    assert code == 1
    assert lines == ["not verified: planted: its library is missing; install it", "FAIL: nothing to compare"]
    foreign = dataclasses.replace(row, devices=("cuda",))
    with mock.patch.object(backends, "BACKENDS", (foreign, EXACT)):
        code, lines = run(capsys, seed)
    assert code == 1 and lines[0] == "not verified: planted: works on cuda tensors, not on cpu"


def test_without_a_seed_every_run_is_another_and_says_which(capsys, plant, only):
    plant(EXACT.masked_adamw_)
    only("LayerGradDrop")
    seeds = set()
    for _ in range(2):
        assert verify.verify("cpu", "planted", quick=True) == 0
        seeds.add(re.search(r"--seed (\d+)", capsys.readouterr().out)[1])
    assert len(seeds) == 2


def test_progress_is_one_line_on_a_terminal(monkeypatch, capsys):
    for done in range(21):
        verify._progress(done, 20, "cases", 1.4)
    assert capsys.readouterr().err.splitlines() == [f"{done} of 20 cases, 1 s" for done in range(0, 21, 2)]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for done in range(21):
        verify._progress(done, 20, "cases", 1.4)
    written = capsys.readouterr().err
    assert written.count("\r") == 21 and written.count("\n") == 1 and written.endswith("\n")


def wrong_step(batch):
    EXACT.masked_adamw_(batch)
    for param in batch.params:
        param.neg_()


def test_a_failure_is_printed_when_it_is_met(capsys, plant, only, seed):
    """And not at the end, which a run of hours may not reach: before the next case begins."""
    printed = []

    def step(batch):
        printed.append(capsys.readouterr().out)
        wrong_step(batch)

    plant(step)
    only("mask=None")
    run(capsys, seed)
    shown = [text.count("FAIL planted on cpu: mask=None") for text in printed]
    assert shown[:4] == [0, 1, 1, 1] and sum(shown) == 3 and len(shown) == MODES


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("of the comparison itself")], ids=repr)
def test_a_table_comes_whatever_happens(error, capsys, plant, only, monkeypatch, seed):
    plant(wrong_step)
    only("mask=None", "GradDrop")
    run_case, done = side_by_side.run_case, []

    def stopped(case, *rest):
        if len(done) == 5:
            raise error
        done.append(case)
        run_case(case, *rest)

    monkeypatch.setattr(verify, "run_case", stopped)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else RuntimeError):
        run(capsys, seed)
    lines = capsys.readouterr().out.splitlines()
    assert [case.policy for case in done] == ["mask=None", "GradDrop"] * 2 + ["mask=None"]  # in turns
    assert any(re.search(r"^planted  cpu     mask=None +3 +.* FAIL 3$", line) for line in lines), lines
    assert lines[-1].startswith(f"FAIL: 5 failures: 5 of {2 * MODES} cases on 1 engines, ")


def test_a_limit_of_seconds_ends_with_the_table(capsys, plant, only, monkeypatch, seed):
    """Every policy has had a case. What was compared decides; where nothing was, that is no pass."""
    plant(EXACT.masked_adamw_)
    only("mask=None", "GradDrop", "FixedMask")
    now, run_case = [0.0], side_by_side.run_case
    monkeypatch.setattr(verify.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(verify, "run_case", lambda *case: now.__setitem__(0, now[0] + 1) or run_case(*case))
    code, lines = run(capsys, seed, "--seconds", "3.5")
    assert code == 0 and lines[-1] == f"PASS so far: 4 of {3 * MODES} cases on 1 engines, 4 comparisons in 4 s"
    for policy, cases in (("mask=None", 2), ("GradDrop", 1), ("FixedMask", 1)):
        assert any(re.search(rf"cpu     {policy} +{cases} +{cases}/{cases} .* PASS$", line) for line in lines), lines
    monkeypatch.setattr(verify.time, "monotonic", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    code, lines = run(capsys, seed, "--seconds", "0.5")
    assert code == 1 and lines[-1].startswith(f"FAIL: nothing was compared: 0 of {3 * MODES} cases")


@pytest.mark.parametrize("quick", [True, False])
def test_backends_of_one_launch_per_operation_step_a_part_of_the_cases_on_a_gpu(quick, seed):
    """They are the same PyTorch code as on the CPU, which steps all. "exact" steps on the GPU what its long tensors
    need: a case of their dtypes.
    """
    gpu = torch.device("cuda")
    cases = make_cases(seed, quick, [gpu])
    for name in ("reference", "exact"):
        row = backends._BY_NAME[name]
        small = [case for case in cases if case.reference == CPU]
        taken = [case for case in small if verify._takes(Engine(row, gpu), case)]
        assert all(verify._takes(Engine(row, CPU), case) for case in small)
        assert Counter(case.policy for case in taken) == dict.fromkeys(POLICIES, 1 if quick else len(COLUMNS))
        assert {case.column for case in taken} == {*COLUMNS} or quick
        dtypes = {(case.policy, case.dtypes) for case in taken}
        assert all((case.policy, case.dtypes) in dtypes for case in cases if case.reference == gpu)
    row = dataclasses.replace(EXACT, name="planted", devices=("cuda",), unavailable=lambda: None)
    assert all(verify._takes(Engine(row, gpu), case) for case in cases)


def test_findings_of_instruction_sets_share_a_row():
    row = backends._BY_NAME["reference"]
    findings = {
        Engine(row, CPU, isa): {"GradDrop": Findings(2, 2, wrong, 100, 7, {"f32": ulp}, ["FAIL"] * wrong)}
        for isa, wrong, ulp in (("a", 0, 0.5), ("b", 1, 3.0))
    }
    line = next(line for line in verify._table(findings).splitlines() if line.startswith("reference"))
    assert line.split() == [
        "reference", "cpu", "GradDrop", "4", "3/4", "3", *["-"] * (MODES - 1), "14", "of", "200", "FAIL", "1"
    ]  # fmt: skip
