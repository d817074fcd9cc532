"""MaskedGroups: an optimizer's parameter groups as its steps see them: policies, names, random streams, plans."""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import backends
from ..backends.batch import Hyper
from ..masks.bitmask import bits_of_layout, count_kept
from ..masks.plan import MaskPlan
from ..policies import KEEP, FixedMask, GradDropEpoch, Policy
from ..policies.clock import Clock, PlanContext
from ..policies.registry import PolicyBook
from ..tensors.local import has_processes, is_dtensor
from .checks import check_fixed_mask, check_param
from .flat_buffers import FlatPiece, flat_buffer_reason
from .names import canonical_name
from .options import check_options
from .records import ParamRecord, Span, make_records, spans_of

if TYPE_CHECKING:
    pass


class MaskedGroups:
    """A view of ``optimizer.param_groups``. What it keeps can be made again from them; ``forget()`` drops it, after a
    load or a new group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, policies: PolicyBook):
        # Or its moments would wait for the garbage collector.
        self._optimizer: torch.optim.Optimizer = weakref.proxy(optimizer)
        self.policies = policies
        self.flat: dict[torch.Tensor, tuple[FlatPiece, ...]] = {}  # what is in the flat buffers among the parameters
        self.shapes: dict[str, tuple[int, ...]] | None = None  # of all parameters, where this process has only some
        self.last_buffers: frozenset[torch.Tensor] = frozenset()  # see attach_pieces(last=)
        self.has_gradients: Callable[[int], bool] = lambda index: False  # see attach_pieces(has_gradients=)
        self._given: dict[int, weakref.ref[torch.Tensor]] | None = None  # the tensors that groups were made of
        self.forget()

    def forget(self) -> None:
        self._records: dict[int, tuple[tuple[Any, ...], tuple[list[ParamRecord], tuple[str, ...]]]] = {}
        self._words: dict[torch.Tensor, tuple[tuple[Any, ...], list[torch.Tensor | None]]] = {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._optimizer.param_groups[index]

    def indices(self) -> range:
        return range(len(self._optimizer.param_groups))

    def facts(self) -> list[tuple[Any, ...]]:
        """What of the groups a prepared step depends on."""
        return [
            (
                group["mask"], group["seed"], group["amsgrad"], group["master_weights"], group["stochastic_rounding"],
                len(group["params"]), group.get("param_names"),
            )
            for group in self._optimizer.param_groups
        ]  # fmt: skip

    def remember(self, params: list[torch.Tensor]) -> None:
        """Notes the tensors of a new group: one that comes into a group later has been put there by an engine."""
        if self._given is None:
            self._given, params = {}, [
                param for group in self._optimizer.param_groups for param in group["params"]
            ]
        self._given |= {id(param): weakref.ref(param) for param in params}

    def flat_buffer_reason(self, param: torch.Tensor) -> str | None:
        """Why a parameter must not be stepped before ``attach_pieces``; None: there is no reason."""
        if param in self.flat:
            return None
        ref = None if self._given is None else self._given.get(id(param))
        return flat_buffer_reason(param, given=self._given is None or (ref is not None and ref() is param))

    def completes_step(self, index: int) -> bool:
        """Whether a step of what is in the group now is the group's last call of ``step()`` in a step."""
        return not self.last_buffers or any(param in self.last_buffers for param in self[index]["params"])

    # Policies and their plans.

    def policy(self, index: int) -> Policy | None:
        return self.policies.get(self[index]["mask"])

    def is_frozen(self, index: int) -> bool:
        """Whether dropped elements stay as they are, instead of having a gradient of 0. Of a group with a policy."""
        policy: Any = self.policy(index)
        masked: str = self[index]["masked"] or policy.masked
        return masked == "frozen"

    def counts_steps(self, index: int) -> bool:
        """Whether the masks of a group depend on how many steps it has made."""
        policy = self.policy(index)
        return policy is not None and policy.counts_steps(self.is_frozen(index))

    def clock(self, index: int) -> Clock:
        group = self[index]
        return Clock(group["epoch"], group["completed_steps"], Clock.parse_history(group["epoch_history"]))

    def plan(self, index: int, unit: Hashable, clock: Clock | None = None) -> MaskPlan:
        """What the policy does to one unit of a group at a time (default: in the next step)."""
        policy, group = self.policy(index), self[index]
        if policy is None:
            return KEEP
        count_active_steps = group["bias_correction"] == "active"
        context = PlanContext(
            clock or self.clock(index), group["seed"], self.is_frozen(index), count_active_steps, self.blocks(index)
        )
        return policy.plan(context, unit)

    def hyper(self, index: int, unit: Hashable, clock: Clock) -> Hyper:
        """The hyper-parameters and the mask of this step, for one unit of one group."""
        group, lr = self[index], self[index]["lr"]
        if not isinstance(lr, torch.Tensor) or (lr.device.type == "cpu" and not lr.requires_grad):
            lr = float(lr)
        beta1, beta2 = map(float, group["betas"])
        return Hyper(
            lr, beta1, beta2, group["eps"], group["weight_decay"], group["amsgrad"], group["maximize"],
            self.plan(index, unit, clock),
        )  # fmt: skip

    def active_fraction(self, index: int, clock: Clock | None = None) -> float:
        """The share of a group's elements kept at a time (default: in the next step): exact for blocks and fixed masks.
        Of sharded parameters as a whole, of flat buffers what is in this process.
        """
        plans: dict[Hashable, MaskPlan] = {}
        active, total = 0.0, 0
        for param, record in zip(self[index]["params"], self.records(index)):
            spans: Sequence[Span | None] = spans_of(param, record) if record.flat else [None]
            words = self.mask_words(index, param, record) if record.flat else [None]
            for span, bits in zip(spans, words):
                unit, numel = (record.unit, param.numel()) if span is None else (span.unit, span.numel)
                if unit not in plans:
                    plans[unit] = self.plan(index, unit, clock)
                plan = plans[unit]
                share = plan.active_fraction
                if plan.kind == "fixed":
                    policy: Any = self.policy(index)  # a FixedMask
                    share = count_kept(policy.words[record.name] if bits is None else bits) / max(numel, 1)
                active += share * numel
                total += numel
        return active / total if total else 1.0

    # Parameters.

    def records(self, index: int) -> list[ParamRecord]:
        return self._records_and_blocks(index)[0]

    def blocks(self, index: int) -> tuple[str, ...]:
        """The model's blocks in forward order; empty where the policy needs none."""
        return self._records_and_blocks(index)[1]

    def _records_and_blocks(self, index: int) -> tuple[list[ParamRecord], tuple[str, ...]]:
        group = self[index]
        made_from: tuple[Any, ...] = (group["seed"], group["mask"], len(group["params"]), group.get("param_names"))
        if self.flat:  # DeepSpeed's stage 3 puts one buffer after the other into a group
            made_from += tuple(map(id, group["params"]))
        cached = self._records.get(index)
        if cached is None or cached[0] != made_from:
            made = make_records(self._optimizer.param_groups, index, self.policy(index), self.flat)
            cached = self._records[index] = (made_from, made)
        return cached[1]

    def find(self, param: torch.Tensor | str) -> tuple[int, int]:
        """(group, position) of a parameter or of its name; of the flat buffer that it is in. Raises KeyError."""
        wanted = canonical_name(param) if isinstance(param, str) else None
        for index, group in enumerate(self._optimizer.param_groups):
            for position, (tensor, record) in enumerate(zip(group["params"], self.records(index))):
                names = [record.name, *(piece.name for piece, _, _ in record.flat)]
                if tensor is param or wanted in names:
                    return index, position
        raise KeyError(
            f"{param!r} is not a parameter of this optimizer"
            if wanted
            else "this tensor is not a parameter of this optimizer"
        )

    def mask_words(self, index: int, param: torch.Tensor, record: ParamRecord) -> list[torch.Tensor | None]:
        """Bit-planes of the buckets or the bits of a fixed mask, of each span, made once a parameter and kept on its
        device; None where the policy stores none.
        """
        policy, spans = self.policy(index), spans_of(param, record)
        if not isinstance(policy, FixedMask) and getattr(policy, "storage", None) != "bitpacked":
            return [None] * len(spans)
        made_for = (spans, param.device, self[index]["mask"])
        cached = self._words.get(param)
        if cached is None or cached[0] != made_for:
            cached = self._words[param] = (made_for, [_mask_words(policy, span, param.device) for span in spans])
        return cached[1]

    def check(self) -> None:
        """Raises ValueError or TypeError for options, policies and parameters that no step could use."""
        for index, group in enumerate(self._optimizer.param_groups):
            check_options(index, group)
            policy = self.policy(index)
            if policy is not None and policy.masked is None and group["masked"] is not None:
                raise ValueError(
                    f"masked={group['masked']!r} does not apply to {type(policy).__name__}, which drops nothing; "
                    "leave it None"
                )
            for param, record in zip(group["params"], self.records(index)):
                check_param(record.name, param)
                self.check_named(index, param, record)
            if len(set(group["params"])) != len(group["params"]):
                raise ValueError(f"a parameter appears twice in parameter group {index}; give each parameter once")
        self.check_fixed_masks(wait=True)

    def check_named(self, index: int, param: torch.Tensor, record: ParamRecord) -> None:
        """Raises ValueError for a DTensor without a name; a wrapper may also have put it into its place later."""
        group = self[index]
        if group["mask"] is not None and "param_names" not in group and not record.flat and is_dtensor(param):
            raise ValueError(
                f"parameter {record.name!r} is sharded and has no name: its place in the optimizer is no key for masks "
                "that are to be the same in any sharding; pass model.named_parameters() or "
                "graddrop_kernels.param_groups(model)"
            )

    def check_fixed_masks(self, wait: bool = False) -> None:
        """Raises ValueError for a FixedMask of no parameter. ``wait``: pieces may still be attached to what has no name
        in this process.
        """
        fixed: dict[FixedMask, dict[str, tuple[int, ...] | None]] = {}
        for index, group in enumerate(self._optimizer.param_groups):
            policy = self.policy(index)
            if not isinstance(policy, FixedMask):
                continue
            nameless = "param_names" not in group and ("block" in group or has_processes())
            unknown = (param for param in group["params"] if param not in self.flat)
            if wait and any(nameless or self.flat_buffer_reason(param) for param in unknown):
                return
            for param, record in zip(group["params"], self.records(index)):
                named: dict[str, tuple[int, ...] | None] = {piece.name: None for piece, _, _ in record.flat}
                named = named or {record.name: tuple(param.shape)}
                fixed.setdefault(policy, {}).update(named)
        for policy, shapes in fixed.items():
            check_fixed_mask(policy, shapes if self.shapes is None else self.shapes)


def _mask_words(policy: Any, span: Span, device: torch.device) -> torch.Tensor | None:
    if isinstance(policy, GradDropEpoch):
        return backends.bucket_planes(span.key, policy.epochs, span.layout, span.numel, device)
    if span.name not in policy.words:
        return None
    return bits_of_layout(policy.words[span.name], span.layout, span.numel).to(device)


def require_optimizer(function: str, optimizer: object) -> None:
    """Raises TypeError unless it is a FusedGradDropAdamW."""
    from ..optimizer import FusedGradDropAdamW  # which imports this module

    if not isinstance(optimizer, FusedGradDropAdamW):
        raise TypeError(
            f"{function}(optimizer) needs a FusedGradDropAdamW, got {type(optimizer).__name__}; "
            "where that is a wrapper around one, pass the one inside"
        )
