"""Reads and writes files of results, results/<machine>/<benchmark>.json, with a line per measurement."""

import argparse
import json
import tempfile
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

from .machine import ROOT, facts, gpu_slug, slug
from .rows import EVERY, Recorder, assembled

RESULTS = ROOT / "benchmarks" / "results"
CONTRACT = "compile_contract.json"  # a compiler's counts, in the folder of one machine or of all


def text_of(result: dict) -> str:
    """Formats JSON with a line per measurement: only what holds lists of objects is spread over lines."""
    return _text(result, "") + "\n"


def _text(value, indent: str) -> str:
    if not _holds_rows(value):
        return json.dumps(value)
    more = indent + " "
    if isinstance(value, dict):
        lines = [f"{more}{json.dumps(key)}: {_text(each, more)}" for key, each in value.items()]
    else:
        lines = [more + _text(each, more) for each in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([start, ",\n".join(lines), indent + end])


def _holds_rows(value) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_rows, value.values()))
    return isinstance(value, list) and any(isinstance(each, dict) for each in value)


def load(folder: Path, rehearsal: bool = False) -> dict[str, dict[str, dict]]:
    """Returns {machine: {benchmark: its JSON}}. A rehearsal is no result: it raises SystemExit, unless asked for."""
    found: dict[str, dict] = {}
    for path in sorted(folder.glob("*/*.json")):
        if path.name == CONTRACT:
            continue
        result = json.loads(path.read_text())
        if result.get("rehearsal") and not rehearsal:
            raise SystemExit(f"{path} is a rehearsal on CPU tensors, not a result; delete it")
        found.setdefault(path.parent.name, {})[path.stem] = result
    return found


def arguments(description: str) -> argparse.ArgumentParser:
    """Makes a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/<machine>)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs; the figures mean nothing")
    return parser


def gpu_arguments(description: str) -> argparse.ArgumentParser:
    """Makes a parser with the options that every benchmark of the GPU has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/<GPU>)")
    parser.add_argument("--budget", type=float, default=60, metavar="SECONDS", help="by when the last round begins")
    parser.add_argument("--rehearse", action="store_true", help="tiny CPU tensors, a host clock: shows that it runs")
    return parser


def write(benchmark: str, options: argparse.Namespace, results: dict) -> Path:
    """Writes the results with the machine's facts to results/<machine>/<benchmark>.json, or into the folder ``--out``.

    A quick run is no result: without ``--out`` it goes into a temporary folder.
    """
    machine = facts()
    folder = options.out or (Path(tempfile.mkdtemp()) if options.quick else RESULTS / slug(machine))
    return _write(folder, {"benchmark": benchmark, "quick": options.quick, "machine": machine}, results)


def describe(recorder: Recorder, rehearsal: bool) -> dict:
    """Writes what is true of every benchmark of a run on the GPU. Returns the machine's facts."""
    machine = facts()
    told = {"quick": rehearsal, "rehearsal": rehearsal, "machine": machine, "when": _now()}
    for name, value in told.items():
        recorder.put(EVERY, name, value)
    return machine


def write_assembled(lines: Iterable[str], folder: Path) -> list[Path]:
    """Writes a file for each benchmark of a run on the GPU."""
    return [_write(folder, {"benchmark": name}, results) for name, results in assembled(lines).items()]


def gpu_folder(machine: dict, results: Path = RESULTS) -> Path:
    """Returns the folder of the GPU's results."""
    return results / gpu_slug(machine)


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _write(folder: Path, head: dict, results: dict) -> Path:
    """Writes whole or not at all: a run that is killed leaves the previous file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{head['benchmark']}.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text_of({"benchmark": head["benchmark"], "when": _now()} | head | results))
    unfinished.replace(path)
    return path
