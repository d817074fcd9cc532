"""DTensor parameters (FSDP2, HSDP, tensor parallel, both): masks, parameters and moments are those of one process.

Gradients are given, equal in all layouts, so that whatever differs is the step's doing: a reduction of real gradients
over other ranks adds them up in another order.
"""

import pytest
import torch
from cases import ALL_MASKINGS, EPOCH_OF_STEP, HYPERS, PAST_THE_LAST_EPOCH, assert_same_bits, of_all_rows
from ranks import run_ranks

from graddrop_kernels import FusedGradDropAdamW

pytestmark = pytest.mark.filterwarnings(PAST_THE_LAST_EPOCH)

# Uneven in both dimensions over 2, 3 and 4 ranks; more ranks than rows; empty; without dimensions; of three.
SHAPES = ((37, 24), (50, 24), (24, 50), (9, 7), (1, 5), (5,), (), (0, 3), (2, 6, 5), (300, 40))
EVEN = {1: (24, 50, 6)}  # dimension 1 is sharded by FSDP2 only where it is even
LAYOUTS = {  # name: (mesh, placements)
    "fsdp over 2": ((2,), ("S0",)),
    "fsdp over 3": ((3,), ("S0",)),
    "fsdp over 4": ((4,), ("S0",)),
    "columns over 2": ((2,), ("S1",)),
    "columns over 3": ((3,), ("S1",)),
    "replicated": ((2,), ("R",)),
    "hsdp": ((2, 2), ("R", "S0")),
    "blocks": ((2, 2), ("S0", "S1")),
    "twice": ((2, 2), ("S0", "S0")),
}


def values_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return [(f"layers.{i % 4}.weight{i}", torch.randn(shape, generator=generator)) for i, shape in enumerate(SHAPES)]


def gradients_of(values, seed, step):
    generator = torch.Generator().manual_seed(seed * 31 + step)
    return [torch.randn(value.shape, generator=generator) for _, value in values]


def sharded(value, mesh, placements):
    """A DTensor of the value; where it has not the dimension to shard, replicated."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    kinds = [Replicate() if kind == "R" or int(kind[1]) >= value.dim() else Shard(int(kind[1])) for kind in placements]
    return distribute_tensor(value, mesh, kinds, src_data_rank=None)  # every rank has the value: nothing is sent


def arguments_of(masking, values):
    hyper = HYPERS["amsgrad"] | {"maximize": True}
    return {"mask": ALL_MASKINGS[masking].policy(values), **ALL_MASKINGS[masking].arguments, **hyper}


def train(named, masking, values, seed, given, **extra):
    """Six steps: (masks before each step, parameters and state after the last, norms of the gradients)."""
    optimizer = FusedGradDropAdamW(named, seed=seed, **arguments_of(masking, values), **extra)
    masks, norms = {}, []
    for step, epoch in enumerate(EPOCH_OF_STEP[:6]):
        optimizer.set_epoch(epoch)
        masks |= {f"mask of {name} before step {step}": optimizer.mask(param) for name, param in named}
        for (_, param), grad in zip(named, gradients_of(values, seed, step)):
            param.grad = given(grad)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    after = {name: param.detach() for name, param in named}
    for name, param in named:
        state = optimizer.state[param].items()
        after |= {f"{key} of {name}": of_all_rows(optimizer, param, value) for key, value in state}
    return masks | after, norms


def compare_with_whole(layout, maskings, seed, extra):
    """Trains both, and compares what this rank has of each tensor. Returns how many elements it has compared."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh_shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape)
    values, compared = values_of(seed), 0
    shard = lambda value: sharded(value, mesh, placements)
    for masking in maskings:
        whole, norms = train(parameters(values, lambda value: value), masking, values, seed, torch.clone, **extra)
        own, own_norms = train(parameters(values, shard), masking, values, seed, shard, **extra)
        assert own.keys() == whole.keys()
        for name, tensor in own.items():
            expected = whole[name] if name.startswith("step of") else shard(whole[name]).to_local()
            tensor = tensor if name.startswith("step of") else tensor.to_local()
            assert_same_bits(tensor, expected, f"{masking}: {name}")
            compared += tensor.numel()
        for a, b in zip(own_norms, norms):
            assert a is b is None or torch.equal(a, b), f"{masking}: norm {a}, of one process {b}"
    return compared


def parameters(values, made):
    return [(name, torch.nn.Parameter(made(value.clone()))) for name, value in values]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_has_the_bits_of_one_process(layout, seed):
    world = torch.Size(LAYOUTS[layout][0]).numel()
    turn = list(LAYOUTS).index(layout) % 3  # every policy in three layouts, rows in all
    maskings = {*list(ALL_MASKINGS)[turn::3], "rows"}
    compared = run_ranks(world, compare_with_whole, layout, sorted(maskings), seed, {}, timeout=240)
    assert min(compared) > 50_000
