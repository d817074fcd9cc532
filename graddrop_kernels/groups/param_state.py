"""AdamW's state of a parameter (step, exp_avg, exp_avg_sq, max_exp_avg_sq, master_param): dtypes, creation, validation.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..backends.batch import ROUND_MOMENTS, ROUND_PARAMS
from ..policies.rows import Runs
from ..tensors.local import is_dtensor
from ..tensors.memory import check_memory, laid_out, lies_as, overlaps_itself, reach

STATE_TENSORS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param")  # the step count aside
_HALF = (torch.bfloat16, torch.float16)


def has_master(param: torch.Tensor, group: dict[str, Any]) -> bool:
    """Whether a float32 copy of the parameter is stepped in place of the parameter."""
    return group["master_weights"] and param.dtype in _HALF


def stochastic(param: torch.Tensor, group: dict[str, Any], moments: torch.dtype) -> int:
    """ROUND_PARAMS and ROUND_MOMENTS for what is rounded stochastically. Only bfloat16 is; the rest is as usual."""
    rounds_params = group["stochastic_rounding"] and param.dtype == torch.bfloat16
    rounds_moments = group["stochastic_moments"] and moments == torch.bfloat16
    return ROUND_PARAMS * rounds_params | ROUND_MOMENTS * rounds_moments


def moment_dtype(param: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> torch.dtype:
    """The dtype of the moments: float32 with master weights, else that of existing moments, else the group's choice."""
    if has_master(param, group):
        return torch.float32
    if "exp_avg" in state:
        dtype: torch.dtype = state["exp_avg"].dtype
        return dtype
    return wanted_moments(param, group)


def wanted_moments(param: torch.Tensor, group: dict[str, Any]) -> torch.dtype:
    """The dtype of new moments. The group's choice is for 16-bit parameters (float32) or float32 ones (bfloat16)."""
    if has_master(param, group) or (group["moment_dtype"] == "float32" and param.dtype in _HALF):
        return torch.float32
    return torch.bfloat16 if group["moment_dtype"] == "bfloat16" and param.dtype == torch.float32 else param.dtype


def note_moments(group: dict[str, Any], states: Mapping[torch.Tensor, Any]) -> None:
    """Sets the group's moment_dtype to bfloat16 if the user has given such moments to a float32 parameter. A load then
    keeps them, while those of a bfloat16 model are cast to the dtype of the model that they are loaded for.
    """
    if group["moment_dtype"] is None and any(
        param.dtype == torch.float32 and getattr(states.get(param, {}).get("exp_avg"), "dtype", None) == torch.bfloat16
        for param in group["params"]
    ):
        group["moment_dtype"] = "bfloat16"


def mode(
    param: torch.Tensor, group: dict[str, Any], state: dict[str, Any]
) -> tuple[torch.device, torch.dtype, torch.dtype]:
    """(device, stepped dtype, moment dtype) as backends.select() takes them. With master weights the float32 masters
    are stepped.
    """
    stepped = torch.float32 if has_master(param, group) else param.dtype
    return param.device, stepped, moment_dtype(param, group, state)


def state_shape(param: torch.Tensor, rows: Runs | None) -> tuple[int, ...]:
    """The shape of moments and masters. ``rows``: as of spans.trained_rows()."""
    return tuple(param.shape) if rows is None else (sum(stop - start for start, stop in rows), *param.shape[1:])


def in_rows(tensor: torch.Tensor, rows: Runs | None) -> torch.Tensor:
    """The rows of a tensor in the parameter's shape, side by side as in the state; the tensor itself for None."""
    if rows is None:
        return tensor
    return torch.cat([tensor.new_empty(state_shape(tensor, ())), *(tensor[start:stop] for start, stop in rows)])


def make_state(
    param: torch.Tensor, group: dict[str, Any], state: dict[str, Any], rows: Runs | None = None
) -> None:  # fmt: skip
    """Adds the entries that ``state`` lacks. Moments are zeros in the parameter's strides, as torch makes them.

    ``rows``: as of spans.trained_rows().
    """
    dtype = moment_dtype(param, group, state)
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 2 + group["amsgrad"]]:
        if name not in state and rows is None:
            state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        elif name not in state:
            state[name] = torch.zeros(state_shape(param, rows), dtype=dtype, device=param.device)
        state[name] = state[name].to(dtype)  # another dtype if master weights begin in the middle of a run
    if has_master(param, group) and "master_param" not in state:
        state["master_param"] = in_rows(param.detach(), rows).to(torch.float32)
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    else:  # torch's own AdamW keeps it on the CPU, in the default dtype
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)


def lay_out_state(state: dict[str, Any], stride: tuple[int, ...] | None) -> None:
    """Puts moments and masters into the order of the parameter in memory (None: contiguous), once, where a checkpoint
    or a conversion of the model has brought another.
    """
    for name in STATE_TENSORS:
        if name in state and not is_dtensor(state[name]) and not lies_as(state[name], stride):
            state[name] = laid_out(state[name], stride)


def check_state(name: str, param: torch.Tensor, state: dict[str, Any], rows: Runs | None = None) -> None:
    """Raises ValueError or TypeError for state that does not fit its parameter. Kernels get only addresses, and would
    write past the end of a tensor that is too short.

    ``rows``: as of spans.trained_rows().
    """
    shape = state_shape(param, rows)
    what = "its parameter" if rows is None else "the rows of its parameter that are trained"
    remedy = "build a new optimizer, or delete optimizer.state[param]"
    step = state.get("step", 0)
    tensor_step = isinstance(step, torch.Tensor) and step.numel() == 1 and step.device.type != "meta"
    if not (tensor_step or isinstance(step, (int, float))):
        raise ValueError(f"step of {name!r} must be one number, got {step!r}; {remedy}")
    moments: dict[str, Any] = {key: state[key] for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if key in state}
    for key, moment in moments.items():
        if not isinstance(moment, torch.Tensor):
            raise ValueError(f"{key} of {name!r} must be a tensor, got {moment!r}; {remedy}")
        if moment.shape != shape or moment.device != param.device:
            raise ValueError(
                f"{key} of {name!r} has shape {tuple(moment.shape)} on {moment.device}, {what} {shape} on "
                f"{param.device}: the parameter was replaced after its state was made, or its mask; {remedy}"
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
            shape, torch.float32, param.device,
        ):  # fmt: skip
            raise ValueError(f"master_param of {name!r} must be float32 of shape {shape} on {param.device}; {remedy}")
        check_memory(f"master_param of {name!r}", master)
        moments["master_param"] = master
    spans = sorted((each.data_ptr(), each.data_ptr() + reach(each)) for each in moments.values() if each.numel())
    if any(end > start for (_, end), (start, _) in zip(spans, spans[1:])):
        raise ValueError(f"the tensors in the state of {name!r} share memory: put copies (.clone()) into it")
