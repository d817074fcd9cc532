"""find_blocks on every model class of the installed transformers that its default configuration can build: as many
blocks as the configuration counts layers. Where that differs, blocks_exceptions.csv says why: "right" if the
configuration counts what the class has not or does not count what it has, "shared" if policies of whole blocks must
refuse it, "wrong" and "refused" if the blocks are not found.

The whole is for `make test-all`; `make test` draws classes for some seconds.
"""

import csv
import gc
import importlib
import random
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from layer_counts import CONVOLUTIONAL, counted_layers
from lazy import transformers

from graddrop_kernels import find_blocks

PARTS = 24
SECONDS = 20  # for the drawn classes
TABLE = Path(__file__).with_name("blocks_exceptions.csv")
EXCEPTIONS = {row["class"]: row for row in csv.DictReader(TABLE.read_text().splitlines())}
RELEASE = "5.23.0"  # that the table is of; others have other classes and other defaults

try:
    installed = version("transformers")
except PackageNotFoundError:
    installed = "none"
if installed != RELEASE:
    pytest.skip(f"the table is of transformers {RELEASE}, installed is {installed}", allow_module_level=True)


def class_names() -> list[str]:
    """The classes of the auto mappings, for base models and for tasks."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    mappings = [value for key, value in vars(auto).items() if key.endswith("_NAMES")]
    listed = [value for mapping in mappings for value in getattr(mapping, "values", list)()]
    names = {name for value in listed for name in ([value] if isinstance(value, str) else value)}
    return sorted(name for name in names if not name.endswith("Config"))


def build(name: str):
    """The model on the meta device, or None where the default configuration makes none."""
    try:
        model_class = getattr(transformers, name)
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return model_class(model_class.config_class())
    except Exception:  # a configuration without a default, a package that is missing, another's bug
        return None


def blocks_of(model) -> tuple[int, str]:
    """(number of blocks, why there are none)."""
    try:
        return len(find_blocks(model)), ""
    except ValueError as error:
        return 0, str(error)


def fault(name: str, model) -> str | None:
    """What is wrong with the blocks of a model, if the table does not know it."""
    config = model.config.to_dict()
    (found, reason), counted = blocks_of(model), counted_layers(name, config)
    seen[name] = found or counted
    row = EXCEPTIONS.get(name, {"found": found, "counted": found, "verdict": "right"})
    if (found, counted) != (int(row["found"]), int(row["counted"])):
        return f"{name}: {found} blocks, {counted} layers in the configuration; the table has {row}"
    if not found and "layers=[...]" not in reason:
        return f"{name}: refused without the remedy: {reason}"
    if not found and ("share weights" in reason) != (row["verdict"] == "shared"):
        return f"{name}: refused for another reason than {row['verdict']!r}: {reason}"
    if config.get("model_type") in CONVOLUTIONAL and "no clear transformer blocks" not in reason:
        return f"{name}: {found} blocks in a convolutional network: {reason}"
    return None


seen: dict[str, int] = {}  # classes that were built: blocks found, or layers counted where there are none


def check(names) -> None:
    faults = []
    for name in names:
        model = build(name)
        if model is None:
            continue
        if told := fault(name, model):
            faults.append(told)
        del model
    gc.collect()
    assert not faults, "\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_class(part):
    check(class_names()[part::PARTS])


@pytest.mark.slow
def test_nearly_all_classes_are_right():
    """After all parts: of the classes that have layers at least 97% are right, and no row of the table is left over."""
    if len(seen) < 0.8 * len(class_names()):
        pytest.skip("runs after all parts, in one process")
    transformer = [name for name, layers in seen.items() if layers]
    missed = {name for name, row in EXCEPTIONS.items() if row["verdict"] in ("wrong", "refused")}
    wrong = missed.intersection(transformer)
    print(f"{len(seen)} classes built, {len(transformer)} with layers, {len(wrong)} not found right")
    assert len(wrong) <= 0.03 * len(transformer)
    assert set(EXCEPTIONS) <= set(seen)


def test_drawn_classes(seed):
    names = class_names()
    random.Random(seed).shuffle(names)
    end = time.monotonic() + SECONDS
    done = 0
    while names and time.monotonic() < end:
        check([names.pop()])
        done += 1
    assert done


def test_the_table_says_why():
    assert len(EXCEPTIONS) == len(TABLE.read_text().splitlines()) - 1
    for row in EXCEPTIONS.values():
        assert row["verdict"] in ("right", "shared", "wrong", "refused") and row["reason"], row
        assert row["found"] != row["counted"], row
