"""Results as they are measured: a line of JSON for each, appended and flushed. Files of results are made of the lines
afterwards, also of those of a run that was killed. Imports no torch.
"""

import json
from collections.abc import Iterable
from pathlib import Path

ROWS = "rows.jsonl"
EVERY = "*"  # stands for every benchmark: facts about the machine


class Recorder:
    """Writes lines into ``folder``/rows.jsonl. Several processes may."""

    def __init__(self, folder: Path):
        self.path = folder / ROWS

    def begin(self, benchmark: str, *lists: str) -> None:
        """Says that a benchmark has begun, whose lists are empty unless rows follow."""
        self._write({"benchmark": benchmark, "lists": lists})

    def put(self, benchmark: str, name: str, value) -> None:
        """Writes a value of a benchmark, which replaces an earlier one of this name."""
        self._write({"benchmark": benchmark, "name": name, "value": value})

    def add(self, benchmark: str, name: str, row, key: str = "") -> None:
        """Writes a row of a benchmark's list. It replaces the one of the same key, which had fewer rounds."""
        self._write({"benchmark": benchmark, "name": name, "key": key, "row": row})

    def _write(self, entry: dict) -> None:
        # Unbuffered, so that the lines of two processes do not mix. A line that was cut off when its process was killed
        # must not swallow this one.
        with open(self.path, "ab", buffering=0) as file:
            file.write(f"\n{json.dumps(entry)}\n".encode())


def assembled(lines: Iterable[str]) -> dict[str, dict]:
    """Returns {benchmark: {name: value, or list of rows}} of the lines of a run. A line that was cut off is left out.
    """
    values: dict[str, dict] = {}
    rows: dict[tuple[str, str], dict] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        of_benchmark = values.setdefault(entry["benchmark"], {})
        for name in entry.get("lists", ()):
            of_benchmark.setdefault(name, [])
        if "value" in entry:
            of_benchmark[entry["name"]] = entry["value"]
        if "row" not in entry:
            continue
        listed = rows.setdefault((entry["benchmark"], entry["name"]), {})
        listed[entry["key"] or len(listed)] = entry["row"]
        of_benchmark[entry["name"]] = list(listed.values())
    facts = values.pop(EVERY, {})
    return {benchmark: facts | results for benchmark, results in values.items()}
