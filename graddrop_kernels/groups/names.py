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
        near = near_names(pattern, [prefix for name in names for prefix in _prefixes(name)])
        raise ValueError(f"the layers pattern {pattern!r} finds no block. Nearest names: {near}")
    for name in found:
        if outer := block_of(name, found):
            raise ValueError(f"layers finds block {name!r} inside block {outer!r}: drop the pattern of one of them")
    return sorted(found, key=forward_order(found))


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
