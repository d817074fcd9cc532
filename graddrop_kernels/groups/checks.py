"""Checks made before anything changes. They refuse groups, parameters, gradients and masks that no step could use."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # not in torch's stub

from ..policies import Policy
from ..tensors.local import has_processes, is_dtensor, local
from ..tensors.memory import check_memory, is_fake, overlaps_itself
from .masking import Masking
from .options import check_clipping, check_options
from .owner import Owner
from .param_state import check_state
from .records import ParamRecord
from .spans import trained_rows


def check_groups(masking: Masking, first: int = 0) -> None:
    """Raises ValueError or TypeError for options, policies and parameters that no step could use. Groups before the one
    of index ``first`` have been checked before.

    Of a parameter that is frozen and has no gradient only the name is looked at: it may be of any kind, as the 8-bit
    integers of a quantised model are.
    """
    for index, group in list(enumerate(masking.groups))[first:]:
        check_options(index, group)
        policy = masking.policy(index)
        if policy is not None and policy.masked is None and group["masked"] is not None:
            raise ValueError(
                f"masked={group['masked']!r} does not apply to {type(policy).__name__}, which drops nothing; "
                "leave it None"
            )
        if policy is not None and not policy.takes_any_masked and group["masked"] not in (None, policy.masked):
            raise ValueError(
                f"{type(policy).__name__} has a meaning with masked={policy.masked!r} only, its default; got masked="
                f"{group['masked']!r}"
            )
        if policy is not None and policy.takes_turns:
            policy.check_blocks(masking.blocks(index))
            if getattr(policy, "idle_state", "keep") == "drop" and not masking.is_frozen(index):
                raise ValueError(
                    f"idle_state='drop' of {type(policy).__name__} needs masked='frozen', its default, as moments that "
                    f"decay have to be there; got masked={group['masked']!r}"
                )
        for param, record in zip(group["params"], masking.records(index)):
            if param.requires_grad or param.grad is not None:
                check_param(record.name, param)
                check_named(group, param, record)
        if len(set(group["params"])) != len(group["params"]):
            raise ValueError(f"a parameter appears twice in parameter group {index}; give each parameter once")
    check_names(masking, first)
    check_clipping(masking.groups, first)
    check_named_params(masking, wait=True, first=first)


def check_names(masking: Masking, first: int = 0) -> None:
    """Raises ValueError for two parameters of one name, which would get the same masks and the same rounding."""
    if repeated := masking.repeated_name(first):
        name, one, other = repeated
        raise ValueError(
            f"two parameters are called {name!r}, in parameter groups {one} and {other}: masks are drawn by name, so "
            "theirs would be the same; give each its own, for example "
            "[*((f'generator.{n}', p) for n, p in generator.named_parameters()), ...]"
        )


def check_named(group: dict[str, Any], param: torch.Tensor, record: ParamRecord) -> None:
    """Raises ValueError for a DTensor without a name. A wrapper may have put it there after the group was made."""
    if group["mask"] is not None and "param_names" not in group and not record.flat and is_dtensor(param):
        raise ValueError(
            f"parameter {record.name!r} is sharded and has no name: its place in the optimizer is no key for masks "
            "that are to be the same in any sharding; pass model.named_parameters() or "
            "graddrop_kernels.param_groups(model)"
        )


def check_named_params(masking: Masking, wait: bool = False, first: int = 0) -> None:
    """Raises ValueError for a policy that names an unknown parameter, or one whose shape does not suit it.

    With ``wait`` it raises nothing while pieces may still be attached to parameters without a name in this process.
    Groups before the one of index ``first`` have been checked before.
    """
    buffers = masking.buffers
    checked = {group["mask"] for group in masking.groups[:first]}
    found: dict[Policy, dict[str, tuple[int, ...] | None]] = {}
    for index, group in list(enumerate(masking.groups))[first:]:
        policy = masking.policy(index)
        if policy is None or not policy.named:
            continue
        nameless = "param_names" not in group and ("block" in group or has_processes())
        unknown = (param for param in group["params"] if param not in buffers.pieces)
        if wait and any(nameless or buffers.reason(param) for param in unknown):
            return
        for param, record in zip(group["params"], masking.records(index)):
            shapes: dict[str, tuple[int, ...] | None] = {each.piece.name: None for each in record.flat}
            found.setdefault(policy, {}).update(shapes or {record.name: tuple(param.shape)})
    for policy, shapes in found.items():
        names = policy.named if policy.to_json() not in checked else set(policy.named) & shapes.keys()
        elsewhere = [name for name in names if name not in shapes and masking.has(name)]
        if elsewhere and buffers.shapes is None:
            raise ValueError(
                f"{type(policy).__name__}: {elsewhere[0]!r} is in a parameter group with another mask, or none: leave "
                "it out (the builders of masks take groups=param_groups(model)), or pass model.named_parameters()"
            )
        check_shapes(policy, names, shapes if buffers.shapes is None else buffers.shapes)


def check_shapes(policy: Policy, names: Iterable[str], shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    """Raises ValueError unless each of these names that the policy has is a parameter's, of a shape that suits it. The
    shape is None in a flat buffer.
    """
    for name in names:
        if name not in shapes:
            near = difflib.get_close_matches(name, shapes, n=3, cutoff=0.0)
            raise ValueError(
                f"{type(policy).__name__}: no parameter is called {name!r}; near names are {', '.join(map(repr, near))}"
            )
        shape = shapes[name]
        if shape is not None:
            policy.check_shape(name, shape)


def check_row(
    owner: Owner, masking: Masking, group: dict[str, Any], param: torch.Tensor, record: ParamRecord, grad: torch.Tensor
) -> None:
    """Raises ValueError, TypeError or RuntimeError if a kernel cannot take the parameter, its local gradient or its
    state.
    """
    tensor = local(param)
    check_param(record.name, param)
    check_grad(record.name, tensor, grad)
    if is_fake(tensor):
        return  # no kernel is given its address
    state = {key: local(value) for key, value in owner.state.get(param, {}).items()}
    check_state(record.name, tensor, state, trained_rows(param, record))
    check_memory(f"parameter {record.name!r}", tensor)
    check_memory(f"the gradient of {record.name!r}", grad)
    if record.flat and owner.max_grad_norm is not None:
        raise ValueError(
            f"max_grad_norm={owner.max_grad_norm!r} cannot be used with the flat buffer {record.name!r}, whose "
            "other parts are not known here: set it to None and clip with the engine's own method"
        )
    check_named(group, param, record)


def check_param(name: str, param: torch.Tensor) -> None:
    """Raises ValueError or TypeError for a parameter that no backend can step."""
    if isinstance(param, UninitializedTensorMixin):
        return  # of a lazy module: checked again before its first step
    if not param.is_floating_point() and param.dtype not in (torch.complex64, torch.complex128):
        raise TypeError(
            f"parameter {name!r} has dtype {param.dtype}; "
            "float32, float64, bfloat16, float16, complex64 and complex128 are supported"
        )
    if param.layout is not torch.strided:
        raise TypeError(
            f"parameter {name!r} has the layout {param.layout}, and only dense parameters are supported; convert it "
            "(.to_dense()), or leave it out of the optimizer"
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


def check_written_grads(masking: Masking, params: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
    """Raises ValueError for a gradient that cannot be unscaled in place."""
    for param, grad in zip(params, grads):
        if not grad.is_contiguous() and overlaps_itself(grad):
            raise ValueError(
                f"the gradient of {masking.record_of(param).name!r} has overlapping memory, as after expand(): it "
                "cannot be unscaled in place; give param.grad a copy (.clone())"
            )
