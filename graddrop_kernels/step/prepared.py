"""TensorBatch: the tensors that one backend call updates,
with everything the call needs beside them in plain numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch

from ..backends.batch import TensorBatch
from ..masks.row_block import RowBlock
from ..tensors.guards import same_facts
from ..tensors.local import local, local_tensors
from ..tensors.memory import as_real, is_plain, plain_copy, turns_of

# map() with these runs through 400 tensors in a third of the time of a list comprehension.
grad_of = attrgetter("grad")
_address = torch.Tensor.data_ptr


@dataclass(slots=True)
class Row:
    """One parameter with a gradient, as it lies in this process; or one span of it.

    ``state`` holds step (0-d float32), exp_avg, exp_avg_sq, with amsgrad max_exp_avg_sq, with ``master`` master_param.
    """

    param: torch.Tensor
    grad: torch.Tensor
    state: dict[str, Any]
    amsgrad: bool
    key: int  # 64-bit Philox key
    layout: RowBlock  # where the elements lie in the whole parameter
    plan_of: tuple[Any, ...]  # (group index, unit): rows of one pair share a Hyper
    mask_words: torch.Tensor | None = None  # int32 bit-planes of the buckets, or the bits of a fixed mask
    master: bool = False  # master_param is stepped, and the parameter is what it rounds to
    stochastic: bool = False  # the bfloat16 parameter is rounded up or down at random
    span: slice | None = None  # of the flat elements; None: all
    sharded_over: tuple[Any, ...] = ()  # process groups whose processes hold the other parts


class PreparedStep:
    """The batches of a step, good for the next one as long as every tensor is where it was.

    Sorting 400 parameters into batches takes a millisecond of Python, asking each tensor for its address a tenth of it.
    All tensors are held, so that no other can come by the place of one; a tensor's own memory may still be exchanged
    (``param.data = ...``), so addresses are compared too.

    An element's index is its place in contiguous order, whatever the strides.
    """

    def __init__(
        self, params: list[torch.Tensor], rows: list[Row], state: Mapping[torch.Tensor, Any], made_for: object
    ) -> None:
        self.made_for = made_for
        self.params = params
        stepped = {id(row.param) for row in rows}
        self.absent = [id(param) not in stepped for param in params]
        states = {id(row.state): row for row in rows}.values()  # one row of each parameter
        self.states = [row.state for row in states]
        self.amsgrad_states = [row.state for row in states if row.amsgrad]
        self.master_states = [row.state for row in states if row.master]
        self.all_states = list(state.values())
        self.copied_steps: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.batches = self._sort(rows)
        self.group_indices = {index for batch in self.batches for index, _ in batch.plans_of}
        self.same_params = same_facts(params)
        grads = [row.grad for row in states]
        self.same_grads = same_facts(grads)
        self.grads_are_contiguous = all(map(is_plain, grads))
        self.has_spans = any(row.span for row in rows)
        state_tensors: Any = self._state_tensors()  # a list: nothing is missing yet
        self.state_tensors: list[torch.Tensor] = state_tensors
        self.addresses = self._addresses(params)

    def holds(
        self, params: list[torch.Tensor], grads: list[torch.Tensor | None], state: Mapping[torch.Tensor, Any],
        made_for: object,
    ) -> bool:  # fmt: skip
        """Whether ``rows`` made now would be the same but for the gradients' addresses."""
        return (
            self.made_for == made_for
            and [grad is None for grad in grads] == self.absent
            and same_objects(params, self.params)
            and same_objects(list(state.values()), self.all_states)
            and self.same_params(params)
            and self.same_grads(present(grads))
            and same_objects(self._state_tensors(), self.state_tensors)
            and self._addresses(params) == self.addresses
        )

    def set_grads(self, grads: list[torch.Tensor | None]) -> None:
        """Hands the gradients of this step to the batches."""
        self.grads = present(grads)
        self.used_grads = self.grads
        if not self.grads_are_contiguous:
            self.used_grads = [grad if is_plain(grad) else plain_copy(grad) for grad in self.grads]
        for batch in self.batches:
            batch.grads = self.used_grads
            if self.has_spans:
                batch.grads = [_span(self.used_grads[i], span) for i, span in zip(batch.members, batch.spans)]
            elif len(self.batches) > 1:
                batch.grads = [self.used_grads[i] for i in batch.members]
            if batch.param_dtype.is_complex:
                batch.grads = list(map(as_real, batch.grads))
        for step, copy in self.copied_steps:
            copy.copy_(step)

    def write_grads_back(self) -> None:
        """Copies back the gradients of which the step had copies."""
        for grad, used in zip(self.grads, self.used_grads):
            if used is not grad:
                grad.copy_(used)

    def forget_grads(self) -> None:
        """Or they would outlive zero_grad(), beside those of the next backward pass."""
        self.grads = self.used_grads = []
        for batch in self.batches:
            batch.grads = []

    def _addresses(self, params: list[torch.Tensor]) -> list[int]:
        """Of the parameters and of what is kept for them."""
        steps = len(self.states)  # these come first, and are no DTensors
        moments = local_tensors(self.state_tensors[steps:])
        return list(map(_address, chain(params, self.state_tensors[:steps], moments)))

    def _state_tensors(self) -> list[torch.Tensor] | None:
        """The steps and moments of all rows; None where one is gone."""
        try:
            kept = [map(itemgetter(name), self.states) for name in ("step", "exp_avg", "exp_avg_sq")]
            kept.append(map(itemgetter("max_exp_avg_sq"), self.amsgrad_states))
            kept.append(map(itemgetter("master_param"), self.master_states))
            return list(chain(*kept))
        except KeyError:
            return None

    def _sort(self, rows: list[Row]) -> list[TensorBatch]:
        batches: dict[tuple[Any, ...], TensorBatch] = {}
        turns = turns_of([_span(row.param, row.span) if is_plain(row.param) else row.param for row in rows])
        members: dict[int, int] = {}
        for position, row in enumerate(rows):
            first = id(row.state) not in members
            member = members.setdefault(id(row.state), len(members))
            state = {key: local(value) for key, value in row.state.items()}
            stepped = state["master_param"] if row.master else row.param
            facts = (stepped.device, stepped.dtype, state["exp_avg"].dtype)
            key = (*facts, row.grad.dtype, row.stochastic, row.sharded_over, turns.get(position, 0))
            if key not in batches:
                batches[key] = TensorBatch(
                    *facts, grad_dtype=row.grad.dtype, stochastic=row.stochastic, sharded_over=row.sharded_over
                )
            batch = batches[key]
            if row.plan_of not in batch.plans_of:
                batch.plans_of.append(row.plan_of)
            batch.hyper_rows.append(batch.plans_of.index(row.plan_of))
            batch.members.append(member)
            batch.spans.append(row.span)
            batch.params.append(_contiguous(batch, stepped, row.span))
            if row.master:
                batch.copies.append(_contiguous(batch, row.param, row.span))
            batch.exp_avgs.append(_contiguous(batch, state["exp_avg"], row.span))
            batch.exp_avg_sqs.append(_contiguous(batch, state["exp_avg_sq"], row.span))
            batch.max_exp_avg_sqs.append(
                _contiguous(batch, state["max_exp_avg_sq"], row.span) if row.amsgrad else None
            )
            step = state["step"]
            if not first:  # a step is counted by one of the spans of a parameter; the others count copies
                self.copied_steps.append((state["step"], step := step.clone()))
            batch.steps.append(step)
            batch.keys.append(row.key)
            batch.layouts.append(row.layout)
            batch.mask_words.append(row.mask_words)
        return list(batches.values())


def _contiguous(batch: TensorBatch, tensor: torch.Tensor, span: slice | None) -> torch.Tensor:
    """A tensor as the kernels take it; one that is not contiguous is staged, once a batch."""
    if not is_plain(tensor):
        copies = (copy for staged, copy in batch.staged if staged is tensor)
        copy = next(copies, None) if span else None
        if copy is None:
            copy = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            batch.staged.append((tensor, copy))
        tensor = copy
    return as_real(_span(tensor, span))


def _span(tensor: torch.Tensor, span: slice | None) -> torch.Tensor:
    """Those flat elements of a contiguous tensor."""
    return tensor if span is None else tensor.detach().view(-1)[span]


def same_objects(objects: list[Any] | None, others: list[Any]) -> bool:
    return objects is not None and len(objects) == len(others) and all(map(is_, objects, others))


def present(grads: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """The gradients that are there."""
    return [grad for grad in grads if grad is not None]
