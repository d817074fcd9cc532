"""Who may import whom in benchmarks/: measurements stand on what they share, and nothing stands on a measurement."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
MAY_IMPORT = {
    "__init__": set(),
    "common": set(),
    "xglue": set(),
    "render": {"common", "xglue"},
    "cpu": {"common", "render", "xglue"},
    "gpu": {"common", "render"},
    "test_micro": {"common"},
}
FILES = sorted(BENCHMARKS.rglob("*.py"))


def imported(path: Path, text: str) -> set[Path]:
    """The files of benchmarks/ that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "benchmarks" for alias in node.names), f"{path}: use from"
        if not isinstance(node, ast.ImportFrom):
            continue
        names = node.module.split(".") if node.module else []
        if not node.level and names[0] != "benchmarks":
            continue
        folder = (path.parents[node.level - 1] if node.level else ROOT).joinpath(*names)
        for alias in node.names:
            places = (f"{folder / alias.name}.py", folder / alias.name / "__init__.py", f"{folder}.py")
            found |= {file for file in map(Path, places) if file.is_file()}
    return found


def package(path: Path) -> str:
    return path.relative_to(BENCHMARKS).parts[0].removesuffix(".py")


def is_program(path: Path) -> bool:
    return 'if __name__ == "__main__"' in path.read_text()


def arrows(path: Path, text: str | None = None) -> list[tuple[Path, Path]]:
    return [(path, other) for other in imported(path, path.read_text() if text is None else text)]


def upwards(path: Path, other: Path) -> bool:
    return package(other) != package(path) and package(other) not in MAY_IMPORT[package(path)]


def of_a_measurement(path: Path, other: Path) -> bool:
    return package(other) in ("cpu", "gpu") and is_program(other)


def shown(found: list[tuple[Path, Path]]) -> str:
    return "\n".join(f"{path.relative_to(ROOT)} -> {other.relative_to(ROOT)}" for path, other in found)


def test_packages_import_downwards():
    found = [arrow for path in FILES for arrow in arrows(path)]
    assert len(found) > 100  # the search has not gone blind
    wrong = [arrow for arrow in found if upwards(*arrow)]
    assert not wrong, shown(wrong)


def test_nothing_imports_a_measurement():
    wrong = [arrow for path in FILES for arrow in arrows(path) if of_a_measurement(*arrow)]
    assert not wrong, shown(wrong)
    assert sum(package(path) in ("cpu", "gpu") and is_program(path) for path in FILES) > 10


def test_what_renders_reads_reports_and_runs_nothing():
    found = [arrow for path in FILES if package(path) == "render" for arrow in arrows(path)]
    of_xglue = [(path, other) for path, other in found if package(other) == "xglue"]
    allowed = (BENCHMARKS / "xglue" / "report", BENCHMARKS / "xglue")  # the second for titles.py
    wrong = [(path, other) for path, other in of_xglue if other.parent not in allowed]
    assert of_xglue and not wrong, shown(wrong)


def test_no_circle_of_files():
    left = {path: imported(path, path.read_text()) - {path} for path in FILES}
    while free := [path for path, others in left.items() if not others & left.keys()]:
        for path in free:
            del left[path]
    assert not left, sorted(str(path.relative_to(ROOT)) for path in left)


def test_a_wrong_import_is_found():
    path = BENCHMARKS / "common" / "rounds.py"
    for text in ("from ..render import style", "def f():\n    from benchmarks.cpu.step import measure"):
        assert [upwards(*arrow) for arrow in arrows(path, text)] == [True]
    (arrow,) = arrows(BENCHMARKS / "gpu" / "modes.py", "from .step import first_steps")
    assert of_a_measurement(*arrow) and not upwards(*arrow)
