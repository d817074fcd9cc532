"""Makes a PreparedStep from an optimizer's parameters and gradients. Runs every check before it changes anything, then
makes missing state and masks, then the rows.
"""

import os
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from .. import backends
from ..backends import Backend
from ..groups.checks import check_named_params, check_row
from ..groups.masking import Masking
from ..groups.owner import Owner
from ..groups.param_state import has_master, lay_out_state, make_state, mode, stochastic
from ..groups.records import ParamRecord
from ..groups.spans import spans_of, trained_rows
from ..masks.memory_order import MemoryOrder
from ..masks.row_block import RowBlock
from ..policies import LEFT_OUT
from ..tensors.local import any_nonzero, local, local_tensors, several_processes, sharded_over
from ..tensors.memory import is_fake, is_marked, lies_as
from .prepared import Member, PreparedStep, Row
from .warn_once import WarnOnce


def prepared_for(owner: Owner, masking: Masking) -> tuple[Any, ...]:
    """The options and the environment variable that a prepared step depends on."""
    clips = owner.max_grad_norm is not None, owner.max_grad_norm is not None and owner.norm_after_mask
    return *clips, backend_name(owner), os.environ.get("GRADDROP_BACKEND"), masking.facts()


def backend_name(owner: Owner) -> str:
    """The backend asked for. With differentiable=True the reference, since only it records a step for autograd."""
    return "reference" if owner.defaults["differentiable"] else owner.backend


def prepare(
    owner: Owner, masking: Masking, warn: WarnOnce, there: list[int], params: list[torch.Tensor],
    grads: list[torch.Tensor], fresh: Callable[[], bool] | None, made_for: object, before: PreparedStep | None,
    free: Callable[[], None] = lambda: None,
) -> PreparedStep | None:  # fmt: skip
    """Checks the parameters that have gradients, then makes missing state and masks. Does neither for those that the
    step ``before`` has prepared and that have not changed since.

    Args:
        there, params: the parameters that have gradients, and their positions among all of the step.
        grads: local tensors, see tensors.local.local_grads.
        fresh: whether there was no step before. None if the step is of one parameter, not of all groups.
        made_for: prepared_for() of now.
        free: frees state that is no longer needed. Called after the checks, before state is made.

    Returns:
        None if the call only made the optimizer create its state, as torch.distributed.checkpoint and FakeTensorMode
        do, and must not count as a step.

    Raises before anything has changed.
    """
    states, name = owner.state, backend_name(owner)
    members = {} if before is None else _still_good(before, there, params, grads, states, made_for)
    missing = [each for each in zip(there, params, grads) if each[0] not in members]
    found = list(_found(masking, missing, params_of_all=fresh is not None))
    for new in found:
        masking.check_flat(new.record, new.param)
    policies = (masking.policy(new.index) for new in found)
    if any(policy is not None and policy.named for policy in policies):
        check_named_params(masking)
    for new in found:
        check_row(owner, masking, new.group, new.param, new.record, new.grad)
    warn_of_position_names(masking, warn)
    chosen = [backends.select(name, *mode(new.param, new.group, states.get(new.param, {}))) for new in found]
    probe = fresh is not None and _is_state_probe(owner, params, grads, fresh)
    warn_of_unknown_epochs(masking, warn, {new.index for new in found})
    free()
    for new in found:
        make_state(new.param, new.group, states[new.param], trained_rows(new.param, new.record))
    if probe or any(is_fake(local(new.param)) for new in found):
        return None  # under FakeTensorMode the state is all that a step would have left in memory
    lost = before.lost if before is not None else []
    for new, backend in zip(found, chosen):
        members[new.position] = _member(owner, masking, new, backend, lost)
    lost.clear()  # those that are left have lost nothing
    kept = states if fresh is not None else {param: states[param] for param in params}
    return PreparedStep(dict(sorted(members.items())), there, params, kept, made_for, lost)


class _Found(NamedTuple):
    """A parameter to be prepared."""

    position: int  # among all parameters
    index: int  # type: ignore[assignment]  # of its group, not tuple.index
    group: dict[str, Any]
    param: torch.Tensor
    record: ParamRecord
    grad: torch.Tensor


def _found(
    masking: Masking, missing: list[tuple[int, torch.Tensor, torch.Tensor]], params_of_all: bool
) -> Iterator[_Found]:
    """The parameters of these (position, parameter, gradient). ``params_of_all``: positions are among the parameters
    of all groups, in order.
    """
    starts = list(accumulate((len(group["params"]) for group in masking.groups), initial=0)) if params_of_all else []
    for position, param, grad in missing:
        if params_of_all:
            index = bisect(starts, position) - 1
            place = position - starts[index]
        else:
            index, place = masking.find(param)
        record = masking.records(index)[place]
        yield _Found(position, index, masking[index], param, record, grad)


def _still_good(
    before: PreparedStep, there: list[int], params: list[torch.Tensor], grads: list[torch.Tensor],
    states: Mapping[Any, Any], made_for: object,
) -> dict[int, Member]:  # fmt: skip
    """What was prepared before and can be used again. A parameter without a gradient is looked at when it has one."""
    if before.made_for != made_for:
        return {}
    known = {each: (param, grad) for each, param, grad in zip(there, params, grads) if each in before.members}
    params, grads = [param for param, _ in known.values()], [grad for _, grad in known.values()]
    if before.holds(list(known), params, local_tensors(params), grads, states, made_for):  # all at once: others are new
        return dict(before.members)
    good = {}
    for position, member in before.members.items():
        if position not in known:
            holds = member.is_whole
        else:
            param, grad = known[position]
            holds = member.holds({**states.get(param, {}), "param": local(param)}, grad)
        if holds:
            good[position] = member
    return good


def _member(owner: Owner, masking: Masking, new: _Found, backend: Backend, lost: list[object]) -> Member:
    """Makes the rows of a parameter that has been checked."""
    group, param, state, tensor = new.group, new.param, owner.state[new.param], local(new.param)
    policy, master = masking.policy(new.index), has_master(param, group)
    rounding = stochastic(param, group, state["exp_avg"].dtype)
    # Rows that are not trained are read only where their gradients are a part of the norm.
    spans = spans_of(param, new.record, left_out=owner.max_grad_norm is not None and not owner.norm_after_mask)
    is_whole = len(spans) == 1 and spans[0].layout == RowBlock.whole(tensor.numel())
    draws = "numbers" if rounding else policy.draws if policy is not None else None
    order = _order(tensor, backend, draws) if is_whole else None
    stride = None if order is None else tensor.stride()
    if backend.by_address and (order is not None or tensor.is_contiguous()):
        lay_out_state(state, stride)
    names = ["step", "exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * group["amsgrad"], *["master_param"] * master]
    tensors = {"param": tensor, **{name: state[name] for name in names}}
    fits: Callable[[torch.Tensor], bool] = partial(lies_as, stride=stride)
    if not backend.by_address and all(span.numel == tensor.numel() for span in spans):
        fits = lambda tensor: not is_marked(tensor)
    dtypes = torch.float32 if master else tensor.dtype, state["exp_avg"].dtype, new.grad.dtype
    facts = (tensor.device, *dtypes, rounding, sharded_over(param) if owner.max_grad_norm is not None else ())
    staged = frozenset(name for name, each in tensors.items() if name != "step" and not fits(local(each)))
    own_steps = state["step"].repeat(len(spans) - 1)  # of all spans but the first, which counts in the parameter's
    rows = []
    for number, (span, words) in enumerate(zip(spans, masking.words(new.index, param, spans, order))):
        elements = None if span.numel == tensor.numel() else slice(span.start, span.start + span.numel)
        of_state = None if elements is None and span.unit != LEFT_OUT else span.state
        rows.append(Row(
            facts, span.key, span.layout, order, (new.index, span.unit), backend, words, elements, of_state,
            frozenset(tensors), staged, own_steps[number - 1] if number else None,
        ))  # fmt: skip
    return Member(tensors, new.grad, fits(new.grad), stride, rows, own_steps if len(spans) > 1 else None, lost)


def _order(tensor: torch.Tensor, backend: Backend, draws: str | None) -> MemoryOrder | None:
    """The order in which a backend can step a tensor without a contiguous copy; None: it is contiguous, or needs one.

    Args:
        draws: as Policy.draws.
    """
    if not backend.by_address or tensor.is_contiguous() or is_marked(tensor):
        return None
    order = MemoryOrder.of(tuple(tensor.shape), tensor.stride())
    if order is None or draws is None:
        return order
    return order if draws == "bits" and backend.draws_in_order and order.transposed() else None


def _is_state_probe(
    owner: Owner, params: list[torch.Tensor], grads: list[torch.Tensor], fresh: Callable[[], bool]
) -> bool:
    """Whether the call only asks for the state. torch.distributed.checkpoint makes a fresh optimizer create its state
    by a step with lr 0 and zero gradients, which must not count as a step. The user's hook may have made state before.
    """
    return (
        fresh()
        and bool(grads)
        and all(float(group["lr"]) == 0 for group in owner.param_groups)
        and not any(bool(owner.state.get(param, {}).get("step", 0)) for param in params)
        and not any_nonzero([param for group in owner.param_groups for param in group["params"]], grads)
    )


def warn_of_unknown_epochs(masking: Masking, warn: WarnOnce, indices: set[int]) -> None:
    """Warns of policies of these groups that follow epochs, where nothing tells them the epoch."""
    for index in sorted(indices):
        policy = masking.policy(index)
        if policy is not None and policy.follows_epochs and not masking[index]["epoch_was_set"]:
            warn(
                f"{type(policy).__name__} follows epochs, but set_epoch(epoch) was not called: "
                "call it at the start of every epoch, 0 first"
            )


def warn_of_position_names(masking: Masking, warn: WarnOnce) -> None:
    """Warns of masks that are drawn by places in the optimizer, with several processes."""
    if several_processes() and any(
        group["mask"] is not None and "param_names" not in group and param not in masking.buffers.pieces
        for group in masking.groups
        for param in group["params"]
    ):
        warn(
            "masks are keyed by each parameter's place in the optimizer, as it was given no names; "
            "pass model.named_parameters()"
        )
