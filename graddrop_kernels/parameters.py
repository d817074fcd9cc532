"""What the optimizer knows of each parameter besides its tensors: its name, its random stream, its block.
And which parameters it must refuse.
"""

import difflib
from dataclasses import dataclass

import torch

from .memory import overlaps_itself
from .names import block_of, canonical_name, match_layers
from .philox import stream_key
from .policies import FixedMask, Policy


@dataclass(frozen=True, slots=True)
class ParamRecord:
    """``unit`` is what decides about the parameter together with others (Policy.unit): None, its block's name, ..."""

    name: str
    key: int
    unit: object


def group_names(group: dict, index: int) -> list[str]:
    """Canonical names of a group's parameters; "{group}.{position}" for parameters given without names.

    Raises:
        ValueError: fewer or more names than parameters, as when a wrapper has flattened them into one buffer.
    """
    names = group.get("param_names")
    if names is None:
        return [f"{index}.{position}" for position in range(len(group["params"]))]
    if len(names) != len(group["params"]):
        raise ValueError(
            f"parameter group {index} has {len(group['params'])} tensors but {len(names)} names: a wrapper has "
            "flattened them, and masks drawn for the flat buffer would depend on the sharding; "
            "build the optimizer from the tensors that it will step"
        )
    return [canonical_name(name) for name in names]


def group_blocks(groups: list[dict], index: int, policy: Policy) -> tuple[tuple[str, ...], list[str | None]]:
    """(all blocks in forward order, the block of each parameter of group ``index``), for a policy that needs blocks.

    They come from the policy's ``layers`` patterns, else from what ``param_groups`` has put into the group.

    Raises:
        ValueError: neither is there.
    """
    group = groups[index]
    kind = type(policy).__name__
    if policy.layers is not None:
        if "param_names" not in group:
            raise ValueError(
                f"{kind}(layers=...) needs parameter names: pass model.named_parameters() instead of model.parameters()"
            )
        blocks = match_layers(
            policy.layers, [name for position, other in enumerate(groups) for name in group_names(other, position)]
        )
        return tuple(blocks), [block_of(name, blocks) for name in group_names(group, index)]
    if "block" in group:  # param_groups(..., per_block=True): however many tensors an engine makes of it
        return tuple(group["blocks"]), [group["block"]] * len(group["params"])
    if len(group.get("param_blocks", ())) != len(group["params"]) or "blocks" not in group:
        raise ValueError(
            f"mask={kind}(...) drops whole transformer blocks and must know them: "
            "pass graddrop_kernels.param_groups(model) as the parameters, "
            f"or name the blocks with model.named_parameters() and {kind}(..., layers=['encoder.layer.*'])"
        )
    return tuple(group["blocks"]), list(group["param_blocks"])


def make_records(groups: list[dict], index: int, policy: Policy | None) -> tuple[list[ParamRecord], tuple[str, ...]]:
    """The records of group ``index``, and the blocks of the model (empty where the policy needs none).

    Raises ValueError as the functions above do.
    """
    group = groups[index]
    names = group_names(group, index)
    blocks, param_blocks = (), [None] * len(names)
    if policy is not None and policy.needs_blocks:
        blocks, param_blocks = group_blocks(groups, index, policy)
    unit = policy.unit if policy is not None else lambda name, block: None
    return [
        ParamRecord(name, stream_key(name, group["seed"]), unit(name, block))
        for name, block in zip(names, param_blocks)
    ], blocks


def check_fixed_mask(policy: FixedMask, named: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless every mask has a parameter of its name and shape."""
    for name, shape in policy.shapes.items():
        if name not in named:
            near = difflib.get_close_matches(name, named, n=3, cutoff=0.0)
            raise ValueError(f"FixedMask: no parameter is called {name!r}; near names are {', '.join(map(repr, near))}")
        if tuple(named[name].shape) != shape:
            raise ValueError(
                f"FixedMask: the mask of {name!r} has shape {shape}, but the parameter has {tuple(named[name].shape)}"
            )


def check_param(name: str, param: torch.Tensor) -> None:
    """Raises ValueError or TypeError for a parameter that no backend can step."""
    if hasattr(param, "placements") or type(param).__name__ == "FlatParameter":
        raise TypeError(
            f"parameter {name!r} is a {type(param).__name__}, a shard of a larger tensor: "
            "sharded parameters are not supported yet, "
            "and a mask drawn for the shard alone would depend on the sharding"
        )
    if isinstance(param, torch.nn.parameter.UninitializedTensorMixin):
        return  # of a lazy module: checked again before its first step
    if not param.is_floating_point() and param.dtype not in (torch.complex64, torch.complex128):
        raise TypeError(
            f"parameter {name!r} has dtype {param.dtype}; "
            "float32, float64, bfloat16, float16, complex64 and complex128 are supported"
        )
    if not param.is_contiguous() and overlaps_itself(param):
        raise ValueError(
            f"parameter {name!r} has overlapping memory (shape {tuple(param.shape)}, strides {param.stride()}), "
            "as after expand(): several of its elements would be stepped in one place; "
            "give the optimizer a copy (.clone() or .contiguous())"
        )


def check_grad(name: str, param: torch.Tensor, grad: torch.Tensor) -> None:
    """Raises RuntimeError or ValueError for a gradient that does not belong to its parameter."""
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"the gradient of {name!r} is sparse ({grad.layout}): FusedGradDropAdamW needs dense gradients; "
            "use sparse=False in the embedding"
        )
    if grad.shape != param.shape or grad.dtype != param.dtype or grad.device != param.device:
        raise ValueError(
            f"the gradient of {name!r} is {tuple(grad.shape)} {grad.dtype} on {grad.device}, its parameter "
            f"{tuple(param.shape)} {param.dtype} on {param.device}; they must be alike"
        )
