"""--sample: the same part for the same seed, in which every value of every parameter stays; without it, everything."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import sampling

ROOT = Path(__file__).resolve().parents[2]
POLICIES, DTYPES, SIZES = ("graddrop", "layer", "freeze"), ("float32", "bfloat16"), range(9)
# Two large tables, and a test with one policy more than they have.
CASES = [
    *(("test_bits", sampling.axes_of({"policy": p, "dtype": d, "size": s}))
      for p, d, s in itertools.product(POLICIES, DTYPES, SIZES)),
    *(("test_masks", sampling.axes_of({"policy": p, "size": s})) for p, s in itertools.product(POLICIES, SIZES)),
    *(("test_names", sampling.axes_of({"policy": p})) for p in (*POLICIES, "gaussian")),
    ("test_without_parameters", set()),
]  # fmt: skip


def test_every_test_and_every_value_stays_in_a_small_part():
    for seed in range(100):
        kept = [CASES[number] for number in sampling.draw(CASES, 1, seed)]
        assert {test for test, _ in kept} == {test for test, _ in CASES}
        assert set.union(*(axes for _, axes in kept)) == set.union(*(axes for _, axes in CASES))
        assert len(kept) < 25, (seed, kept)


def test_a_seed_gives_its_part_again_and_others_all_the_rest():
    parts = [sampling.draw(CASES, 1, seed) for seed in range(200)]
    assert parts == [sampling.draw(CASES, 1, seed) for seed in range(200)]
    assert set.union(*parts) == set(range(len(CASES)))


def test_at_least_so_many_of_each():
    kept = [CASES[number][0] for number in sampling.draw(CASES, 5, seed=3)]
    assert all(kept.count(test) >= count for test, count in (("test_bits", 5), ("test_masks", 5), ("test_names", 4)))
    assert len(sampling.draw(CASES, 1000, seed=3)) == len(CASES)


class Tuple(NamedTuple):
    dtype: str
    masters: bool


def test_what_a_case_is_made_of():
    assert sampling.axes_of({"case": Tuple("float16", True), "p": 0.5}) == {
        ("dtype", "float16"), ("masters", "True"), ("p", "0.5"),
    }  # fmt: skip
    (axis,) = sampling.axes_of({"made_by": test_what_a_case_is_made_of})
    assert axis == ("made_by", "<function test_what_a_case_is_made_of>")  # no address: other processes have another


def marked(name, *marks, **params):
    callspec = {"callspec": SimpleNamespace(params=params)} if params else {}
    return SimpleNamespace(nodeid=name, get_closest_marker=lambda mark: mark in marks or None, **callspec)


def test_slow_tests_are_left_out_and_the_order_stays():
    gone = []
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: gone.extend(items)))
    before = [marked("a.py::test_a"), marked("a.py::test_slow", "slow")]
    before += [marked(f"b.py::test_b[{number}]", size=0) for number in range(9)]
    items = list(before)
    sampling.select(config, items, 2, seed=1)
    assert [item.nodeid.partition("[")[0] for item in items] == ["a.py::test_a", "b.py::test_b", "b.py::test_b"]
    assert items == [item for item in before if item not in gone] and len(items) + len(gone) == len(before)


def collected(*options):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "GRADDROP_TEST_SEED": "7"}
    settings = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 120}
    result = subprocess.run([*command, "tests/masks"], **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    return [line for line in result.stdout.splitlines() if "::" in line], result.stdout


def test_of_the_suite_itself():
    """That all processes draw the same part is seen in every run of `make test`: pytest-xdist compares."""
    (full, said), (sample, _) = collected(), collected("--sample=1")
    assert f"{len(full)} tests collected" in said and "deselected" not in said
    assert len(sample) < 0.6 * len(full) and set(sample) < set(full)
    assert {name.partition("[")[0] for name in sample} == {name.partition("[")[0] for name in full}
