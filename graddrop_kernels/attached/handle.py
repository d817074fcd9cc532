"""attach_mask: the masks of this package on the gradients of any optimizer, by hooks around its step."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version

from .. import backends
from ..groups.checks import check_names, check_param
from ..groups.flat_buffers import FlatPiece
from ..groups.masking import Masking
from ..groups.options import check_epoch, check_seed
from ..inspection.describe import describe_masks
from ..masks.plan import MaskPlan
from ..policies import Clock, Policy, PolicyBook
from ..step.prepare import warn_of_position_names, warn_of_unknown_epochs
from ..step.prepared import grad_of
from ..step.skip_dropped import SkipDropped
from ..step.streams import Streams
from ..step.warn_once import WarnOnce
from ..tensors.local import is_dtensor, local_grads
from .checks import check_grads, check_step, is_state_probe
from .gradients import GradientBatches, Place
from .groups import KEYS, MaskedGroups, keys_of_user, name_params
from .owner import AttachedOwner
from .refuse import check_policy, inner

_attached: "weakref.WeakKeyDictionary[torch.optim.Optimizer, AttachedMask]" = weakref.WeakKeyDictionary()


def attach_mask(
    optimizer: torch.optim.Optimizer,
    mask: Policy | None,
    *,
    model: nn.Module | None = None,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    seed: int = 0,
    masked: str | None = None,
    backend: str = "auto",
) -> "AttachedMask":
    """Masks the gradients of any optimizer before each of its steps: 0 where they are dropped, else times the mask's
    scale. With ``torch.optim.SGD`` this is the paper's Eq. 3 and 4.

    It is one pass over the gradients, in place, with the bits that FusedGradDropAdamW draws for the same names, seed
    and steps. Dropped blocks of policies that freeze (GradFreeze, SampleBlocks, CycleBlocks, LayerGradDrop with
    ``masked="frozen"``) have no gradient during the step, so that the optimizer leaves them alone, and have it again
    after it. The mask acts on all groups, but on those with ``"mask": None``, as ``param_groups(model)`` makes them.

    The optimizer's own ``param_groups`` keep the policy, the epoch and all counts, so that its state dict resumes
    exactly. Attach the same mask to the new optimizer, before or after it loads. A copy of an optimizer has no mask
    until one is attached to it.

    Args:
        optimizer: of torch or of another package, as SGD, Muon, Adafactor, Lion, an 8-bit AdamW. To
            FusedGradDropAdamW give ``mask=`` itself.
        mask: a policy of ``graddrop_kernels``. A group's own ``"mask"`` goes before it.
        model: gives names and, to policies of whole blocks, the blocks. Not needed if the optimizer was made from
            ``model.named_parameters()`` or ``param_groups(model)``.
        named_parameters: gives names only.
        seed: int in [0, 2^64).
        masked: ``"gradient"`` or, for policies of whole blocks, ``"frozen"``. None: the policy's own choice.
        backend: as in FusedGradDropAdamW.

    Returns:
        A handle with ``set_epoch(epoch)``, ``mask(param, step=None)``, ``active_fraction()``, ``describe()`` and
        ``skip_dropped(model)``, as FusedGradDropAdamW has them, and ``remove()``.

    Raises:
        TypeError, ValueError: an argument that cannot work, or an optimizer that cannot be masked from outside: LBFGS
            and ZeroRedundancyOptimizer, ``differentiable=True``, masks on single elements that are frozen. Nothing has
            changed.

    Example:
        >>> import torch
        >>> from graddrop_kernels import GradDrop, attach_mask
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> masks = attach_mask(optimizer, GradDrop(p=0.2), model=model)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> masks.mask("weight", step=0).shape
        torch.Size([2, 4])
    """
    optimizer = inner(optimizer)
    if optimizer in _attached:
        raise ValueError("a mask is attached to this optimizer already: call remove() of its handle first")
    named = None if named_parameters is None else list(named_parameters)
    if named is not None and model is not None:
        raise ValueError("give attach_mask the model or named_parameters, not both: the model gives the names too")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    return AttachedMask(optimizer, mask, named, model, seed, masked, backends.check_name(backend))


def attached_to(optimizer: Any) -> "AttachedMask | None":
    """The mask that is attached to this very optimizer, not to one inside of it; None if there is none."""
    return _attached.get(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else None


class AttachedMask:
    """A mask on an optimizer, made by ``attach_mask()``."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, mask: Policy | None, named: list[tuple[str, torch.Tensor]] | None,
        model: nn.Module | None, seed: int, masked: str | None, backend: str,
    ) -> None:  # fmt: skip
        book = PolicyBook()
        self.warn, self._streams = WarnOnce(), Streams()
        self.owner = AttachedOwner(optimizer, backend)
        owner: Any = self.owner  # as an Owner, though nobody replaces its attributes
        self.masking = Masking(owner, book)
        self.masking.buffers.note(optimizer.param_groups)  # flat tensors that come later are an engine's
        self._groups = MaskedGroups(book, mask, seed, masked)
        self.captured: tuple[()] = ()  # for SkipDropped: steps in CUDA graphs, of which there are none
        this: Any = self
        self._skip_dropped = SkipDropped(this)
        self._batches: GradientBatches | None = None
        self._held: list[tuple[torch.Tensor, torch.Tensor | None]] = []  # gradients that come back after the step
        self._counted: dict[int, list[int]] | None = None  # per group, the parameters that the step under way counts
        self._clocks: list[Clock] = []
        self._masked: list[tuple[weakref.ref[torch.Tensor], int]] = []  # the last masked gradients, and their versions
        self._awaited = False  # whether the optimizer has still to call the step's closure
        self._checked = 0  # groups
        before = [dict(group) for group in optimizer.param_groups]
        try:
            self._added = name_params(optimizer, named, model, mask)
            self._check()
        except BaseException:
            for group, values in zip(optimizer.param_groups, before):
                group.clear()
                group.update(values)
            raise
        self._before_groups = list(map(keys_of_user, before))
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_pre_hook(self._check_file),
            optimizer.register_load_state_dict_post_hook(self._forget),
        ]
        _attached[optimizer] = self

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that is masked."""
        return self.owner.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Its parameter groups, with the keys of the mask."""
        return self.owner.param_groups

    # What a user asks for.

    @_disable_dynamo
    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that policies follow, as ``FusedGradDropAdamW.set_epoch`` does."""
        check_epoch(epoch)
        self._skip_dropped.check_outside("set_epoch()")
        self._check()
        self.masking.set_epoch(epoch, self.warn)

    def mask(self, param: torch.Tensor | str, step: int | None = None) -> torch.Tensor:
        """Returns a parameter's keep mask, as ``FusedGradDropAdamW.mask`` does."""
        self._check()
        return self.masking.keep(param, step)

    def active_fraction(self) -> list[float]:
        """Returns the share of elements that the next step keeps, in [0, 1] per group."""
        self._check()
        return list(map(self.masking.active_fraction, self.masking.indices()))

    def describe(self) -> str:
        """Returns a text table of what the next step would mask, as ``FusedGradDropAdamW.describe`` does."""
        self._check()
        return describe_masks(self.masking, plain=f"plain {type(self.optimizer).__name__}")

    def skip_dropped(self, model: nn.Module | None = None) -> AbstractContextManager[None]:
        """Leaves out the weight gradients of the blocks that the coming step drops, as
        ``FusedGradDropAdamW.skip_dropped`` does.
        """
        self._check()
        return self._skip_dropped.around(model)

    def attach_pieces(
        self,
        pieces: Mapping[torch.Tensor, Sequence[FlatPiece]],
        shapes: Mapping[str, Sequence[int]] | None = None,
        has_gradients: Callable[[int], bool] | None = None,
    ) -> None:
        """Describes the flat buffers among the optimizer's parameters, as ``FusedGradDropAdamW.attach_pieces`` does.
        ``attach_fsdp1`` and ``attach_deepspeed`` call it.
        """
        self.masking.attach_pieces(pieces, shapes, (), has_gradients, self._check_again)
        self._batches = None

    def remove(self) -> None:
        """Takes the mask off: later steps are the optimizer's own, and its groups have no keys of the mask any more."""
        self._skip_dropped.check_outside("remove()")
        for hook in self._hooks:
            hook.remove()
        optimizer = self.optimizer
        _attached.pop(optimizer, None)
        for index, group in enumerate(optimizer.param_groups):
            for key in (*KEYS, *(self._added[index] if index < len(self._added) else ())):
                group.pop(key, None)
            group.update(self._before_groups[index] if index < len(self._before_groups) else {})

    # What SkipDropped asks for, of a Stepper.

    def settle(self, only_if_needed: bool = False) -> None:
        """Does nothing: all counts are on the host."""

    # Checks.

    def _check(self) -> None:
        """Raises ValueError or TypeError for groups that no step can mask. Groups of before are looked at again only in
        what can change.
        """
        optimizer, masking = self.optimizer, self.masking
        self._groups.bring(optimizer)
        if self._checked == len(optimizer.param_groups):
            return
        for index, group in enumerate(optimizer.param_groups):
            check_seed(index, group["seed"])
            check_policy(index, masking.policy(index), group["masked"])
            if group.get("differentiable"):
                raise ValueError(
                    f"differentiable=True of parameter group {index} records the step for autograd, and a mask in "
                    "place is no part of it: use FusedGradDropAdamW(differentiable=True)"
                )
            policy = masking.policy(index)
            if policy is not None and policy.takes_turns:
                policy.check_blocks(masking.blocks(index))
            for param, record in zip(group["params"], masking.records(index)):
                if param.requires_grad or param.grad is not None:
                    check_param(record.name, param)
        check_names(masking)
        self._checked = len(optimizer.param_groups)

    def _check_again(self) -> None:
        self._checked = 0
        self._check()

    def _check_file(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        self._skip_dropped.check_outside("load_state_dict()")
        self._groups.check_file(optimizer, state_dict)

    def _forget(self, optimizer: torch.optim.Optimizer) -> None:
        self._groups.bring(optimizer)  # now, as DeepSpeed shows a step only one of the new groups
        self.masking.forget()
        self._batches = None

    # The step.

    @_disable_dynamo
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        """Masks the gradients, or lets the step's closure do so after it has computed them."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._awaited = False
        if closure is None:
            with torch.no_grad():
                self._mask(optimizer)
            return None
        self._counted, self._awaited = None, True
        masked = self._masked_closure(optimizer, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": masked}
        return (args[0], masked, *args[2:]), kwargs

    def _masked_closure(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def masked() -> Any:
            if self._counted is not None:
                raise RuntimeError(
                    f"{type(optimizer).__name__} calls its closure more than once in a step, and a step has one mask: "
                    "attach_mask works with optimizers that compute gradients once per step"
                )
            self._awaited = False
            loss = closure()
            with torch.no_grad():
                self._mask(optimizer)
            return loss

        return masked

    def _mask(self, optimizer: torch.optim.Optimizer) -> None:
        """Masks the gradients of this step. Raises before anything has changed."""
        self._restore()
        self._counted = None
        self._check()
        groups, masking = optimizer.param_groups, self.masking
        params = [param for group in groups for param in group["params"]]
        grads = list(map(grad_of, params))
        check_step(optimizer, [grad for grad in grads if grad is not None], self._masked)
        if is_state_probe(optimizer, params, grads):
            return
        completed = self._skip_dropped.complete(params, grads, None, False)
        clocks = masking.clocks()
        plans: dict[tuple[int, Any], MaskPlan] = {}
        places: list[Place] = []  # of what is masked in place
        counted: dict[int, list[int]] = {}
        held: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        start = 0
        for index, group in enumerate(groups):
            own, stop = group["params"], start + len(group["params"])
            there = [position for position, grad in enumerate(completed[start:stop]) if grad is not None]
            given, start = grads[start:stop], stop
            if not there:
                continue
            counted[index] = there
            if masking.policy(index) is None:
                continue
            records = masking.records(index)
            units = {records[position].unit for position in there}
            if masking.buffers.pieces:
                units = {unit for position in there for unit in records[position].units}
            plans |= {(index, unit): masking.plan(index, unit, clocks[index]) for unit in units}
            if masking.is_frozen(index):
                dropped = {unit for unit in units if plans[index, unit].kind == "off"}
                idle = [position for position in there if records[position].unit in dropped]
                held += [(own[position], given[position]) for position in idle if given[position] is not None]
                counted[index] = [position for position in there if records[position].unit not in dropped]
            else:  # what was skipped has a gradient of 0 in this step
                held += [(own[position], None) for position in there if given[position] is None]
                places += [(index, position) for position in there if given[position] is not None]
        self._mask_in_place(places, plans)
        for param, grad in held:
            param.grad = torch.zeros_like(param) if grad is None else None
        self._held, self._counted, self._clocks = held, counted, clocks

    def _mask_in_place(self, places: list[Place], plans: dict[tuple[int, Any], MaskPlan]) -> None:
        groups = self.param_groups
        params = [groups[index]["params"][position] for index, position in places]
        given: list[Any] = list(map(grad_of, params))
        if not set(map(type, given)) <= {torch.Tensor}:
            for param, grad in zip(params, given):  # what is masked must be what is stepped
                if is_dtensor(param) and is_dtensor(grad) and grad.placements != param.placements:
                    param.grad = grad.redistribute(placements=param.placements)
            given = list(map(grad_of, params))
        grads = local_grads(params, given)
        check_grads(grads)
        made_for = [(group["mask"], group["seed"], group.get("param_names")) for group in groups]
        if self._batches is None or not self._batches.holds(places, params, grads, made_for):
            warn_of_position_names(self.masking, self.warn)
            warn_of_unknown_epochs(self.masking, self.warn, {index for index, _ in places})
            batches = GradientBatches(self.masking, self.owner.backend, places, params, grads, made_for)
            self._streams.hold(self.masking.drawn_streams())
            self._batches = batches
        self._batches.mask_(grads, plans, [group["param_steps"] for group in groups])
        increment_version(given if grads is given else [*given, *grads])
        self._masked = [(weakref.ref(grad), grad._version) for grad in given]

    @_disable_dynamo
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        """Gives dropped blocks their gradients back, and counts the step."""
        counted, self._counted = self._counted, None
        self._restore()
        if self._awaited:
            self._awaited = False
            raise RuntimeError(
                f"{type(optimizer).__name__} did not call the closure of step(), so that nothing was masked: "
                "compute the gradients before step()"
            )
        if counted is None:
            return
        self._skip_dropped.missing.clear()
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) != 0:
            return  # a GradScaler has made the step a no-op
        self.warn(self._streams.warning_of_step())
        buffers = self.masking.buffers
        elsewhere = set(filter(buffers.has_gradients, self.masking.indices()))
        for index in elsewhere | counted.keys():
            group = optimizer.param_groups[index]
            steps = list(group["param_steps"])  # a new list: a state dict may hold the old one
            positions = counted.get(index, [])
            if index in elsewhere:  # a slice without elements in this process makes the step of the others
                empty = [place for place, param in enumerate(group["params"]) if buffers.pieces.get(param) == ()]
                positions = positions + empty
            for position in positions:
                steps[position] += 1
            group["param_steps"] = steps
            self.masking.count_step(index, self._clocks[index])
        if self._batches is not None:
            self._batches.count()

    def _restore(self) -> None:
        for param, grad in self._held:
            if grad is None:
                param.grad = None
            elif param.grad is None:
                param.grad = grad
        self._held = []
