"""The transformer blocks of a model (the paper's "layers"): which modules they are and which parameters are theirs."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from .names import (
    SAY_LAYERS,
    WRAPPERS,
    canonical_module_name,
    canonical_name,
    forward_order,
    in_decoder,
    match_layers,
)

_CHECKPOINTING_LAYER = "transformers.modeling_layers.GradientCheckpointingLayer"
_SHARED = (
    "blocks that share weights cannot be masked one by one. For masks on single elements pass model.named_parameters() "
    f"to the optimizer; for other blocks {SAY_LAYERS}"
)

Layers = str | Iterable[str | nn.Module]  # what ``layers=`` takes
Blocks = list[tuple[str, nn.Module]]


def find_blocks(model: nn.Module, layers: Layers | None = None) -> Blocks:
    """Return the blocks of ``model`` (the paper's layers, section III) as (canonical name, module), in forward order,
    encoder before decoder.

    The first rule that finds something decides:

    1. ``layers``: block modules and/or patterns (see ``match_layers``). Modules alone keep the order given.
    2. The outermost ``transformers.modeling_layers.GradientCheckpointingLayer``s.
    3. The outermost ``nn.ModuleList``s of two or more children of one class. Lists of single layers (heads, embedding
       tables) count only where no list has composite children. A list of one is never taken. Two lists of one parent
       are taken only as encoder and decoder; XLM, which keeps each half of its blocks in a list of its own, needs
       ``layers``.

    Args:
        model: any module; it is not changed.
        layers: one or a list of block modules of the model, or of patterns as ``"encoder.layer.*"``. None: rules 2, 3.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: nothing is found (the candidates are listed), ``layers`` names what the model does not have, or
            blocks share weights: ALBERT, tied, nested or repeated blocks. A forward() that runs a block several
            times cannot be seen in the modules and is not refused; ALBERT is recognised by its config.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    blocks = _detect(model) if layers is None else _select(model, layers)
    parameter_blocks(model, blocks)
    return blocks


def parameter_blocks(model: nn.Module, blocks: Blocks) -> dict[int, str]:
    """Return {id(parameter): block name} for every parameter that is reached only through one of ``blocks``.

    A parameter that the rest of the model holds too (tied to an embedding or a head) is outside and left out.
    Raises ValueError if two blocks hold one parameter.
    """
    ids = {id(module) for _, module in blocks}
    reached = (module for _, module in _walk(model, lambda module: id(module) in ids))
    outside = {id(param) for module in reached if id(module) not in ids for param in module.parameters(recurse=False)}
    owner: dict[int, str] = {}
    for block, module in blocks:
        for name, param in module.named_parameters():
            if id(param) in owner:
                both = f"blocks {owner[id(param)]!r} and {block!r} both hold the parameter {canonical_name(name)!r}"
                raise ValueError(f"{both}: {_SHARED}")
            if id(param) not in outside:
                owner[id(param)] = block
    return owner


def _select(model: nn.Module, layers: Layers) -> Blocks:
    if not isinstance(layers, Iterable) or isinstance(layers, (bytes, dict)):
        raise TypeError(f"layers={layers!r}: {SAY_LAYERS}")
    if not (layers := [layers] if isinstance(layers, str) else list(layers)):
        raise ValueError(f"layers is empty: {SAY_LAYERS}, or None to find the blocks")
    # Aliases included: a list that holds one module twice is two names. A wrapper comes before what it wraps.
    named = [(canonical_module_name(path), module) for path, module in model.named_modules(remove_duplicate=False)]
    blocks = []
    for module in (item for item in layers if isinstance(item, nn.Module)):
        name = next((name for name, known in named if known is module), "")
        if not name:
            raise ValueError(f"layers holds a {type(module).__name__} that is no submodule of the model: {SAY_LAYERS}")
        blocks.append((name, module))
    if patterns := [item for item in layers if not isinstance(item, nn.Module)]:
        given, modules = {name for name, _ in blocks}, dict(reversed(named))
        names = match_layers(patterns, [name for name, _ in model.named_parameters(remove_duplicate=False)])
        blocks = _in_forward_order(blocks + [(name, modules[name]) for name in names if name not in given])
    if lists := [name for name, module in blocks if isinstance(module, nn.ModuleList)]:
        raise ValueError(f"layers names the ModuleList {lists[0]!r}, not its blocks: write '{lists[0]}.*'")
    return blocks


def _detect(model: nn.Module) -> Blocks:
    for module in model.modules():
        config = getattr(module, "config", None)
        applied, stored = (getattr(config, key, None) for key in ("num_hidden_layers", "num_hidden_groups"))
        if isinstance(applied, int) and isinstance(stored, int) and stored < applied:  # ALBERT
            raise ValueError(f"{type(module).__name__} runs {applied} layers on {stored} stored group(s): {_SHARED}")
    blocks = [(name, module) for name, module in _outermost(model, _is_checkpointing_layer) if name]
    if not blocks:
        stacks: dict[nn.ModuleList, str] = {}
        lists: Any = _outermost(model, lambda module: isinstance(module, nn.ModuleList) and len(module) > 1)
        for name, stack in lists:
            stacks.setdefault(stack, name)  # a list under two names is one list
        stacks = {stack: name for stack, name in stacks.items() if len(set(map(_class, stack))) == 1}
        stacks = {s: name for s, name in stacks.items() if any(list(child.children()) for child in s)} or stacks
        places = {(name.rpartition(".")[0], in_decoder(name)) for name in stacks.values()}
        for stack, name in stacks.items() if len(places) == len(stacks) else ():
            # Not children(), which leaves out a module that is listed again.
            blocks += [(f"{name}.{key}".removeprefix("."), child) for key, child in stack._modules.items()]
    if not blocks:
        near = {n: m for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))}
        seen = [f"{n!r} ({len(m)} of {', '.join(sorted({_class(c).__name__ for c in m}))})" for n, m in near.items()]
        candidates = "; ".join(seen[:8]) or "there is no ModuleList or Sequential"
        raise ValueError(f"{type(model).__name__}: no clear transformer blocks: {SAY_LAYERS}. Candidates: {candidates}")
    return _in_forward_order(blocks)


def _in_forward_order(blocks: Blocks) -> Blocks:
    key = forward_order([name for name, _ in blocks])
    return sorted(blocks, key=lambda block: key(block[0]))


def _is_checkpointing_layer(module: nn.Module) -> bool:
    # By name, not isinstance: transformers may be absent, and is slow to import.
    return any(f"{cls.__module__}.{cls.__qualname__}" == _CHECKPOINTING_LAYER for cls in type(module).__mro__)


def _class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or of the module inside if a compiled or checkpointed child is wrapped."""
    inner = next((child for key, child in module._modules.items() if key in WRAPPERS and key != "module"), None)
    return type(module) if inner is None else _class(inner)


def _outermost(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> Blocks:
    return [(name, module) for name, module in _walk(model, wanted) if wanted(module)]


def _walk(
    module: nn.Module, stop: Callable[[nn.Module], bool], name: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield (canonical name, module) without looking into ``stop`` modules. Those are yielded wherever they are found,
    others once.
    """
    seen = set() if seen is None else seen
    if stop(module):
        yield name, module
    elif id(module) not in seen:
        seen.add(id(module))
        yield name, module
        for key, child in module._modules.items():
            if child is not None:
                yield from _walk(child, stop, name if key in WRAPPERS else f"{name}.{key}".removeprefix("."), seen)
