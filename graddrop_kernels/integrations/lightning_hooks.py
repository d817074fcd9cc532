"""Hooks of GradDropCallback in a Trainer of Lightning, for both of its packages."""

import contextlib
import warnings
from typing import Any

from .activation_dropout import warn_of_activation_dropout
from .optimizer_of import Masked, describe_masks, unwrapped


class GradDropHooks:
    """Sets the epoch of every FusedGradDropAdamW of the trainer, and of those with ``attach_mask``, also after a resume
    in mid-epoch. Logs what the masks of each step did: ``graddrop_epoch``, ``graddrop_active_fraction`` and,
    where a policy has one, ``graddrop_p`` (with ``_0``, ``_1`` ... at the end if there are several such optimizers).

    Warns if the model drops out hidden activations, which the paper turns off. Leaves other optimizers alone, with a
    warning if there is none of ours.

    Args:
        skip_dropped: leave out the weight gradients of the blocks that a step drops, see
            ``FusedGradDropAdamW.skip_dropped``. DistributedDataParallel needs ``find_unused_parameters``.

    Raises, when training begins:
        ValueError: ``skip_dropped`` with manual optimization, where a batch may have any number of steps, or with the
            trainer's ``gradient_clip_val``, whose norm would lack the gradients that were left out.
    """

    def __init__(self, skip_dropped: bool = False) -> None:
        self.skip_dropped = skip_dropped
        self._optimizers: list[Masked] = []
        self._skipping = contextlib.ExitStack()
        self._ahead: list[int] = []  # epochs that each optimizer is ahead of the trainer, see on_train_start

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._skipping.close()  # open if an exception ended the last training
        known = set(map(id, self._optimizers))
        self._optimizers = [found for found in map(unwrapped, trainer.optimizers) if found is not None]
        # A state that was loaded past the trainer, whose counter begins at 0, goes on from its own epoch. An optimizer
        # of the last training begins another one.
        self._ahead = [
            0 if id(one) in known else max(0, one.param_groups[0]["epoch"] - trainer.current_epoch)
            for one in self._optimizers
        ]
        if not self._optimizers:
            warnings.warn(
                f"GradDropCallback: the trainer's optimizers are {[type(one).__name__ for one in trainer.optimizers]}, "
                "none of them a FusedGradDropAdamW, or with attach_mask(); return one from configure_optimizers()",
                stacklevel=2,
            )
            return
        if self.skip_dropped:
            self._check_skipping(trainer, pl_module)
        for optimizer in self._optimizers:
            warn_of_activation_dropout(pl_module, optimizer)
        self._set_epoch(trainer)  # a run resumed in mid-epoch does not begin that epoch again

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._set_epoch(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.skip_dropped:
            for optimizer in self._optimizers:
                self._skipping.enter_context(optimizer.skip_dropped(trainer.strategy.model))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._skipping.close()  # the backward pass, which Lightning runs inside of step(), is over

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._skipping.close()  # open after a batch without a step, whose gradients accumulate
        for number, optimizer in enumerate(self._optimizers):
            end = f"_{number}" if len(self._optimizers) > 1 else ""
            found = {name + end: float(value) for name, value in describe_masks(optimizer).items()}
            pl_module.log_dict(found, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._skipping.close()  # open if the module's on_train_batch_start() has ended the epoch

    def on_exception(self, trainer: Any, pl_module: Any, exception: Any) -> None:
        self._skipping.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._skipping.close()

    def _set_epoch(self, trainer: Any) -> None:
        for optimizer, ahead in zip(self._optimizers, self._ahead):
            optimizer.set_epoch(trainer.current_epoch + ahead)

    def _check_skipping(self, trainer: Any, pl_module: Any) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                "GradDropCallback(skip_dropped=True) with automatic_optimization=False: a batch may have any number of "
                "steps; enter optimizer.skip_dropped() in training_step() yourself"
            )
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
            raise ValueError(
                f"GradDropCallback(skip_dropped=True) with gradient_clip_val={trainer.gradient_clip_val!r}: the norm "
                "would lack the gradients that are left out; set gradient_clip_val=None, and clip in the optimizer: "
                "FusedGradDropAdamW(..., max_grad_norm=..., norm_after_mask=True)"
            )
