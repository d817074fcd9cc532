"""The optimizer that transformers' Trainer makes of a run's settings."""

from transformers import TrainingArguments

from graddrop_kernels import FusedGradDropAdamW, param_groups
from graddrop_kernels.demo.methods import is_head
from graddrop_kernels.integrations.transformers import trainer_optimizer

from .methods import policy_of
from .settings import Settings


class WithHeadRate:
    """What Trainer calls for its optimizer: blocks masked, embeddings and head dense, the head at its own rate."""

    def __call__(
        self, model, *, lr: float, head_lr_factor: float, weight_decay: float, exclude, layers, **arguments
    ) -> FusedGradDropAdamW:
        groups = []
        for group in param_groups(model, weight_decay, exclude, layers):
            if "param_blocks" in group:  # the head is no block's
                groups.append(group)
                continue
            for head in (False, True):
                own = [item for item in group["params"] if is_head(model, item[0]) is head]
                more = {"name": f"head_{group['name']}", "lr": head_lr_factor * lr} if head else {}
                if own:
                    groups.append({**group, "params": own, **more})
        return FusedGradDropAdamW(groups, lr=lr, **arguments)


def optimizer_of(settings: Settings, args: TrainingArguments) -> tuple[type[WithHeadRate], dict]:
    """For ``Trainer(optimizer_cls_and_kwargs=...)``: FusedGradDropAdamW in the paper's scope."""
    _, arguments = trainer_optimizer(args, mask=policy_of(settings))
    return WithHeadRate, {**arguments, "head_lr_factor": settings.head_lr_factor}
