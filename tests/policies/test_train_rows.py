"""TrainRows: its rows, their text, and what it refuses."""

import random
import time

import numpy as np
import pytest
import torch
from toy import named_params, refused, snapshot

from graddrop_kernels import FusedGradDropAdamW, GradDrop, TrainRows
from graddrop_kernels.masks.row_block import RowBlock
from graddrop_kernels.policies import Rows, from_json

SIZE = 12


@pytest.mark.parametrize(
    "given, rows, text",
    [
        (slice(9, None), [9, 10, 11], "9:"),
        (slice(-3, None), [9, 10, 11], "-3:"),
        (slice(None, 2), [0, 1], "0:2"),
        (slice(2, 9, 3), [2, 5, 8], "2,5,8"),
        (slice(1, None, 4), [1, 5, 9], "1::4"),
        (range(3, 6), [3, 4, 5], "3:6"),
        (range(-2, 1), [0, 10, 11], "0,-1,-2"),
        (7, [7], "7"),
        ([5, 4, 5, 9], [4, 5, 9], "4:6,9"),
        ([0, -1], [0, 11], "0,-1"),
        (torch.tensor([8, 2, 3]), [2, 3, 8], "2:4,8"),
        (np.array([1, 10]), [1, 10], "1,10"),
        (np.int64(3), [3], "3"),
        ([np.int64(3), np.int32(4)], [3, 4], "3:5"),
        (torch.arange(SIZE) % 5 == 1, [1, 6, 11], "1,6,11"),
        (np.arange(SIZE) > 9, [10, 11], "10:12"),
        ([True] + 11 * [False], [0], "0"),
        (" 5, 7, 9: ", [5, 7, 9, 10, 11], "5,7,9:"),
    ],
    ids=repr,
)
def test_rows_however_they_are_given(given, rows, text):
    parsed = Rows.parse(given)
    assert [row for start, stop in parsed.runs(SIZE) for row in range(start, stop)] == rows
    assert str(parsed) == text and Rows.parse(text).runs(SIZE) == parsed.runs(SIZE)
    assert parsed.share((SIZE, 3)) == len(rows) / SIZE
    policy = TrainRows({"weight": given})
    assert from_json(policy.to_json()) == policy and hash(from_json(policy.to_json())) == hash(policy)


def test_equal_rows_are_equal_policies():
    named = TrainRows({"a": [3, 4, 9], "b": slice(2, None)}, rest="frozen")
    assert named == TrainRows({"module.a": "3:5,9", "b": "2:"}, "frozen") != TrainRows({"a": [3, 4, 9], "b": "2:"})
    assert named != TrainRows({"a": [3, 4], "b": "2:"}, "frozen")
    assert repr(named) == "TrainRows({'a': '3:5,9', 'b': '2:'}, rest='frozen')"
    assert len(repr(TrainRows({"a": range(0, 4000, 2)}))) < 100


@pytest.mark.parametrize("runs", range(300))
def test_the_parts_of_a_layout_within_a_range_are_its_elements_there(runs, seed):
    rng = random.Random(seed + runs)
    inner, numel, base = rng.randint(1, 6), rng.randint(1, 30), rng.randint(0, 9)
    layout = RowBlock(base, inner, inner + rng.randint(0, 5))
    index = lambda layout, numel: [first + i for _, first, count in layout.runs(numel) for i in range(count)]
    start = rng.randint(0, 45)
    stop = start + rng.randint(1, 25)
    parts = list(layout.within(numel, start, stop))
    found = [pair for first, count, part in parts for pair in enumerate(index(part, count), first)]
    assert found == [(i, at) for i, at in enumerate(index(layout, numel)) if start <= at < stop] and len(parts) <= 3


def test_many_rows_take_no_more_time_each():
    start = time.process_time()
    assert len(TrainRows({"weight": list(range(0, 80_000, 2))}).rows["weight"].parts) == 40_000
    assert time.process_time() - start < 5  # comparing each with each takes four times as long


# What is refused.


@pytest.mark.parametrize(
    "make, parts",
    [
        (lambda: TrainRows({}), [r"TrainRows\(rows=\)", "non-empty mapping", r"got \{\}"]),
        (lambda: TrainRows([1, 2]), [r"TrainRows\(rows=\)", "non-empty mapping"]),
        (lambda: TrainRows({"weight": [1]}, rest="off"), [r"TrainRows\(rest=\)", "'dense' or 'frozen'", "'off'"]),
        (lambda: TrainRows({"w": [1], "module.w": [2]}), ["names a parameter twice"]),
        (lambda: TrainRows({"weight": []}), ["'weight'", "no rows", "leave the parameter out"]),
        (lambda: TrainRows({"weight": torch.zeros(3).bool()}), ["'weight'", "no rows"]),
        (lambda: TrainRows({"weight": range(7, -1)}), ["'weight'", "no rows"]),
        (lambda: TrainRows({"weight": torch.ones(3)}), ["'weight'", "must be a slice, ints, a bool vector", "tensor"]),
        (lambda: TrainRows({"weight": torch.ones(3, 2).bool()}), ["'weight'", r"shape \(3, 2\)"]),
        (lambda: TrainRows({"weight": [True, 2]}), ["'weight'", "must be a slice"]),
        (lambda: TrainRows({"weight": "3-5"}), ["'weight'", "must be a slice", "'3-5'"]),
        (lambda: TrainRows({"weight": slice(5, 1, -1)}), ["'weight'", "counts down", "at least 1"]),
        (lambda: TrainRows({"weight": slice(0.5, 1)}), ["'weight'", "must be a slice"]),
        (lambda: TrainRows({"weight": None}), ["'weight'", "must be a slice", "None"]),
        (lambda: TrainRows({"weight": b"12"}), ["'weight'", "must be a slice", "b'12'"]),
        (lambda: TrainRows({"weight": torch.ones(3, dtype=torch.uint8)}), ["'weight'", "got uint8", "bool or int64"]),
        (lambda: TrainRows({"weight": np.ones(3, np.uint8)}), ["'weight'", "got uint8", "bool or int64"]),
        (lambda: TrainRows({"weight": torch.ones(3, device="meta").long()}), ["'weight'", "readable values", "meta"]),
        (lambda: TrainRows({"weight": torch.ones(3).to_sparse()}), ["'weight'", "readable values", "sparse_coo"]),
        (lambda: TrainRows({1: [1]}), ["has the key 1", "name of a parameter"]),
    ],
)
def test_bad_rows(make, parts):
    with refused(ValueError, *parts):
        make()


@pytest.mark.parametrize(
    "rows, parts",
    [
        ({"weight": [2]}, [r"'weight' of shape \(2, 3\)", "rows 2, but there are 2 rows"]),
        ({"weight": [-3]}, ["rows -3, but there are 2 rows"]),
        ({"weight": slice(0, 5)}, ["rows 0:5, but there are 2 rows"]),
        ({"weight": slice(2, None)}, ["rows 2:, but there are 2 rows"]),
        ({"weight": slice(1, 1)}, ["rows 1:1, but there are 2 rows"]),
        ({"weight": torch.ones(3).bool()}, ["a bool vector of 3, but there are 2 rows"]),
        ({"wieght": [0]}, ["no parameter is called 'wieght'", "'weight'"]),
        ({"scalar": [0]}, ["'scalar' is a scalar and has no rows", "leave it out"]),
        ({"other": [0]}, ["'other' is in a parameter group with another mask", "leave it out"]),
    ],
)
def test_rows_that_do_not_suit_the_parameters(rows, parts):
    scalar = ("scalar", torch.nn.Parameter(torch.ones(())))
    other = {"params": named_params("other"), "mask": GradDrop()}
    with refused(ValueError, "TrainRows", *parts):
        FusedGradDropAdamW([{"params": [*named_params(), scalar]}, other], mask=TrainRows(rows))
    optimizer = FusedGradDropAdamW(named_params("first"), mask=None)
    new = [("weight" if "other" not in rows else "another", named_params()[0][1]), scalar]
    if "other" not in rows:
        before = snapshot(optimizer)
        with refused(ValueError, "TrainRows", *parts):
            optimizer.add_param_group({"params": new, "mask": TrainRows(rows)})
        assert snapshot(optimizer) == before


def test_other_meanings_than_frozen_are_refused():
    with refused(ValueError, "TrainRows has a meaning with masked='frozen' only", "masked='gradient'"):
        FusedGradDropAdamW(named_params(), mask=TrainRows({"weight": [0]}), masked="gradient")
