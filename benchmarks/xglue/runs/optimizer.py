"""Makes the optimizer of a run's settings for transformers' Trainer."""

from transformers import TrainingArguments

from graddrop_kernels import FusedGradDropAdamW
from graddrop_kernels.demo.methods import with_head_lr
from graddrop_kernels.integrations.transformers import GradDropFactory, trainer_optimizer

from ..settings import Settings
from .methods import policy_of


class WithHeadRate(GradDropFactory):
    """Makes Trainer's optimizer: blocks masked, embeddings and head dense, the head at its own rate."""

    def __call__(self, model, *, head_lr_factor: float, **arguments) -> FusedGradDropAdamW:
        self.head_lr_factor = head_lr_factor
        return super().__call__(model, **arguments)

    def adapt(self, groups, model, args):
        return with_head_lr(groups, model, self.head_lr_factor * args.learning_rate)


def optimizer_of(settings: Settings, args: TrainingArguments, skip_dropped: bool) -> tuple[type[WithHeadRate], dict]:
    """Makes ``Trainer(optimizer_cls_and_kwargs=...)``: FusedGradDropAdamW in the paper's scope. With ``skip_dropped``
    it clips gradients itself, as Trainer would lack some for the norm.
    """
    clip = {"max_grad_norm": settings.max_grad_norm or None, "norm_after_mask": True} if skip_dropped else {}
    _, arguments = trainer_optimizer(args, mask=policy_of(settings), **clip)
    return WithHeadRate, {**arguments, "head_lr_factor": settings.head_lr_factor}
