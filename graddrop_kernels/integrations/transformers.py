"""Hugging Face Trainer: makes its optimizer, and the callback that sets the optimizer's epoch.

    trainer = Trainer(
        model, args, train_dataset=...,
        optimizer_cls_and_kwargs=trainer_optimizer(args, mask=GradDrop(p=0.2)),
        callbacks=[GradDropCallback()],
    )
"""

import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..attached.handle import attach_mask
from ..groups.blocks import Layers
from ..groups.param_groups import param_groups
from ..optimizer import FusedGradDropAdamW
from ..policies import GradDrop, Policy, TrainRows
from ..tensors.local import is_dtensor
from .activation_dropout import warn_of_activation_dropout
from .deepspeed import attach_deepspeed
from .fsdp1 import attach_fsdp1
from .optimizer_of import Masked, active_blocks, describe_masks, unwrapped

Mask = Policy | Callable[[int], Policy] | Callable[[nn.Module], Policy] | None


class GradDropFactory:
    """Makes the optimizer when Trainer calls it with the model, so that parameters have names and blocks are known.

    transformers 5 makes an instance and calls it with the model. transformers 4 makes an instance from the parameters
    that it has grouped itself, without names, or from the entry "model" of the arguments.
    """

    def __new__(cls, model: Any = None, **arguments: Any) -> Any:
        factory = super().__new__(cls)
        return factory if model is None else factory(model, **arguments)

    def __call__(
        self, trained: Any, *, args: TrainingArguments, mask: Mask, model: nn.Module | None = None,
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
        _warn_of_ignored(args, arguments)
        policy = _policy_of(mask, args, model)
        if isinstance(policy, TrainRows):  # what it names may be outside of the blocks, as embeddings are
            for group in groups:
                group.pop("mask", None)
        optimizer = FusedGradDropAdamW(groups, **{"mask": policy, "seed": args.seed, **values, **arguments})
        if _is_fsdp1(model):
            attach_fsdp1(optimizer, model)
        optimizer.register_load_state_dict_pre_hook(functools.partial(_name_plain_run, _names_of_plain_run(model)))
        optimizer.register_load_state_dict_post_hook(_forget_that_epoch_was_set)
        optimizer.register_step_pre_hook(_require_epoch)
        return optimizer

    def adapt(
        self, groups: list[dict[str, Any]], model: nn.Module, args: TrainingArguments
    ) -> list[dict[str, Any]]:
        """Adapts the optimizer's groups, for subclasses: another learning rate for some parameters, for example."""
        return groups


def _is_fsdp1(model: nn.Module) -> bool:
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def _policy_of(mask: Any, args: TrainingArguments, model: nn.Module) -> Policy | None:
    """Returns the policy for this model, and for as many epochs as ``args`` says. A search for hyper-parameters changes
    both in between.
    """
    if isinstance(mask, Policy) or not callable(mask):  # what is no policy is refused by the optimizer
        return mask  # type: ignore[no-any-return]
    first = next(iter(inspect.signature(mask).parameters), None)
    if first == "model":
        return mask(model)  # type: ignore[no-any-return]
    if isinstance(mask, type) and issubclass(mask, Policy) and first != "epochs":
        raise ValueError(
            f"mask={mask.__name__} would take the number of epochs for its {first}: give a policy, {mask.__name__}(...)"
        )
    if args.max_steps > 0:
        raise ValueError(
            f"mask={mask!r} needs the number of epochs, but args.max_steps={args.max_steps} decides how long is "
            "trained: give a policy with its number of epochs"
        )
    return mask(math.ceil(args.num_train_epochs))  # type: ignore[no-any-return]


def _warn_of_ignored(args: TrainingArguments, arguments: dict[str, Any]) -> None:
    """Warns of arguments of Trainer that would have no effect, or one that is not expected."""
    optim = getattr(args.optim, "value", args.optim)
    ignored = {} if optim in ("adamw_torch", "adamw_torch_fused") else {"optim": optim}
    ignored |= {name: getattr(args, name, None) for name in ("optim_args", "optim_target_modules")}
    for name, value in ignored.items():
        if value:
            warnings.warn(
                f"args.{name}={value!r} has no effect: the optimizer is that of trainer_optimizer(); leave {name} at "
                "its default, or leave optimizer_cls_and_kwargs out",
                stacklevel=3,
            )
    if arguments.get("max_grad_norm") is not None and args.max_grad_norm:
        warnings.warn(
            f"gradients are clipped twice, by Trainer to args.max_grad_norm={args.max_grad_norm!r} and then by the "
            f"optimizer to max_grad_norm={arguments['max_grad_norm']!r}: set one of them to 0 or None",
            stacklevel=3,
        )


def _names_of_plain_run(model: nn.Module) -> list[list[str]]:
    """Returns the names in the two groups that Trainer makes for its own AdamW, with and without weight decay."""
    decays = set(Trainer.get_decay_parameter_names(None, model))  # which uses no Trainer
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    return [[name for name in names if (name in decays) == wanted] for wanted in (True, False)]


def _name_plain_run(names: list[list[str]], _: Any, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """Gives a checkpoint of Trainer's own AdamW the names that it lacks, by which it is brought into our groups."""
    groups = state_dict["param_groups"]
    if "mask" in groups[0] or [len(group["params"]) for group in groups] != list(map(len, names)):
        return None
    return {**state_dict, "param_groups": [{"param_names": own, **group} for group, own in zip(groups, names)]}


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
    """Marks the epoch as not set: a checkpoint's epoch would hold for the whole resumed run without the callback. The
    callback also sees by it that the epoch is a file's.
    """
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
    mask: Mask = GradDrop(),  # noqa: B008 (immutable)
    *,
    exclude: str | Iterable[str] = (),
    layers: Layers | None = None,
    model: nn.Module | None = None,
    **arguments: Any,
) -> tuple[type[GradDropFactory], dict[str, Any]]:
    """Makes ``Trainer(optimizer_cls_and_kwargs=...)``: a FusedGradDropAdamW in the paper's scope. Give it to a trainer
    without that argument, as TRL's DPOTrainer, as an attribute: ``trainer.optimizer_cls_and_kwargs = ...``.

    Args:
        args: gives learning rate, betas, eps and weight decay, as they are when Trainer makes the optimizer. Trainer
            clips gradients itself, by ``args.max_grad_norm``.
        mask: a policy, or a function that makes one: of the number of epochs (``GradDropEpoch``, ``lambda epochs:
            GradDrop(LinearAnneal(epochs))``), or of the model if its first argument is called ``model``
            (``new_token_rows``). TrainRows reaches all parameters, others those in the blocks.
        exclude, layers: as in ``param_groups``.
        model: the module to train, if not the trainer's model. With sentence-transformers this is a loss that has
            parameters. With transformers 4, which does not pass its model on, it is the trainer's model.
        arguments: others of FusedGradDropAdamW, as ``seed`` (default: ``args.seed``), ``moment_dtype``. With
            ``strict=False`` a checkpoint of Trainer's own AdamW can be resumed, or one of another number of epochs.

    Returns:
        The callable that Trainer calls with the model, and the keyword arguments that it adds.

    Raises:
        ValueError: when Trainer makes the optimizer, a function for ``mask``, and ``args.max_steps`` instead of a
            number of epochs.
    """
    factory = {"args": args, "mask": mask, "exclude": exclude, "layers": layers, **arguments}
    return GradDropFactory, factory if model is None else {**factory, "model": model}


class GradDropCallback(TrainerCallback):
    """Sets the optimizer's epoch, also after a resume in mid-epoch, and logs what the masks of the last step did:
    ``graddrop_epoch``, ``graddrop_active_fraction`` and, where a policy has them, ``graddrop_p`` and the names of the
    blocks whose turn it is, ``graddrop_active_blocks``.

    With ``mask`` it needs no ``trainer_optimizer``: it attaches the mask to the optimizer of any ``args.optim``, by
    ``attach_mask``. The mask then acts on all parameters, and blocks are those of the model.

    Warns if the model drops out hidden activations, which the paper turns off. Works under Accelerate's and DeepSpeed's
    wrappers of the optimizer, and attaches DeepSpeed's flat partitions. Leaves another optimizer alone, with a warning.
    Trainer calls the trackers of ``args.report_to`` before its callbacks. A tracker that shall have these values must
    come after this callback: ``callbacks=[GradDropCallback(), TensorBoardCallback()]``.

    Args:
        skip_dropped: leave out the weight gradients of the blocks that a step drops, see
            ``FusedGradDropAdamW.skip_dropped``. In one process or under FSDP2.
        mask: what to attach to the trainer's optimizer: a policy, or a function that makes one, as in
            ``trainer_optimizer``. None: its optimizer is that of ``trainer_optimizer``.
        attach: more arguments of ``attach_mask``, as ``masked``, ``seed`` (default: ``args.seed``).

    Raises:
        ValueError: when training begins, ``mask`` beside an optimizer of ``trainer_optimizer``; what ``attach_mask``
            refuses. ``skip_dropped`` with ``args.max_grad_norm``, as Trainer would clip by a norm
            without the gradients that were left out. Set it to 0, and give ``trainer_optimizer`` a ``max_grad_norm``
            and ``norm_after_mask``. Also ``skip_dropped`` in several processes without FSDP2.
    """

    def __init__(self, skip_dropped: bool = False, mask: Mask = None, **attach: Any):
        self.skip_dropped, self.mask, self.attach = skip_dropped, mask, attach
        self._optimizer: Masked | None = None
        self._stop: Callable[[], None] | None = None  # ends the skipping
        self._epoch: int | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        self._stop_skipping()  # on if an exception ended the last training
        self._epoch, self._optimizer = None, unwrapped(optimizer)
        if self.mask is not None:
            self._optimizer = self._attached(optimizer, args, model)
        if self._optimizer is None:
            warnings.warn(
                f"GradDropCallback: the trainer's optimizer is a {type(optimizer).__name__}, not a FusedGradDropAdamW; "
                "pass optimizer_cls_and_kwargs=trainer_optimizer(args, ...), or GradDropCallback(mask=...)",
                stacklevel=2,
            )
            return
        if self.skip_dropped:
            self._check_skip_dropped(self._optimizer, args)
            self._stop = _skip_in_training_steps(_calling_trainer(), self._optimizer)
        if isinstance(self._optimizer, FusedGradDropAdamW):
            _attach_to_deepspeed(optimizer, model, args, state)
            if not self._optimizer.strict:
                _fit_schedule(lr_scheduler, self._optimizer.param_groups)
        warn_of_activation_dropout(model, self._optimizer)

    def _attached(self, optimizer: Any, args: Any, model: Any) -> Masked:
        """The mask on the trainer's optimizer. In a second training it may be there already."""
        if isinstance(self._optimizer, FusedGradDropAdamW):
            raise ValueError(
                "GradDropCallback(mask=...) is for other optimizers: give mask= to trainer_optimizer(), or "
                "leave optimizer_cls_and_kwargs out"
            )
        if self._optimizer is not None:
            return self._optimizer
        policy = _policy_of(self.mask, args, model)
        masks = attach_mask(optimizer, policy, model=model, **{"seed": args.seed, **self.attach})
        if _is_fsdp1(model):
            attach_fsdp1(masks.optimizer, model)
        return masks

    def _check_skip_dropped(self, optimizer: Masked, args: TrainingArguments) -> None:
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
        if self._epoch is None:
            # A state that was loaded past Trainer, whose counter begins at 0, goes on from its own epoch.
            loaded = [group["epoch"] for group in self._optimizer.param_groups if not group["epoch_was_set"]]
            # state.epoch is a fraction after a resume in mid-epoch, and after an epoch that a callback has ended.
            self._epoch = max([int(state.epoch), *loaded])
        else:
            self._epoch += 1
        self._optimizer.set_epoch(self._epoch)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_skipping()

    def _stop_skipping(self) -> None:
        if self._stop is not None:
            self._stop()
            self._stop = None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs is None or self._optimizer is None or "loss" not in logs:
            return
        found: dict[str, Any] = dict(describe_masks(self._optimizer))
        if blocks := active_blocks(self._optimizer):
            found["graddrop_active_blocks"] = ", ".join(blocks)
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)  # Trainer has already put a copy there


def _calling_trainer() -> Trainer:
    """Returns the trainer whose callback this is. Trainer does not show itself to its callbacks."""
    frame: Any = sys._getframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer):
            return trainer
        frame = frame.f_back
    raise RuntimeError("GradDropCallback(skip_dropped=True) is called by no Trainer of transformers: give it to one")


def _skip_in_training_steps(trainer: Any, optimizer: Masked) -> Callable[[], None]:
    """Lets every ``training_step()`` of the trainer, its forward and backward pass, leave out what is dropped. Whatever
    ends one, also an interrupt, leaves no parameter frozen. Returns the function that ends this.
    """
    own, step = vars(trainer).get("training_step"), trainer.training_step

    @functools.wraps(step)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        with optimizer.skip_dropped():
            return step(*args, **kwargs)

    def stop() -> None:
        if vars(trainer).get("training_step") is training_step:
            del trainer.training_step
            if own is not None:
                trainer.training_step = own

    trainer.training_step = training_step
    return stop


def _fit_schedule(scheduler: Any, groups: list[dict[str, Any]]) -> None:
    """Gives a schedule that was loaded from a run with other groups a learning rate for each of ours. The next step
    gets the rate of this schedule, which may be longer, and not the last rate of the loaded one.
    """
    if len(getattr(scheduler, "base_lrs", groups)) != len(groups):
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
    for group, base, factor in zip(groups, getattr(scheduler, "base_lrs", ()), getattr(scheduler, "lr_lambdas", ())):
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]  # what Trainer logs
