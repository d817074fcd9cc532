"""PreparedStep: parameters sorted into batches, good for the next step too as long as no tensor has moved."""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, compress
from operator import attrgetter, ge, is_, itemgetter
from typing import Any, NamedTuple

import torch

from ..backends import Backend
from ..backends.batch import TensorBatch
from ..masks.row_block import RowBlock
from ..tensors.guards import same_facts
from ..tensors.local import local, local_tensors
from ..tensors.memory import as_real, is_plain, needed_bytes, plain_copy, storage_bytes, turns_of

# For 400 tensors, map() with these takes a third of the time of a list comprehension.
grad_of = attrgetter("grad")
_address = torch.Tensor.data_ptr

PlanOf = tuple[int, Any]  # (group index, unit): rows of one pair share a Hyper


@dataclass(slots=True)
class Row:
    """The local tensor of one parameter with a gradient, or one span of it.

    ``state`` holds step (0-d float32), exp_avg and exp_avg_sq. With ``amsgrad`` it also holds max_exp_avg_sq, with
    ``master`` master_param.
    """

    param: torch.Tensor
    grad: torch.Tensor
    state: dict[str, Any]
    amsgrad: bool
    key: int  # 64-bit Philox key
    layout: RowBlock  # which elements of the whole parameter these are
    plan_of: PlanOf
    backend: Backend
    mask_words: torch.Tensor | None = None  # int32 bit-planes of the buckets, or the bits of a fixed mask
    master: bool = False  # master_param is stepped, and rounded to give the parameter
    stochastic: bool = False  # the bfloat16 parameter is rounded up or down at random
    span: slice | None = None  # of the flat elements; None: all
    sharded_over: tuple[Any, ...] = ()  # process groups whose processes hold the other parts


class _Source(NamedTuple):
    """The indices by which a row of a batch finds its tensors in each step."""

    member: int  # index among the parameters that have gradients
    span: slice | None
    amsgrad: bool
    step: torch.Tensor | None  # a copy of the step count; None: the count itself


@dataclass(slots=True)
class Part:
    """One batch of a prepared step, with the facts that its backend need not know."""

    batch: TensorBatch
    backend: Backend
    master: bool
    plans_of: list[PlanOf] = field(default_factory=list)  # of each hyper row
    sources: list[_Source] = field(default_factory=list)
    # Contiguous copies of the tensors that have other strides, by member and name. They take 12 bytes per element.
    copies: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)


class PreparedStep:
    """The parts of a step. The next step can use them too, as long as every tensor is where it was.

    Sorting 400 parameters into batches takes a millisecond of Python; asking each tensor for its address takes a tenth
    of that. Between two steps no tensor of the user is held, so that a tensor that was replaced is freed at once.
    Parameters are recognised by their position among the state's keys, state tensors by identity as long as they live.
    The addresses of both are compared too, since ``param.data = ...`` replaces only the memory.

    An element's index is its position in contiguous order, whatever the strides are.
    """

    def __init__(
        self, params: list[torch.Tensor], grads: list[torch.Tensor | None], rows: list[Row],
        state: Mapping[torch.Tensor, Any], made_for: object,
    ) -> None:  # fmt: skip
        """
        Args:
            params: the parameters that have gradients, as keys of the state.
            grads: local gradients of all parameters; None for a parameter that has none.
            rows: the rows of ``params``, in the same order.
            state: the state of all parameters that have been stepped.
        """
        self.made_for = made_for
        self.is_there = [grad is not None for grad in grads]
        self.all_there = all(self.is_there)
        place = {id(param): position for position, param in enumerate(state)}
        places = [place[id(param)] for param in params]
        self.state_size = len(place)
        self.places = None if places == list(range(self.state_size)) else places  # None: all, in order
        first_rows = list({id(row.state): row for row in rows}.values())  # one row per parameter
        self.amsgrad_members = [member for member, row in enumerate(first_rows) if row.amsgrad]
        self.master_members = [member for member, row in enumerate(first_rows) if row.master]
        tensors = [row.param for row in first_rows]
        self.all_plain = all(map(is_, params, tensors))
        self.same_params = same_facts(tensors)
        self.same_grads = same_facts([row.grad for row in first_rows])
        self.grad_bytes = [needed_bytes(row.grad) for row in first_rows]
        self.grads_are_contiguous = all(is_plain(row.grad) for row in first_rows)
        self.has_spans = any(row.span for row in rows)
        self.copied_steps: list[tuple[int, torch.Tensor]] = []  # (member, copy)
        self.parts = self._sort(rows)
        self.group_indices = {index for part in self.parts for index, _ in part.plans_of}
        kept: Any = self._kept([row.state for row in first_rows])  # a list: nothing is missing yet
        self.addresses = self._addresses(tensors, kept)
        self.kept_ids = list(map(id, kept))
        self.lost: list[object] = []  # weak references to those that are gone, whose ids may be used again
        self._watched = [weakref.ref(tensor, self.lost.append) for tensor in kept]

    def holds(
        self, params: list[torch.Tensor], tensors: list[torch.Tensor], grads: list[torch.Tensor | None],
        state: Mapping[torch.Tensor, Any], made_for: object,
    ) -> bool:  # fmt: skip
        """Whether rows made now would be the same, except for the gradients' addresses.

        Args:
            params, tensors: all parameters, as keys of the state and as local tensors.
            grads, state, made_for: as in __init__.
        """
        if self.lost or self.made_for != made_for or [grad is not None for grad in grads] != self.is_there:
            return False
        params, tensors, given = self._there(params), self._there(tensors), self._there(grads)
        keys, states = list(state), list(state.values())
        if len(keys) != self.state_size:
            return False
        keys, states = self._picked(keys), self._picked(states)
        if len(keys) != len(params) or not all(map(is_, keys, params)):
            return False
        if not self.same_params(tensors) or not self.same_grads(given):
            return False
        # A gradient whose storage was freed has the same facts. This takes 0.08 us per tensor. Storages of the others
        # cannot shrink in place: their addresses would change.
        if not all(map(ge, storage_bytes(given), self.grad_bytes)):
            return False
        kept = self._kept(states)
        return (
            kept is not None
            and list(map(id, kept)) == self.kept_ids
            and self._addresses(tensors, kept) == self.addresses
        )

    def take(
        self, tensors: list[torch.Tensor], grads: list[torch.Tensor | None], state: Mapping[torch.Tensor, Any]
    ) -> None:
        """Puts the gradients of this step into the parts, and the other tensors where a backend needs them again."""
        self.grads: list[torch.Tensor] = self._there(grads)
        self.used_grads = self.grads
        if not self.grads_are_contiguous:
            self.used_grads = [grad if is_plain(grad) else plain_copy(grad) for grad in self.grads]
        for part in self.parts:
            batch = part.batch
            batch.version += 1
            batch.grads = self.used_grads
            if self.has_spans:
                batch.grads = [_span(self.used_grads[source.member], source.span) for source in part.sources]
            elif len(self.parts) > 1:
                batch.grads = [self.used_grads[source.member] for source in part.sources]
            if batch.param_dtype.is_complex:
                batch.grads = list(map(as_real, batch.grads))
        wanting = [part for part in self.parts if part.batch.table is None or part.copies]
        if wanting or self.copied_steps:
            tensors, states = self._there(tensors), self._picked(list(state.values()))
            for part in wanting:
                _fill(part, tensors, states)
            for member, copy in self.copied_steps:
                copy.copy_(states[member]["step"])

    def write_grads_back(self) -> None:
        """Copies the gradients that the step used as contiguous copies back into the tensors that they came from."""
        for grad, used in zip(self.grads, self.used_grads):
            if used is not grad:
                grad.copy_(used)

    def written(self, tensors: list[torch.Tensor], state: Mapping[torch.Tensor, Any]) -> list[torch.Tensor]:
        """The parameters, and their local tensors where these are others. autograd must learn that they have changed,
        as the kernels know only addresses.
        """
        keys = self._picked(list(state))
        return keys if self.all_plain else [*keys, *self._there(tensors)]

    def release(self) -> None:
        """Drops the references to this step's tensors, which would otherwise outlive zero_grad() or a replacement."""
        self.grads = self.used_grads = []
        for part in self.parts:
            part.batch.release()

    def addressed_tensors(
        self, tensors: list[torch.Tensor], state: Mapping[torch.Tensor, Any]
    ) -> list[torch.Tensor]:
        """All tensors whose addresses the step holds, except the gradients."""
        states = self._picked(list(state.values()))
        staged = [copy for part in self.parts for copy in part.copies.values()]
        return [*self._there(tensors), *(self._kept(states) or ()), *staged]

    def _there(self, items: list[Any]) -> list[Any]:
        """The items of the parameters that have gradients, from one item per parameter."""
        return items if self.all_there else list(compress(items, self.is_there))

    def _picked(self, items: list[Any]) -> list[Any]:
        """The items of the parameters that have gradients, from one item per parameter that has a state."""
        return items if self.places is None else [items[place] for place in self.places]

    def _kept(self, states: list[Any]) -> list[torch.Tensor] | None:
        """The state tensors of the parameters (step counts, moments, masters); None if one is gone."""
        try:
            kept: list[Iterable[Any]] = [map(itemgetter(name), states) for name in ("step", "exp_avg", "exp_avg_sq")]
            kept.append(states[member]["max_exp_avg_sq"] for member in self.amsgrad_members)
            kept.append(states[member]["master_param"] for member in self.master_members)
            return list(chain(*kept))
        except KeyError:
            return None

    def _addresses(self, tensors: list[torch.Tensor], kept: list[torch.Tensor]) -> list[int]:
        """The addresses of the parameters and of their state tensors."""
        steps = len(tensors)  # these come first, and are no DTensors
        return list(map(_address, chain(tensors, kept[:steps], local_tensors(kept[steps:]))))

    def _sort(self, rows: list[Row]) -> list[Part]:
        parts: dict[tuple[Any, ...], Part] = {}
        turns = turns_of([_span(row.param, row.span) if is_plain(row.param) else row.param for row in rows])
        members: dict[int, int] = {}
        for position, row in enumerate(rows):
            first = id(row.state) not in members
            member = members.setdefault(id(row.state), len(members))
            stepped = row.state["master_param"] if row.master else row.param
            facts = (stepped.device, stepped.dtype, row.state["exp_avg"].dtype)
            key = (*facts, row.grad.dtype, row.stochastic, row.sharded_over, turns.get(position, 0))
            if key not in parts:
                batch = TensorBatch(
                    *facts, grad_dtype=row.grad.dtype, stochastic=row.stochastic, sharded_over=row.sharded_over
                )
                parts[key] = Part(batch, row.backend, row.master)
            part, step = parts[key], None
            if not first:  # a step is counted by one of the spans of a parameter; the others count copies
                self.copied_steps.append((member, step := row.state["step"].clone()))
            if row.plan_of not in part.plans_of:
                part.plans_of.append(row.plan_of)
            part.sources.append(_Source(member, row.span, row.amsgrad, step))
            part.batch.hyper_rows.append(part.plans_of.index(row.plan_of))
            part.batch.keys.append(row.key)
            part.batch.layouts.append(row.layout)
            part.batch.mask_words.append(row.mask_words)
        return list(parts.values())


def _fill(part: Part, tensors: list[torch.Tensor], states: list[dict[str, Any]]) -> None:
    """Puts the tensors of a step into a batch, in the form that kernels take. Stages those that are not contiguous."""
    batch, stepped = part.batch, "master_param" if part.master else "param"
    batch.release(but_grads=True)
    staged: set[tuple[int, str]] = set()

    def of_source(name: str, source: _Source) -> torch.Tensor:
        tensor = tensors[source.member] if name == "param" else local(states[source.member][name])
        place = (source.member, name)
        if place in part.copies or not is_plain(tensor):
            if place not in part.copies:
                part.copies[place] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            if place not in staged:
                staged.add(place)
                batch.staged.append((tensor, part.copies[place]))
            tensor = part.copies[place]
        return as_real(_span(tensor, source.span))

    def column(name: str) -> list[torch.Tensor]:
        return [of_source(name, source) for source in part.sources]

    batch.params = column(stepped)
    batch.copies = column("param") if part.master else []
    batch.exp_avgs, batch.exp_avg_sqs = column("exp_avg"), column("exp_avg_sq")
    batch.max_exp_avg_sqs = [
        of_source("max_exp_avg_sq", source) if source.amsgrad else None for source in part.sources
    ]
    batch.steps = [
        states[source.member]["step"] if source.step is None else source.step for source in part.sources
    ]


def _span(tensor: torch.Tensor, span: slice | None) -> torch.Tensor:
    """The elements of a contiguous tensor whose flat indices are in ``span``; all of them for None."""
    return tensor if span is None else tensor.detach().view(-1)[span]


def present(grads: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """The gradients that are not None."""
    return [grad for grad in grads if grad is not None]
