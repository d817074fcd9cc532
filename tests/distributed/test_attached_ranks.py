"""attach_mask on several ranks: sharded models have the bits of one process, checkpoints go on with other numbers of
ranks, replicas stay equal.
"""

import itertools

import pytest
import torch
from cases import ALL_MASKINGS, EPOCH_OF_STEP, PAST_THE_LAST_EPOCH, assert_same_bits, masked_of
from ranks import run_ranks
from test_elastic_checkpoint import Model as Elastic
from test_elastic_checkpoint import gradient, set_state, state_of, whole
from test_sharded_modules import WRAPPERS, Model, fully_sharded, like, local, mesh_of, numbered, tensor_parallel

from graddrop_kernels import GradDrop, LayerGradDrop, attach_mask

pytestmark = pytest.mark.filterwarnings(PAST_THE_LAST_EPOCH)

MASKINGS = [name for name in ALL_MASKINGS if name not in ("none", "rows") and masked_of(name) != "update"]
SGD = {"lr": 0.03, "momentum": 0.8, "weight_decay": 0.1}


def attached(model, masking, values, seed):
    policy, arguments = ALL_MASKINGS[masking].policy(values), ALL_MASKINGS[masking].arguments
    masked = arguments.get("masked") if policy.needs_blocks else None if policy.masked is None else "gradient"
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    return optimizer, attach_mask(
        optimizer, policy, named_parameters=model.named_parameters(), seed=seed, masked=masked
    )


def compare_with_whole(wrapper, maskings, seed):
    compared = 0
    for masking in maskings:
        model, index = numbered(WRAPPERS[wrapper][1])
        one = Model()
        values = [(name, param.detach()) for name, param in one.named_parameters()]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for (name, param), other in zip(model.named_parameters(), one.parameters()):
                other.copy_(torch.randn(other.shape, generator=generator))
                local(param).copy_(other.flatten()[index[name]])
        pairs = [attached(each, masking, values, seed) for each in (model, one)]
        for step, epoch in enumerate(EPOCH_OF_STEP[:5]):
            for (name, param), other in zip(model.named_parameters(), one.parameters()):
                other.grad = torch.randn(other.shape, generator=generator)
                param.grad = like(param, other.grad.flatten()[index[name]])
            for optimizer, handle in pairs:
                handle.set_epoch(epoch)
                optimizer.step()
            for (name, param), other in zip(model.named_parameters(), one.parameters()):
                for a, b in ((param.grad, other.grad), (param, other)):
                    assert_same_bits(local(a.detach()), b.detach().flatten()[index[name]], f"{masking}: {name}, {step}")
                    compared += local(a).numel()
        assert pairs[0][0].param_groups[0]["param_steps"] == pairs[1][0].param_groups[0]["param_steps"]
    return compared


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_sharded_models_have_the_bits_of_one_process(wrapper, seed):
    maskings = MASKINGS[list(WRAPPERS).index(wrapper) % 3 :: 3]
    compared = run_ranks(WRAPPERS[wrapper][0], compare_with_whole, wrapper, maskings, seed, timeout=240)
    assert min(compared) > 10_000


def partial_gradients(seed):
    """Sequence parallelism: norms are replicated, their gradients partial sums. The sum is masked, not each part."""
    torch.manual_seed(seed)
    model, other = Model(), Model()
    other.load_state_dict(model.state_dict())
    tensor_parallel(model, mesh_of(2), sequence=True)
    ids = torch.randint(37, (4, 6), generator=torch.Generator().manual_seed(seed))
    weights = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(seed))
    for each in (model, other):
        x = each.embedding(ids)
        for layer in each.layers:
            moved = layer.norm(layer.down(layer.up(x).relu()))
            x = x + (moved.full_tensor() if hasattr(moved, "to_local") else moved)
        (each.head(x) * weights).sum().backward()
    before = str(model.layers[0].norm.weight.grad.placements)
    for each in (model, other):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        attach_mask(optimizer, GradDrop(p=0.4), named_parameters=each.named_parameters(), seed=seed)
        optimizer.step()
    differences = [(whole(a) - b.detach()).abs().max().item() for a, b in zip(model.parameters(), other.parameters())]
    dropped = [
        torch.equal(whole(a.grad) == 0, b.grad == 0) for a, b in zip(model.parameters(), other.parameters())
    ]
    return before, max(differences), all(dropped)


def test_partial_gradients_are_summed_up_before_they_are_masked(seed):
    for before, difference, same in run_ranks(2, partial_gradients, seed):
        assert "artial" in before and difference < 1e-3 and same


# Blocks that freeze have no state in torch's AdamW until their first step, which torch.distributed.checkpoint misses.
POLICIES = {"element": GradDrop(p=0.4), "block": LayerGradDrop(p=0.5, layers=("layers.*",))}


def build(policy, seed, mesh=None):
    model = Elastic()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    if mesh is not None:
        fully_sharded(model, mesh)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.03, betas=(0.8, 0.95), foreach=False)
    return model, optimizer, attach_mask(optimizer, POLICIES[policy], seed=5)


def train(model, optimizer, handle, steps, seed):
    from torch.distributed.tensor import DTensor, distribute_tensor

    for step in steps:
        handle.set_epoch(step // 3)
        for name, param in model.named_parameters():
            grad = gradient(name, param.shape, step, seed)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
            param.grad = grad
        optimizer.step()
        optimizer.zero_grad()


def leg(folder, number, steps, seed):
    import torch.distributed.checkpoint as dcp

    mesh = mesh_of(torch.distributed.get_world_size())
    runs = {f"{name} {flat}": build(name, seed, mesh) for name, flat in itertools.product(POLICIES, (True, False))}
    flat = lambda name: name.endswith("True")
    if number:
        states = {name: state_of(model, optimizer, flat(name)) for name, (model, optimizer, _) in runs.items()}
        dcp.load(states, checkpoint_id=f"{folder}/{number - 1}")
        for name, (model, optimizer, _) in runs.items():
            set_state(model, optimizer, flat(name), states[name])
    for run in runs.values():
        train(*run, steps, seed)
    states = {name: state_of(model, optimizer, flat(name)) for name, (model, optimizer, _) in runs.items()}
    dcp.save(states, checkpoint_id=f"{folder}/{number}")
    params = lambda model: {name: whole(param) for name, param in model.named_parameters()}
    return {
        name: (params(model), optimizer.param_groups[0]["param_steps"]) for name, (model, optimizer, _) in runs.items()
    }


def test_checkpoints_go_on_with_other_numbers_of_ranks(seed, tmp_path):
    """2 ranks, then 4, then 2: the bits of one process that was not interrupted."""
    for number, (world, steps) in enumerate(((2, range(4)), (4, range(4, 6)), (2, range(6, 9)))):
        found = run_ranks(world, leg, str(tmp_path), number, steps, seed, timeout=240)
    for name in POLICIES:
        model, optimizer, handle = build(name, seed)
        train(model, optimizer, handle, range(9), seed)
        for rank in found:
            for flat in (True, False):
                params, steps = rank[f"{name} {flat}"]
                assert steps == optimizer.param_groups[0]["param_steps"]
                for each, param in model.named_parameters():
                    assert_same_bits(params[each], param.detach(), f"{name}: {each}")


def replicas(seed):
    """DistributedDataParallel with gradients as views of its buckets, real gradients, each rank its own batches."""
    torch.manual_seed(seed)
    model = torch.nn.parallel.DistributedDataParallel(Model(), gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    handle = attach_mask(optimizer, GradDrop(p=0.4), model=model, seed=seed)
    rank, masks = torch.distributed.get_rank(), []
    for step in range(6):
        ids = torch.randint(37, (4, 6), generator=torch.Generator().manual_seed(100 * step + rank))
        model(ids).square().sum().backward()
        mask = handle.mask("head.weight")
        optimizer.step()
        masks.append((mask, model.module.head.weight.grad != 0))
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    return [param.detach().clone() for param in model.parameters()], masks


@pytest.mark.parametrize("world", [2, 4])
def test_replicas_stay_equal(world, seed):
    ranks = run_ranks(world, replicas, seed)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters())
    handle = attach_mask(optimizer, GradDrop(p=0.4), model=model, seed=seed)
    for params, masks in ranks:
        for param, first in zip(params, ranks[0][0]):
            assert_same_bits(param, first)
        for step, (mask, kept) in enumerate(masks):
            assert torch.equal(mask, kept) and torch.equal(mask, handle.mask("head.weight", step=step))
