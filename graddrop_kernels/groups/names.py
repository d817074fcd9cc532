"""Canonical parameter names, and the blocks that a parameter name or a pattern means. Works on names only."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase

# DistributedDataParallel and most hand-made wrappers, torch.compile, FSDP1, torch's activation checkpointing.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
SAY_LAYERS = "pass layers=[...] (patterns on block names such as 'encoder.layer.*', or block modules of the model)"


def canonical_name(fqn: str) -> str:
    """Return the parameter name ``fqn`` without wrapper components, at any depth.

    Only whole components count (``submodule.`` is kept), and the last one, the parameter's own name, always stays.
    """
    *path, last = fqn.split(".")
    return ".".join([part for part in path if part not in WRAPPERS] + [last])


def canonical_module_name(fqn: str) -> str:
    """As ``canonical_name``, for a module. Its last component may be a wrapper too (``layer.0._orig_mod``)."""
    return canonical_name(f"{fqn}.").removesuffix(".")


def block_of(name: str, block_names: Collection[str]) -> str | None:
    """Return the one of ``block_names`` (best a set or dict) that holds the parameter of this canonical name."""
    return next((prefix for prefix in _prefixes(name) if prefix in block_names), None)


def match_layers(patterns: str | Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the distinct block names that ``patterns`` find among the parameter names ``names``, in forward order.
    Raises as LayerMatch does.
    """
    match = LayerMatch(patterns)
    match.add(names)
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
        self._holders: dict[str, str] = {}  # a block inside of each module that holds blocks
        self._nested: tuple[str, str] | None = None  # a block inside of another
        self._blocks: tuple[str, ...] | None = None

    def add(self, names: Iterable[str]) -> None:
        """Looks for blocks among more names. Takes time for these only."""
        for name in map(canonical_name, names):
            self._names.append(name)
            parts = name.split(".")
            for pattern, wanted in self._wanted.items():
                # A block is a module: at least the parameter's own name follows.
                if len(wanted) < len(parts) and all(map(fnmatchcase, parts, wanted)):
                    self._unused.pop(pattern, None)
                    self._add_block(".".join(parts[: len(wanted)]))

    def _add_block(self, block: str) -> None:
        if block in self._found:
            return
        if self._nested is None and (outer := block_of(block, self._found)):
            self._nested = block, outer
        elif self._nested is None and block in self._holders:
            self._nested = self._holders[block], block
        self._found[block] = self._blocks = None
        for holder in _prefixes(block):
            self._holders.setdefault(holder, block)

    def check(self) -> None:
        """Raises ValueError for the names that there are now."""
        for pattern in self._unused:
            near = near_names(pattern, [prefix for name in self._names for prefix in _prefixes(name)])
            raise ValueError(f"the layers pattern {pattern!r} finds no block. Nearest names: {near}")
        if self._nested is not None:
            inner, outer = self._nested
            raise ValueError(f"layers finds block {inner!r} inside block {outer!r}: drop the pattern of one of them")

    def block_of(self, name: str) -> str | None:
        """The block of a parameter of this canonical name."""
        return block_of(name, self._found)

    def blocks(self) -> tuple[str, ...]:
        """All blocks, in forward order."""
        self.check()
        if self._blocks is None:
            self._blocks = tuple(sorted(self._found, key=forward_order(self._found)))
        return self._blocks


def forward_order(names: Iterable[str]) -> Callable[[str], tuple[bool, int, list[int]]]:
    """Return the sort key that puts block names into forward order. ``names`` are given in order of appearance."""
    stacks: dict[str, int] = {}
    for name in names:
        stacks.setdefault(_numbers_to_stars(name), len(stacks))

    def key(name: str) -> tuple[bool, int, list[int]]:
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        return in_decoder(name), stacks[_numbers_to_stars(name)], numbers

    return key


def in_decoder(name: str) -> bool:
    """Whether a module belongs to a decoder. The outermost word decides: decoder.bert.encoder.layer.0 does."""
    coder = re.search("encoder|decoder", name)
    return coder is not None and coder[0] == "decoder"


def near_names(pattern: str, names: Iterable[str], count: int = 3) -> str:
    """The ``count`` names (numbers as ``*``) most like ``pattern``, quoted, for an error message."""
    near = difflib.get_close_matches(pattern, dict.fromkeys(map(_numbers_to_stars, names)), n=count, cutoff=0.0)
    return ", ".join(map(repr, near)) or "none: there are no names"


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _numbers_to_stars(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
