"""The printed tables as data: complete, and every average that does not follow from its row is a known one."""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.xglue.report import paper  # noqa: E402
from graddrop_kernels.demo.methods import METHODS  # noqa: E402

OWN = {"sft", "graddrop", "anneal-graddrop", "layer-graddrop", "anneal-layer-graddrop", "graddrop-epoch"}
OWN |= {"gradfreeze-topdown", "gradfreeze-bottomup"}

# (table, row): the printed average is not the mean of the printed columns, however it is rounded.
KNOWN = {
    ("I", "+GradFreeze-TopBottom"), ("I", "+Anneal-GradDrop"), ("I", "+GradDrop-Epoch"), ("II", "+ GradDrop"),
    ("II", "+ Layer-GradDrop"), ("II", "+ GradDrop-Epoch"), ("III", "+GradDrop-Epoch"), ("IV", "+Layer-GradDrop"),
    ("V", "+ GradFreeze-TopDown"), ("V", "+ GradFreeze-BottomUp"), ("V", "+ GradDrop"), ("V", "+ Anneal Graddrop"),
    ("V", "+ Layer-GradDrop"), ("V", "+ GradDrop-Epoch"), ("VII", "+ GradFreeze-TopDown"),
    ("VII", "+ GradFreeze-BottomUp"), ("VII", "+ Anneal-GradDrop"), ("VII", "+ Layer-GradDrop"),
    ("VIII", "+GradDrop"), ("IX", "+Layer-GradDrop"), ("IX", "+GradDrop-Epoch"), ("X", "+Layer-GradDrop"),
}  # fmt: skip


def test_every_table_has_its_rows_and_columns():
    tables = paper.tables()
    assert list(tables) == ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X"]
    sizes = [(len(table.columns), len(table.rows)) for table in tables.values()]
    assert sizes == [(15, 14), (5, 10), (3, 10), (3, 10), (4, 10), (4, 11), (18, 11), (7, 10), (7, 11), (9, 14)]
    for table in tables.values():
        assert {row.method for row in table.rows} - {None} == OWN <= set(METHODS), table.number
        for row in table.rows:
            assert tuple(row.values) == table.columns and set(row.second) <= {*table.columns, "average"}
            assert all(value is None or 48 < value < 98 for value in row.values.values()), (table.number, row)


def test_averages_are_right_but_for_the_known_ones():
    wrong = {(table.number, row.name) for table in paper.tables().values() for row in table.rows if _is_wrong(row)}
    assert wrong == KNOWN


def _is_wrong(row):
    """Whether the printed average is off by more than a unit of its last digit: half of it for its own rounding, half
    for that of the columns."""
    values = list(row.values.values())
    if row.average is None or None in values:
        return False
    unit = 10.0 ** -len(repr(row.average).partition(".")[2])
    return abs(sum(values) / len(values) - row.average) > unit + 1e-9


def test_table_x_differs_from_the_others_only_as_its_notes_say():
    tables = paper.tables()
    summary, notes = tables["X"], " ".join(tables["X"].notes)
    for table in tables.values():
        for method in OWN if table.task else ():
            own, printed = table.row(method).average, summary.row(method).values[table.task]
            if own != printed:
                assert all(re.search(rf"\b{value:g}\b", notes) for value in (own, printed)), (table.number, method)


@pytest.mark.parametrize("task, method, column, value", [
    ("xnli", "graddrop-epoch", "el", 88.71), ("ner", "sft", "de", 74.67), ("pos", "gradfreeze-topdown", "zh", 57.85),
    ("mlqa", "layer-graddrop", "en", 87.02), ("wpr", "anneal-layer-graddrop", "zh", 63.67),
])  # fmt: skip
def test_cells(task, method, column, value):
    assert paper.table_of(task).row(method).values[column] == value


def test_a_stand_in_has_no_table():
    assert paper.table_of("sib200") is None
