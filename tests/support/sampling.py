"""``--sample K``: a part of the suite, another one in every run, drawn by the seed when the tests are collected.

A parametrised test keeps K of its cases, drawn, and further ones that alone show some value of a parameter. So over the
suite every value of every parameter is seen, though not with every other. A dataclass or a named tuple counts as its
fields, so that of a table of cases every policy and every dtype stays. Tests marked ``slow`` are left out. Without the
option every test runs.
"""

import dataclasses
import random
import re


def axes_of(params: dict) -> set[tuple[str, str]]:
    """Returns (parameter, value) of all that a case is made of."""
    axes = set()
    for name, value in params.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        elif isinstance(value, tuple) and hasattr(value, "_fields"):
            parts = value._asdict()
        else:
            parts = {name: value}
        axes |= {(part, _told(each)) for part, each in parts.items()}
    return axes


def _told(value) -> str:
    """Converts to text without addresses, which is equal in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def draw(cases: list[tuple[str, set]], count: int, seed: int) -> set[int]:
    """Returns the numbers of the cases to keep of ``(test, axes)``."""
    order = list(range(len(cases)))
    random.Random(seed).shuffle(order)
    kept, kept_of, seen = set(), {}, set()
    for number in order:
        test, axes = cases[number]
        if kept_of.get(test, 0) < count:
            kept.add(number)
            kept_of[test] = kept_of.get(test, 0) + 1
            seen |= axes
    for number in order:
        if not cases[number][1] <= seen:
            kept.add(number)
            seen |= cases[number][1]
    return kept


def select(config, items: list, count: int, seed: int) -> None:
    """Reduces ``items`` to the sample, in their order, and reports the others to pytest as deselected."""
    quick = [item for item in items if not item.get_closest_marker("slow")]
    test = lambda item: item.nodeid.partition("[")[0]
    axes = lambda item: axes_of(item.callspec.params) if hasattr(item, "callspec") else set()
    kept = draw([(test(item), axes(item)) for item in quick], count, seed)
    chosen = {quick[number].nodeid for number in kept}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
    items[:] = [item for item in items if item.nodeid in chosen]
