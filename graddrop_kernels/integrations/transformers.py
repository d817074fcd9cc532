"""Hugging Face Trainer: makes its optimizer, and the callback that sets the optimizer's epoch.

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
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments

from ..groups.blocks import Layers
from ..groups.param_groups import param_groups
from ..optimizer import FusedGradDropAdamW
from ..policies import GradDrop, Policy
from ..tensors.local import is_dtensor
from .activation_dropout import warn_of_activation_dropout
from .deepspeed import attach_deepspeed
from .fsdp1 import attach_fsdp1
from .optimizer_of import describe_masks, unwrapped


class GradDropFactory:
    """Makes the optimizer when Trainer calls it with the model, so that parameters have names and blocks are known.

    transformers 5 makes an instance and calls it with the model. transformers 4 makes an instance from the parameters
    that it has grouped itself, without names, or from the entry "model" of the arguments.
    """

    def __new__(cls, model: Any = None, **arguments: Any) -> Any:
        factory = super().__new__(cls)
        return factory if model is None else factory(model, **arguments)

    def __call__(
        self, trained: Any, *, args: TrainingArguments, model: nn.Module | None = None,
        exclude: str | Iterable[str] = (), layers: Layers | None = None, **arguments: Any,
    ) -> FusedGradDropAdamW:  # fmt: skip
        model = trained if model is None else model
        if not isinstance(model, nn.Module):
            raise TypeError(
                "this version of transformers hands the optimizer no model, hence neither names nor blocks: "
                "trainer_optimizer(args, ..., model=model)"
            )
        # DeepSpeed makes one flat tensor per group, and policies of blocks need one per block.
        per_block = getattr(args, "hf_deepspeed_config", None) is not None
        groups = param_groups(model, arguments.pop("weight_decay", args.weight_decay), exclude, layers, per_block)
        groups = self.adapt(groups, model, args)
        values = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        optimizer = FusedGradDropAdamW(groups, **{"seed": args.seed, **values, **arguments})
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):  # FSDP1
            attach_fsdp1(optimizer, model)
        optimizer.register_load_state_dict_post_hook(_forget_that_epoch_was_set)
        optimizer.register_step_pre_hook(_require_epoch)
        return optimizer

    def adapt(
        self, groups: list[dict[str, Any]], model: nn.Module, args: TrainingArguments
    ) -> list[dict[str, Any]]:
        """Adapts the optimizer's groups, for subclasses: another learning rate for some parameters, for example."""
        return groups


def _attach_to_deepspeed(optimizer: Any, model: nn.Module, args: TrainingArguments, state: Any) -> None:
    """Attaches ``optimizer`` as Trainer shows it: Accelerate's wrapper around DeepSpeed's around ours."""
    inner = optimizer
    while not isinstance(inner, FusedGradDropAdamW):
        optimizer, inner = inner, inner.optimizer
    if not type(optimizer).__module__.startswith("deepspeed."):
        return
    config: Any = args.hf_deepspeed_config
    # Trainer keeps the engine to itself, and has loaded a checkpoint already if it resumes from one.
    engine = SimpleNamespace(
        basic_optimizer=inner, optimizer=optimizer, module=model,
        zero_elastic_checkpoint=lambda: config.get_value("zero_optimization.elastic_checkpoint", False),
        load_universal_checkpoint=lambda: config.get_value("checkpoint.load_universal", False),
        loaded_checkpoint_dp_world_size=state.global_step or None,
    )  # fmt: skip
    attach_deepspeed(engine)


def _forget_that_epoch_was_set(optimizer: Any) -> None:
    """Marks the epoch as not set: a checkpoint's epoch would hold for the whole resumed run without the callback."""
    for group in optimizer.param_groups:
        group["epoch_was_set"] = False


def _require_epoch(optimizer: Any, *_: Any) -> None:
    if all(group["lr"] == 0 for group in optimizer.param_groups):
        return  # torch.distributed.checkpoint creates the state by such a step before training begins
    for index, group in enumerate(optimizer.param_groups):
        policy = optimizer.masking.policy(index)
        if policy is not None and policy.follows_epochs and not group["epoch_was_set"]:
            raise RuntimeError(
                f"mask={policy!r} follows epochs, and nothing tells this optimizer the epoch: give the trainer "
                "callbacks=[GradDropCallback()]"
            )


def trainer_optimizer(
    args: TrainingArguments,
    mask: Policy | Callable[[int], Policy] | None = GradDrop(),  # noqa: B008 (immutable)
    *,
    exclude: str | Iterable[str] = (),
    layers: Layers | None = None,
    model: nn.Module | None = None,
    **arguments: Any,
) -> tuple[type[GradDropFactory], dict[str, Any]]:
    """Makes ``Trainer(optimizer_cls_and_kwargs=...)``: a FusedGradDropAdamW in the paper's scope.

    Args:
        args: gives learning rate, betas, eps and weight decay. Trainer clips gradients itself, by
            ``args.max_grad_norm``.
        mask: a policy, or a function of the number of epochs that makes one: ``GradDropEpoch``, ``lambda epochs:
            GradDrop(LinearAnneal(epochs))``.
        exclude, layers: as in ``param_groups``.
        model: the module to train, if not the trainer's model. With sentence-transformers this is a loss that has
            parameters. With transformers 4, which does not pass its model on, it is the trainer's model.
        arguments: others of FusedGradDropAdamW, as ``seed`` (default: ``args.seed``), ``moment_dtype``.

    Returns:
        The callable that Trainer calls with the model, and the keyword arguments that it adds.

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
    factory = {"args": args, "mask": mask, "exclude": exclude, "layers": layers, **arguments}
    return GradDropFactory, factory if model is None else {**factory, "model": model}


class GradDropCallback(TrainerCallback):
    """Sets the optimizer's epoch, also after a resume in mid-epoch, and logs what the masks of the last step did:
    ``graddrop_epoch``, ``graddrop_active_fraction`` and, where a policy has one, ``graddrop_p``.

    Warns if the model drops out hidden activations, which the paper turns off. Works under Accelerate's and DeepSpeed's
    wrappers of the optimizer, and attaches DeepSpeed's flat partitions. Leaves another optimizer alone, with a warning.
    Trainer calls the trackers of ``args.report_to`` before its callbacks. A tracker that shall have these values must
    come after this callback: ``callbacks=[GradDropCallback(), TensorBoardCallback()]``.

    Args:
        skip_dropped: leave out the weight gradients of the blocks that a step drops, see
            ``FusedGradDropAdamW.skip_dropped``. In one process or under FSDP2.

    Raises:
        ValueError: when training begins, ``skip_dropped`` with ``args.max_grad_norm``, as Trainer would clip by a norm
            without the gradients that were left out. Set it to 0, and give ``trainer_optimizer`` a ``max_grad_norm``
            and ``norm_after_mask``. Also ``skip_dropped`` in several processes without FSDP2.
    """

    def __init__(self, skip_dropped: bool = False):
        self.skip_dropped = skip_dropped
        self._optimizer: FusedGradDropAdamW | None = None
        self._skipping: AbstractContextManager[None] | None = None
        self._epoch: int | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self._leave()  # open if an exception ended the last training
        self._epoch, self._optimizer = None, unwrapped(optimizer)
        if self._optimizer is None:
            warnings.warn(
                f"GradDropCallback: the trainer's optimizer is a {type(optimizer).__name__}, not a FusedGradDropAdamW; "
                "pass optimizer_cls_and_kwargs=trainer_optimizer(args, ...)",
                stacklevel=2,
            )
            return
        if self.skip_dropped:
            self._check_skip_dropped(self._optimizer, args)
        _attach_to_deepspeed(optimizer, model, args, state)
        warn_of_activation_dropout(model, self._optimizer)

    def _check_skip_dropped(self, optimizer: FusedGradDropAdamW, args: TrainingArguments) -> None:
        if args.max_grad_norm:
            raise ValueError(
                f"GradDropCallback(skip_dropped=True) with args.max_grad_norm={args.max_grad_norm!r}: the norm would "
                "lack the gradients that are left out; set args.max_grad_norm=0, and clip in the optimizer: "
                "trainer_optimizer(args, ..., max_grad_norm=..., norm_after_mask=True)"
            )
        params = (param for group in optimizer.param_groups for param in group["params"])
        if args.world_size > 1 and not all(map(is_dtensor, params)):
            raise ValueError(
                f"GradDropCallback(skip_dropped=True) with {args.world_size} processes needs FSDP2: Trainer does not "
                "show its callbacks the wrapper that averages the gradients; use fsdp=True, or skip_dropped=False"
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._optimizer is None:
            return
        self._leave()  # open if a callback ended an epoch between two micro-batches
        # state.epoch is a fraction after a resume in mid-epoch, and after an epoch that a callback has ended.
        self._epoch = int(state.epoch) if self._epoch is None else self._epoch + 1
        self._optimizer.set_epoch(self._epoch)

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
            state.log_history[-1].update(found)  # Trainer has already put a copy there
