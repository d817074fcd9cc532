"""Who may import whom: a package imports only what stands below it, nobody imports in a circle, and nobody reads what
another object keeps to itself.
"""

import ast
from functools import cache
from pathlib import Path

import graddrop_kernels

ROOT = Path(graddrop_kernels.__file__).parent
MAY_IMPORT = {  # docs/architecture.md draws it
    "masks": set(),
    "policies": {"masks"},
    "tensors": {"masks"},
    "backends": {"masks"},  # never a policy, a group or a process group
    "groups": {"masks", "policies", "tensors", "backends"},
    "step": {"masks", "policies", "tensors", "backends", "groups"},
    "inspection": {"masks", "policies", "backends", "groups", "tensors"},
    "attached": {"masks", "policies", "tensors", "backends", "groups", "step", "inspection"},
    "optimizer": {"policies", "backends", "groups", "step", "inspection"},
    "integrations": {"policies", "tensors", "groups", "optimizer", "attached"},
    "__init__": {"policies", "backends", "attached", "groups", "inspection", "integrations", "optimizer"},
    "tools": {"masks", "policies", "backends", "attached", "optimizer", "__init__"},
    "demo": {"policies", "backends", "groups", "optimizer", "__init__"},
    "__main__": {"tools"},
}
LOOPS = {"transformers", "accelerate", "lightning", "pytorch_lightning"}  # each imports the package of its name
FILES = sorted(ROOT.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> list[tuple[Path, str]]:
    """(file of the package, name) of everything that a file imports, also in functions and for annotations only."""
    found = []
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for alias in node.names:
            places = (folder / alias.name, folder)
            files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
            found.append((next(filter(Path.is_file, files)), alias.name))
    return found


def package(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def arrow(path: Path, other: Path, what: str = "") -> str:
    return f"{path.relative_to(ROOT)} -> {other.relative_to(ROOT)} {what}"


def test_every_package_has_its_place():
    assert {package(path) for path in FILES} == MAY_IMPORT.keys()
    assert len(list(ROOT.glob("[!_]*")) + [ROOT / "__init__.py", ROOT / "__main__.py"]) <= 15


def test_packages_import_downwards():
    wrong = {
        arrow(path, other)
        for path in FILES
        for other, _ in imports(path)
        if package(other) != package(path) and package(other) not in MAY_IMPORT[package(path)]
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_nobody_imports_the_integration_of_a_loop():
    """It would bring the loop's package to users of another one."""
    wrong = [
        arrow(path, other)
        for path in FILES
        for other, _ in imports(path)
        if package(other) == "integrations" and other.stem in LOOPS
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_files():
    left = {path: {other for other, _ in imports(path)} - {path} for path in FILES}
    while free := [path for path, others in left.items() if not others & left.keys()]:
        for path in free:
            del left[path]
    assert not left, "\n".join(arrow(path, other) for path in left for other in left[path] & left.keys())


def test_private_names_stay_in_their_package():
    wrong = [
        arrow(path, other, name)
        for path in FILES
        for other, name in imports(path)
        if name.startswith("_") and not name.endswith("__") and package(path) != package(other)
    ]
    assert not wrong, "\n".join(wrong)


@cache
def private_members(path: Path) -> set[str]:
    """The private attributes and methods of a file's classes."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef):
            found |= {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return {name for name in found if name.startswith("_") and not name.endswith("__")}


def test_nobody_reads_the_private_members_of_another_files_objects():
    ours = {name: path for path in FILES for name in private_members(path)}
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}, of {ours[node.attr].relative_to(ROOT)}"
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and node.attr in ours and node.attr not in private_members(path)
        if ast.unparse(node.value) not in ("self", "cls")
    ]
    assert not wrong, "\n".join(wrong)
