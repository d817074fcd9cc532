"""Access to the optimizer inside Accelerate's wrapper, in one process and under DDP, FSDP2 and DeepSpeed.

    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for epoch in range(epochs):
        set_epoch(optimizer, epoch)
        ...
            accelerator.log(mask_log(optimizer), step)
"""

from torch.optim import Optimizer

from .optimizer_of import Masked, describe_masks, unwrapped


def graddrop_optimizer(optimizer: Optimizer) -> Masked:
    """Returns the FusedGradDropAdamW that ``accelerator.prepare()`` has wrapped, with all of its methods, or the handle
    of ``attach_mask`` for another optimizer.

    Raises:
        TypeError: no FusedGradDropAdamW in ``optimizer``, and no mask attached to it.
    """
    found = unwrapped(optimizer)
    if found is None:
        raise TypeError(
            f"no FusedGradDropAdamW in this {type(optimizer).__name__}: pass what accelerator.prepare() made of one, "
            "or of an optimizer with attach_mask()"
        )
    return found


def set_epoch(optimizer: Optimizer, epoch: int) -> None:
    """Calls the optimizer's ``set_epoch`` through Accelerate's wrapper. Call it at the start of every epoch, 0 first.

    Raises:
        TypeError: no FusedGradDropAdamW in ``optimizer``.
        ValueError: ``epoch`` is no int >= 0.
    """
    graddrop_optimizer(optimizer).set_epoch(epoch)


def mask_log(optimizer: Optimizer) -> dict[str, float]:
    """Returns what the masks of the last step did (before the first step: what they will do): ``graddrop_epoch``,
    ``graddrop_active_fraction`` in [0, 1] of the masked groups and, where a policy has one, ``graddrop_p`` in [0, 1).

    Raises:
        TypeError: no FusedGradDropAdamW in ``optimizer``.
    """
    return describe_masks(graddrop_optimizer(optimizer))
