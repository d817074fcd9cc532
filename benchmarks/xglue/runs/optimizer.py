"""Makes the optimizer of a run's settings for transformers' Trainer: FusedGradDropAdamW, or another with a mask."""

from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from graddrop_kernels import FusedGradDropAdamW, attach_mask, param_groups
from graddrop_kernels.demo.methods import with_head_lr
from graddrop_kernels.integrations.transformers import GradDropFactory, trainer_optimizer
from graddrop_kernels.policies import Policy

from ..settings import Settings
from .methods import policy_of

ARGUMENTS = {"graddrop-update": {"masked": "update"}, "graddrop-cautious": {"cautious_weight_decay": True}}
OTHERS = ("graddrop-sgd", "graddrop-muon")


class WithHeadRate(GradDropFactory):
    """Makes Trainer's optimizer: blocks masked, embeddings and head dense, the head at its own rate."""

    def __call__(self, model, *, head_lr_factor: float, **arguments) -> FusedGradDropAdamW:
        self.head_lr_factor = head_lr_factor
        return super().__call__(model, **arguments)

    def adapt(self, groups, model, args):
        return with_head_lr(groups, model, self.head_lr_factor * args.learning_rate)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the blocks, FusedGradDropAdamW for the rest of the model, in one optimizer for Trainer.

    GradDropCallback finds the mask of Muon by ``optimizer``, the name that wrappers have for what they wrap.
    """

    def __init__(self, groups: list[dict[str, Any]], policy: Policy, lr: float, eps: float, seed: int):
        matrices = [group for group in groups if group["name"] == "blocks"]
        rest = [group for group in groups if group["name"] != "blocks"]
        # AdamW's rates fit, as each step of Muon is made as large as AdamW's.
        self.optimizer = torch.optim.Muon(matrices, lr, adjust_lr_fn="match_rms_adamw")
        self.adamw = FusedGradDropAdamW(rest, lr, eps=eps, mask=policy, seed=seed)
        attach_mask(self.optimizer, policy, seed=seed)
        self.defaults, self.state = {}, {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [*self.optimizer.param_groups, *self.adamw.param_groups]

    def step(self, closure=None) -> None:
        self.optimizer.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.optimizer.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])


def _other_optimizer(model: nn.Module, *, settings: Settings) -> torch.optim.Optimizer:
    policy = policy_of(settings)
    groups = param_groups(model, settings.weight_decay)
    groups = with_head_lr(groups, model, settings.head_lr_factor * settings.lr)
    if settings.method == "graddrop-muon":
        return MuonAndAdamW(groups, policy, settings.lr, settings.adam_eps, settings.seed)
    optimizer = torch.optim.SGD(groups, settings.lr, momentum=0.9)
    attach_mask(optimizer, policy, seed=settings.seed)
    return optimizer


def optimizer_of(settings: Settings, args: TrainingArguments, skip_dropped: bool) -> tuple[Any, dict]:
    """Makes ``Trainer(optimizer_cls_and_kwargs=...)``: the optimizer in the paper's scope. With ``skip_dropped``
    it clips gradients itself, as Trainer would lack some for the norm.
    """
    if settings.method in OTHERS:
        return lambda: _other_optimizer, {"settings": settings}
    clip = {"max_grad_norm": settings.max_grad_norm or None, "norm_after_mask": True} if skip_dropped else {}
    _, arguments = trainer_optimizer(args, mask=policy_of(settings), **clip, **ARGUMENTS.get(settings.method, {}))
    return WithHeadRate, {**arguments, "head_lr_factor": settings.head_lr_factor}
