"""Orders training examples: batches of near-equal length, a pure function of (seed, epoch)."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

BUCKET = 8  # batches whose examples are sorted by length together, for little padding


class LengthBuckets(Sampler[int]):
    """Yields indices of examples. Each next ``batch_size`` of them are a batch; only an epoch's last may be smaller.

    A resume needs no saved state. Every method sees the same batches under the same seed, also on several processes,
    which share out each batch.

    Args:
        lengths: of the examples.
        batch_size: of a whole optimizer step.
        epoch: called when an epoch begins.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch()])
        order = generator.permutation(len(self.lengths)).tolist()
        bucket = BUCKET * self.batch_size
        for start in range(0, len(order), bucket):
            order[start : start + bucket] = sorted(order[start : start + bucket], key=self.lengths.__getitem__)
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        rest = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # goes last, as it would shift all others
        for number in generator.permutation(len(batches)):
            yield from batches[number]
        for batch in rest:
            yield from batch
