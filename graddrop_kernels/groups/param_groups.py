"""Parameter groups with the paper's scope: masks on the transformer blocks, everything outside them dense."""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .blocks import Layers
from .names import canonical_name, near_names
from .scope import Named, find_scope

# As transformers' Trainer.get_decay_parameter_names, on lower-case names ...
_NO_DECAY_NAME = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.|_)norm(?:$|\.)")
# ... but any normalisation class counts, not only nn.LayerNorm: T5LayerNorm, BatchNorm2d, MambaRMSNormGated.
_NORM_CLASS = re.compile(r"norm(?:\dd|gated)?$", re.IGNORECASE)


def param_groups(
    model: nn.Module, weight_decay: float | torch.Tensor = 1e-2, exclude: str | Iterable[str] = (),
    layers: Layers | None = None, per_block: bool = False, blocks: Sequence[str] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return parameter groups for the optimizer, so that its mask acts inside the model's blocks only (section III).

    Args:
        model: its trainable parameters are grouped, each once; frozen ones (``requires_grad=False``) are left out.
        weight_decay: the weight decay of the decaying groups, at least 0, a number or a tensor of one element. Biases
            (any name with "bias" in it, T5's ``relative_attention_bias`` too) and normalisation layers get 0, as in
            transformers' Trainer.
        exclude: shell patterns on whole canonical parameter names. Parameters that match are dense although they are
            inside a block. ``*`` is any run of characters, dots too: ``"*.bias"``, ``"*LayerNorm*"``,
            ``"encoder.layer.1.*"``.
        layers: the blocks, if ``find_blocks`` is not to look for them itself.
        per_block: makes a group of its own for each block. Policies of whole blocks need this with engines that make
            one flat tensor of a group (DeepSpeed) or distribute its parameters (ZeroRedundancyOptimizer). Parameters
            then have no names, since these engines take none; ``attach_deepspeed`` and ``attach_zero`` add the names.
        blocks: where ``model`` is a stage of a pipeline, the names of all trained blocks of the whole model in forward
            order, ``[name for name, _ in find_blocks(whole)]``, so that schedules count all of them. The modules of the
            stage must have the names that they have in the whole model.

    Embeddings, pooler, head and final norm are outside the blocks, hence dense, and so is a parameter that a block
    shares with them. A parameter that one block holds for all blocks belongs to that block; T5 keeps its
    ``relative_attention_bias`` in block 0. Blocks in which nothing is trained have no turn in a schedule.

    Where there are no blocks, or where they share weights that are trained (ALBERT, Zamba2), every matrix outside
    embeddings, head and pooler is masked. Policies of whole blocks refuse such groups.

    Returns:
        The non-empty ones of these groups, in this order, with parameters in the order of ``model.named_parameters()``:
        ``{"name": "blocks" or "blocks_no_decay", "params": [(canonical name, Parameter), ...], "weight_decay": float,
        "blocks": [name of every block, in forward order], "param_blocks": [block name of each of params]}``, and
        ``{"name": "dense" or "dense_no_decay", "params": ..., "weight_decay": ..., "mask": None}``.
        With ``per_block``, params are Parameters only, and a block's groups, called ``"{block}"`` and
        ``"{block}_no_decay"``, have ``"block": its name`` in place of ``"param_blocks"``. Without blocks, the masked
        groups are called ``"matrices"`` and ``"matrices_no_decay"``, and have ``"no_blocks": the reason``. The first
        group has ``"notes": [...]`` if there is something to say of what is left out; ``describe()`` shows them.

    Warns:
        UserWarning: there are no blocks; more than a tenth of the trained matrix elements outside embeddings and head
            would be dense (the largest modules are named); this looks like a stage of a pipeline.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: ``weight_decay`` negative or not finite, a pattern that matches nothing, no trainable parameter, two
            parameters with one canonical name, no usable ``layers`` (see ``find_blocks``), or a block of the model that
            is not among ``blocks``.
    """
    if not isinstance(weight_decay, torch.Tensor):  # the optimizer checks a tensor
        if isinstance(weight_decay, bool) or not isinstance(weight_decay, (int, float)):
            raise TypeError(f"weight_decay must be a float, not {weight_decay!r}")
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ValueError(f"weight_decay must be finite and at least 0, not {weight_decay}")
        weight_decay = float(weight_decay)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    named = _named_parameters(model)
    excluded = _excluded(exclude, named)
    trained = {name: place for name, place in named.items() if place[1].requires_grad}
    if not trained:
        raise ValueError(f"no parameter of this {type(model).__name__} has requires_grad=True: nothing to optimize")
    scope = find_scope(model, trained, excluded, layers, blocks)
    kinds = ("matrices", "dense") if scope.no_blocks else ("blocks", "dense")
    groups: dict[str, dict[str, Any]] = {}
    for kind, ending in itertools.product(kinds, ("", "_no_decay")):
        decay = 0.0 if ending else weight_decay
        group = groups[kind + ending] = {"name": kind + ending, "params": [], "weight_decay": decay}
        if kind == "dense":
            group["mask"] = None
        elif scope.no_blocks:
            group["no_blocks"] = scope.no_blocks
        else:
            group |= {"blocks": list(scope.blocks), "param_blocks": []}
    for name, (module, param) in trained.items():
        is_masked = id(param) in scope.masked and name not in excluded
        group = groups[kinds[not is_masked] + ("" if _decays(name, module) else "_no_decay")]
        group["params"].append((name, param))
        if "param_blocks" in group:
            group["param_blocks"].append(scope.masked[id(param)])
    result = [group for group in groups.values() if group["params"]]
    if scope.notes:
        result[0]["notes"] = scope.notes
    return _per_block(result) if per_block else result


def _per_block(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    split: dict[tuple[str | None, str], dict[str, Any]] = {}
    for group in groups:
        for (_, param), block in zip(group["params"], group.get("param_blocks", [None] * len(group["params"]))):
            name = group["name"] if block is None else group["name"].replace("blocks", block, 1)
            if (block, name) not in split:
                kept = {key: value for key, value in group.items() if key != "param_blocks"}
                split[block, name] = {**kept, "name": name, "params": [], **({"block": block} if block else {})}
            split[block, name]["params"].append(param)
    return list(split.values())


def _named_parameters(model: nn.Module) -> Named:
    """{canonical name: (owning module, parameter)}, each parameter once, as in ``model.named_parameters()``."""
    named: dict[str, tuple[nn.Module, nn.Parameter]] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for key, param in module.named_parameters(recurse=False):
            if id(param) in seen:
                continue
            seen.add(id(param))
            name = canonical_name(f"{path}.{key}".removeprefix("."))
            if name in named:
                raise ValueError(
                    f"two parameters are called {name!r} once wrapper names such as 'module.' are taken off "
                    f"({path}.{key} is one): rename the attribute of one of them"
                )
            named[name] = (module, param)
    return named


def _excluded(exclude: str | Iterable[str], names: Iterable[str]) -> set[str]:
    patterns = list(exclude) if isinstance(exclude, Iterable) and not isinstance(exclude, str) else [exclude]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"exclude must be patterns on parameter names such as ['*.bias'], not {exclude!r}")
    excluded: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            near = near_names(pattern, names)
            raise ValueError(f"the exclude pattern {pattern!r} matches no whole parameter name. Nearest names: {near}")
        excluded |= hits
    return excluded


def _decays(name: str, module: nn.Module) -> bool:
    norm = any(_NORM_CLASS.search(cls.__name__) for cls in type(module).__mro__)
    return not (norm or _NO_DECAY_NAME.search(name.lower()))
