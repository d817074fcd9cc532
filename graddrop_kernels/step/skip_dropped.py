"""SkipDropped: the backward pass leaves out the weight gradients of the blocks that the coming step drops."""

import contextlib
import functools
from collections.abc import Iterator

import torch

from ..backends import capture
from ..tensors.local import several_processes
from .idle_state import drops_idle_state
from .stepper import Stepper


class SkipDropped:
    """Implements ``optimizer.skip_dropped()``, and keeps what it must know beside the optimizer's own state.

    Which blocks a step drops is known before its forward pass. It depends only on the seed, the epoch, the count of
    steps and the block's name, so it is equal on all ranks. Inside of the with block, the parameters of these blocks
    have ``requires_grad`` False. The step then finds no gradient for them, and treats them as dropped, not as unused.

    A parameter without state is not skipped, because only its first backward pass shows whether it has a gradient at
    all. torch does not step a parameter that has none, and a dropped block must not change that. Under
    ``idle_state="drop"`` it does not matter: a dropped block has no state anyway.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._inside = False
        # Parameters that missed a backward pass since gradients were last zeroed. The next step must drop all of them;
        # if anything in between (a new epoch, an extra step) has changed that, complete() raises.
        self.missing: set[torch.Tensor] = set()

    @contextlib.contextmanager
    def around(self, model: torch.nn.Module | None) -> Iterator[None]:
        self.check_outside("skip_dropped()")
        self._check_optimizer()
        check_model(model, self._everything())
        self._stepper.settle()
        if all(param.grad is None for param in self._everything()):
            self.missing.clear()
        skipped = self._skippable()
        try:
            self._inside = True
            for param in skipped:
                param.requires_grad_(False)
            yield
        finally:
            for param in skipped:
                param.requires_grad_(True)
            self._inside = False
            self.missing.update(skipped)

    def complete(
        self, params: list[torch.Tensor], grads: list[torch.Tensor | None], grad_scale: torch.Tensor | None,
        under_way: bool,
    ) -> list[torch.Tensor | None]:  # fmt: skip
        """The gradients of a step, with a stand-in for each one that was skipped.

        Args:
            under_way: whether parameters have been stepped for this step already, in the backward pass.

        Raises:
            RuntimeError: the step would train a parameter whose gradient was skipped.
            ValueError: the step needs gradients that were skipped.
        """
        self.check_outside("step()")
        if not self.missing or not (under_way or any(grad is not None for grad in grads)):
            return grads
        self._stepper.settle(only_if_needed=True)
        self._check_optimizer()
        if trained := self.missing - self._dropped():
            name = self._stepper.masking.record_of(next(iter(trained))).name
            raise RuntimeError(
                f"the gradient of {name!r} was skipped in a backward pass under skip_dropped(), but this step does not "
                "drop it: set_epoch(), load_state_dict() or another step() came in between, or gradients were left "
                "from an earlier step; call optimizer.zero_grad(), then run forward, backward and step() anew"
            )
        return [
            _stand_in(param, grad_scale) if grad is None and param in self.missing else grad
            for param, grad in zip(params, grads)
        ]

    def check_outside(self, what: str) -> None:
        """Raises RuntimeError inside of the with block, where requires_grad is not what the user has set."""
        if self._inside:
            raise RuntimeError(
                f"{what} inside of skip_dropped(), where dropped blocks have requires_grad=False: leave the with block "
                "first; it belongs around the forward and backward passes of one step only"
            )

    def _everything(self) -> list[torch.Tensor]:
        return [param for group in self._stepper.owner.param_groups for param in group["params"]]

    def _dropped(self) -> set[torch.Tensor]:
        """The parameters whose whole gradient the next step drops."""
        masking = self._stepper.masking
        found: set[torch.Tensor] = set()
        for index in masking.indices():
            records, clock = masking.records(index), masking.clock(index)
            units = {record.unit for record in records}
            plans = {unit: masking.plan(index, unit, clock) for unit in units}
            off = {unit for unit, plan in plans.items() if plan.kind == "off" and not plan.update}
            found.update(param for param, record in zip(masking[index]["params"], records) if record.unit in off)
        return found

    def _skippable(self) -> list[torch.Tensor]:
        owner, masking = self._stepper.owner, self._stepper.masking
        dropping = [drops_idle_state(masking, index) for index in masking.indices()]
        known = [
            param
            for group, drops in zip(owner.param_groups, dropping)
            for param in group["params"]
            if param.requires_grad and (drops or owner.state.get(param))
        ]
        dropped = self._dropped()
        skipped = [param for param in known if param in dropped]
        # A loss that depends on nothing trainable has no backward pass: one parameter stays, the last and cheapest.
        return skipped[:-1] if len(skipped) == len(known) else skipped

    def _check_optimizer(self) -> None:
        owner = self._stepper.owner
        if owner.max_grad_norm is not None and not owner.norm_after_mask:
            raise ValueError(
                f"max_grad_norm={owner.max_grad_norm!r} is a limit on the norm of all gradients, and "
                "skip_dropped() leaves those of dropped blocks out: set norm_after_mask=True, which counts them as 0, "
                "or max_grad_norm=None"
            )
        if owner.defaults["differentiable"]:
            raise ValueError(
                "differentiable=True needs the derivatives by all parameters: train without skip_dropped(), or with "
                "differentiable=False"
            )
        devices = {param.device for param in self._everything()}
        if self._stepper.captured or any(map(capture.capturing, devices)):
            raise RuntimeError(
                "a CUDA graph repeats the backward pass that it captured, and each step drops other blocks: "
                "skip_dropped() works with steps that are not captured only"
            )


def _stand_in(param: torch.Tensor, grad_scale: torch.Tensor | None) -> torch.Tensor:
    """A tensor in place of a dropped parameter's gradient. The step uses only its shape, dtype and device.

    It is the parameter itself, which costs no memory. Gradients that are unscaled are written, so there it is zeros.
    """
    return param.detach() if grad_scale is None else torch.zeros_like(param)


def check_model(model: torch.nn.Module | None, params: list[torch.Tensor]) -> None:
    """Raises RuntimeError for a wrapper under which requires_grad of parameters cannot change from step to step. With
    several processes it also raises if there is no model that shows the wrapper, unless all parameters are DTensors.
    """
    if model is None and several_processes() and not all(hasattr(param, "placements") for param in params):
        raise RuntimeError(
            "skip_dropped() must see the wrapper that averages the gradients of several processes: pass the wrapped "
            "model, optimizer.skip_dropped(model)"
        )
    for name, module in model.named_modules() if model is not None else ():
        if reason := _misfit(module):
            raise RuntimeError(f"skip_dropped(): module {name!r} ({type(module).__name__}) {reason}")


def _misfit(module: torch.nn.Module) -> str | None:
    """The reason why skipping would fail, or train wrongly, with this module; None if there is none."""
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
