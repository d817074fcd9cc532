"""TensorBatch: the tensors that one backend call updates,
with everything the call needs beside them in plain numbers.
"""

from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_, itemgetter

import torch

from .layout import RowBlock
from .parameters import reach
from .plan import MaskPlan
from .tensor_facts import same_facts

# map() with these runs through 400 tensors in a third of the time of a list comprehension.
grad_of = attrgetter("grad")
_address = torch.Tensor.data_ptr


@dataclass(frozen=True)
class Hyper:
    """One row of hyper-parameters: what the parameters of one group under one plan share."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    plan: MaskPlan


@dataclass(slots=True)
class Row:
    """One parameter with a gradient.

    ``state`` holds step (0-d float32), exp_avg, exp_avg_sq and with amsgrad max_exp_avg_sq.
    """

    param: torch.Tensor
    grad: torch.Tensor
    state: dict
    amsgrad: bool
    key: int  # 64-bit Philox key
    layout: RowBlock  # where the elements lie in the whole parameter
    plan_of: tuple  # (group index, unit): rows of one pair share a Hyper
    mask_words: torch.Tensor | None = None  # int32 bit-planes of the buckets, or the bits of a fixed mask


@dataclass
class TensorBatch:
    """Parallel lists, one entry a parameter: contiguous, on one device, with the same dtypes.

    It knows nothing of groups or policies. ``steps`` are advanced by the backend call; ``max_exp_avg_sqs`` has None
    without amsgrad; ``hyper_rows`` are indices into ``hypers``, which, like ``grads``, is filled anew for every step.
    Everything else stays as long as no tensor moves, so that a backend may keep what it derives from it in ``table``.
    """

    device: torch.device
    param_dtype: torch.dtype
    moment_dtype: torch.dtype
    params: list[torch.Tensor] = field(default_factory=list)
    exp_avgs: list[torch.Tensor] = field(default_factory=list)
    exp_avg_sqs: list[torch.Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[torch.Tensor | None] = field(default_factory=list)
    steps: list[torch.Tensor] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    layouts: list[RowBlock] = field(default_factory=list)
    mask_words: list[torch.Tensor | None] = field(default_factory=list)
    hyper_rows: list[int] = field(default_factory=list)
    members: list[int] = field(default_factory=list)  # positions among the parameters that have gradients
    plans_of: list[tuple] = field(default_factory=list)  # of each hyper row
    grads: list[torch.Tensor] = field(default_factory=list)
    hypers: list[Hyper] = field(default_factory=list)
    grad_scale: torch.Tensor | None = None  # one float32: gradients are divided by it, and written back
    found_inf: torch.Tensor | None = None  # one float32: not 0 makes the step a no-op
    table: object = None


class PreparedStep:
    """The batches of a step, good for the next one as long as every tensor is where it was.

    Sorting 400 parameters into batches takes a millisecond of Python, asking each tensor for its address a tenth of it.
    All tensors are held, so that no other can come by the place of one; a tensor's own memory may still be exchanged
    (``param.data = ...``), so addresses are compared too.

    An element's index is its place in contiguous order, whatever the strides, so tensors with other strides are staged
    through contiguous copies: slower, and right where torch's fused CPU kernel silently is not.
    """

    def __init__(self, params: list[torch.Tensor], rows: list[Row], state: dict, made_for: object):
        self.made_for = made_for
        self.params = params
        stepped = {id(row.param) for row in rows}
        self.absent = [id(param) not in stepped for param in params]
        self.states = [row.state for row in rows]
        self.amsgrad_states = [row.state for row in rows if row.amsgrad]
        self.all_states = list(state.values())
        self.staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.batches = self._sort(rows)
        self.same_params = same_facts(params)
        self.same_grads = same_facts([row.grad for row in rows])
        self.grads_are_contiguous = all(is_plain(row.grad) for row in rows)
        self.state_tensors = self._state_tensors()
        self.addresses = list(map(_address, chain(params, self.state_tensors)))

    def holds(
        self, params: list[torch.Tensor], grads: list[torch.Tensor | None], state: dict, made_for: object
    ) -> bool:
        """Whether ``rows`` made now would be the same but for the gradients' addresses."""
        return (
            self.made_for == made_for
            and not self.staged
            and [grad is None for grad in grads] == self.absent
            and same_objects(params, self.params)
            and same_objects(list(state.values()), self.all_states)
            and self.same_params(params)
            and self.same_grads(present(grads))
            and same_objects(tensors := self._state_tensors(), self.state_tensors)
            and list(map(_address, chain(params, tensors))) == self.addresses
        )

    def set_grads(self, grads: list[torch.Tensor | None]) -> None:
        """Hands the gradients of this step to the batches."""
        grads = present(grads)
        if not self.grads_are_contiguous:
            grads = [grad if is_plain(grad) else plain_copy(grad) for grad in grads]
        for batch in self.batches:
            batch.grads = grads if len(self.batches) == 1 else [grads[i] for i in batch.members]

    def write_back(self, grads: list[torch.Tensor | None] = ()) -> None:
        """Copies staged tensors back after the step, and ``grads`` where the step had copies of them."""
        for tensor, copy in self.staged:
            tensor.copy_(copy)
        if grads and not self.grads_are_contiguous:
            grads = present(grads)
            for batch in self.batches:
                for position, used in zip(batch.members, batch.grads):
                    if used is not grads[position]:
                        grads[position].copy_(used)

    def _state_tensors(self) -> list[torch.Tensor] | None:
        """The moments and steps of all rows; None where one is gone."""
        try:
            kept = [map(itemgetter(name), self.states) for name in ("exp_avg", "exp_avg_sq", "step")]
            return list(chain(*kept, map(itemgetter("max_exp_avg_sq"), self.amsgrad_states)))
        except KeyError:
            return None

    def _sort(self, rows: list[Row]) -> list[TensorBatch]:
        batches: dict[tuple, TensorBatch] = {}
        turns = turns_of([row.param for row in rows])
        for position, row in enumerate(rows):
            exp_avg = row.state["exp_avg"]
            facts = (row.param.device, row.param.dtype, exp_avg.dtype)
            key = (*facts, turns.get(position, 0))
            batch = batches.get(key) or batches.setdefault(key, TensorBatch(*facts))
            if row.plan_of not in batch.plans_of:
                batch.plans_of.append(row.plan_of)
            batch.hyper_rows.append(batch.plans_of.index(row.plan_of))
            batch.members.append(position)
            batch.params.append(self._contiguous(row.param))
            batch.exp_avgs.append(self._contiguous(exp_avg))
            batch.exp_avg_sqs.append(self._contiguous(row.state["exp_avg_sq"]))
            batch.max_exp_avg_sqs.append(self._contiguous(row.state["max_exp_avg_sq"]) if row.amsgrad else None)
            batch.steps.append(row.state["step"])
            batch.keys.append(row.key)
            batch.layouts.append(row.layout)
            batch.mask_words.append(row.mask_words)
        return list(batches.values())

    def _contiguous(self, tensor: torch.Tensor) -> torch.Tensor:
        if is_plain(tensor):
            return tensor
        copy = plain_copy(tensor)
        self.staged.append((tensor, copy))
        return copy


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether its memory holds its values in order: contiguous, no view that torch negates when it is read, and no
    tensor of zeros without memory.
    """
    return tensor.is_contiguous() and not tensor.is_neg() and not tensor._is_zerotensor()


def plain_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in order in memory of their own."""
    return tensor.resolve_neg().clone(memory_format=torch.contiguous_format)


def turns_of(params: list[torch.Tensor]) -> dict[int, int]:
    """{position: turn} of the parameters that share memory with others, else {}: in one batch threads would step them
    at once.
    """
    spans = sorted(
        (param.data_ptr(), param.data_ptr() + reach(param), position)
        for position, param in enumerate(params)
        if param.numel()
    )
    shared, end, last = set(), 0, None
    for start, stop, position in spans:
        if start < end:
            shared |= {last, position}
        if stop > end:
            end, last = stop, position
    return {position: turn for turn, position in enumerate(sorted(shared), 1)}


def same_objects(objects: list | None, others: list) -> bool:
    return objects is not None and len(objects) == len(others) and all(map(is_, objects, others))


def present(grads: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """The gradients that are there."""
    return [grad for grad in grads if grad is not None]
