"""memory(): beside the storages of the tensors that there are, at every step of the schedules."""

import pytest
import torch
from toy import Encoder, build, every_policy, random_grads

from graddrop_kernels import CycleBlocks, FixedMask, FusedGradDropAdamW, SampleBlocks, memory, param_groups

OPTIONS = [
    {}, {"amsgrad": True}, {"dtype": torch.bfloat16, "moment_dtype": torch.float32},
    {"dtype": torch.bfloat16, "master_weights": True},
]  # fmt: skip
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def storage_bytes(tensors):
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def counted(model, optimizer):
    states = [optimizer.state.get(param, {}) for param in model.parameters()]
    masters = [state["master_param"] for state in states if "master_param" in state]
    moments = [value for state in states for name, value in state.items() if name != "master_param"]
    found = {
        "parameters": storage_bytes(model.parameters()),
        "gradients": storage_bytes(param.grad for param in model.parameters() if param.grad is not None),
        "moments": storage_bytes(moments), "masters": storage_bytes(masters),
    }  # fmt: skip
    return found


def run(model, optimizer, steps=8):
    """The largest of each kind over some steps, each as memory() says. The peak is what was said before the first."""
    generator, most, said = torch.Generator().manual_seed(1), {}, optimizer.memory()["peak"]
    assert {kind: memory(optimizer)["now"][kind] for kind in ("gradients", "moments", "masters")} == {
        "gradients": 0, "moments": 0, "masters": 0
    }  # fmt: skip
    for step in range(steps):
        optimizer.set_epoch(step // 2)
        random_grads(model.parameters(), generator)
        optimizer.step()
        found, now = counted(model, optimizer), memory(optimizer)["now"]
        assert {kind: now[kind] for kind in found} == found
        assert now["total"] == sum(value for kind, value in now.items() if kind != "total")
        most = {kind: max(most.get(kind, 0), now[kind]) for kind in now if kind != "total"}
    assert most == {kind: said[kind] for kind in most} and said["total"] == sum(most.values())
    assert memory(optimizer)["peak"] == said


@every_policy
@every_option
def test_what_is_said_is_what_there_is(policy, options):
    options = dict(options)
    model, optimizer = build(policy, Encoder(dtype=options.pop("dtype", torch.float32)), **options)
    run(model, optimizer)


@every_option
def test_tensors_without_elements_have_a_step_count(options):
    options = dict(options)
    params = {"empty": torch.nn.Parameter(torch.ones(0, 3, dtype=options.pop("dtype", torch.float32)))}
    optimizer = FusedGradDropAdamW(params.items(), mask=None, **options)
    params["empty"].grad = torch.ones_like(params["empty"])
    said = optimizer.memory()["peak"]["moments"]
    optimizer.step()
    assert said == optimizer.memory()["now"]["moments"] == 4


@pytest.mark.parametrize("mask", [SampleBlocks(2, 1, idle_state="drop"), CycleBlocks(1, idle_state="drop")], ids=repr)
@every_option
def test_moments_of_blocks_in_turns(mask, options):
    """Blocks are alike here, and every one has had its turn. Half of what dense training needs, or less."""
    options = dict(options)
    model = Encoder(blocks=5, dtype=options.pop("dtype", torch.float32))
    optimizer = FusedGradDropAdamW(param_groups(model), mask=mask, **options)
    run(model, optimizer)
    dense = FusedGradDropAdamW(param_groups(model), mask=None, **options)
    of_blocks = sum(param.numel() for name, param in model.named_parameters() if name.startswith("layer."))
    itemsize = 4 if options.get("moment_dtype") or options.get("master_weights") else model.head.weight.itemsize
    saved = memory(dense)["peak"]["moments"] - memory(optimizer)["peak"]["moments"]
    active = getattr(mask, "k", 1)
    assert saved == (2 + options.get("amsgrad", False)) * itemsize * of_blocks * (5 - active) // 5


def test_the_largest_blocks_count():
    sizes = {"layers.0.weight": 3, "layers.1.weight": 50, "layers.2.weight": 7, "head": 11}
    named = [(name, torch.nn.Parameter(torch.ones(size))) for name, size in sizes.items()]
    mask = SampleBlocks(2, 1, layers="layers.*", idle_state="drop")
    optimizer = FusedGradDropAdamW([{"params": named[:2]}, {"params": named[2:]}], mask=mask)
    assert memory(optimizer)["peak"]["moments"] == 4 * 2 * (50 + 7 + 11) + 4 * len(sizes)


def test_frozen_parameters_need_neither_gradients_nor_moments():
    model = Encoder()
    model.embeddings.requires_grad_(False)
    optimizer = FusedGradDropAdamW(model.named_parameters(), mask=None)
    found = memory(optimizer)
    trained = sum(4 * param.numel() for param in model.parameters() if param.requires_grad)
    assert found["now"]["parameters"] == trained + 4 * model.embeddings.weight.numel()
    assert found["peak"]["gradients"] == trained


def test_masks_that_were_given_count_once():
    masks = {"weight": torch.rand(40, 50) < 0.5}
    param = torch.nn.Parameter(torch.ones(40, 50))
    optimizer = FusedGradDropAdamW([("weight", param)], mask=FixedMask(masks))
    param.grad = torch.ones(40, 50)
    optimizer.step()
    assert memory(optimizer)["now"]["masks"] == memory(optimizer)["peak"]["masks"] == 4 * -(-2000 // 32)


def test_what_cannot_be_stepped_counts_nothing():
    sparse = torch.nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    lazy = torch.nn.LazyLinear(4).weight
    optimizer = FusedGradDropAdamW([("sparse", sparse), ("lazy", lazy)], mask=None)
    assert not any(memory(optimizer)["now"].values()) and not any(memory(optimizer)["peak"].values())


def test_another_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"memory\(optimizer\) needs a FusedGradDropAdamW"):
        memory(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
