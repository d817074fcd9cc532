"""Compares results with the committed ones, run by run: the same bits, the same scores, or the size of the
difference.
"""

from pathlib import Path

from ..runs.results import key_of, read_all
from .beyond import FOLDER
from .collect import test_scores

COMMITTED = Path(__file__).parents[2] / "results" / "xglue"


def compare(ours: Path, theirs: Path = COMMITTED) -> list[str]:
    """Returns a line per run that both folders have, and one that counts them.

    Raises:
        ValueError: as ``read_all``.
    """
    found = read_all(ours), [*read_all(theirs), *read_all(theirs / FOLDER)]
    own, other = ({key_of(result): result for result in results} for results in found)
    common = [key for key in own if key in other]
    lines, counts = [], dict.fromkeys(("the same bits", "the same test scores"), 0)
    for key in common:
        found = _difference(own[key], other[key])
        if found in counts:
            counts[found] += 1
        *_, method, lr, seed = key
        lines.append(f"{method}-lr{lr:g}-seed{seed}: {found}")
    summary = ", ".join(f"{count} with {what}" for what, count in counts.items())
    different = len(common) - sum(counts.values())
    return [*lines, f"{len(common)} of {len(own)} runs are in {theirs.name}: {summary}, {different} with others"]


def _difference(first: dict, second: dict) -> str:
    if first["weights_sha256"] is not None and first["weights_sha256"] == second["weights_sha256"]:
        return "the same bits"
    one, other = test_scores(first), test_scores(second)
    if one.keys() != other.keys():
        return f"tested in {' '.join(one)}, there in {' '.join(other)}"
    points = {language: 100 * (one[language]["official"] - other[language]["official"]) for language in one}
    if not any(points.values()):
        return "the same test scores"
    language = max(points, key=lambda name: abs(points[name]))
    return f"{sum(points.values()) / len(points):+.2f} points on average, most in {language}: {points[language]:+.2f}"
