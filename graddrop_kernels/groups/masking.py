"""Masking: policies, random streams, plans and masks of an optimizer's parameter groups."""

import copy
import math
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import backends
from ..backends.batch import Hyper
from ..masks.bitmask import bits_of_layout, count_kept, pack, unpack
from ..masks.memory_order import MemoryOrder
from ..masks.plan import MaskPlan
from ..policies import KEEP, FixedMask, GradDropEpoch, Policy
from ..policies.clock import Clock, PlanContext
from ..policies.registry import PolicyBook
from ..tensors.local import as_sharded, local
from .flat_buffers import Flat, FlatBuffers, check_pieces
from .names import canonical_name
from .options import draws
from .owner import Owner
from .records import LayerMatches, ParamRecord, make_records
from .spans import Span, spans_of


class Masking:
    """A view of an optimizer's ``param_groups``. Everything that it keeps beside the policies and the flat buffers is a
    cache, which ``forget()`` drops after a load or a new group.
    """

    def __init__(self, owner: Owner, policies: PolicyBook):
        # A weak reference: with a strong one, deleting the optimizer would not free its moments until the garbage
        # collector runs.
        self._owner: Owner = weakref.proxy(owner)
        self.policies = policies
        self.buffers = FlatBuffers()
        self.matches = LayerMatches()
        self.forget()

    def forget(self) -> None:
        self._records: dict[int, tuple[tuple[Any, ...], tuple[list[ParamRecord], Callable[[], tuple[str, ...]]]]] = {}
        self._places: dict[str | int, tuple[int, int]] = {}  # where names, and ids of tensors, were last found
        self._words: dict[tuple[Any, ...], tuple[tuple[Any, ...], list[torch.Tensor | None]]] = {}
        self._group_of_name: dict[str, int] = {}
        self._named_groups = 0  # the groups whose names that has

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self._owner.param_groups

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._owner.param_groups[index]

    def indices(self) -> range:
        return range(len(self._owner.param_groups))

    def facts(self) -> list[tuple[Any, ...]]:
        """The values of the groups that a prepared step depends on."""
        return [
            (
                group["mask"], group["seed"], group["amsgrad"], group["master_weights"], group["stochastic_rounding"],
                group["stochastic_moments"], len(group["params"]), group.get("param_names"),
            )
            for group in self._owner.param_groups
        ]  # fmt: skip

    # Policies and their plans.

    def policy(self, index: int) -> Policy | None:
        return self.policies.get(self[index]["mask"])

    def masked(self, index: int) -> str:
        """What is masked in a group that has a policy, see options.MASKED."""
        policy: Any = self.policy(index)
        masked: str = self[index]["masked"] or policy.masked
        return masked

    def is_frozen(self, index: int) -> bool:
        """Whether dropped elements stay as they are with their moments. The group must have a policy."""
        return self.masked(index) == "frozen"

    def counts_steps(self, index: int) -> bool:
        """Whether the masks of a group depend on how many steps it has made."""
        policy = self.policy(index)
        return policy is not None and policy.counts_steps(self.is_frozen(index))

    def clock(self, index: int) -> Clock:
        group = self[index]
        return Clock.of(group["epoch"], group["completed_steps"], group["epoch_history"])

    def clocks(self) -> list[Clock]:
        """The clock of each group."""
        return list(map(self.clock, self.indices()))

    def set_epoch(self, epoch: int, warn: Callable[[str | None], None]) -> None:
        """See FusedGradDropAdamW.set_epoch()."""
        for policy in map(self.policy, self.indices()):
            if policy is not None and policy.follows_epochs:
                policy.check_epoch(epoch)
                warn(policy.after_last_epoch(epoch))
        for group in self.groups:
            group["epoch"] = epoch
            group["epoch_was_set"] = True

    def count_step(self, index: int, clock: Clock) -> None:
        """Counts a step that a group has made at the time ``clock``."""
        group = self[index]
        if not clock.history or clock.history[-1][0] != clock.epoch:
            group["epoch_history"] = clock.with_this_step((self.policy(index) or Policy()).fold)
        group["completed_steps"] += 1

    def plan(self, index: int, unit: Hashable, clock: Clock | None = None) -> MaskPlan:
        """The plan of one unit of a group at the time ``clock``, by default in the next step."""
        policy, group = self.policy(index), self[index]
        if policy is None:
            return KEEP
        count_active_steps, clock = group.get("bias_correction") != "global", clock or self.clock(index)
        if policy.takes_turns:  # a group may have missed steps, or be new, and all groups change at once
            steps = max(each["completed_steps"] for each in self.groups if each["mask"] == group["mask"])
            clock = replace(clock, completed_steps=clock.completed_steps + steps - group["completed_steps"])
        context = PlanContext(clock, group["seed"], self.is_frozen(index), count_active_steps, self.blocks(index))
        plan = policy.plan(context, unit)
        return replace(plan, update=True) if self.masked(index) == "update" else plan

    def hyper(self, index: int, unit: Hashable, clock: Clock) -> Hyper:
        """The hyper-parameters and the mask of this step, for one unit of one group."""
        group = self[index]
        beta1, beta2 = map(float, group["betas"])
        return Hyper(
            _read(group["lr"]), beta1, beta2, group["eps"], _read(group["weight_decay"]), group["amsgrad"],
            group["maximize"], self.plan(index, unit, clock), group["cautious_weight_decay"],
        )  # fmt: skip

    def active_fraction(self, index: int, clock: Clock | None = None) -> float:
        """The share of a group's elements kept at the time ``clock``, by default in the next step. It is exact for
        blocks and fixed masks. It counts the whole of a sharded parameter, but only this process's part of a flat
        buffer.
        """
        plans: dict[Hashable, MaskPlan] = {}
        active, total = 0.0, 0
        for param, record in zip(self[index]["params"], self.records(index)):
            spans: Sequence[Span | None] = spans_of(param, record, left_out=True) if record.flat else [None]
            words = self.words(index, param, spans) if record.flat else [None]
            for span, bits in zip(spans, words):
                unit, numel = (record.unit, param.numel()) if span is None else (span.unit, span.numel)
                if unit not in plans:
                    plans[unit] = self.plan(index, unit, clock)
                plan = plans[unit]
                share = plan.active_fraction
                if plan.kind == "fixed":
                    policy: Any = self.policy(index)  # a FixedMask
                    share = count_kept(policy.words[record.name] if bits is None else bits) / max(numel, 1)
                if record.rows is not None:
                    share *= record.rows.share(param.shape)
                active += share * numel
                total += numel
        return active / total if total else 1.0

    # Parameters.

    def records(self, index: int) -> list[ParamRecord]:
        return self._records_and_blocks(index)[0]

    def blocks(self, index: int) -> tuple[str, ...]:
        """The model's blocks in forward order; empty if the policy needs none."""
        return self._records_and_blocks(index)[1]()

    def _records_and_blocks(self, index: int) -> tuple[list[ParamRecord], Callable[[], tuple[str, ...]]]:
        group = self[index]
        made_from: tuple[Any, ...] = (group["seed"], group["mask"], len(group["params"]), group.get("param_names"))
        if self.buffers.pieces:  # DeepSpeed's stage 3 puts one buffer after the other into a group
            made_from += tuple(map(id, group["params"]))
        cached = self._records.get(index)
        if cached is None or cached[0] != made_from:
            made = make_records(self.groups, index, self.policy(index), self.buffers, self.matches)
            cached = self._records[index] = (made_from, made)
        return cached[1]

    def drawn_streams(self) -> dict[int, str]:
        """{key: name} of the random streams that the steps of these groups draw from."""
        drawing = [index for index in self.indices() if draws(self[index])]
        return {
            key: name
            for index in drawing
            for record in self.records(index)
            for key, name in [(record.key, record.name), *((each.key, each.piece.name) for each in record.flat)]
        }

    def find(self, param: torch.Tensor | str) -> tuple[int, int]:
        """(group, position) of a parameter given as a tensor or by name, or of the flat buffer that holds it. Raises
        KeyError for an unknown one.
        """
        wanted = canonical_name(param) if isinstance(param, str) else id(param)
        if not self._is_at(self._places.get(wanted), param):
            self._places = dict(reversed(list(self._keys_and_places())))  # the first counts
        place = self._places.get(wanted)
        if place is None:
            raise KeyError(
                f"{param!r} is not a parameter of this optimizer"
                if isinstance(param, str)
                else "this tensor is not a parameter of this optimizer"
            )
        return place

    def _keys_and_places(self) -> Iterator[tuple[str | int, tuple[int, int]]]:
        for index, group in enumerate(self.groups):
            for position, (tensor, record) in enumerate(zip(group["params"], self.records(index))):
                yield id(tensor), (index, position)
                for name in _names_of(record):
                    yield name, (index, position)

    def _is_at(self, place: tuple[int, int] | None, param: torch.Tensor | str) -> bool:
        """Whether a parameter still is where it was found before."""
        if place is None or place[0] >= len(self.groups) or place[1] >= len(self[place[0]]["params"]):
            return False
        index, position = place
        if isinstance(param, str):
            return canonical_name(param) in _names_of(self.records(index)[position])
        return self[index]["params"][position] is param

    def repeated_name(self, first: int = 0) -> tuple[str, int, int] | None:
        """(name, group, group) of two parameters of one name, or None. Names within the groups before ``first`` were
        looked at before.
        """
        if 0 < first == self._named_groups and self._note_names(first) is None:
            return None
        self._group_of_name = {}  # what is known may be out of date
        return self._note_names(0)

    def _note_names(self, first: int) -> tuple[str, int, int] | None:
        self._named_groups = 0
        for index in self.indices()[first:]:
            for record in self.records(index):
                if record.name in self._group_of_name and not record.flat:
                    return record.name, self._group_of_name[record.name], index
                self._group_of_name[record.name] = index
        self._named_groups = len(self.groups)
        return None

    def has(self, name: str) -> bool:
        """Whether a parameter has this name."""
        try:
            self.find(name)
        except KeyError:
            return False
        return True

    def record_of(self, param: torch.Tensor | str) -> ParamRecord:
        """The record of a parameter. Raises KeyError for an unknown one."""
        index, position = self.find(param)
        return self.records(index)[position]

    def attach_pieces(
        self, pieces: Flat, shapes: Mapping[str, Sequence[int]] | None, last: Iterable[torch.Tensor],
        has_gradients: Callable[[int], bool] | None, check: Callable[[], None],
    ) -> None:  # fmt: skip
        """Keeps the pieces of flat buffers. What ``check`` raises of the masks that they then have is raised, and
        nothing has changed.
        """
        for tensor, own in pieces.items():
            self.find(tensor)
            check_pieces(tensor, own)
        before = copy.copy(self.buffers)
        self.buffers.attach(pieces, shapes, last, has_gradients)
        self.forget()
        try:
            check()
        except Exception:
            self.buffers = before
            self.forget()
            raise

    def check_flat(self, record: ParamRecord, param: torch.Tensor) -> None:
        """Raises TypeError for a flat buffer whose pieces were not attached."""
        if reason := self.buffers.reason(param):
            raise TypeError(
                f"parameter {record.name!r} is a flat buffer of a wrapper, and a mask drawn for it would depend on the "
                f"sharding: {reason}"
            )

    # Masks.

    def words(
        self, index: int, param: torch.Tensor, spans: Sequence[Any], order: MemoryOrder | None = None
    ) -> list[torch.Tensor | None]:  # fmt: skip
        """Per span of a parameter, the bit-planes of the buckets or the bits of a fixed mask; None where the policy
        stores none. They are made once per parameter and kept on its device. With an ``order`` they are in that of the
        memory.
        """
        policy = self.policy(index)
        if not isinstance(policy, FixedMask) and getattr(policy, "storage", None) != "bitpacked":
            return [None] * len(spans)
        made_for = (spans, param.device, self[index]["mask"], order)
        # By name: a parameter that is replaced by one of another size again and again leaves nothing behind.
        place = index, tuple(span.name for span in spans), order is None
        if place not in self._words or self._words[place][0] != made_for:
            words = [_words_of(policy, span, param.device) for span in spans]
            self._words[place] = made_for, words if order is None else [_reordered(each, order) for each in words]
        return self._words[place][1]

    def stored(self) -> list[torch.Tensor]:
        """The tensors of all masks that are stored: fixed masks as given, and what was made for parameters."""
        fixed = {policy for policy in map(self.policy, self.indices()) if isinstance(policy, FixedMask)}
        given = [words for policy in fixed for words in policy.words.values()]
        return given + [words for _, made in self._words.values() for words in made if words is not None]

    def keep(self, param: torch.Tensor | str, step: int | None = None) -> torch.Tensor:
        """The keep mask of a parameter, see FusedGradDropAdamW.mask()."""
        index, position = self.find(param)
        tensor, record = self[index]["params"][position], self.records(index)[position]
        self.check_flat(record, tensor)
        clock = self.clock(index)
        if step is not None:
            clock = replace(clock, completed_steps=step)
        own_step = self.step_of(tensor) if step is None else step
        keep = torch.zeros(local(tensor).numel(), dtype=torch.bool, device=tensor.device)
        spans = spans_of(tensor, record)
        for span, words in zip(spans, self.words(index, tensor, spans)):
            plan = self.plan(index, span.unit, clock)
            keep[span.start : span.start + span.numel] = backends.keep_mask(
                plan, span.key, own_step, span.layout, span.numel, words, tensor.device
            )
        if record.flat and isinstance(param, str):
            own = [span for span in spans if span.name == canonical_name(param)]
            return torch.cat([keep[:0], *(keep[span.start : span.start + span.numel] for span in own)])
        return as_sharded(keep, tensor)

    def step_of(self, param: torch.Tensor) -> int:
        """The number of steps that a parameter has completed."""
        return int(self._owner.state.get(param, {}).get("step", 0))


def _names_of(record: ParamRecord) -> list[str]:
    """The names that find a parameter: its own, and those of what a flat buffer holds."""
    return [record.name, *(each.piece.name for each in record.flat)]


def _words_of(policy: Any, span: Span, device: torch.device) -> torch.Tensor | None:
    if isinstance(policy, GradDropEpoch):
        return backends.bucket_planes(span.key, policy.epochs, span.layout, span.numel, device)
    if span.name not in policy.words:
        return None
    return bits_of_layout(policy.words[span.name], span.layout, span.numel).to(device)


def _reordered(words: torch.Tensor | None, order: MemoryOrder) -> torch.Tensor | None:
    """Bits, or bit-planes, of the elements by index, in the order of memory."""
    if words is None:
        return None
    planes = [pack(order.bits(unpack(plane, math.prod(order.shape)))) for plane in words.view(-1, words.size(-1))]
    return torch.stack(planes).view_as(words) if planes else words


def _read(number: float | torch.Tensor) -> float | torch.Tensor:
    """The number as a float. A tensor stays one if the host would have to wait for its value, or if it is recorded."""
    if isinstance(number, torch.Tensor) and (number.device.type != "cpu" or number.requires_grad):
        return number
    return float(number)


def masking_of(function: str, optimizer: Any) -> Masking:
    """The Masking of a FusedGradDropAdamW. Raises TypeError for anything else."""
    masking = optimizer.masking if hasattr(type(optimizer), "masking") else None  # not a wrapper's __getattr__
    if not isinstance(masking, Masking):
        raise TypeError(
            f"{function}(optimizer) needs a FusedGradDropAdamW, got {type(optimizer).__name__}; "
            "where that is a wrapper around one, pass the one inside"
        )
    return masking
