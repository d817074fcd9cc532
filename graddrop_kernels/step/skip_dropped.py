"""SkipBackward: the backward pass leaves out the weight gradients of the blocks that the coming step drops."""

import contextlib
import functools
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..backends.capture import capturing
from .prepared import present

if TYPE_CHECKING:
    from ..optimizer import FusedGradDropAdamW


class SkipBackward:
    """What ``optimizer.skip_dropped()`` needs to know beside the optimizer's own state.

    Which blocks a step drops is known before its forward pass: a function of the seed, the epoch, the count of steps
    and the block's name, so equal on all ranks. Their parameters have ``requires_grad`` False inside of the with block.
    The step then finds no gradient for them, and takes them for what they are: dropped, not unused.

    A parameter without state is never skipped: only its first backward pass shows whether it has a gradient at all.
    torch does not step one that has none, and a dropped block must not become the reason to.
    """

    def __init__(self, optimizer: "FusedGradDropAdamW") -> None:
        # Or its moments would wait for the garbage collector.
        self._optimizer: FusedGradDropAdamW = weakref.proxy(optimizer)
        self._inside = False
        # Parameters whose gradients lack a backward pass, since the gradients were last zeroed. A step may only drop
        # them: whatever came between (another epoch, a step too many or too few), that decides whether it is right.
        self.missing: set[torch.Tensor] = set()

    @contextlib.contextmanager
    def around(self, model: torch.nn.Module | None) -> Iterator[None]:
        self.check_outside("skip_dropped()")
        self._check_optimizer()
        check_model(model, self._params())
        self._optimizer._settle_skipped_steps()
        if all(param.grad is None for param in self._params()):
            self.missing.clear()
        skipped = self._skippable()
        self._inside = True
        try:
            for param in skipped:
                param.requires_grad_(False)
            yield
        finally:
            self._inside = False
            for param in skipped:
                param.requires_grad_(True)
            self.missing.update(skipped)

    def complete(
        self, params: list[torch.Tensor], grads: list[torch.Tensor | None], grad_scale: torch.Tensor | None
    ) -> list[torch.Tensor | None]:
        """The gradients of a step, with something in the place of those that were skipped.

        Raises:
            RuntimeError: the step would train what was skipped. ValueError: it needs gradients that were skipped.
        """
        self.check_outside("step()")
        in_backward = self._optimizer._in_backward
        if not self.missing or not (present(grads) or (in_backward and in_backward.under_way)):
            return grads
        self._check_optimizer()
        if trained := self.missing - self._dropped():
            index, position = self._optimizer._groups.find(next(iter(trained)))
            raise RuntimeError(
                f"the gradient of {self._optimizer._groups.records(index)[position].name!r} was skipped in a backward "
                "pass under skip_dropped(), but this step does not drop it: set_epoch(), load_state_dict() or another "
                "step() came in between, or gradients were left from an earlier step; call optimizer.zero_grad(), "
                "then run forward, backward and step() anew"
            )
        return [
            _stand_in(param, grad_scale) if grad is None and param in self.missing else grad
            for param, grad in zip(params, grads)
        ]

    def check_outside(self, what: str) -> None:
        """Raises RuntimeError inside of the with block, where requires_grad of the parameters is not the user's."""
        if self._inside:
            raise RuntimeError(
                f"{what} inside of skip_dropped(), where dropped blocks have requires_grad=False: leave the with block "
                "first; it belongs around the forward and backward passes of one step only"
            )

    def _params(self) -> list[torch.Tensor]:
        return [param for group in self._optimizer.param_groups for param in group["params"]]

    def _dropped(self) -> set[torch.Tensor]:
        """The parameters of which the next step drops the whole gradient."""
        groups = self._optimizer._groups
        found: set[torch.Tensor] = set()
        for index in groups.indices():
            records, clock = groups.records(index), groups.clock(index)
            units = {record.unit for record in records}
            off = {unit for unit in units if groups.plan(index, unit, clock).kind == "off"}
            found.update(param for param, record in zip(groups[index]["params"], records) if record.unit in off)
        return found

    def _skippable(self) -> list[torch.Tensor]:
        known = [param for param in self._params() if param.requires_grad and self._optimizer.state.get(param)]
        dropped = self._dropped()
        skipped = [param for param in known if param in dropped]
        # A loss that depends on nothing trainable has no backward pass: one parameter stays, the last and cheapest.
        return skipped[:-1] if len(skipped) == len(known) else skipped

    def _check_optimizer(self) -> None:
        optimizer = self._optimizer
        if optimizer.max_grad_norm is not None and not optimizer.norm_after_mask:
            raise ValueError(
                f"max_grad_norm={optimizer.max_grad_norm!r} is a limit on the norm of all gradients, and "
                "skip_dropped() leaves those of dropped blocks out: set norm_after_mask=True, which counts them as 0, "
                "or max_grad_norm=None"
            )
        if optimizer.defaults["differentiable"]:
            raise ValueError(
                "differentiable=True needs the derivatives by all parameters: train without skip_dropped(), or with "
                "differentiable=False"
            )
        if optimizer._captured is not None or any(map(capturing, {param.device for param in self._params()})):
            raise RuntimeError(
                "a CUDA graph repeats the backward pass that it captured, and each step drops other blocks: "
                "skip_dropped() works with steps that are not captured only"
            )


def _stand_in(param: torch.Tensor, grad_scale: torch.Tensor | None) -> torch.Tensor:
    """For the gradient of a dropped parameter, of which the step takes only shape, dtype and device.

    The parameter itself will do, so that it costs no memory, unless gradients are unscaled, hence written.
    """
    return param.detach() if grad_scale is None else torch.zeros_like(param)


def check_model(model: torch.nn.Module | None, params: list[torch.Tensor]) -> None:
    """Raises RuntimeError for wrappers under which parameters cannot change between requires_grad True and False, or
    if it cannot be seen which wrapper there is.
    """
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if model is None and several and not all(hasattr(param, "placements") for param in params):
        raise RuntimeError(
            "skip_dropped() must see the wrapper that averages the gradients of several processes: pass the wrapped "
            "model, optimizer.skip_dropped(model)"
        )
    for name, module in model.named_modules() if model is not None else ():
        if reason := _misfit(module):
            raise RuntimeError(f"skip_dropped(): module {name!r} ({type(module).__name__}) {reason}")


def _misfit(module: torch.nn.Module) -> str | None:
    """Why skipping would fail, or train wrongly, with this module."""
    averages = isinstance(module, torch.nn.parallel.DistributedDataParallel)
    if averages and module.static_graph:
        return "has static_graph=True, and its graph changes with the dropped blocks: make it without"
    if averages and not module.find_unused_parameters:
        return "waits for the gradients of dropped blocks: make it with find_unused_parameters=True"
    if type(module).__name__ == "FullyShardedDataParallel":  # FSDP1, not imported for this
        return "keeps many parameters in one flat one, which has one requires_grad: use fully_shard (FSDP2)"
    hugging_face = getattr(module, "gradient_checkpointing", False) is True
    checkpoint = getattr(module, "_gradient_checkpointing_func", None) if hugging_face else None
    reentrant = isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant", True)
    if reentrant or getattr(getattr(module, "checkpoint_impl", None), "name", None) == "REENTRANT":
        return (
            "is checkpointed with use_reentrant=True, which gives a trained block no gradients where everything below "
            "it is dropped: use use_reentrant=False"
        )
    return None
