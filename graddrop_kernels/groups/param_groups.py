"""Parameter groups with the paper's scope: masks on the transformer blocks, everything outside them dense."""

import math
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .blocks import Layers, find_blocks, parameter_blocks
from .names import canonical_name, near_names

# As transformers' Trainer.get_decay_parameter_names, on lower-case names ...
_NO_DECAY_NAME = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.|_)norm(?:$|\.)")
# ... but any normalisation class counts, not only nn.LayerNorm: T5LayerNorm, BatchNorm2d, MambaRMSNormGated.
_NORM_CLASS = re.compile(r"norm(?:\dd|gated)?$", re.IGNORECASE)


def param_groups(
    model: nn.Module, weight_decay: float = 1e-2, exclude: str | Iterable[str] = (), layers: Layers | None = None,
    per_block: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return parameter groups for the optimizer, so that its mask acts inside the model's blocks only (section III).

    Args:
        model: its trainable parameters are grouped, each once; frozen ones (``requires_grad=False``) are left out.
        weight_decay: the weight decay of the decaying groups, at least 0. Biases (any name with "bias" in it, T5's
            ``relative_attention_bias`` too) and normalisation layers get 0, as in transformers' Trainer.
        exclude: shell patterns on whole canonical parameter names. Parameters that match are dense although they are
            inside a block. ``*`` is any run of characters, dots too: ``"*.bias"``, ``"*LayerNorm*"``,
            ``"encoder.layer.1.*"``.
        layers: the blocks, if ``find_blocks`` is not to look for them itself.
        per_block: makes a group of its own for each block. Policies of whole blocks need this with engines that make
            one flat tensor of a group (DeepSpeed) or distribute its parameters (ZeroRedundancyOptimizer). Parameters
            then have no names, since these engines take none; ``attach_deepspeed`` and ``attach_zero`` add the names.

    Embeddings, pooler, head and final norm are outside the blocks, hence dense, and so is a parameter that a block
    shares with them. A parameter that one block holds for all blocks belongs to that block; T5 keeps its
    ``relative_attention_bias`` in block 0. ALBERT-like models, whose layers share weights, are refused as in
    ``find_blocks``.

    Returns:
        The non-empty ones of these groups, in this order, with parameters in the order of ``model.named_parameters()``:
        ``{"name": "blocks" or "blocks_no_decay", "params": [(canonical name, Parameter), ...], "weight_decay": float,
        "blocks": [name of every block, in forward order], "param_blocks": [block name of each of params]}``, and
        ``{"name": "dense" or "dense_no_decay", "params": ..., "weight_decay": ..., "mask": None}``.
        With ``per_block``, params are Parameters only, and a block's groups, called ``"{block}"`` and
        ``"{block}_no_decay"``, have ``"block": its name`` in place of ``"param_blocks"``.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: ``weight_decay`` negative or not finite, a pattern that matches nothing, no trainable parameter, two
            parameters with one canonical name, or no usable blocks (see ``find_blocks``).
    """
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, (int, float)):
        raise TypeError(f"weight_decay must be a float, not {weight_decay!r}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be finite and at least 0, not {weight_decay}")
    blocks = find_blocks(model, layers)
    owner = parameter_blocks(model, blocks)
    named = _named_parameters(model)
    excluded = _excluded(exclude, named)
    groups: dict[str, dict[str, Any]] = {
        "blocks": {"blocks": [name for name, _ in blocks], "param_blocks": []},
        "blocks_no_decay": {"blocks": [name for name, _ in blocks], "param_blocks": []},
        "dense": {"mask": None},
        "dense_no_decay": {"mask": None},
    }
    for kind, values in groups.items():
        decay = 0.0 if kind.endswith("no_decay") else float(weight_decay)
        groups[kind] = {"name": kind, "params": [], "weight_decay": decay, **values}
    for name, (module, param) in named.items():
        if not param.requires_grad:
            continue
        block = None if name in excluded else owner.get(id(param))
        group = groups[("dense" if block is None else "blocks") + ("" if _decays(name, module) else "_no_decay")]
        group["params"].append((name, param))
        if block is not None:
            group["param_blocks"].append(block)
    result = [group for group in groups.values() if group["params"]]
    if not result:
        raise ValueError(f"no parameter of this {type(model).__name__} has requires_grad=True: nothing to optimize")
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


def _named_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
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
