"""Reads and writes results of runs: a JSON file per run, or a compressed table with a line of JSON per run."""

import json
import lzma
from pathlib import Path

from graddrop_kernels.demo.report import write_json

from ..settings import VARIED, Settings

FORMAT = 1
TABLE = ".jsonl.xz"  # 30 % smaller than gzip


def read(path: Path) -> dict:
    """Returns a result's JSON. Raises ValueError for a file that is no result."""
    try:
        return _checked(path.read_text(encoding="utf-8"), path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no result of a run ({error}); delete it, and run again") from error


def read_all(source: Path) -> list[dict]:
    """Returns the results of a table; or those of a folder, in its tables and in the files that its runs left. Sorted
    by task, configuration, method, learning rate and seed.

    Raises:
        ValueError: a file that is not a result, or two results of the same settings.
    """
    source = Path(source)
    found: dict[tuple, tuple[dict, str]] = {}
    for result, where in [*_of_tables(source), *_of_files(source)]:
        key = key_of(result)
        if key in found:
            raise ValueError(f"{where} and {found[key][1]} are the same run; keep one of them")
        found[key] = result, where
    return [found[key][0] for key in sorted(found)]


def key_of(result: dict) -> tuple:
    """Returns what distinguishes a run from all others: its settings, in an order for tables."""
    settings = result["settings"]
    same = {name: value for name, value in settings.items() if name not in VARIED}
    varied = (settings["method"], settings["lr"], settings["seed"])
    return settings["task"], json.dumps(same, sort_keys=True), *varied


def pack(source: Path, table: Path) -> int:
    """Writes the results of ``source`` as one table and returns their number. The same results give the same bytes.

    Raises:
        FileNotFoundError: there are none.
        ValueError: as ``read_all``, or a name that is not a table's.
    """
    results = _some(source)
    if not table.name.endswith(TABLE):
        raise ValueError(f"{table}: the name of a table must end in {TABLE}")
    with lzma.open(table, "wb", preset=9) as packed:
        for result in results:
            packed.write(json.dumps(result, separators=(",", ":")).encode() + b"\n")
    return len(results)


def unpack(table: Path, folder: Path) -> int:
    """Writes a table's results as the files that their runs left, from which a sweep continues. Returns their number.

    Raises:
        FileNotFoundError, ValueError: as ``pack``.
    """
    results = _some(table)
    for result in results:
        path = folder / Settings(**result["settings"]).file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    return len(results)


def _some(source: Path) -> list[dict]:
    results = read_all(source)
    if not results:
        raise FileNotFoundError(f"no results in {source}")
    return results


def _of_tables(source: Path) -> list[tuple[dict, str]]:
    found = []
    for path in [source] if source.is_file() else sorted(source.glob(f"*{TABLE}")):
        try:
            lines = lzma.decompress(path.read_bytes()).decode().splitlines()
        except (lzma.LZMAError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no table of results ({error})") from error
        places = [f"{path}:{number}" for number in range(1, len(lines) + 1)]
        found += [(_checked(line, place), place) for line, place in zip(lines, places)]
    return found


def _of_files(source: Path) -> list[tuple[dict, str]]:
    # Only results are two folders deep, in task and configuration.
    return [(read(path), str(path)) for path in sorted(source.glob("*/*/*-lr*-seed*.json"))]


def _checked(text: str, where) -> dict:
    try:
        result = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no result of a run ({error}); delete it, and run again") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ValueError(f"{where} is no result of a run (format {FORMAT}); move it elsewhere")
    return result
