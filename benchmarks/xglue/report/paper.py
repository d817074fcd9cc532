"""The paper's tables I to X as printed (paper.json), and their inconsistencies."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A printed row. ``values`` are percent by column, None where the paper prints "-"; ``second`` are the columns it
    marks with a dagger ("average" among them); ``method`` is the row's name here, None for others' results."""

    name: str
    method: str | None
    values: dict[str, float | None]
    average: float | None
    second: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A printed table. Columns are languages, in table X tasks (``task`` is None there)."""

    number: str
    title: str
    task: str | None
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def row(self, method: str) -> Row | None:
        """Returns the authors' row of a method; of two with one name the second, which is their own run (table VI's
        SFT).
        """
        return next((row for row in reversed(self.rows) if row.method == method), None)


@functools.cache
def tables() -> dict[str, Table]:
    """Returns {"I": Table, ... "X": Table}."""
    found = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))["tables"]
    return {table["number"]: _table(table) for table in found}


def table_of(task: str) -> Table | None:
    """Returns the table of an official task by its name here ("xnli"); None for a stand-in."""
    return next((table for table in tables().values() if table.task == task), None)


def _table(found: dict) -> Table:
    rows = tuple(
        Row(row["name"], row["method"], row["values"], row["average"], tuple(row.get("second", ())))
        for row in found["rows"]
    )
    parts = (tuple(found["columns"]), rows, tuple(found["notes"]))
    return Table(found["number"], found["title"], found["task"], *parts)
