"""The public part of the suite on a wheel: what needs neither csrc's sources nor a file of the repository.

    python tests/project/installed.py WHEEL [--python PYTHON] [--results FILE] [pytest arguments]

In a fresh environment of that Python's version, where graddrop_kernels is the wheel's and every other package PYTHON's,
and in a fresh folder, from which the source tree cannot be imported. --results adds what ran to the JSON of the
README's table (benchmarks/render); GRADDROP_TEST_ONE_IN=k runs a part of each test's cases.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PUBLIC = tuple(
    f"{folder}/test_{name}"
    for folder, names in {
        "optimizer": "public_api optimizer optimizer_masks optimizer_training adamw_matches_torch",
        "groups": "optimizer_groups state_dict state_dict_exchange blocks param_groups",
        "policies": "policies policy_values schedules",
        "masks": "philox",
        "step": "masked_semantics mixed_precision clipping grad_scaler in_backward compile",
        "backends": "backends_agree layout triton_kernels triton_interpreter",
    }.items()
    for name in names.split()
)
HELPERS = ("batches", "cases", "pictures", "ranks", "toy")
_VERSIONS = """
import json, platform
from importlib.metadata import PackageNotFoundError, version
import graddrop_kernels, torch
found = {"python": platform.python_version()}
for name in ("torch", "triton", "transformers", "numpy"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = None
found["backends"] = list(graddrop_kernels.available_backends())
print(json.dumps([graddrop_kernels.__file__, found]))
"""


def make_environment(folder: Path, wheel: Path, python: str) -> str:
    """The fresh environment's Python."""
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    own = str(folder / "bin" / "python")
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", own, "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True, cwd=folder)
    # After the installation, or pip would take a graddrop_kernels of PYTHON's for its own. The folders of its packages
    # only: an editable install there is in none of them.
    folders = "import sys; print(*(path for path in sys.path if path.endswith('-packages')), sep='\\n')"
    packages = _output([python, "-c", folders], folder)
    (place,) = folder.glob("lib/python*/site-packages")
    (place / "packages.pth").write_text(packages)
    return own


def run(wheel: Path, python: str = sys.executable, arguments: tuple[str, ...] = ()) -> dict:
    """The versions, and how many tests passed, failed, were skipped. Raises RuntimeError for a foreign package."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        own = make_environment(folder / "environment", wheel.resolve(), python)
        tests = folder / "tests"
        tests.mkdir()
        (tests / "pytest.ini").write_text("[pytest]\npythonpath = support\n")
        names = ("conftest", *(f"support/{name}" for name in HELPERS), *PUBLIC)
        for file in (f"{name}.py" for name in names):
            (tests / file).parent.mkdir(exist_ok=True)
            shutil.copy(TESTS / file, tests / file)
        file, found = json.loads(_output([own, "-c", _VERSIONS], tests))
        if not Path(file).is_relative_to(folder):
            raise RuntimeError(f"graddrop_kernels is {file}, not the wheel's")
        report = folder / "report.xml"
        command = [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        status = subprocess.run(command, cwd=tests, env=_environment()).returncode
        if not report.exists():
            raise RuntimeError(f"pytest ended with {status} before it ran a test")
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
        count = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        found["failed"] = count["failures"] + count["errors"]
        found["skipped"] = count["skipped"]
        found["passed"] = count["tests"] - found["failed"] - found["skipped"]
        return found


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}


def _output(command: list[str], folder: Path) -> str:
    return subprocess.run(command, cwd=folder, env=_environment(), check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--results", type=Path)
    options, arguments = parser.parse_known_args()
    found = run(options.wheel, options.python, tuple(arguments))
    print(json.dumps(found))
    if options.results:
        rows = json.loads(options.results.read_text()) if options.results.exists() else []
        versions = lambda row: [row[key] for key in ("python", "torch", "triton", "transformers", "numpy")]
        rows = [row for row in rows if versions(row) != versions(found)] + [found]
        options.results.write_text(json.dumps(sorted(rows, key=lambda row: str(versions(row))), indent=1) + "\n")
    return 1 if found["failed"] or not found["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
