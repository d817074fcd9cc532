"""Hugging Face Trainer (transformers 5): the optimizer that it makes, and the callback that tells it the epoch.

    trainer = Trainer(
        model, args, train_dataset=...,
        optimizer_cls_and_kwargs=trainer_optimizer(args, mask=GradDrop(p=0.2)),
        callbacks=[GradDropCallback()],
    )
"""

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments

from ..blocks import Layers
from ..groups import param_groups
from ..optimizer import FusedGradDropAdamW
from ..policies import GradDrop, Policy
from .optimizer_of import describe_masks, unwrapped


class GradDropFactory:
    """What Trainer calls for its optimizer, with the model, so that parameters have names and blocks are known."""

    def __call__(
        self, model: nn.Module, *, weight_decay: float, exclude: Any, layers: Any, **arguments: Any
    ) -> FusedGradDropAdamW:
        return FusedGradDropAdamW(param_groups(model, weight_decay, exclude, layers), **arguments)


def trainer_optimizer(
    args: TrainingArguments,
    mask: Policy | Callable[[int], Policy] | None = GradDrop(),  # noqa: B008 (immutable)
    *,
    exclude: str | Iterable[str] = (),
    layers: Layers | None = None,
    **arguments: Any,
) -> tuple[type[GradDropFactory], dict[str, Any]]:
    """For ``Trainer(optimizer_cls_and_kwargs=...)``: FusedGradDropAdamW in the paper's scope.

    Args:
        args: learning rate, betas, eps and weight decay are taken from here. Trainer clips gradients itself, by
            ``args.max_grad_norm``.
        mask: a policy, or a function of the number of epochs that makes one: ``GradDropEpoch``,
            ``lambda epochs: GradDrop(LinearAnneal(epochs))``.
        exclude, layers: as in ``param_groups``.
        arguments: others of FusedGradDropAdamW, as ``seed`` (default: ``args.seed``), ``moment_dtype``.

    Returns:
        What Trainer calls with the model, and the keyword arguments that it adds.

    Raises:
        ValueError: a function for ``mask``, and ``args.max_steps`` instead of a number of epochs.
    """
    if mask is not None and not isinstance(mask, Policy):
        if args.max_steps > 0:
            raise ValueError(
                f"mask={mask!r} needs the number of epochs, but args.max_steps={args.max_steps} decides how long is "
                "trained: give a policy with its number of epochs"
            )
        mask = mask(math.ceil(args.num_train_epochs))
    return GradDropFactory, {
        "lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay, "exclude": exclude, "layers": layers, "mask": mask, "seed": args.seed,
        **arguments,
    }  # fmt: skip


class GradDropCallback(TrainerCallback):
    """Tells the optimizer the epoch, also after a resume in mid-epoch, and logs what its masks do: ``graddrop_epoch``,
    ``graddrop_active_fraction`` and, where a policy has one, ``graddrop_p``.

    Warns where the model drops out hidden activations, which the paper turns off. Works under Accelerate's and
    DeepSpeed's wrappers of the optimizer; another optimizer is left alone, with a warning.

    Args:
        skip_dropped: leave out the weight gradients of the blocks that a step drops, see
            ``FusedGradDropAdamW.skip_dropped``. In one process or under FSDP2.

    Raises:
        ValueError: when training begins, ``skip_dropped`` with ``args.max_grad_norm``: Trainer would clip by a norm
            without the gradients that were left out. Set it to 0, and give ``trainer_optimizer`` a ``max_grad_norm``
            and ``norm_after_mask``.
    """

    def __init__(self, skip_dropped: bool = False):
        self.skip_dropped = skip_dropped
        self._optimizer: FusedGradDropAdamW | None = None
        self._skipping: AbstractContextManager[None] | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self._leave()  # a training that an exception has ended
        self._optimizer = unwrapped(optimizer)
        if self._optimizer is None:
            warnings.warn(
                f"GradDropCallback: the trainer's optimizer is a {type(optimizer).__name__}, not a FusedGradDropAdamW; "
                "pass optimizer_cls_and_kwargs=trainer_optimizer(args, ...)",
                stacklevel=2,
            )
            return
        if self.skip_dropped and args.max_grad_norm:
            raise ValueError(
                f"GradDropCallback(skip_dropped=True) with args.max_grad_norm={args.max_grad_norm!r}: the norm would "
                "lack the gradients that are left out; set args.max_grad_norm=0, and clip in the optimizer: "
                "trainer_optimizer(args, ..., max_grad_norm=..., norm_after_mask=True)"
            )
        config = getattr(model, "config", None)
        rates = {name: getattr(config, name, 0) for name in ("hidden_dropout_prob", "dropout", "resid_pdrop")}
        on = {name: rate for name, rate in rates.items() if isinstance(rate, float) and rate > 0}
        if on and any(group["mask"] is not None for group in self._optimizer.param_groups):
            warnings.warn(
                f"the model drops out activations ({on}) beside masked gradients; the paper turns it off: set it to 0 "
                "in the model's config",
                stacklevel=2,
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._optimizer is not None:
            self._optimizer.set_epoch(int(state.epoch))  # a run resumed in mid-epoch begins it with a fraction

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.skip_dropped and self._optimizer is not None:
            self._skipping = self._optimizer.skip_dropped()
            self._skipping.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._skipping is not None:
            self._skipping.__exit__(None, None, None)
            self._skipping = None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs is None or self._optimizer is None or "loss" not in logs:
            return
        found = describe_masks(self._optimizer)
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)  # Trainer has put a copy there already
