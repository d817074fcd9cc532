"""The rows of the paper by name, and the optimizer for one of them."""

from dataclasses import dataclass

import torch
from torch import nn

from .. import FusedGradDropAdamW, param_groups
from ..policies import Policy, paper

METHODS = {name: method for name, method in paper.METHODS.items() if method.studied}

# How the pretrained body's weights are kept: (their dtype, the optimizer's arguments). Moments have their dtype, but
# beside masters, where they are float32.
WEIGHTS: dict[str, tuple[torch.dtype, dict]] = {
    "float32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "bf16-master": (torch.bfloat16, {"master_weights": True}),
    "bf16-stochastic": (torch.bfloat16, {"stochastic_rounding": True}),
}


@dataclass(frozen=True)
class Settings:
    """The values that decide the bits of a run, named as on the command line. A checkpoint made with others is refused.

    languages is part of it because it decides the vocabulary, and so the shape of the word embedding.
    """

    model: str
    languages: list[str]
    method: str
    epochs: int
    batch_size: int
    max_length: int
    lr: float
    head_lr: float
    weight_decay: float
    p: float
    dropout: float
    seed: int
    precision: str
    weights: str

    @property
    def policy(self) -> Policy | None:
        """The optimizer's mask."""
        return METHODS[self.method](self.epochs, self.p)


def is_head(model: nn.Module, name: str) -> bool:
    """Whether the parameter lies outside the pretrained body, which transformers calls the base model."""
    return not name.startswith(f"{model.base_model_prefix}.")


def with_head_lr(groups: list[dict], model: nn.Module, head_lr: float) -> list[dict]:
    """param_groups(model), with the head in groups of its own that have its learning rate."""
    split = []
    for group in groups:
        body = [(name, param) for name, param in group["params"] if not is_head(model, name)]
        head = [(name, param) for name, param in group["params"] if is_head(model, name)]
        if body:
            split.append({**group, "params": body})
        if head:
            split.append({**group, "params": head, "name": f"head_{group['name']}", "lr": head_lr})
    return split


def build_optimizer(model: nn.Module, settings: Settings, backend: str = "auto") -> FusedGradDropAdamW:
    """The paper's scope, blocks masked and embeddings and head dense; the head has its own learning rate."""
    groups = with_head_lr(param_groups(model, weight_decay=settings.weight_decay), model, settings.head_lr)
    arguments = {"lr": settings.lr, "mask": settings.policy, "seed": settings.seed, "backend": backend}
    return FusedGradDropAdamW(groups, **arguments, **WEIGHTS[settings.weights][1])


def active_share(optimizer: FusedGradDropAdamW) -> float:
    """The share of the blocks' elements that the next step does not drop; what is dense anyway is left out."""
    kept = total = 0
    for group, share in zip(optimizer.param_groups, optimizer.active_fraction()):
        if "blocks" in group:
            size = sum(param.numel() for param in group["params"])
            kept, total = kept + size * share, total + size
    return kept / total
