"""From an optimizer's parameters and gradients to a PreparedStep: every check before anything is changed, then what is
missing of state and masks, then the rows.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .. import backends
from ..groups.checks import check_flat, check_grad, check_param
from ..groups.param_state import check_state, has_master, is_stochastic, make_state, mode
from ..groups.records import ParamRecord, spans_of
from ..tensors.local import any_nonzero, local, local_tensors, several_processes, sharded_over
from ..tensors.memory import check_memory
from .prepared import PreparedStep, Row

if TYPE_CHECKING:
    from ..optimizer import FusedGradDropAdamW


def prepare(
    optimizer: "FusedGradDropAdamW", params: list[torch.Tensor], grads: list[torch.Tensor | None],
    fresh: Callable[[], bool] | None,
) -> PreparedStep | None:  # fmt: skip
    """Checks the parameters that have gradients, then makes missing state and masks.

    Args:
        grads: local tensors, see shards.local_grads.
        fresh: whether there was no step before; None: these are not all parameters of the step.

    Returns:
        None: this was a question for the state, not a step.

    Raises before anything has changed.
    """
    groups, states = optimizer._groups, optimizer.state
    given = {id(param): grad for param, grad in zip(params, grads) if grad is not None}
    found = [
        (index, group, param, record)
        for index, group in enumerate(optimizer.param_groups)
        for param, record in zip(group["params"], groups.records(index))
        if id(param) in given
    ]
    for index, _, param, record in found:
        _check(optimizer, param, record, given[id(param)])
        groups.check_named(index, param, record)
    groups.check_fixed_masks()
    _warn_of_position_names(optimizer)
    for _, group, param, _ in found:
        backends.select(optimizer._backend_name(), *mode(param, group, states.get(param, {})))
    probe = fresh is not None and _is_state_probe(optimizer, params, grads, fresh)
    _warn_of_unknown_epochs(optimizer, {index for index, _, _, _ in found})
    for _, group, param, _ in found:
        make_state(param, group, states[param])
    if probe:
        return None
    rows = []
    for index, group, param, record in found:
        tensor, spans = local(param), spans_of(param, record)
        over = sharded_over(param) if optimizer.max_grad_norm is not None else ()
        for span, words in zip(spans, groups.mask_words(index, param, record)):
            elements = None if span.numel == tensor.numel() else slice(span.start, span.start + span.numel)
            row = Row(
                tensor, given[id(param)], states[param], group["amsgrad"], span.key, span.layout, (index, span.unit),
                words, has_master(param, group), is_stochastic(param, group), elements, over,
            )  # fmt: skip
            rows.append(row)
    kept = states if fresh is not None else {param: states[param] for param in params}
    return PreparedStep(local_tensors(params), rows, kept, optimizer._facts())


def _check(optimizer: "FusedGradDropAdamW", param: torch.Tensor, record: ParamRecord, grad: torch.Tensor) -> None:
    tensor = local(param)
    check_param(record.name, param)
    check_grad(record.name, tensor, grad)
    state = {key: local(value) for key, value in optimizer.state.get(param, {}).items()}
    check_state(record.name, tensor, state)
    check_memory(f"parameter {record.name!r}", tensor)
    check_memory(f"the gradient of {record.name!r}", grad)
    check_flat(optimizer, record, param)


def _is_state_probe(
    optimizer: "FusedGradDropAdamW", params: list[torch.Tensor], grads: list[torch.Tensor | None],
    fresh: Callable[[], bool],
) -> bool:  # fmt: skip
    """torch.distributed.checkpoint asks a fresh optimizer for its state by a step with lr 0 and zero gradients: that
    must not count as one.
    """
    return (
        fresh()
        and any(grad is not None for grad in grads)
        and all(float(group["lr"]) == 0 for group in optimizer.param_groups)
        and not any_nonzero(params, grads)
    )


def _warn_of_unknown_epochs(optimizer: "FusedGradDropAdamW", indices: set[int]) -> None:
    for index in sorted(indices):
        policy = optimizer._groups.policy(index)
        if policy is not None and policy.follows_epochs and not optimizer.param_groups[index]["epoch_was_set"]:
            optimizer._warn_once(
                f"{type(policy).__name__} follows epochs, but set_epoch(epoch) was not called: "
                "call it at the start of every epoch, 0 first"
            )


def _warn_of_position_names(optimizer: "FusedGradDropAdamW") -> None:
    if several_processes() and any(
        group["mask"] is not None and "param_names" not in group and param not in optimizer._groups.flat
        for group in optimizer.param_groups
        for param in group["params"]
    ):
        optimizer._warn_once(
            "masks are keyed by each parameter's place in the optimizer, as it was given no names; "
            "pass model.named_parameters()"
        )
