"""What the optimizer knows of each parameter besides its tensors: its name, its random stream, its block.
And which parameters it must refuse.
"""

import difflib
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

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
    if not param.is_floating_point():
        raise TypeError(
            f"parameter {name!r} has dtype {param.dtype}; float32, float64, bfloat16 and float16 are supported"
        )
    if not param.is_contiguous() and overlaps_itself(param):
        raise ValueError(
            f"parameter {name!r} has overlapping memory (shape {tuple(param.shape)}, strides {param.stride()}), "
            "as after expand(): several of its elements would be stepped in one place; "
            "give the optimizer a copy (.clone() or .contiguous())"
        )


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of a strided tensor may share memory (exact for expanded, transposed and sliced tensors,
    else on the safe side).
    """
    span = 0  # the farthest offset that the smaller strides reach
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride <= span:
                return tensor.numel() > 1
            span += stride * (size - 1)
    return False


def check_state(name: str, param: torch.Tensor, state: dict) -> None:
    """Raises ValueError or TypeError for state that does not fit its parameter: the kernels get addresses,
    and would write past an end.
    """
    remedy = "build a new optimizer, or delete optimizer.state[param]"
    step = state.get("step", 0)
    tensor_step = isinstance(step, torch.Tensor) and step.numel() == 1 and step.device.type != "meta"
    if not (tensor_step or isinstance(step, (int, float))):
        raise ValueError(f"step of {name!r} must be one number, got {step!r}; {remedy}")
    moments = {key: state[key] for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if key in state}
    for key, moment in moments.items():
        if not isinstance(moment, torch.Tensor):
            raise ValueError(f"{key} of {name!r} must be a tensor, got {moment!r}; {remedy}")
        if moment.shape != param.shape or moment.device != param.device:
            raise ValueError(
                f"{key} of {name!r} has shape {tuple(moment.shape)} on {moment.device}, its parameter "
                f"{tuple(param.shape)} on {param.device}: the parameter was replaced after its state was made; {remedy}"
            )
        check_memory(f"{key} of {name!r}", moment)
        if not moment.is_contiguous() and overlaps_itself(moment):
            raise ValueError(
                f"{key} of {name!r} has overlapping memory (shape {tuple(moment.shape)}, strides {moment.stride()}): "
                "several of its elements would be stepped in one place; put a copy (.clone()) into the state"
            )
    if len({moment.dtype for moment in moments.values()}) > 1:
        found = ", ".join(f"{key} {moment.dtype}" for key, moment in moments.items())
        raise ValueError(
            f"the moments of {name!r} have different dtypes ({found}): convert them to one, in the file or in the state"
        )
    if "master_param" in state:
        master = state["master_param"]
        if not isinstance(master, torch.Tensor) or (master.shape, master.dtype, master.device) != (
            param.shape, torch.float32, param.device,
        ):  # fmt: skip
            raise ValueError(
                f"master_param of {name!r} must be float32 of shape {tuple(param.shape)} on {param.device}; {remedy}"
            )
        check_memory(f"master_param of {name!r}", master)
        moments["master_param"] = master
    spans = sorted((each.data_ptr(), each.data_ptr() + reach(each)) for each in moments.values() if each.numel())
    if any(end > start for (_, end), (start, _) in zip(spans, spans[1:])):
        raise ValueError(f"the tensors in the state of {name!r} share memory: put copies (.clone()) into it")


def reach(tensor: torch.Tensor) -> int:
    """Bytes from a strided tensor's first element to the end of its last."""
    return tensor.element_size() * (1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape)))


def check_memory(what: str, tensor: torch.Tensor) -> None:
    """Raises TypeError or ValueError for a tensor without the memory that its shape needs."""
    if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor) or tensor.device.type == "meta":
        raise TypeError(
            f"{what} is a {type(tensor).__name__} of layout {tensor.layout} on {tensor.device}, which has no memory of "
            "its own to step in; give the optimizer a plain tensor"
        )
    if tensor.numel() and not tensor._is_zerotensor():
        storage = tensor.untyped_storage()
        needed = tensor.storage_offset() * tensor.element_size() + reach(tensor)
        if storage.nbytes() < needed or storage.data_ptr() == 0:
            raise ValueError(
                f"{what} needs {needed} bytes, but its storage has {storage.nbytes()}: it was freed or resized; "
                "step while it is allocated"
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
