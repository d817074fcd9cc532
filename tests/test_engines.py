"""Engines that hand the optimizer other tensors than the model's parameters, or only some: masks and training are those
of one process, bit for bit.
"""

import importlib.util

import pytest
import torch
from ranks import run_ranks
from torch import nn

from graddrop_kernels.attach import deepspeed_pieces, fsdp1_pieces

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation 'graddrop-kernels[deepspeed]'",
)


class Unit(nn.Module):
    """Its output's gradient by each parameter is a random tensor of the caller's seed: the same on every rank, so that
    any average over two ranks, or half the sum of two, is that tensor to the last bit.
    """

    def __init__(self, number, shapes):
        super().__init__()
        self.number = number
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def forward(self, seed):
        generator = torch.Generator().manual_seed(1000 * seed + self.number)
        return sum((param * torch.randn(param.shape, generator=generator)).sum() for param in self.parameters())


class Model(nn.Module):
    """39 parameters of uneven sizes."""

    def __init__(self):
        super().__init__()
        block = {"up": (13, 11), "up_bias": (13,), "down": (11, 13), "down_bias": (11,), "norm": (11,), "norm_bias": 11}
        self.embeddings = Unit(0, {"weight": (37, 11)})
        self.layer = nn.ModuleList(Unit(1 + number, block) for number in range(6))
        self.head = Unit(7, {"weight": (3, 11), "bias": (3,)})
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.rand(param.shape, generator=generator) + 0.5)

    def forward(self, seed):
        return sum(unit(seed) for unit in (self.embeddings, *self.layer, self.head))


def wrapped_fsdp1(model, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    # The head and the embeddings stay in the outermost unit.
    policy = lambda module, recurse, nonwrapped_numel: recurse or (isinstance(module, Unit) and 0 < module.number < 7)
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=cpu)


def started_deepspeed(model, optimizer, stage):
    import deepspeed

    # Or it would compile an operator for all-reduces in shared memory, for a minute; gloo does them, too.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        # Stage 3 flattens each group in parts of about this many elements of a rank, and steps part by part.
        "zero_optimization": {"stage": stage, "sub_group_size": 700, "stage3_param_persistence_threshold": 10},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


# Maps.


def numbered(model):
    """A model whose elements tell what they are: 1000 * number of the parameter + place in it."""
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.copy_(1000 * number + torch.arange(param.numel()).view(param.shape))
    return model


def contents(pieces):
    """(name, first element, values) of every piece, after a look at their order; and the tensors' other elements."""
    found, others = [], 0
    for flat, each in pieces.items():
        end = 0
        for piece in each:
            assert piece.local_start >= end and piece.numel > 0, (piece, end)
            end = piece.local_start + piece.numel
            found.append((piece.name, piece.global_start, flat.detach().flatten()[piece.local_start : end].clone()))
        others += flat.numel() - sum(piece.numel for piece in each)
    return found, others


def fsdp1_contents(use_orig_params):
    model = wrapped_fsdp1(numbered(Model()), use_orig_params)
    pieces = fsdp1_pieces(model)
    assert set(pieces) == set(model.parameters())
    return contents(pieces)


def deepspeed_contents(stage):
    model = numbered(Model())
    engine = started_deepspeed(model, torch.optim.AdamW(model.parameters()), stage)
    return contents(deepspeed_pieces(engine))


@pytest.mark.parametrize("function, argument", [
    (fsdp1_contents, True), (fsdp1_contents, False),
    *[pytest.param(deepspeed_contents, stage, marks=needs_deepspeed) for stage in (1, 2, 3)],
])  # fmt: skip
@pytest.mark.parametrize("world", [2, 3])
def test_a_map_says_where_every_element_is(function, argument, world):
    owned = {name: torch.full((param.numel(),), -1.0) for name, param in Model().named_parameters()}
    for found, others in run_ranks(world, function, argument):
        assert others < 100  # padding
        for name, start, values in found:
            assert (owned[name][start : start + len(values)] == -1).all()  # nobody else's
            owned[name][start : start + len(values)] = values
    for name, param in numbered(Model()).named_parameters():
        assert torch.equal(owned[name], param.flatten()), name
