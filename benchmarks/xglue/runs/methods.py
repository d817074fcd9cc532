"""The paper's methods by name: the mask of a run's settings."""

import dataclasses

from graddrop_kernels.demo.methods import METHODS
from graddrop_kernels.policies import GradFreeze, Policy
from graddrop_kernels.policies.schedules import LinearAnneal

from ..settings import Settings


def policy_of(settings: Settings) -> Policy | None:
    """The optimizer's mask; None for plain AdamW. Raises ValueError, as policies do, for values that cannot be."""
    anneal = LinearAnneal(settings.epochs, settings.anneal_start, settings.anneal_end)
    policy = METHODS[settings.method](settings.epochs, settings.p, anneal)
    if isinstance(policy, GradFreeze) and settings.blocks_per_epoch is not None:
        return dataclasses.replace(policy, blocks_per_epoch=settings.blocks_per_epoch)
    return policy
