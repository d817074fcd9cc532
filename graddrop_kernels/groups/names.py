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
    Raises as LayerMatch does.
    """
    match = LayerMatch(patterns)
    match.add((name, True) for name in names)
    return list(match.blocks())


class LayerMatch:
    """The blocks that ``layers`` patterns find among parameter names, which may come in several parts.

    A pattern is a whole block name with shell wildcards inside its dotted components: ``*`` is exactly one component,
    and ``encoder.layer.*`` finds ``encoder.layer.0`` from ``encoder.layer.0.attention.weight``. One str is one pattern.
    Forward order is the order of first appearance, with two exceptions. Within a stack the layer numbers decide, since
    groups by learning rate may list the top first. An encoder comes before a decoder.

    Raises TypeError for anything but str, ValueError for a pattern that finds nothing and for blocks within blocks.
    """

    def __init__(self, patterns: str | Iterable[str]) -> None:
        patterns = list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str) else [patterns]
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"layers: {pattern!r} is not a pattern: {SAY_LAYERS}")
        self._wanted = {pattern: pattern.split(".") for pattern in patterns}
        self._unused = dict.fromkeys(patterns)
        self._names: list[str] = []
        self._found: dict[str, None] = {}
        self._trained: dict[str, None] = {}  # those of the found that have a trained parameter; the others have no turn
        self._holders: dict[str, str] = {}  # a block inside of each module that holds blocks
        self._nested: tuple[str, str] | None = None  # a block inside of another
        self._blocks: tuple[str, ...] | None = None

    def add(self, names: Iterable[tuple[str, bool]]) -> None:
        """Looks for blocks among more parameters, (name, whether it is trained). Takes time for these only."""
        for name, is_trained in names:
            name = canonical_name(name)
            self._names.append(name)
            parts = name.split(".")
            for pattern, wanted in self._wanted.items():
                # A block is a module: at least the parameter's own name follows.
                if len(wanted) < len(parts) and all(map(fnmatchcase, parts, wanted)):
                    self._unused.pop(pattern, None)
                    block = ".".join(parts[: len(wanted)])
                    self._add_block(block)
                    if is_trained:
                        self._trained[block] = self._blocks = None

    def _add_block(self, block: str) -> None:
        if block in self._found:
            return
        if self._nested is None and (outer := block_of(block, self._found)):
            self._nested = block, outer
        elif self._nested is None and block in self._holders:
            self._nested = self._holders[block], block
        self._found[block] = self._blocks = None
        for holder in prefixes(block):
            self._holders.setdefault(holder, block)

    def check(self) -> None:
        """Raises ValueError for the names that there are now."""
        for pattern in self._unused:
            near = near_names(pattern, [prefix for name in self._names for prefix in prefixes(name)])
            raise ValueError(f"the layers pattern {pattern!r} finds no block. Nearest names: {near}")
        if self._nested is not None:
            inner, outer = self._nested
            raise ValueError(f"layers finds block {inner!r} inside block {outer!r}: drop the pattern of one of them")

    def block_of(self, name: str) -> str | None:
        """The block of a parameter of this canonical name."""
        return block_of(name, self._found)

    def idle(self) -> list[str]:
        """The blocks that have no trained parameter, in forward order."""
        idle = self._found.keys() - self._trained.keys()
        return sorted(idle, key=forward_order(self._found)) if idle else []

    def blocks(self) -> tuple[str, ...]:
        """The blocks that have a turn, in forward order: those with a trained parameter, or all if none has one."""
        self.check()
        if self._blocks is None:
            self._blocks = tuple(sorted(self._trained or self._found, key=forward_order(self._found)))
        return self._blocks


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
