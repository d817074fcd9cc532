"""graddrop::step_: the optimizer's step as one operator, which torch.compile puts into its graph.

A graph makes constants of the Python numbers that it meets, and is compiled again when one of them changes. So it holds
only the tensors of the step and a handle: whatever else the step needs (lr, p, the epoch, the counts) the operator
asks the optimizer for when it runs, and it does there what step() does without a compiler.
"""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..groups.masking import MaskedGroups
from ..groups.param_state import has_master, make_state
from ..tensors.local import is_dtensor
from .prepared import same_objects

if TYPE_CHECKING:
    from ..optimizer import FusedGradDropAdamW

# `hypers` are those of lr, beta1 and beta2 that are tensors, `hyper_places` where they belong: the group and 0, 1 or 2,
# flat. `positions` are the places of `params` among all parameters of the optimizer; `max_exp_avg_sqs` and
# `master_params` are of those parameters that have one. With a grad_scale the gradients are written too: that is the
# overload `unscale`.
_SCHEMA = (
    "(Tensor(a!)[] params, Tensor{}[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] master_params, Tensor(f!)[] steps, Tensor[] hypers, "
    "Tensor? grad_scale, Tensor? found_inf, int[] positions, int[] hyper_places, str handle, bool grad_enabled) -> ()"
)
_COUNTS = ("completed_steps", "epoch_history")  # what a step changes in its group

_handles = itertools.count()
_optimizers: weakref.WeakValueDictionary[str, FusedGradDropAdamW] = weakref.WeakValueDictionary()


def new_handle(optimizer: FusedGradDropAdamW) -> str:
    """A name by which the operator finds the optimizer, as long as it lives; never given twice in a process.

    A string: torch.compile would take the second int that it meets in one place for a variable.
    """
    handle = str(next(_handles))
    _optimizers[handle] = optimizer
    return handle


def step_in_graph(optimizer: FusedGradDropAdamW, closure: Callable[[], Any] | None, grad_enabled: bool) -> Any:
    """step() as torch.compile traces it: collects the tensors and calls the operator. ``grad_enabled``: whether
    gradients were recorded outside of step().

    What cannot be traced (a closure, a change of the groups in the same function) is a graph break, hence with
    fullgraph=True an error.
    """
    if not torch.compiler.is_compiling():  # after torch.compile has given up on this function
        return optimizer._step_uncompiled(closure)
    if closure is not None:
        torch._dynamo.graph_break(
            msg="optimizer.step(closure) cannot be compiled: call the closure first, then the compiled optimizer.step()"
        )
        return optimizer._step_uncompiled(closure)
    # Not optimizer.param_groups: torch.compile knows that name (that of torch 2.11 in optimizer.__dict__ too), guards
    # every number in the groups, and on a GPU sets their capturable.
    groups = optimizer._own_groups
    everything = [param for group in groups for param in group["params"]]
    positions = [position for position, param in enumerate(everything) if param.grad is not None]
    if not positions:
        return None
    if any(map(is_dtensor, everything)):
        torch._dynamo.graph_break(msg="a step of DTensors is not compiled: it is one call already")
        return optimizer._step_uncompiled(closure)
    hyper_places: Any = _before_tracing(optimizer._handle, positions)
    if hyper_places is None:
        torch._dynamo.graph_break(
            msg="the compiled function has changed optimizer.param_groups, which a step in the same graph would not "
            "see: change lr and the like outside of it, or after the step"
        )
        hyper_places = _before_tracing(optimizer._handle, positions)
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
        optimizer._handle,
        grad_enabled,
    )
    return None


def _hyper(group: dict[str, Any], place: int) -> Any:
    return group["lr"] if place == 0 else group["betas"][place - 1]


def _before_tracing(handle: str, positions: list[int]) -> tuple[tuple[int, int], ...] | None:
    """Called by torch.compile while it traces, not by its graph: makes missing state, as torch does for its own
    optimizers, so that the first step is not another graph than the second.

    Returns the hyper_places, found here so that the graph has no guard on the numbers that are no tensors.
    None: the traced function has changed the groups, which the operator would see only after the graph.
    """
    optimizer = _optimizers[handle]
    if _has_pending_change(optimizer.param_groups):
        return None
    rows = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    for position in positions:
        param, group = rows[position]
        make_state(param, group, optimizer.state[param])
    return tuple(
        (index, place)
        for index, group in enumerate(optimizer.param_groups)
        for place in range(3)
        if isinstance(_hyper(group, place), torch.Tensor)
    )


# As torch.compiler.assume_constant_result, which imports torch._dynamo.
_before_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a mark on a function


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
        # Compiled code leaves a torch.no_grad() by no `finally`: autograd would stay off after an error.
        torch.set_grad_enabled(grad_enabled)
        raise


@torch.no_grad()
def _step_now(
    params: list[torch.Tensor], grads: list[torch.Tensor], exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor], max_exp_avg_sqs: list[torch.Tensor], master_params: list[torch.Tensor],
    steps: list[torch.Tensor], hypers: list[torch.Tensor], grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None, positions: list[int], hyper_places: list[int], handle: str,
) -> None:  # fmt: skip
    optimizer = _optimizers.get(handle)
    if optimizer is None:
        raise RuntimeError("graddrop::step_: the optimizer that this step was compiled for is gone")
    if optimizer._own_groups is not optimizer.param_groups:
        raise RuntimeError(
            "optimizer.param_groups was set to another list, which the compiled step does not see: change the groups "
            "in it, or use add_param_group() and load_state_dict()"
        )
    if optimizer._skip.missing:
        raise RuntimeError(
            "a compiled step has the tensors of one pattern of dropped blocks: after skip_dropped() call "
            "optimizer.step() outside of torch.compile"
        )
    # As the step that torch's lr_scheduler wraps says.
    optimizer._opt_called = True  # type: ignore[attr-defined]  # made by that scheduler
    for group in optimizer.param_groups:  # torch.compile sets it when a function that it compiles names param_groups
        group["capturable"] = optimizer.defaults["capturable"]
    everything = [(group, param) for group in optimizer.param_groups for param in group["params"]]
    with_amsgrad = [i for i, position in enumerate(positions) if everything[position][0]["amsgrad"]]
    with_master = [i for i, position in enumerate(positions) if has_master(params[i], everything[position][0])]
    given = {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "step": steps}
    own_params = [everything[position][1] for position in positions]
    own_states = [optimizer.state[param] for param in own_params]
    places = list(zip(hyper_places[::2], hyper_places[1::2]))
    own = (
        same_objects(params, own_params)
        and all(same_objects(given[name], [state.get(name) for state in own_states]) for name in given)
        and same_objects(max_exp_avg_sqs, [own_states[i].get("max_exp_avg_sq") for i in with_amsgrad])
        and same_objects(master_params, [own_states[i].get("master_param") for i in with_master])
        and same_objects(hypers, [_hyper(optimizer.param_groups[index], place) for index, place in places])
    )
    if own:  # as inductor gives them: what was prepared for the last step serves this one too
        target = optimizer
    else:
        states = [dict(zip(given, tensors)) for tensors in zip(*given.values())]
        for i, maximum in zip(with_amsgrad, max_exp_avg_sqs):
            states[i]["max_exp_avg_sq"] = maximum
        for i, master in zip(with_master, master_params):
            states[i]["master_param"] = master
        target = _twin(optimizer, dict(zip(positions, params)), zip(params, states), zip(places, hypers))
    grad_at = dict(zip(positions, grads))
    target._step_with(
        [param for group in target.param_groups for param in group["params"]],
        [grad_at.get(position) for position in range(len(everything))],
        grad_scale,
        found_inf,
        fresh=lambda: not any(map(bool, steps)),
    )
    if target is not optimizer:
        for group, stepped in zip(optimizer.param_groups, target.param_groups):
            group.update((name, stepped[name]) for name in _COUNTS)
        optimizer.grad_norm = target.grad_norm


def _twin(
    optimizer: FusedGradDropAdamW, param_at: dict[int, torch.Tensor],
    states: Iterable[tuple[torch.Tensor, dict[str, torch.Tensor]]],
    hypers: Iterable[tuple[tuple[int, int], torch.Tensor]],
) -> FusedGradDropAdamW:  # fmt: skip
    """An optimizer with everything of this one but its tensors. A graph may have copied them, to be free of side
    effects, and changed the copies on the way.
    """
    twin: FusedGradDropAdamW = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin._groups, twin._prepared = MaskedGroups(twin, optimizer._groups.policies), None
    twin._groups.flat = optimizer._groups.flat
    position = itertools.count()
    twin.param_groups = [
        {**group, "params": [param_at.get(next(position), param) for param in group["params"]]}
        for group in optimizer.param_groups
    ]
    for (index, place), value in hypers:
        group = twin.param_groups[index]
        if place == 0:
            group["lr"] = value
        else:
            group["betas"] = tuple(value if i == place - 1 else beta for i, beta in enumerate(group["betas"]))
    twin.state = defaultdict(dict, states)
    return twin


for _name, _grads in (("graddrop::step_", "Tensor[]"), ("graddrop::step_.unscale", "Tensor(g!)[]")):
    # Not to be captured in a CUDA graph, which would replay the numbers of one step.
    torch.library.define(_name, _SCHEMA.replace("Tensor{}[]", _grads), tags=(torch.Tag.cudagraph_unsafe,))
    torch.library.impl(_name, "CompositeExplicitAutograd", _step)
    torch.library.register_fake(_name, lambda *tensors_and_numbers: None)
