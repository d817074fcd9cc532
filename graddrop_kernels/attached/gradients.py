"""GradientBatches: the gradients that a mask of single elements acts on, sorted into batches of the backends."""

import os
from collections.abc import Hashable
from operator import ge
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import backends
from ..backends import Backend
from ..backends.batch import Hyper, TensorBatch
from ..backends.tensor_table import tensor_table
from ..groups.checks import check_grad, check_named, check_named_params, check_param, check_written_grads
from ..groups.masking import Masking
from ..groups.spans import spans_of
from ..masks.plan import MaskPlan
from ..tensors.guards import same_facts
from ..tensors.local import local
from ..tensors.memory import as_real, check_memory, is_marked, laid_out, lies_as, needed_bytes, storage_bytes

Place = tuple[int, int]  # of a parameter: its group, and its position there


class _Row(NamedTuple):
    """A gradient, or one span of it."""

    gradient: int  # among all of the step
    span: slice | None  # of its flat elements; None: all
    key: int
    layout: Any
    words: torch.Tensor | None
    plan_of: tuple[int, Hashable]
    place: Place


class _Batch:
    """The rows of one backend, device and dtype."""

    def __init__(self, backend: Backend, grad: torch.Tensor, rows: list[_Row], grads: list[torch.Tensor]) -> None:
        self.backend, self.rows = backend, rows
        self.plans = list(dict.fromkeys(row.plan_of for row in rows))
        self.steps: list[int] = [0] * len(rows)
        self.counts = torch.zeros(len(rows), dtype=torch.float32, device=grad.device)
        places = {plan_of: index for index, plan_of in enumerate(self.plans)}
        none: list[Any] = [None] * len(rows)
        self.batch = TensorBatch(
            grad.device, grad.dtype, grad.dtype, steps=list(self.counts.unbind()), keys=[row.key for row in rows],
            layouts=[row.layout for row in rows], mask_words=[row.words for row in rows],
            hyper_rows=[places[row.plan_of] for row in rows],
        )  # fmt: skip
        if backend.by_address:
            # The tables name no tensor but the gradients, whose addresses are new in every step, and the counts.
            self.batch.params = [_span(grads[row.gradient], row.span) for row in rows]
            self.batch.exp_avgs, self.batch.exp_avg_sqs, self.batch.max_exp_avg_sqs = none, none, none
            table = tensor_table(self.batch)
            table["param"] = 0
            self.batch.rows = table
            self.batch.params, self.batch.exp_avgs, self.batch.exp_avg_sqs = [], [], []
            starts = [row.span.start if row.span else 0 for row in rows]
            self.batch.grad_offsets = np.array(starts, np.uint64) * grad.dtype.itemsize

    def mask_(self, grads: list[torch.Tensor], plans: dict[tuple[int, Hashable], MaskPlan], steps: list[int]) -> None:
        batch = self.batch
        if steps != self.steps:
            self.counts.copy_(torch.tensor(steps, dtype=torch.float32, device="cpu"))
            self.steps = steps
        batch.version += 1
        batch.hypers = [_hyper(plans[plan_of]) for plan_of in self.plans]
        batch.grads = [grads[row.gradient] for row in self.rows]
        if not self.backend.by_address:
            batch.grads = [as_real(_span(grad, row.span)) for grad, row in zip(batch.grads, self.rows)]
        try:
            self.backend.mask_gradients_(batch)
        finally:
            batch.grads = []

    def count(self) -> None:
        """Expects the steps after these in the next call, so that nothing is copied to a device."""
        self.counts.add_(1)
        self.steps = [steps + 1 for steps in self.steps]


class GradientBatches:
    """Rows for the gradients of some parameters. Good for the next step as long as their facts are the same."""

    def __init__(
        self, masking: Masking, backend: str, places: list[Place], params: list[torch.Tensor],
        grads: list[torch.Tensor], made_for: object,
    ) -> None:  # fmt: skip
        """
        Args:
            places: of the parameters that have these gradients.
            grads: local tensors.

        Raises before anything has changed.
        """
        self.places, self.made_for, self._environment = places, made_for, os.environ.get("GRADDROP_BACKEND")
        self._param_ids = list(map(id, params))  # a wrapper may put shards of the same shape in their place
        rows: dict[tuple[Any, ...], list[_Row]] = {}
        chosen: dict[tuple[Any, ...], tuple[Backend, torch.Tensor]] = {}
        self._misfits: list[int] = []
        if any(policy is not None and policy.named for policy in map(masking.policy, masking.indices())):
            check_named_params(masking)
        for number, ((index, position), param, grad) in enumerate(zip(places, params, grads)):
            record, tensor = masking.records(index)[position], local(param)
            masking.check_flat(record, param)
            check_param(record.name, param)
            check_grad(record.name, tensor, grad)
            check_memory(f"the gradient of {record.name!r}", grad)
            check_named(masking[index], param, record)
            choice = backends.select(backend, grad.device, grad.dtype, grad.dtype)
            spans = spans_of(param, record)
            whole = all(span.numel == grad.numel() for span in spans)
            if is_marked(grad) or not (lies_as(grad, None) or (whole and not choice.by_address)):
                self._misfits.append(number)
            key = grad.device, grad.dtype, choice.name
            chosen[key] = choice, grad
            for span, words in zip(spans, masking.words(index, param, spans)):
                elements = None if span.numel == grad.numel() else slice(span.start, span.start + span.numel)
                row = _Row(number, elements, span.key, span.layout, words, (index, span.unit), (index, position))
                rows.setdefault(key, []).append(row)
        check_written_grads(masking, params, grads)
        usable = self._usable(grads)
        self._batches = [_Batch(*chosen[key], each, usable) for key, each in rows.items()]
        self.plans = {plan_of for each in self._batches for plan_of in each.plans}
        self._same_facts, self._grad_bytes = same_facts(*grads), list(map(needed_bytes, grads))

    def holds(
        self, places: list[Place], params: list[torch.Tensor], grads: list[torch.Tensor], made_for: object
    ) -> bool:  # fmt: skip
        """Whether rows made now would be the same."""
        return (
            places == self.places
            and list(map(id, params)) == self._param_ids
            and made_for == self.made_for
            and os.environ.get("GRADDROP_BACKEND") == self._environment
            and self._same_facts(*grads)
            and all(map(ge, storage_bytes(grads), self._grad_bytes))
        )

    def mask_(
        self, grads: list[torch.Tensor], plans: dict[tuple[int, Hashable], MaskPlan], steps: list[list[int]]
    ) -> None:
        """Masks the gradients in place. ``steps``: completed ones, per group and position."""
        usable = self._usable(grads)
        for each in self._batches:
            each.mask_(usable, plans, [steps[row.place[0]][row.place[1]] for row in each.rows])
        for grad, used in zip(grads, usable):
            if used is not grad:
                grad.copy_(used)

    def count(self) -> None:
        """Counts the step of the gradients that were masked."""
        for each in self._batches:
            each.count()

    def _usable(self, grads: list[torch.Tensor]) -> list[torch.Tensor]:
        """The gradients, or contiguous copies of those that the backends cannot take as they lie."""
        grads = list(grads)
        for number in self._misfits:
            grads[number] = laid_out(grads[number], None)
        return grads


def _hyper(plan: MaskPlan) -> Hyper:
    """A row of hyper-parameters of which only the plan matters."""
    return Hyper(0.0, 0.0, 0.0, 0.0, 0.0, amsgrad=False, maximize=False, plan=plan)


def _span(tensor: torch.Tensor, span: slice | None) -> torch.Tensor:
    return tensor if span is None else tensor.view(-1)[span]
