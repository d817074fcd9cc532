"""The paper's methods: one row reaches every reader of the table, and the documents name every row."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from graddrop_kernels.policies import FixedMask, TrainRows
from graddrop_kernels.policies.paper import METHODS
from graddrop_kernels.policies.registry import POLICIES

ROOT = Path(__file__).resolve().parents[2]
# In a process of its own: the readers make their tables when they are imported.
ADDS_A_ROW = """
import random
from dataclasses import dataclass

import torch

from graddrop_kernels.policies import BlockPolicy
from graddrop_kernels.policies.paper import METHODS, Method

@dataclass(frozen=True)
class Last(BlockPolicy):
    p: float = 0.5
    layers: tuple[str, ...] | None = None
    def keeps(self, context, block):
        return block == context.blocks[-1]

METHODS["made-up"] = Method("Made-Up", "Last, made up", lambda epochs, p: Last(p))

import cases
import toy
from benchmarks.common import cases as measured
from benchmarks.xglue import titles
from benchmarks.xglue.arguments import methods_of
from benchmarks.xglue.runs.methods import policy_of
from benchmarks.xglue.settings import settings_for
from graddrop_kernels.demo.arguments import parse
from graddrop_kernels.demo.methods import METHODS as of_demo
from graddrop_kernels.tools import bench
from graddrop_kernels.tools.verify.cases import POLICIES, make_cases

assert parse(["--method", "made-up"]).method == ["made-up"] and "made-up" in parse(["--method", "all"]).method
assert of_demo["made-up"](3, 0.25) == Last(0.25)

tensors = bench._make_tensors("float32", torch.device("cpu"), 2, 8)
assert "Last, made up" in [entry.name for entry in bench._entries(tensors, "float32", "exact")]

named = [(f"layers.{i}.weight", torch.ones(3)) for i in range(4)]
assert POLICIES["Last made up"](random.Random(0), named) == Last(0.5, layers=("layers.*",))
made = [case for case in make_cases(0, True, []) if case.policy == "Last made up"]
assert made and all(case.arguments(random.Random(0), named, 1.0)["masked"] for case in made)

case = measured.CASE["Last, made up"]
assert case in measured.CASES and case.needs_blocks and case.policy(named) == Last(measured.P)

assert titles.TITLES["made-up"] == "Made-Up" and "made-up" in methods_of(["all"])
assert policy_of(settings_for("sib200", method="made-up", seed=0)) == Last(0.2)

assert cases.MASKINGS["made-up"].policy(named) == Last(0.5, layers=cases.BLOCKS)
assert "made-up" in {case.policy for case in cases.ALL_CASES}
model, optimizer = toy.build("made-up")
assert optimizer.mask("layer.2.linear.weight").all() and not optimizer.mask("layer.0.linear.weight").any()
assert "made-up" in toy.BLOCK_POLICIES
"""


def test_one_row_reaches_every_reader():
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests' / 'support')!r}]\n{ADDS_A_ROW}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_policy_has_a_row():
    """But for those that name parameters."""
    rows = {type(method(3)).__name__ for method in METHODS.values()}
    assert rows == {*POLICIES, "NoneType"} - {FixedMask.__name__, TrainRows.__name__}


def test_rows_are_told_apart():
    policies = [method(3) for method in METHODS.values()]
    assert len(set(policies)) == len(policies)
    for what in ("title", "name"):
        assert len({getattr(method, what) for method in METHODS.values()}) == len(METHODS), what


# What a page says where a field is not the default.
SAID = {
    "every": lambda value: f'every="{value}"',
    "toggle": lambda value: "toggle=True",
    "storage": lambda value: f'storage="{value}"',
    "direction": lambda value: "-" + value.title().replace("_", ""),  # as in the paper's name
    "p": lambda value: f"p={type(value).__name__}(",
}


def words_of(policy):
    """The class, and what tells the policy from the class's others: numbers do not."""
    if policy is None:
        return ["None`"]
    values = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    changed = {name for name, value in values.items() if value != getattr(type(policy), name, None)}
    numbers = {name for name, value in values.items() if type(value) in (int, float)}
    return [f"`{type(policy).__name__}(", *(SAID[name](values[name]) for name in sorted(changed - numbers))]


@pytest.mark.parametrize("page, row", [
    *(("docs/semantics.md", row) for row in METHODS),
    *(("README.md", row) for row, method in METHODS.items() if method.studied),
])  # fmt: skip
def test_the_documents_name_every_row(page, row):
    """In one line of their table of policies."""
    text = (ROOT / page).read_text(encoding="utf-8")
    section = re.search(r"^## Policies\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]
    table = [line for line in section.splitlines() if line.startswith("|")]
    words = words_of(METHODS[row](3))
    assert any(all(word in line for word in words) for line in table), words
