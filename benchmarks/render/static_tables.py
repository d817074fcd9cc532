"""The compile contract's counts as a static roofline: what an H200 could issue against what it would have to move.

Counts of the compiler over rates of a data sheet. Nothing here was measured on a GPU.
"""

import json
from pathlib import Path

from .markdown import markdown, number

NAME = "compile-contract"
# thread-instructions a second of an H200: multiprocessors, schedulers, lanes, boost clock
ISSUED = 132 * 4 * 32 * 1.98e9
BANDWIDTH = 4.8e12  # bytes a second, H200 data sheet
BYTES = {"float32": 28, "bfloat16, float32 moments": 22, "bfloat16": 14}  # a parameter


def section(results: Path) -> str:
    """What belongs between the markers."""
    path = results / "compile_contract.json"
    if not path.exists():
        return "\n*No results yet.*\n\n"
    contract = json.loads(path.read_text())
    head = ["kernel", "tensors", "registers", "instructions an element", "time to issue them / time to move the bytes"]
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
