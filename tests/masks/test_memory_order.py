"""MemoryOrder: which order the elements of a dense tensor have in memory, and when it is a transposition."""

import itertools
import random

import pytest
import torch

from graddrop_kernels.masks.memory_order import MemoryOrder

SHAPES = [(2, 3, 4), (2, 1, 5), (3, 2, 4, 5), (1, 3, 2, 2), (7,), (2, 3, 1, 2, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_permutation(shape):
    for dims in itertools.permutations(range(len(shape))):
        inverse = [dims.index(dim) for dim in range(len(shape))]
        tensor = torch.empty([shape[dim] for dim in dims]).permute(inverse)
        index = torch.arange(tensor.numel())
        tensor.copy_(index.view(shape))
        order = MemoryOrder.of(tuple(tensor.shape), tensor.stride())
        in_memory = tensor.as_strided((tensor.numel(),), (1,)).long()
        assert torch.equal(order.bits(index), in_memory)
        if matrices := order.transposed():
            a, b = matrices
            assert torch.equal(index.view(-1, a, b).transpose(1, 2).flatten(), in_memory) and min(a, b) > 1
        else:
            rows = [index.view(-1, a, b).transpose(1, 2).flatten() for a, b in _matrices(tensor.numel())]
            assert tensor.is_contiguous() or not any(torch.equal(row, in_memory) for row in rows)


def _matrices(numel):
    return [(a, b) for a in range(2, numel) for b in range(2, numel) if numel % (a * b) == 0]


def test_channels_last_and_transpositions():
    def matrices(tensor):
        return MemoryOrder.of(tuple(tensor.shape), tensor.stride()).transposed()

    assert matrices(torch.empty(5, 6, 3, 4).to(memory_format=torch.channels_last)) == (6, 12)
    assert matrices(torch.empty(5, 6, 2, 3, 4).to(memory_format=torch.channels_last_3d)) == (6, 24)
    assert matrices(torch.empty(5, 6).t()) == (6, 5)


def test_gaps_overlaps_and_nothing_have_no_order(seed):
    dice = random.Random(seed)
    rows, columns = dice.randrange(2, 9), dice.randrange(2, 9)
    for tensor in (
        torch.empty(rows, 2 * columns)[:, :columns],
        torch.empty(rows, 1).expand(rows, columns),
        torch.empty(columns + rows).unfold(0, columns, 1),
        torch.empty(0, columns),
    ):
        assert MemoryOrder.of(tuple(tensor.shape), tensor.stride()) is None
