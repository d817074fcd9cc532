"""PreparedStep: the parameters that have been stepped, sorted into batches of those that have gradients. Good for the
next step too, with other gradients or with the same, as long as no tensor has moved.
"""

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import chain, compress
from operator import attrgetter, call, ge, is_, itemgetter
from typing import Any

import numpy as np
import torch

from ..backends import Backend
from ..backends.batch import TensorBatch
from ..backends.tensor_table import TENSOR_ROW, tensor_table
from ..masks.memory_order import MemoryOrder
from ..masks.row_block import RowBlock
from ..tensors.guards import same_facts
from ..tensors.local import is_dtensor, local, local_tensors
from ..tensors.memory import as_real, laid_out, needed_bytes, reach, storage_bytes, turns_of

# For 400 tensors, map() with these takes a third of the time of a list comprehension.
grad_of = attrgetter("grad")
_address = torch.Tensor.data_ptr
_NOTHING = slice(0, 0)

STATE = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param")
PlanOf = tuple[int, Any]  # (group index, unit): rows of one pair share a Hyper
_Pick = Callable[[list[Any]], list[Any]]
_Tensors = dict[str, torch.Tensor]  # those of one parameter: "param", and the names of STATE that it has


@dataclass(slots=True)
class Row:
    """A parameter that has been stepped, or one span of it. Holds none of its tensors."""

    facts: tuple[Any, ...]  # device, dtypes of what is stepped, the moments and the gradient, rounding, process groups
    key: int  # 64-bit Philox key
    layout: RowBlock  # which elements of the whole parameter these are
    order: MemoryOrder | None  # of the tensors in memory; None: that of their indices
    plan_of: PlanOf
    backend: Backend
    mask_words: torch.Tensor | None  # int32 bit-planes of the buckets, or the bits of a fixed mask
    span: slice | None  # of the flat elements; None: all
    state_span: slice | None  # of those of moments and masters, which may have fewer rows
    names: frozenset[str]  # the tensors that it has
    staged: frozenset[str]  # those that the backend cannot take as they lie
    own_step: torch.Tensor | None  # where it counts, if another span of its parameter counts the parameter's steps
    tensor_row: Any = None  # its TensorRow, once it was met


class Member:
    """A parameter that has been stepped, with everything that was checked and made for it."""

    def __init__(
        self, tensors: _Tensors, grad: torch.Tensor, fits: bool, stride: tuple[int, ...] | None, rows: list[Row],
        own_steps: torch.Tensor | None, lost: list[object],
    ) -> None:  # fmt: skip
        """
        Args:
            tensors: the parameter's local tensor and its state's.
            fits: whether the backend can take the gradient as it lies. ``stride``: what a copy must have if not; None:
                it is contiguous.
            own_steps: those of all rows but the first.
            lost: receives an item when a tensor of the state is gone.
        """
        start = tensors["param"].data_ptr()
        # The first address of its elements and the one after the last.
        self.memory = start, start + reach(tensors["param"]) if tensors["param"].numel() else start
        self.same_pair = same_facts(tensors["param"], grad)
        self.grad_bytes = needed_bytes(grad)
        self.fits, self.stride, self.rows, self.own_steps = fits, stride, rows, own_steps
        kept = {name: tensors[name] for name in STATE if name in tensors}
        self.is_sharded = any(map(is_dtensor, kept.values()))
        self.ids = {name: id(tensor) for name, tensor in kept.items()}
        self.addresses = {name: local(tensor).data_ptr() for name, tensor in tensors.items()}
        self._watched = {name: weakref.ref(tensor, lost.append) for name, tensor in kept.items()}

    @property
    def is_whole(self) -> bool:
        """Whether no tensor of its state is gone. Their ids may be used again."""
        return all(watched() is not None for watched in self._watched.values())

    def holds(self, tensors: _Tensors, grad: torch.Tensor) -> bool:
        """Whether rows made now would be the same."""
        return (
            self.same_pair(tensors["param"], grad)
            and next(storage_bytes([grad])) >= self.grad_bytes
            and self.is_whole
            and all(watched() is tensors.get(name) for name, watched in self._watched.items())
            and all(local(tensors[name]).data_ptr() == address for name, address in self.addresses.items())
        )


class _Whole:
    """All rows of one kind: those that can be in one batch."""

    def __init__(self, facts: tuple[Any, ...], backend: Backend, is_staged: bool) -> None:
        self.facts, self.backend, self.is_staged = facts, backend, is_staged
        self.rows: list[Row] = []
        self.members: list[int] = []  # of each row
        self.plans: dict[PlanOf, int] = {}
        self.hyper_rows: list[int] = []  # of each row, an index into the plans

    def add(self, member: int, row: Row) -> None:
        self.rows.append(row)
        self.members.append(member)
        self.hyper_rows.append(self.plans.setdefault(row.plan_of, len(self.plans)))

    def close(self) -> None:
        """Makes columns of all rows, of which a batch takes some."""
        self._plans, self._hyper_rows = list(self.plans), np.array(self.hyper_rows)
        self._members = np.array(self.members)
        self._columns: dict[str, list[Any]] = {
            "keys": [row.key for row in self.rows], "layouts": [row.layout for row in self.rows],
            "orders": [row.order for row in self.rows], "mask_words": [row.mask_words for row in self.rows],
        }  # fmt: skip
        self._in_rows = ["keys", "layouts", "mask_words"] if any(self._columns["orders"]) else list(self._columns)
        self.has_spans = any(row.span for row in self.rows)
        starts = [row.span.start if row.span else 0 for row in self.rows]
        self._grad_offsets = np.array(starts, np.uint64) * self.facts[3].itemsize if self.has_spans else None
        self.met = np.array([row.tensor_row is not None for row in self.rows])
        self.table = np.zeros(len(self.rows), TENSOR_ROW)  # the TensorRows of those that were met
        self.table[self.met] = [row.tensor_row for row in self.rows if row.tensor_row is not None]

    @property
    def keeps_rows(self) -> bool:
        """Whether its batches have TensorRows in place of tensors."""
        return self.backend.by_address and not self.is_staged

    def part(self, index_of: Any) -> "Part | None":
        """The rows of the members that have gradients, or None if there are none.

        Args:
            index_of: each member's index among those; -1: it has none.
        """
        indices = index_of[self._members]
        taken = indices >= 0
        members = indices[taken].tolist()
        if not members:
            return None
        batch, plans_of = self.batch_of(taken, without=self._in_rows if self.keeps_rows else ()), self._plans
        if len(plans_of) == 1:
            batch.hyper_rows = [0] * len(members)
        else:
            used, hyper_rows = np.unique(self._hyper_rows[taken], return_inverse=True)
            batch.hyper_rows, plans_of = hyper_rows.tolist(), [self._plans[index] for index in used]
        return Part(batch, self, taken, members, plans_of)

    def batch_of(self, taken: Any, without: Collection[str] = ()) -> TensorBatch:
        """A batch of some rows, without their tensors and hyper-parameters. ``without``: what its TensorRows tell."""
        device, param_dtype, moment_dtype, grad_dtype, stochastic, sharded_over = self.facts
        columns: dict[str, Any] = {
            name: [] if name in without else list(compress(column, taken.tolist()))
            for name, column in self._columns.items()
        }
        offsets = None if self._grad_offsets is None else self._grad_offsets[taken]
        return TensorBatch(
            device, param_dtype, moment_dtype, grad_dtype=grad_dtype, stochastic=stochastic, sharded_over=sharded_over,
            grad_offsets=offsets, **columns,
        )  # fmt: skip


@dataclass(slots=True, eq=False)
class Part:
    """One batch of a prepared step, with the facts that its backend need not know."""

    batch: TensorBatch
    whole: _Whole
    taken: Any  # for each row of the whole, whether it is in the batch
    members: list[int]  # for each row, the index of its parameter among those that have gradients
    plans_of: list[PlanOf]  # of each hyper row

    @property
    def rows(self) -> list[Row]:
        return list(compress(self.whole.rows, self.taken.tolist()))

    @property
    def backend(self) -> Backend:
        return self.whole.backend


class PreparedStep:
    """The parts of a step. The next step can use them too, as long as every tensor is where it was.

    Preparing a parameter takes tens of microseconds of Python; asking its tensors for their addresses takes one. So
    what was prepared for a parameter is kept while it has no gradient, and the rows of those that have one are taken
    out of the tables of all. Between two steps no tensor of the user is held, so that a tensor that was replaced is
    freed at once. Parameters are recognised by their position among the state's keys, state tensors by identity as
    long as they live. The addresses of both are compared too, since ``param.data = ...`` replaces only the memory.

    An element's index is its position in contiguous order, whatever the strides are.
    """

    def __init__(
        self, members: Mapping[int, Member], there: list[int], params: list[torch.Tensor],
        state: Mapping[torch.Tensor, Any], made_for: object, lost: list[object],
    ) -> None:  # fmt: skip
        """
        Args:
            members: by their position among the parameters of the step, in order.
            there: the positions of those that have gradients now. All are members.
            params: these, as keys of the state.
            state: the state of all parameters that have been stepped.
            lost: has an item as soon as a tensor of the members' state is gone.
        """
        self.members, self.made_for, self.lost = members, made_for, lost
        self._place_of = {id(param): place for place, param in enumerate(state)}
        self._columns = _Columns(list(members.values()))
        self._index_of = {position: index for index, position in enumerate(members)}
        self._wholes = self._sort(list(members.values()))
        self.parts: list[Part] = []
        self.there: list[int] = []
        known = self._choose(there, params)
        assert known, "every parameter with a gradient is a member"

    @property
    def state_size(self) -> int:
        """The number of parameters that have a state."""
        return len(self._place_of)

    def _choose(self, there: list[int], params: list[torch.Tensor]) -> bool:
        """Takes the rows of the parameters that have gradients. Returns False if one of them is no member."""
        indices: list[Any] = list(map(self._index_of.get, there))
        places: list[Any] = list(map(self._place_of.get, map(id, params)))
        if None in indices or None in places:
            return False
        columns, pick = self._columns, picker(indices)
        self._pick_state = None if places == list(self._place_of.values()) else picker(places)
        self._same_pair = pick(columns.same_pair)
        self._same_facts: Callable[..., bool] | None = None  # of all in one call, once it pays to make it
        self.grad_bytes = pick(columns.grad_bytes)
        self._wanted = {name: having and pick(having) for name, having in columns.having.items()}
        self.kept_ids = columns.picked(columns.ids, pick)
        self.addresses = columns.picked(columns.addresses, pick)
        self._misfits = [
            (index, stride)
            for index, (fits, stride) in enumerate(() if columns.all_fit else pick(columns.fits))
            if not fits
        ]
        index_of = np.full(len(self.members), -1)
        index_of[indices] = np.arange(len(indices))
        parts = (whole.part(index_of) for whole in self._wholes)
        # In the order in which rows made now would be sorted: the sum of a norm depends on it.
        self.parts = sorted((part for part in parts if part is not None), key=lambda part: part.members[0])
        self.has_spans = any(part.whole.has_spans for part in self.parts)
        self._own_steps = [(index, each) for index, each in enumerate(pick(columns.own_steps)) if each is not None]
        self.group_indices = {index for part in self.parts for index, _ in part.plans_of}
        self.there = there
        return True

    def holds(
        self, there: list[int], params: list[torch.Tensor], tensors: list[torch.Tensor],
        grads: list[torch.Tensor], state: Mapping[torch.Tensor, Any], made_for: object,
    ) -> bool:  # fmt: skip
        """Whether rows made now would be the same, except for the gradients' addresses. Takes the rows of those that
        have gradients now.

        Args:
            params, tensors, grads: of those that have gradients: as keys of the state, local tensors, local gradients.
            there, state, made_for: as in __init__.
        """
        if self.lost or self.made_for != made_for:
            return False
        again = there == self.there
        if not again and not self._choose(there, params):
            return False
        keys, states = list(state), list(state.values())
        if len(keys) != self.state_size:
            return False
        keys, states = self._picked(keys), self._picked(states)
        if len(keys) != len(params) or not all(map(is_, keys, params)):
            return False
        if self._same_facts is not None:
            if not self._same_facts(*tensors, *grads):
                return False
        elif not all(map(call, self._same_pair, tensors, grads)):
            return False
        # A gradient whose storage was freed has the same facts. Asking for its size takes 0.08 us. That of the other
        # tensors cannot shrink in place: they would be at another address.
        if not all(map(ge, storage_bytes(grads), self.grad_bytes)):
            return False
        kept = self._kept(states)
        if kept is None or list(map(id, kept)) != self.kept_ids or self._addresses(tensors, kept) != self.addresses:
            return False
        if again and self._same_facts is None:
            self._same_facts = same_facts(*tensors, *grads)
        return True

    def take(
        self, tensors: list[torch.Tensor], grads: list[torch.Tensor], state: Mapping[torch.Tensor, Any]
    ) -> None:
        """Puts the gradients of this step into the parts, and the other tensors where a backend needs them again."""
        self.grads = self.used_grads = grads
        if self._misfits:
            self.used_grads = list(self.grads)
            for index, stride in self._misfits:
                self.used_grads[index] = laid_out(self.grads[index], stride)
        for part in self.parts:
            batch = part.batch
            batch.version += 1
            batch.grads = self.used_grads
            if self.has_spans and not part.backend.by_address:
                batch.grads = [_span(self.used_grads[at], row.span) for at, row in zip(part.members, part.rows)]
            elif self.has_spans or len(self.parts) > 1:
                batch.grads = [self.used_grads[at] for at in part.members]
            if batch.param_dtype.is_complex:
                batch.grads = list(map(as_real, batch.grads))
        wanting = [part for part in self.parts if not part.whole.keeps_rows]
        unaddressed = [part for part in self.parts if part.whole.keeps_rows and part.batch.rows is None]
        if wanting or unaddressed or self._own_steps:
            states = self._picked(list(state.values()))
            for part in wanting:
                _fill(part.batch, part.rows, part.members, tensors, states)
                if part.backend.by_address:
                    _readdress(part.batch)
            for part in unaddressed:
                _give_rows(part, tensors, states)
            if self._own_steps:  # in one launch
                torch._foreach_copy_(
                    [own for _, own in self._own_steps],
                    [states[index]["step"].expand_as(own) for index, own in self._own_steps],
                )

    def write_grads_back(self) -> None:
        """Copies the gradients that the step used as copies back into the tensors that they came from."""
        for grad, used in zip(self.grads, self.used_grads):
            if used is not grad:
                grad.copy_(used)

    def written(self, tensors: list[torch.Tensor], state: Mapping[torch.Tensor, Any]) -> list[torch.Tensor]:
        """The parameters, and their local tensors where these are others. autograd must learn that they have changed,
        as the kernels know only addresses.
        """
        keys = self._picked(list(state))
        return keys if all(map(is_, keys, tensors)) else [*keys, *tensors]

    def release(self) -> None:
        """Drops the references to this step's tensors, which would otherwise outlive zero_grad() or a replacement."""
        self.grads = self.used_grads = []
        for part in self.parts:
            part.batch.release()

    def addressed_tensors(self, tensors: list[torch.Tensor], state: Mapping[torch.Tensor, Any]) -> list[torch.Tensor]:
        """All tensors whose addresses the step holds, except the gradients."""
        states = self._picked(list(state.values()))
        return [*tensors, *(self._kept(states) or ())]

    def _picked(self, items: list[Any]) -> list[Any]:
        """The items of the parameters that have gradients, from one item per parameter that has a state."""
        return items if self._pick_state is None else self._pick_state(items)

    def _kept(self, states: list[Any]) -> list[torch.Tensor] | None:
        """The state tensors of the parameters (step counts, moments, masters); None if one is gone."""
        try:
            kept: list[torch.Tensor] = []
            for name, wanted in self._wanted.items():
                kept += map(itemgetter(name), states if wanted is None else compress(states, wanted))
            return kept
        except KeyError:
            return None

    def _addresses(self, tensors: list[torch.Tensor], kept: list[torch.Tensor]) -> list[int]:
        """The addresses of the parameters and of their state tensors."""
        return list(map(_address, chain(tensors, local_tensors(kept) if self._columns.is_sharded else kept)))

    def _sort(self, members: list[Member]) -> list[_Whole]:
        wholes: dict[tuple[Any, ...], _Whole] = {}
        turns = turns_of([member.memory for member in members])  # the rows of one member have no element in common
        for index, row in ((index, row) for index, member in enumerate(members) for row in member.rows):
            key = (*row.facts, row.backend.name, bool(row.staged), turns.get(index, 0))
            if key not in wholes:
                wholes[key] = _Whole(row.facts, row.backend, bool(row.staged))
            wholes[key].add(index, row)
        for whole in wholes.values():
            whole.close()
        return list(wholes.values())


class _Columns:
    """Facts of all members, one list each."""

    def __init__(self, members: list[Member]) -> None:
        self.same_pair = [member.same_pair for member in members]
        self.grad_bytes = [member.grad_bytes for member in members]
        self.fits = [(member.fits, member.stride) for member in members]
        self.all_fit = all(member.fits for member in members)
        self.own_steps = [member.own_steps for member in members]
        names = [name for name in STATE if any(name in member.ids for member in members)]
        having = {name: [name in member.ids for member in members] for name in names}
        self.ids = {name: [member.ids.get(name) for member in members] for name in names}
        self.having = {name: None if all(each) else each for name, each in having.items()}  # None: all members have it
        self.is_sharded = any(member.is_sharded for member in members)
        self.addresses = {name: [member.addresses.get(name) for member in members] for name in ("param", *names)}

    def picked(self, columns: dict[str, list[int | None]], pick: _Pick) -> list[int | None]:
        """The items of some members, one column after the other, of those that have such a tensor."""
        picked: list[int | None] = []
        for name, column in columns.items():
            items = pick(column)
            picked += items if self.having.get(name) is None else (item for item in items if item is not None)
        return picked


def picker(indices: list[int]) -> _Pick:
    """A function that returns the items at these indices. It takes half of the time of a comprehension."""
    if len(indices) < 2:
        return lambda items: [items[index] for index in indices]
    pick = itemgetter(*indices)
    return lambda items: list(pick(items))


def _give_rows(part: Part, tensors: list[torch.Tensor], states: list[dict[str, Any]]) -> None:
    """Gives a batch the TensorRows of its tensors. Makes those that are met for the first time."""
    whole = part.whole
    new = ~whole.met[part.taken]
    if new.any():
        rows = list(compress(part.rows, new))
        positions = np.flatnonzero(part.taken)[new]
        batch = whole.batch_of(part.taken & ~whole.met)
        batch.hyper_rows = [0] * len(rows)
        _fill(batch, rows, list(compress(part.members, new)), tensors, states)
        whole.table[positions], whole.met[positions] = tensor_table(batch), True
        for row, tensor_row in zip(rows, whole.table[positions].tolist()):
            row.tensor_row = tensor_row
    part.batch.rows = whole.table[part.taken]
    part.batch.rows["hyper"] = part.batch.hyper_rows


def _readdress(batch: TensorBatch) -> None:
    """Brings the TensorRows of a batch up to date, in place, since the tables of a backend refer to them."""
    rows, batch.rows = batch.rows, None
    new = tensor_table(batch)
    if rows is not None:
        rows[:] = new
    batch.rows = new if rows is None else rows


def _fill(
    batch: TensorBatch, rows: list[Row], members: list[int], tensors: list[torch.Tensor], states: list[dict[str, Any]]
) -> None:
    """Puts the tensors of a step into a batch. Stages those that its backend cannot take as they lie."""
    copies: dict[tuple[int, str], torch.Tensor] = {}

    def of_row(name: str, index: int, row: Row) -> torch.Tensor:
        if name == "master_param" and row.state_span == _NOTHING != row.span:
            name = "param"  # rows that are not trained have none; only their number counts
        tensor = tensors[index] if name == "param" else local(states[index][name])
        if name in row.staged:
            if (index, name) not in copies:
                copies[index, name] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                batch.staged.append((tensor, copies[index, name]))
            tensor = copies[index, name]
        return as_real(_span(tensor, row.span if name == "param" else row.state_span))

    def column(name: str) -> list[Any]:
        return [of_row(name, index, row) if name in row.names else None for index, row in zip(members, rows)]

    has_masters = batch.grad_dtype != batch.param_dtype
    batch.staged = []
    batch.params, batch.copies = (column("master_param"), column("param")) if has_masters else (column("param"), [])
    batch.exp_avgs, batch.exp_avg_sqs = column("exp_avg"), column("exp_avg_sq")
    batch.max_exp_avg_sqs = column("max_exp_avg_sq")
    batch.steps = [states[index]["step"] if row.own_step is None else row.own_step for index, row in zip(members, rows)]


def _span(tensor: torch.Tensor, span: slice | None) -> torch.Tensor:
    """The elements of a contiguous tensor whose flat indices are in ``span``; all of them for None."""
    return tensor if span is None else tensor.view(-1)[span]
