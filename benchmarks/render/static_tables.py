"""Tables of no machine: the compile contract's counts, and the versions with which the suite has run."""

import json
from pathlib import Path

from .markdown import markdown, number

NONE = "\n*No results yet.*\n\n"
# thread-instructions per second of an H200: multiprocessors, schedulers, lanes, boost clock
ISSUED = 132 * 4 * 32 * 1.98e9
BANDWIDTH = 4.8e12  # bytes per second, H200 data sheet
BYTES = {"float32": 28, "bfloat16, float32 moments": 22, "bfloat16": 14}  # per parameter
VERSIONS = ("python", "torch", "triton", "transformers", "numpy")


def compile_contract(results: Path) -> str:
    """Returns a static roofline: what an H200 could issue against what it would have to move. The counts are a
    compiler's, the rates a data sheet's. Nothing was measured on a GPU.
    """
    path = results / "compile_contract.json"
    if not path.exists():
        return NONE
    contract = json.loads(path.read_text())
    head = ["kernel", "tensors", "registers", "instructions per element", "time to issue them / time to move the bytes"]
    rows = [
        [
            f"{row['case']} [{row['backend']}]", row["mode"], str(row["registers"]),
            number(row["instructions_per_element"], 1),
            f"{100 * (row['instructions_per_element'] / ISSUED) / (BYTES[row['mode']] / BANDWIDTH):.0f} %",
        ]
        for row in contract["rows"]
    ]  # fmt: skip
    source = f"*Static, {contract['target']}, Triton {contract['triton']}; not a measurement*"
    return f"\n{source}\n\n{markdown(head, rows)}\n\n"


def compatibility(results: Path) -> str:
    """Returns the parts of the suite that ran on a wheel, by versions. tests/project/installed.py --results writes
    them.
    """
    path = results / "compatibility.json"
    if not path.exists():
        return NONE
    head = [*("Python" if name == "python" else name for name in VERSIONS), "passed", "failed", "skipped"]
    rows = json.loads(path.read_text())
    rows.sort(key=lambda row: [[int(part) for part in row[key].split(".")[:2]] for key in ("torch", "python")])
    cells = [
        [*(row[name] or "–" for name in VERSIONS), *(f"{row[key]:,}" for key in ("passed", "failed", "skipped"))]
        for row in rows
    ]
    return f"\n{markdown(head, cells)}\n\n"


TABLES = {"compile-contract": compile_contract, "compatibility": compatibility}  # by the name in the marker
