"""Studies: sweeps that a JSON file describes, so that one command can make a table again from nothing.

    {"description": "...", "sweeps": [{"task": "sib200", "model": "e5-small", "methods": ["all"], "seeds": ["0..15"],
     "lrs": [5e-5, 1e-4], "tuning_seeds": ["0..1"], "epochs": 3}]}

Except methods, seeds, lrs and tuning_seeds the keys of a sweep are settings.Settings' fields.
"""

import json
from pathlib import Path

from ..arguments import methods_of, seeds_of
from ..settings import settings_for
from .sweep import Plan

FOLDER = Path(__file__).parents[1] / "studies"


def plans(file: str) -> list[Plan]:
    """Returns the sweeps of a study: a path, or the name of one of ours.

    Raises:
        FileNotFoundError: there is none; lists ours.
        ValueError: not a study, or impossible settings; names the file.
    """
    path = Path(file) if file.endswith(".json") else FOLDER / f"{file}.json"
    if not path.is_file():
        ours = ", ".join(sorted(known.stem for known in FOLDER.glob("*.json")))
        raise FileNotFoundError(f"no study {file}: give a JSON file, or one of {ours}")
    try:
        return [_plan(dict(sweep)) for sweep in json.loads(path.read_text(encoding="utf-8"))["sweeps"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {type(error).__name__} {error}; see benchmarks/xglue/runs/study.py") from error


def _plan(sweep: dict) -> Plan:
    methods = methods_of(sweep.pop("methods", ["all"]))
    seeds, tuning = seeds_of(sweep.pop("seeds", ["0..4"])), seeds_of(sweep.pop("tuning_seeds", ["0..1"]))
    lrs = sweep.pop("lrs", [])
    base = settings_for(**sweep, method=methods[0], seed=0)
    return Plan(base, methods, seeds, tuple(lrs) or (base.lr,), tuning)
