"""The blocks that a parameter name or a pattern means, and their order. Works on names only."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from itertools import groupby

from ..masks.names import canonical_name as canonical_name

_TOWER = re.compile("encoder|vision|visual|image|video|audio|speech|tower|embed")
# Embeddings, heads and poolers, by the names of modules and parameters.
_OUTER = re.compile(
    r"embed|(?:^|\.)output\.\w+$|(?:^|[._])"
    r"(?:wte|wpe|tokens?|heads?|pooler|classifier|score|cls|qa_outputs|logits|predict\w*|vocab\w*)\d*(?:$|\.)",
    re.IGNORECASE,
)
SAY_LAYERS = "pass layers=[...] (patterns on block names such as 'encoder.layer.*', or block modules of the model)"


def block_of(name: str, block_names: Collection[str]) -> str | None:
    """Return the one of ``block_names`` (best a set or dict) that holds the parameter of this canonical name."""
    return next((prefix for prefix in prefixes(name) if prefix in block_names), None)


def match_layers(patterns: str | Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the distinct block names that ``patterns`` find among the parameter names ``names``, in forward order.

    A pattern is a whole block name with shell wildcards inside its dotted components: ``*`` is exactly one component,
    and ``encoder.layer.*`` finds ``encoder.layer.0`` from ``encoder.layer.0.attention.weight``. One str is one pattern.
    Forward order is the order of first appearance, with two exceptions. Within a stack the layer numbers decide, since
    groups by learning rate may list the top first. An encoder comes before a decoder.

    Raises TypeError for anything but str, ValueError for a pattern that finds nothing and for blocks within blocks.
    """
    patterns = list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str) else [patterns]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"layers: {pattern!r} is not a pattern: {SAY_LAYERS}")
    names = [canonical_name(name) for name in names]
    found: dict[str, None] = {}
    unused = dict.fromkeys(patterns)
    for parts in (name.split(".") for name in names):
        for pattern in patterns:
            wanted = pattern.split(".")
            # A block is a module: at least the parameter's own name follows.
            if len(wanted) < len(parts) and all(map(fnmatchcase, parts, wanted)):
                found[".".join(parts[: len(wanted)])] = None
                unused.pop(pattern, None)
    for pattern in unused:
        near = near_names(pattern, [prefix for name in names for prefix in prefixes(name)])
        raise ValueError(f"the layers pattern {pattern!r} finds no block. Nearest names: {near}")
    for name in found:
        if outer := block_of(name, found):
            raise ValueError(f"layers finds block {name!r} inside block {outer!r}: drop the pattern of one of them")
    return sorted(found, key=forward_order(found))


def forward_order(names: Iterable[str]) -> Callable[[str], tuple[bool, int, list[int]]]:
    """Return the sort key that puts block names into forward order. ``names`` are given in order of appearance."""
    stacks: list[str] = []
    for stack in dict.fromkeys(map(_numbers_to_stars, names)):
        reader = next((place for place, other in enumerate(stacks) if _is_tower(stack, other)), len(stacks))
        stacks.insert(reader, stack)
    places = {stack: place for place, stack in enumerate(stacks)}

    def key(name: str) -> tuple[bool, int, list[int]]:
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        return in_decoder(name), places[_numbers_to_stars(name)], numbers

    return key


def _is_tower(stack: str, trunk: str) -> bool:
    """Whether a stack belongs to a tower within the module that holds the list ``trunk``, whose layers read it."""
    holder = ".".join(trunk.split(".")[:-2])
    inside = stack.startswith(f"{holder}.") if holder else True
    return inside and _TOWER.search(stack[len(holder) :]) is not None and _TOWER.search(trunk[len(holder) :]) is None


def is_outer(name: str) -> bool:
    """Whether a parameter belongs to an embedding, a head or a pooler."""
    return _OUTER.search(name) is not None


def in_decoder(name: str) -> bool:
    """Whether a module belongs to a decoder. The outermost word decides: decoder.bert.encoder.layer.0 does."""
    coder = re.search("encoder|decoder", name)
    return coder is not None and coder[0] == "decoder"


def prefixes(name: str) -> list[str]:
    """Return the names of all modules around a parameter or module, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def join_names(blocks: list[str]) -> str:
    """``layer.0-2, 5`` for layer.0, layer.1, layer.2 and layer.5; names without a number at the end stay whole."""
    parts = []
    for stem, names in groupby(blocks, lambda name: re.sub(r"(?:^|(?<=\.))\d+$", "", name)):
        runs: list[list[int]] = []
        for number in (int(name[len(stem) :]) for name in names if name != stem):
            if runs and runs[-1][1] == number - 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        parts.append(stem + ", ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in runs))
    return "; ".join(parts)


def near_names(pattern: str, names: Iterable[str], count: int = 3) -> str:
    """The ``count`` names (numbers as ``*``) most like ``pattern``, quoted, for an error message."""
    near = difflib.get_close_matches(pattern, dict.fromkeys(map(_numbers_to_stars, names)), n=count, cutoff=0.0)
    return ", ".join(map(repr, near)) or "none: there are no names"


def _numbers_to_stars(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
