"""graddrop::step_: the optimizer's step as one operator, which torch.compile puts into its graph.

torch.compile bakes Python numbers into the graph and recompiles when one changes. So the graph holds only the tensors
of the step and a handle. The operator reads everything else (lr, p, the epoch, the counts) from the optimizer when it
runs. It then does what step() does without a compiler.
"""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch

from ..groups.masking import Masking
from ..groups.owner import Owner
from ..groups.param_state import has_master, make_state
from ..groups.spans import trained_rows
from ..tensors.local import is_dtensor
from .idle_state import drops_idle_state
from .in_backward import StepInBackward
from .skip_dropped import SkipDropped
from .stepper import Stepper

# `hypers` are the tensors among lr, beta1, beta2 and weight_decay. `hyper_places` says where each belongs, in flat
# pairs: the index of a group, then 0 to 3 in that order. `positions` are the indices of `params` among all parameters
# of the optimizer. `max_exp_avg_sqs` and `master_params` have an entry for each parameter that has one. With a
# grad_scale the gradients are written too, which is the overload `unscale`.
_SCHEMA = (
    "(Tensor(a!)[] params, Tensor{}[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] master_params, Tensor(f!)[] steps, Tensor[] hypers, "
    "Tensor? grad_scale, Tensor? found_inf, int[] positions, int[] hyper_places, str handle, bool grad_enabled) -> ()"
)
_COUNTS = ("completed_steps", "epoch_history")  # the keys of its group that a step changes

_handles = itertools.count()
_graph_steps: weakref.WeakValueDictionary[str, GraphStep] = weakref.WeakValueDictionary()


class GraphStep:
    """The parts of one optimizer that the operator needs. ``handle`` finds them as long as the optimizer lives."""

    def __init__(
        self, stepper: Stepper, skip_dropped: SkipDropped, in_backward: StepInBackward, groups: list[dict[str, Any]]
    ) -> None:
        """
        Args:
            groups: the optimizer's own list. torch.compile knows the name ``param_groups`` (torch 2.11 also in
                ``optimizer.__dict__``), guards every number in them, and on a GPU sets their capturable. It does
                neither under this name.
        """
        # Never given twice in a process. A string, since torch.compile makes a variable of an int once it has seen a
        # second value in the same place.
        self.handle = str(next(_handles))
        self.stepper, self.skip_dropped, self.in_backward, self.groups = stepper, skip_dropped, in_backward, groups
        _graph_steps[self.handle] = self


def step_in_graph(
    optimizer: Any, step: GraphStep, closure: Callable[[], Any] | None, eagerly: Callable[[Any], Any],
    grad_enabled: bool,
) -> Any:  # fmt: skip
    """Collects the tensors and calls the operator. This is step() as torch.compile traces it.

    A closure, DTensors, and a change of the groups in the same function cannot be traced. They are graph breaks, hence
    errors with fullgraph=True.

    Args:
        eagerly: step() without a compiler.
        grad_enabled: whether gradients were recorded outside of step().
    """
    if not torch.compiler.is_compiling():  # after torch.compile has given up on this function
        return eagerly(closure)
    if closure is not None:
        torch._dynamo.graph_break(
            msg="optimizer.step(closure) cannot be compiled: call the closure first, then the compiled optimizer.step()"
        )
        return eagerly(closure)
    groups = step.groups
    everything = [param for group in groups for param in group["params"]]
    reason = _why_not_traced(step.handle)
    if reason is not None:
        torch._dynamo.graph_break(msg=reason)
        return eagerly(closure)
    positions = [position for position, param in enumerate(everything) if param.grad is not None]
    if not positions:
        return None
    hyper_places: Any = _before_tracing(step.handle, positions)
    if hyper_places is None:
        torch._dynamo.graph_break(
            msg="the compiled function has changed optimizer.param_groups, which a step in the same graph would not "
            "see: change lr and the like outside of it, or after the step"
        )
        hyper_places = _before_tracing(step.handle, positions)
    amsgrad = [group["amsgrad"] for group in groups for _ in group["params"]]
    params = [everything[position] for position in positions]
    states = [optimizer.state[param] for param in params]
    hypers = []
    for index, place in hyper_places:  # a comprehension would be a closure of groups, and guard all that is in them
        hypers.append(_hyper(groups[index], place))
    grad_scale = getattr(optimizer, "grad_scale", None)
    overload = torch.ops.graddrop.step_.default if grad_scale is None else torch.ops.graddrop.step_.unscale
    overload(
        params,
        [param.grad for param in params],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [state["max_exp_avg_sq"] for position, state in zip(positions, states) if amsgrad[position]],
        [state["master_param"] for state in states if "master_param" in state],
        [state["step"] for state in states],
        hypers,
        grad_scale,
        getattr(optimizer, "found_inf", None),
        positions,
        [number for pair in hyper_places for number in pair],
        step.handle,
        grad_enabled,
    )
    return None


def _hyper(group: dict[str, Any], place: int) -> Any:
    return group["betas"][place - 1] if place in (1, 2) else group["lr" if place == 0 else "weight_decay"]


def _before_tracing(handle: str, positions: list[int]) -> tuple[tuple[int, int], ...] | None:
    """Makes missing state, so that the first step has the same graph as the second. torch does so for its own
    optimizers. torch.compile calls this function while it traces; its graph does not.

    Returns:
        The hyper_places, found here so that the graph does not guard those hyper-parameters that are plain numbers.
        None if the traced function has changed the groups, which the operator would see only after the graph.
    """
    owner = _graph_steps[handle].stepper.owner
    if _has_pending_change(owner.param_groups):
        return None
    masking = _graph_steps[handle].stepper.masking
    rows = [
        (param, group, record)
        for index, group in enumerate(owner.param_groups)
        for param, record in zip(group["params"], masking.records(index))
    ]
    for position in positions:
        param, group, record = rows[position]
        make_state(param, group, owner.state[param], trained_rows(param, record))
    return tuple(
        (index, place)
        for index, group in enumerate(owner.param_groups)
        for place in range(4)
        if isinstance(_hyper(group, place), torch.Tensor)
    )


def _why_not_traced(handle: str) -> str | None:
    step = _graph_steps[handle]
    everything = [param for group in step.groups for param in group["params"]]
    if any(map(is_dtensor, everything)):
        return "a step of DTensors is not compiled: it is one call already"
    if any(drops_idle_state(step.stepper.masking, index) for index in step.stepper.masking.indices()):
        return "idle_state='drop' frees and makes moments between steps, which a graph holds"
    # Only the eager step says which parameter it is. dynamo has not always come to an end with such a tensor.
    if any(param.grad is not None and param.grad.is_sparse for param in everything):
        return "a sparse gradient is refused by the step"
    return None


# Does what torch.compiler.assume_constant_result does, which would import torch._dynamo.
_before_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a mark on a function
_why_not_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _has_pending_change(groups: list[dict[str, Any]]) -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    effects = InstructionTranslator.current_tx().output.side_effects
    traced = [effects.id_to_variable.get(id(each)) for each in (groups, *groups)]
    return any(variable is not None and effects.is_modified(variable) for variable in traced)


def _step(*arguments: Any) -> None:
    *arguments, grad_enabled = arguments  # type: ignore[assignment]  # a list of them
    try:
        _step_now(*arguments)
    except BaseException:
        # Compiled code puts no `finally` around a torch.no_grad(): autograd would stay off after an error.
        torch.set_grad_enabled(grad_enabled)
        raise


@torch.no_grad()
def _step_now(
    params: list[torch.Tensor], grads: list[torch.Tensor], exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor], max_exp_avg_sqs: list[torch.Tensor], master_params: list[torch.Tensor],
    steps: list[torch.Tensor], hypers: list[torch.Tensor], grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None, positions: list[int], hyper_places: list[int], handle: str,
) -> None:  # fmt: skip
    graph_step = _graph_steps.get(handle)
    if graph_step is None or graph_step.stepper.is_orphan:
        raise RuntimeError("graddrop::step_: the optimizer that this step was compiled for is gone")
    stepper = graph_step.stepper
    owner: Any = stepper.owner
    if graph_step.groups is not owner.param_groups:
        raise RuntimeError(
            "optimizer.param_groups was set to another list, which the compiled step does not see: change the groups "
            "in it, or use add_param_group() and load_state_dict()"
        )
    graph_step.skip_dropped.check_outside("step()")
    if graph_step.skip_dropped.missing:
        raise RuntimeError(
            "a compiled step has the tensors of one pattern of dropped blocks: after skip_dropped() call "
            "optimizer.step() outside of torch.compile"
        )
    owner._opt_called = True  # as torch's lr_scheduler does in the step that it wraps
    for group in owner.param_groups:  # torch.compile sets it when a function that it compiles names param_groups
        group["capturable"] = owner.defaults["capturable"]
    everything = [(group, param) for group in owner.param_groups for param in group["params"]]
    with_amsgrad = [i for i, position in enumerate(positions) if everything[position][0]["amsgrad"]]
    with_master = [i for i, position in enumerate(positions) if has_master(params[i], everything[position][0])]
    given = {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "step": steps}
    own_params = [everything[position][1] for position in positions]
    own_states = [owner.state[param] for param in own_params]
    places = list(zip(hyper_places[::2], hyper_places[1::2]))
    own = (
        _same_objects(params, own_params)
        and all(_same_objects(given[name], [state.get(name) for state in own_states]) for name in given)
        and _same_objects(max_exp_avg_sqs, [own_states[i].get("max_exp_avg_sq") for i in with_amsgrad])
        and _same_objects(master_params, [own_states[i].get("master_param") for i in with_master])
        and _same_objects(hypers, [_hyper(owner.param_groups[index], place) for index, place in places])
    )
    target, twin = stepper, owner
    if not own:  # not with inductor: it passes the optimizer's own tensors, and the step prepared last is used again
        states = [dict(zip(given, tensors)) for tensors in zip(*given.values())]
        for i, maximum in zip(with_amsgrad, max_exp_avg_sqs):
            states[i]["max_exp_avg_sq"] = maximum
        for i, master in zip(with_master, master_params):
            states[i]["master_param"] = master
        target, twin = _twin(stepper, dict(zip(positions, params)), zip(params, states), zip(places, hypers))
    grad_at = dict(zip(positions, grads))
    target.step(
        [param for group in twin.param_groups for param in group["params"]],
        [grad_at.get(position) for position in range(len(everything))],
        grad_scale,
        found_inf,
        fresh=lambda: not any(map(bool, steps)),
        stepped=graph_step.in_backward.finish,
    )
    if not own:
        for group, stepped in zip(owner.param_groups, twin.param_groups):
            group.update((name, stepped[name]) for name in _COUNTS)
        owner.grad_norm = twin.grad_norm


@dataclass
class _Twin:
    """An Owner with everything of an optimizer but its tensors. To be free of side effects, a graph may have copied
    those and changed the copies.
    """

    param_groups: list[dict[str, Any]]
    state: defaultdict[torch.Tensor, Any]
    defaults: dict[str, Any]
    backend: str
    max_grad_norm: float | None
    norm_after_mask: bool
    grad_norm: torch.Tensor | None


def _twin(
    stepper: Stepper, param_at: dict[int, torch.Tensor], states: Iterable[tuple[torch.Tensor, dict[str, torch.Tensor]]],
    hypers: Iterable[tuple[tuple[int, int], torch.Tensor]],
) -> tuple[Stepper, Owner]:  # fmt: skip
    """Returns a Stepper for a twin of the optimizer, and the twin. Hold the twin as long as the Stepper is used, which
    refers to it weakly.
    """
    owner, position = stepper.owner, itertools.count()
    groups = [
        {**group, "params": [param_at.get(next(position), param) for param in group["params"]]}
        for group in owner.param_groups
    ]
    for (index, place), value in hypers:
        group = groups[index]
        if place in (0, 3):
            group["lr" if place == 0 else "weight_decay"] = value
        else:
            group["betas"] = tuple(value if i == place - 1 else beta for i, beta in enumerate(group["betas"]))
    twin = _Twin(
        groups, defaultdict(dict, states), owner.defaults, owner.backend, owner.max_grad_norm, owner.norm_after_mask,
        owner.grad_norm,
    )  # fmt: skip
    masking = Masking(twin, stepper.masking.policies)
    masking.buffers, masking.matches = stepper.masking.buffers.of_copies(), stepper.masking.matches
    own = Stepper(twin, masking)
    own.voided, own.warn = stepper.voided, stepper.warn
    return own, twin


def _same_objects(objects: list[Any], others: list[Any]) -> bool:
    return len(objects) == len(others) and all(map(is_, objects, others))


for _name, _grads in (("graddrop::step_", "Tensor[]"), ("graddrop::step_.unscale", "Tensor(g!)[]")):
    # Not to be captured in a CUDA graph, which would replay the numbers of one step.
    torch.library.define(_name, _SCHEMA.replace("Tensor{}[]", _grads), tags=(torch.Tag.cudagraph_unsafe,))
    torch.library.impl(_name, "CompositeExplicitAutograd", _step)
    torch.library.register_fake(_name, lambda *tensors_and_numbers: None)
