"""Makes the mask of a run's settings from the methods by name."""

import dataclasses

from graddrop_kernels.policies import GradFreeze, Policy
from graddrop_kernels.policies.schedules import LinearAnneal

from ..methods import METHODS
from ..settings import Settings


def policy_of(settings: Settings) -> Policy | None:
    """Returns the optimizer's mask; None for plain AdamW. Raises ValueError for impossible values, as policies do."""
    anneal = LinearAnneal(settings.epochs, settings.anneal_start, settings.anneal_end)
    policy = METHODS[settings.method](settings.epochs, settings.p, anneal)
    if isinstance(policy, GradFreeze) and settings.blocks_per_epoch is not None:
        return dataclasses.replace(policy, blocks_per_epoch=settings.blocks_per_epoch)
    return policy
