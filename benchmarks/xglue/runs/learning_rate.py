"""Chooses the learning rate of a method on English dev, by the same rule for every method."""

from ..scores import statistics


def english_dev(result: dict) -> float:
    """Returns the official English dev score of a run's best epoch, 0..1."""
    return result["dev"][str(result["best_epoch"])]["en"]["official"]


def best_lr(scores: dict[float, dict[int, float]]) -> tuple[float, list[int]]:
    """Returns (the rate with the best mean, the seeds by which it was chosen).

    Args:
        scores: {lr: {seed: English dev score}}, not empty. Only seeds that every rate has are compared. Of equal means
            the smaller rate is taken.

    Raises:
        ValueError: several rates without a common seed.
    """
    if len(scores) == 1:
        return next(iter(scores)), []
    common = sorted(set.intersection(*(set(own) for own in scores.values())))
    if not common:
        raise ValueError(f"learning rates {', '.join(f'{lr:g}' for lr in sorted(scores))} have no seed in common")
    means = {lr: statistics.mean([own[seed] for seed in common]) for lr, own in sorted(scores.items())}
    return max(means, key=means.__getitem__), common
