"""Where in a model a mask acts: in its blocks or, where it has none, in its matrices. What is left dense."""

import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..masks.names import canonical_module_name
from .blocks import Layers, NoBlocks, find_blocks, parameter_blocks
from .names import block_of, is_outer, join_names, prefixes
from .stacks import Blocks, find_alike, find_layers, is_matrix

Named = Mapping[str, tuple[nn.Module, nn.Parameter]]  # {canonical name: (the module that holds it, parameter)}

_LITTLE = 0.1  # share of the matrix elements that may be left dense without a word


@dataclass(frozen=True)
class Scope:
    """``masked`` is {id(parameter): its block}, where the block is None if the model has no blocks, and ``no_blocks``
    says why. ``blocks`` have a turn each in a schedule, in this order. ``notes`` are for ``describe()``.
    """

    masked: dict[int, str | None]
    blocks: list[str] = field(default_factory=list)
    no_blocks: str = ""
    notes: list[str] = field(default_factory=list)


def find_scope(
    model: nn.Module, trained: Named, excluded: Collection[str], layers: Layers | None, blocks: Sequence[str] | None
) -> Scope:
    """Return where masks on the parameters ``trained`` act. Warns and raises as ``param_groups`` says."""
    sizes = {name: _size(param) for name, (module, param) in trained.items() if _is_matrix(name, module, param)}
    inner = [name for name in sizes if not is_outer(name) and not isinstance(trained[name][0], nn.Embedding)]
    try:
        found = find_blocks(model, layers) if blocks is None else _blocks_of_stage(model, layers, blocks)
        masked: dict[int, str | None] = {**parameter_blocks(model, found)}
    except NoBlocks as error:
        if layers is not None:
            raise
        masked = {id(trained[name][1]): None for name in inner}
        note = f"{error}. Every matrix outside embeddings, head and pooler is masked"
        return Scope(masked, no_blocks=str(error), notes=_warn([note] if inner else []))
    names = [name for name, _ in found]
    known = set(names)
    of_blocks = {name for name in sizes if id(trained[name][1]) in masked}
    # What has a block's name and is not the block's is tied to an embedding or a head.
    left = {name: sizes[name] for name in inner if name not in excluded and block_of(name, known) is None}
    notes = _left_dense(left, sum(sizes[name] for name in of_blocks.union(inner)), names)
    if layers is None and blocks is None and (first := _first_of_stage(model, names)):
        notes.append(
            f"the first block in its list is {first!r}, as in a stage of a pipeline: schedules (GradFreeze) count only "
            "the blocks that are here; pass blocks=[...], the names of all blocks of the whole model"
        )
    _warn(notes)
    busy = {masked.get(id(param)) for _, param in trained.values()}
    if blocks is None and (idle := [name for name in names if name not in busy]):
        names = [name for name in names if name in busy]
        notes.append(idle_note(idle))
    return Scope(masked, names if blocks is None else list(blocks), notes=notes)


def idle_note(blocks: list[str]) -> str:
    return f"blocks without a turn in schedules, since nothing in them is trained: {join_names(blocks)}"


def _blocks_of_stage(model: nn.Module, layers: Layers | None, blocks: Sequence[str]) -> Blocks:
    """The blocks of the whole model that a stage of a pipeline holds."""
    if not isinstance(blocks, (list, tuple)) or not all(isinstance(name, str) for name in blocks):
        raise TypeError(f"blocks must be the names of all blocks of the whole model, not {blocks!r}")
    if len(set(blocks)) < len(blocks) or not blocks:
        raise ValueError(f"blocks must name each block of the whole model once, got {list(blocks)!r}")
    if layers is not None:
        raise ValueError("layers and blocks exclude each other: blocks names those of this stage too")
    known = set(blocks)
    for name, _ in find_layers(model) or find_alike(model):
        if block_of(f"{name}.", known) is None:
            raise ValueError(
                f"this stage holds the block {name!r}, which is not among blocks: give its modules the names that they "
                f"have in the whole model, as find_blocks(whole) lists them; blocks begins with {blocks[0]!r}"
            )
    modules = _modules(model)
    return [(name, modules[name]) for name in blocks if name in modules]


def _first_of_stage(model: nn.Module, blocks: Sequence[str]) -> str | None:
    """The first block of a list, or dictionary with numbers as keys, that begins later than with number 0."""
    modules = _modules(model)
    for stem in dict.fromkeys(block.rpartition(".")[0] for block in blocks):
        keys = [key for key, child in modules[stem]._modules.items() if key.isdecimal() and _holds_any(child)]
        if isinstance(modules[stem], (nn.ModuleList, nn.ModuleDict)) and keys and "0" not in keys:
            return f"{stem}.{keys[0]}".removeprefix(".")
    return None


def _holds_any(module: nn.Module | None) -> bool:
    """Whether a module is more than the placeholder of one that is in another stage."""
    return module is not None and next(module.parameters(), None) is not None


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """{canonical name: module}; of a wrapper and what it wraps, the wrapper."""
    named = list(model.named_modules(remove_duplicate=False))
    return {canonical_module_name(path): module for path, module in reversed(named)}


def _left_dense(left: Mapping[str, int], total: int, blocks: Sequence[str]) -> list[str]:
    """Says how much of the matrices is in no block, and where, if it is much. ``left`` is {parameter: its size}."""
    if sum(left.values()) <= _LITTLE * total:
        return []
    around = {prefix for block in blocks for prefix in prefixes(block)}
    largest: Counter[str] = Counter()
    for name, size in left.items():
        largest[next((prefix for prefix in prefixes(name) if prefix not in around), name)] += size
    named = ", ".join(f"{name!r} ({size / total:.0%})" for name, size in largest.most_common(3))
    return [
        f"{sum(left.values()) / total:.0%} of the trained matrix elements outside embeddings and head are in no block "
        f"and train densely. The largest modules: {named}. Name further blocks with layers=[...], or these parameters "
        "with exclude=[...]"
    ]


def _is_matrix(name: str, module: nn.Module, param: torch.Tensor) -> bool:
    return is_matrix(module, name.rpartition(".")[2], param)


def _size(param: torch.Tensor) -> int:
    return int(getattr(param, "ds_numel", None) or (0 if is_lazy(param) else param.numel()))  # DeepSpeed's name


def _warn(notes: list[str]) -> list[str]:
    for note in notes:
        warnings.warn(note, stacklevel=4)  # at the line that calls param_groups
    return notes
