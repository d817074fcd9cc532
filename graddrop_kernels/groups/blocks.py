"""The transformer blocks of a model (the paper's "layers"): which modules they are and which parameters are theirs."""

from collections.abc import Iterable

from torch import nn

from ..masks.names import canonical_module_name, canonical_name
from .names import SAY_LAYERS, forward_order, match_layers
from .stacks import Blocks, find_alike, find_layers, walk

_SHARED = (
    "blocks that share weights cannot be masked one by one. Masks on single elements (GradDrop) need no blocks; for "
    f"other blocks {SAY_LAYERS}"
)

Layers = str | Iterable[str | nn.Module]  # what ``layers=`` takes


class NoBlocks(ValueError):
    """A model has no blocks, or none that could be masked one by one."""


def find_blocks(model: nn.Module, layers: Layers | None = None) -> Blocks:
    """Return the blocks of ``model`` (the paper's layers, section III) as (canonical name, module), in forward order,
    encoder before decoder.

    A layer is a module that a transformer repeats: attention, or what takes its place, with its feed-forward part. The
    blocks are the layers of all outermost ``nn.ModuleList``s, ``nn.Sequential``s and ``nn.ModuleDict``s of two or more:
    vision, audio and text towers, encoder and decoder. A class of transformers' (``GradientCheckpointingLayer``) may
    stand alone. Where layers stand in stages (Swin), they are the blocks, and not the stages. Lists of convolutions,
    codebooks, heads and experts are none.

    Where no module is called attention, mixer or the like, the children of the outermost ``nn.ModuleList``s and
    ``nn.Sequential``s of one class are the blocks. Two lists of one parent are then taken only as encoder and decoder.

    Args:
        model: any module; it is not changed.
        layers: one or a list of block modules of the model, or of patterns as ``"encoder.layer.*"`` (see
            ``match_layers``), in place of what would be found. Modules alone keep the order given.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: nothing is found (the candidates are listed), ``layers`` names what the model does not have, or
            blocks share weights that are trained: ALBERT, Zamba2, tied, nested or repeated blocks. A forward() that
            runs a block several times cannot be seen in the modules and is not refused; ALBERT is recognised by its
            config.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    blocks = _detect(model) if layers is None else _select(model, layers)
    parameter_blocks(model, blocks)
    return blocks


def parameter_blocks(model: nn.Module, blocks: Blocks) -> dict[int, str]:
    """Return {id(parameter): block name} for every parameter that is reached only through one of ``blocks``.

    A parameter that the rest of the model holds too (tied to an embedding or a head) is outside and left out.
    Raises NoBlocks if two blocks hold one parameter that is trained; a frozen one is the first block's.
    """
    ids = {id(module) for _, module in blocks}
    reached = (module for _, module in walk(model, lambda module: id(module) in ids))
    outside = {id(param) for module in reached if id(module) not in ids for param in module.parameters(recurse=False)}
    owner: dict[int, str] = {}
    for block, module in blocks:
        for name, param in module.named_parameters():
            if id(param) in owner and param.requires_grad:
                both = f"blocks {owner[id(param)]!r} and {block!r} both hold the parameter {canonical_name(name)!r}"
                raise NoBlocks(f"{both}: {_SHARED}")
            if id(param) not in outside:
                owner.setdefault(id(param), block)
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
            raise NoBlocks(f"{type(module).__name__} runs {applied} layers on {stored} stored group(s): {_SHARED}")
    blocks = find_layers(model) or find_alike(model)
    if not blocks:
        near = {n: m for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))}
        seen = [f"{n!r} ({len(m)} of {', '.join(sorted({type(c).__name__ for c in m}))})" for n, m in near.items()]
        candidates = "; ".join(seen[:8]) or "there is no ModuleList or Sequential"
        raise NoBlocks(f"{type(model).__name__}: no clear transformer blocks: {SAY_LAYERS}. Candidates: {candidates}")
    return _in_forward_order(blocks)


def _in_forward_order(blocks: Blocks) -> Blocks:
    key = forward_order([name for name, _ in blocks])
    return sorted(blocks, key=lambda block: key(block[0]))
