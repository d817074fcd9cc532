"""Results -> figures beside the results, for every machine. Needs matplotlib."""

import argparse
import json
from pathlib import Path

from ..common.results import CONTRACT, RESULTS, load
from . import cpu_figures, gpu_figures


def draw(results: dict[str, dict], folder: Path) -> list[Path]:
    """Draws every figure that one machine has results for."""
    return cpu_figures.draw(results, folder) + gpu_figures.draw(results, folder, compile_contract(folder))


def compile_contract(folder: Path) -> list[dict]:
    """Returns the instructions per element of the GPU's kernels, counted without a GPU: rows of {"backend", "case",
    "mode", "instructions_per_element"} in compile_contract.json, the machine's own or that of all machines; [] without
    one.
    """
    for path in (folder / CONTRACT, folder.parent / CONTRACT):
        if path.exists():
            return json.loads(path.read_text())["rows"]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with one folder a machine")
    parser.add_argument("--machine", help="one folder only")
    parser.add_argument("--rehearsal", action="store_true", help="draw rehearsals too; the figures say so")
    options = parser.parse_args()
    for name, results in load(options.results, options.rehearsal).items():
        if options.machine not in (None, name):
            continue
        for path in draw(results, options.results / name):
            print(path)


if __name__ == "__main__":
    main()
