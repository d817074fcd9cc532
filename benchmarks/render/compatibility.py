"""What of the suite ran on a wheel, with which versions: written by tests/project/installed.py --results."""

import json
from pathlib import Path

from .markdown import markdown

NAME = "compatibility"
VERSIONS = ("python", "torch", "triton", "transformers", "numpy")


def section(results: Path) -> str:
    """What belongs between the markers."""
    path = results / "compatibility.json"
    if not path.exists():
        return "\n*No results yet.*\n\n"
    head = [*("Python" if name == "python" else name for name in VERSIONS), "passed", "failed", "skipped"]
    rows = json.loads(path.read_text())
    rows.sort(key=lambda row: [[int(part) for part in row[key].split(".")[:2]] for key in ("torch", "python")])
    cells = [
        [*(row[name] or "–" for name in VERSIONS), *(f"{row[key]:,}" for key in ("passed", "failed", "skipped"))]
        for row in rows
    ]
    return f"\n{markdown(head, cells)}\n\n"
