"""A run's JSON file, read back."""

import json
from pathlib import Path

FORMAT = 1


def read(path: Path) -> dict:
    """A result's JSON. Raises ValueError for a file that is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result of a run ({error}); delete it, and run again") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ValueError(f"{path} is no result of a run (format {FORMAT}); move it elsewhere")
    return result
