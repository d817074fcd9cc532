"""Reads the texts of the package's errors and warnings from its source. ``…`` stands for what is inserted."""

import ast
from functools import cache
from pathlib import Path

import graddrop_kernels

INSERTED = "…"
PACKAGE = Path(graddrop_kernels.__file__).parent
# Programs with messages of their own kind: the demo's command line, the comparison of backends.
_PROGRAMS = ("demo", "tools")


@cache
def _trees() -> list[tuple[Path, ast.Module]]:
    return [(path.relative_to(PACKAGE), ast.parse(path.read_text())) for path in sorted(PACKAGE.rglob("*.py"))]


def _text(node: ast.AST) -> str | None:
    """Returns the text of a string or an f-string, with a module's constants put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.FormattedValue):
        return _constants().get(ast.unparse(node.value), INSERTED)
    return None


@cache
def _constants() -> dict[str, str]:
    """Returns {name: text} of the strings that modules define."""
    found = {}
    for _, tree in _trees():
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.JoinedStr)):
                values = getattr(node.value, "values", [node.value])
                text = "".join(str(value.value) if isinstance(value, ast.Constant) else INSERTED for value in values)
                found[ast.unparse(node.targets[0])] = text
    return found


def _texts(tree: ast.AST) -> list[str]:
    return [text for text in map(_text, ast.walk(tree)) if text]


@cache
def string_texts() -> list[str]:
    """Returns every string of the package except docstrings."""
    texts = []
    for _, tree in _trees():
        comments = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts += [text for node in ast.walk(tree) if node not in comments and (text := _text(node))]
    return texts


def raised_texts() -> list[tuple[str, str]]:
    """Returns (file:line, text) of every error and warning that has a text of its own."""
    found = []
    for path, tree in _trees():
        if path.parts[0] in _PROGRAMS:
            continue
        for node in ast.walk(tree):
            warning = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("warn", "_warn_once")
            texts = _texts(node) if warning or isinstance(node, ast.Raise) else []
            if texts:
                found.append((f"{path}:{node.lineno}", max(texts, key=len)))
    return found
