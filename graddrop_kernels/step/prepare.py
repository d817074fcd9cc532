"""Makes a PreparedStep from an optimizer's parameters and gradients. Runs every check before it changes anything, then
makes missing state and masks, then the rows.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

from .. import backends
from ..groups.checks import check_fixed_masks, check_row
from ..groups.masking import Masking
from ..groups.owner import Owner
from ..groups.param_state import has_master, is_stochastic, make_state, mode
from ..groups.records import spans_of
from ..tensors.local import any_nonzero, local, several_processes, sharded_over
from ..tensors.memory import is_fake
from .prepared import PreparedStep, Row
from .warn_once import WarnOnce


def prepared_for(owner: Owner, masking: Masking) -> tuple[Any, ...]:
    """The options and the environment variable that a prepared step depends on."""
    return owner.max_grad_norm is not None, backend_name(owner), os.environ.get("GRADDROP_BACKEND"), masking.facts()


def backend_name(owner: Owner) -> str:
    """The backend asked for. With differentiable=True the reference, since only it records a step for autograd."""
    return "reference" if owner.defaults["differentiable"] else owner.backend


def prepare(
    owner: Owner, masking: Masking, warn: WarnOnce, params: list[torch.Tensor], grads: list[torch.Tensor | None],
    fresh: Callable[[], bool] | None,
) -> PreparedStep | None:  # fmt: skip
    """Checks the parameters that have gradients, then makes missing state and masks.

    Args:
        grads: local tensors, see tensors.local.local_grads.
        fresh: whether there was no step before. None if ``params`` are not all parameters of the step.

    Returns:
        None if the call only made the optimizer create its state, as torch.distributed.checkpoint and FakeTensorMode
        do, and must not count as a step.

    Raises before anything has changed.
    """
    states, name = owner.state, backend_name(owner)
    given = {id(param): grad for param, grad in zip(params, grads) if grad is not None}
    found = [
        (index, group, param, record)
        for index, group in enumerate(owner.param_groups)
        for param, record in zip(group["params"], masking.records(index))
        if id(param) in given
    ]
    for _, group, param, record in found:
        check_row(owner, masking, group, param, record, given[id(param)])
    check_fixed_masks(masking)
    _warn_of_position_names(masking, warn)
    chosen = [backends.select(name, *mode(param, group, states.get(param, {}))) for _, group, param, _ in found]
    probe = fresh is not None and _is_state_probe(owner, params, grads, fresh)
    _warn_of_unknown_epochs(masking, warn, {index for index, _, _, _ in found})
    for _, group, param, _ in found:
        make_state(param, group, states[param])
    if probe or any(is_fake(local(param)) for _, _, param, _ in found):
        return None  # under FakeTensorMode the state is all that a step would have left in memory
    rows = []
    for (index, group, param, record), backend in zip(found, chosen):
        tensor, spans = local(param), spans_of(param, record)
        over = sharded_over(param) if owner.max_grad_norm is not None else ()
        for span, words in zip(spans, masking.words(index, param, record)):
            elements = None if span.numel == tensor.numel() else slice(span.start, span.start + span.numel)
            row = Row(
                tensor, given[id(param)], states[param], group["amsgrad"], span.key, span.layout, (index, span.unit),
                backend, words, has_master(param, group), is_stochastic(param, group), elements, over,
            )  # fmt: skip
            rows.append(row)
    stepped = [param for param in params if id(param) in given]
    kept = states if fresh is not None else {param: states[param] for param in params}
    return PreparedStep(stepped, grads, rows, kept, prepared_for(owner, masking))


def _is_state_probe(
    owner: Owner, params: list[torch.Tensor], grads: list[torch.Tensor | None], fresh: Callable[[], bool]
) -> bool:
    """Whether the call only asks for the state. torch.distributed.checkpoint makes a fresh optimizer create its state
    by a step with lr 0 and zero gradients, which must not count as a step.
    """
    return (
        fresh()
        and any(grad is not None for grad in grads)
        and all(float(group["lr"]) == 0 for group in owner.param_groups)
        and not any_nonzero(params, grads)
    )


def _warn_of_unknown_epochs(masking: Masking, warn: WarnOnce, indices: set[int]) -> None:
    for index in sorted(indices):
        policy = masking.policy(index)
        if policy is not None and policy.follows_epochs and not masking[index]["epoch_was_set"]:
            warn(
                f"{type(policy).__name__} follows epochs, but set_epoch(epoch) was not called: "
                "call it at the start of every epoch, 0 first"
            )


def _warn_of_position_names(masking: Masking, warn: WarnOnce) -> None:
    if several_processes() and any(
        group["mask"] is not None and "param_names" not in group and param not in masking.buffers.pieces
        for group in masking.groups
        for param in group["params"]
    ):
        warn(
            "masks are keyed by each parameter's place in the optimizer, as it was given no names; "
            "pass model.named_parameters()"
        )
