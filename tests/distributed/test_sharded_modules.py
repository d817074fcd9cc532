"""Models sharded by FSDP2, HSDP, tensor parallelism and both together, by torch's own functions.

Where an element lies is read off the model itself: its parameters count from 0 when it is wrapped. So the expected
values are made without what the optimizer knows of layouts.
"""

import pytest
import torch
from cases import ALL_MASKINGS, EPOCH_OF_STEP, PAST_THE_LAST_EPOCH, assert_same_bits, of_all_rows
from ranks import run_ranks
from torch import nn

from graddrop_kernels import FusedGradDropAdamW, GradDrop, describe, param_groups

pytestmark = pytest.mark.filterwarnings(PAST_THE_LAST_EPOCH)

HIDDEN, WIDE = 12, 18  # WIDE is even over 2, but not over 4: FSDP2 over tensor parallelism cuts 9 in two


class Block(nn.Module):
    def __init__(self, wide):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(HIDDEN, wide), nn.Linear(wide, HIDDEN), nn.LayerNorm(HIDDEN)

    def forward(self, x):
        return x + self.norm(self.down(self.up(x).relu()))


class Model(nn.Module):
    def __init__(self, wide=WIDE):
        super().__init__()
        self.embedding = nn.Embedding(37, HIDDEN)
        self.layers = nn.ModuleList(Block(wide) for _ in range(3))
        self.head = nn.Linear(HIDDEN, 5)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def fully_sharded(model, mesh, **how):
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def tensor_parallel(model, mesh, sequence=False):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as tp

    plan = {"up": tp.ColwiseParallel(), "down": tp.RowwiseParallel()}
    if sequence:  # the gradient of a norm is a sum over the ranks that they have yet to make
        plan["down"] = tp.RowwiseParallel(output_layouts=Shard(1))
        plan["norm"] = tp.SequenceParallel()
        plan["up"] = tp.ColwiseParallel(input_layouts=Replicate())
    for layer in model.layers:
        tp.parallelize_module(layer, mesh, plan)
    return model


def columns_of_two(param):
    """FSDP2 takes other dimensions than the first where they divide evenly."""
    from torch.distributed.tensor import Shard

    return Shard(1) if param.dim() == 2 and param.shape[1] % 2 == 0 else Shard(0)


def mesh_of(*shape):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "model")[: len(shape)])


WRAPPERS = {  # name: (ranks, function)
    "fsdp2 over 2": (2, lambda model: fully_sharded(model, mesh_of(2))),
    "fsdp2 over 3": (3, lambda model: fully_sharded(model, mesh_of(3))),
    "fsdp2 columns": (2, lambda model: fully_sharded(model, mesh_of(2), shard_placement_fn=columns_of_two)),
    "hsdp": (4, lambda model: fully_sharded(model, mesh_of(2, 2))),
    "tensor parallel": (2, lambda model: tensor_parallel(model, mesh_of(2))),
    "fsdp2 over tensor parallel": (
        4, lambda model: both(model, mesh_of(2, 2))
    ),
}  # fmt: skip


def both(model, mesh):
    return fully_sharded(tensor_parallel(model, mesh["model"]), mesh["data"])


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def numbered(wrap):
    """(wrapped model, the global indices of the elements that this rank has, by name)"""
    model = Model()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.arange(param.numel(), dtype=param.dtype).view(param.shape))
    model = wrap(model)
    return model, {name: local(param.detach()).long() for name, param in model.named_parameters()}


def like(param, values):
    """The local values as a tensor beside the parameter."""
    if not hasattr(param, "to_local"):
        return values
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        values.contiguous(), param.device_mesh, param.placements, run_check=False,
        shape=param.shape, stride=param.stride(),
    )  # fmt: skip


def compare_with_whole(wrapper, maskings, seed):
    compared = 0
    for masking in maskings:
        model, index = numbered(WRAPPERS[wrapper][1])
        whole = Model()
        values = [(name, param.detach()) for name, param in whole.named_parameters()]
        arguments = {
            "mask": ALL_MASKINGS[masking].policy(values), **ALL_MASKINGS[masking].arguments,
            "lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.1, "seed": seed, "amsgrad": True,
        }  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for (name, param), other in zip(model.named_parameters(), whole.parameters()):
                other.copy_(torch.randn(other.shape, generator=generator))
                local(param).copy_(other.flatten()[index[name]])
        optimizers = [FusedGradDropAdamW(each.named_parameters(), **arguments) for each in (model, whole)]
        for step, epoch in enumerate(EPOCH_OF_STEP[:5]):
            for (name, param), other in zip(model.named_parameters(), whole.parameters()):
                other.grad = torch.randn(other.shape, generator=generator)
                param.grad = like(param, other.grad.flatten()[index[name]])
            for optimizer in optimizers:
                optimizer.set_epoch(epoch)
            for (name, param), other in zip(model.named_parameters(), whole.parameters()):
                mask, expected = optimizers[0].mask(param), optimizers[1].mask(other)
                assert_same_bits(local(mask), expected.flatten()[index[name]], f"{masking}: mask of {name}, {step}")
            for optimizer in optimizers:
                optimizer.step()
        for (name, param), other in zip(model.named_parameters(), whole.parameters()):
            own, theirs = optimizers[0].state[param], optimizers[1].state[other]
            assert own.keys() == theirs.keys() and own["step"] == theirs["step"]
            pairs = [(param, other)]
            for key in own.keys() - {"step"}:
                whole_rows = of_all_rows(optimizers[0], param, own[key]), of_all_rows(optimizers[1], other, theirs[key])
                pairs.append(whole_rows)
            for a, b in pairs:
                assert_same_bits(local(a.detach()), b.detach().flatten()[index[name]], f"{masking}: of {name}")
                compared += local(a).numel()
    return compared


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_have_the_bits_of_one_process(wrapper, seed):
    maskings = {*list(ALL_MASKINGS)[list(WRAPPERS).index(wrapper) % 3 :: 3], "rows"}
    compared = run_ranks(WRAPPERS[wrapper][0], compare_with_whole, wrapper, sorted(maskings), seed, timeout=240)
    assert min(compared) > 10_000


def train_for_real(wrapper, steps, seed):
    """Real gradients of different data on each rank. Returns each rank's local tensors and step counts."""
    torch.manual_seed(seed)
    model = WRAPPERS[wrapper][1](Model())
    optimizer = FusedGradDropAdamW(param_groups(model), lr=0.01, mask=GradDrop(0.3), seed=seed, max_grad_norm=0.5)
    torch.manual_seed(seed if "tensor" in wrapper else seed + torch.distributed.get_rank())
    first = last = None
    for _ in range(steps):
        ids = torch.randint(37, (8, 6))
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten() % 5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first, last = first or loss.item(), loss.item()
    norm = optimizer.grad_norm.item()
    return first, last, norm, {name: local(param.detach()) for name, param in model.named_parameters()}


@pytest.mark.parametrize("wrapper", ["fsdp2 over 2", "hsdp", "fsdp2 over tensor parallel"])
def test_training_with_real_gradients_and_clipping(wrapper, seed):
    results = run_ranks(WRAPPERS[wrapper][0], train_for_real, wrapper, 20, seed, timeout=120)
    assert len({norm for _, _, norm, _ in results}) == 1, "the norm is that of the whole gradient, on every rank"
    for first, last, _, _ in results:
        assert last < 0.8 * first
    if wrapper == "hsdp":  # ranks 0 and 2 hold the same shard, as 1 and 3
        for a, b in ((0, 2), (1, 3)):
            for name, tensor in results[a][3].items():
                assert_same_bits(results[b][3][name], tensor, f"{name} of the replicas {a} and {b}")


def clip_sharded(seed):
    """The norm of the gradients of a model whose weights are sharded in one dimension, two, or not at all."""
    model, index = numbered(WRAPPERS["fsdp2 over tensor parallel"][1])
    whole, generator = Model(), torch.Generator().manual_seed(seed)
    for (name, param), other in zip(model.named_parameters(), whole.parameters()):
        other.grad = torch.randn(other.shape, generator=generator)
        param.grad = like(param, other.grad.flatten()[index[name]])
        with torch.no_grad():
            local(param).copy_(other.flatten()[index[name]])
    norms = []
    for each in (model, whole):
        optimizer = FusedGradDropAdamW(
            each.named_parameters(), mask=GradDrop(0.3), max_grad_norm=1.5, norm_after_mask=True
        )
        optimizer.step()
        norms.append(optimizer.grad_norm.item())
    return norms


def test_the_norm_of_differently_sharded_parameters(seed):
    for sharded, whole in run_ranks(4, clip_sharded, seed):
        assert sharded == whole  # both are sums in float64, rounded to float32


def partial_gradients(seed):
    """Sequence parallelism: norms are replicated, their gradients partial sums. A step, and one of whole gradients."""
    torch.manual_seed(seed)
    model, other = Model(), Model()
    other.load_state_dict(model.state_dict())
    tensor_parallel(model, mesh_of(2), sequence=True)
    ids = torch.randint(37, (4, 6), generator=torch.Generator().manual_seed(seed))
    weights = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(seed))
    placements = []
    for each in (model, other):
        x = each.embedding(ids)
        for layer in each.layers:
            moved = layer.down(layer.up(x).relu())
            moved = layer.norm(moved)
            if hasattr(moved, "to_local"):
                placements.append(str(moved.placements))
                moved = moved.full_tensor()
            x = x + moved
        (each.head(x) * weights).sum().backward()
        FusedGradDropAdamW(each.named_parameters(), lr=0.1, mask=GradDrop(0.3), eps=1.0).step()
    grad = model.layers[0].norm.weight.grad
    differences = [
        ((a.detach().full_tensor() if hasattr(a, "full_tensor") else a.detach()) - b.detach()).abs().max().item()
        for a, b in zip(model.parameters(), other.parameters())
    ]
    return str(getattr(grad, "placements", "")), max(differences)


def test_partial_gradients_are_summed_up_before_the_step(seed):
    for placements, difference in run_ranks(2, partial_gradients, seed):
        assert "Partial" in placements, "the case is none any more"
        assert difference < 1e-5


def scaled_steps(fused, seed):
    """Four steps under a GradScaler; in the second there is an inf in what rank 1 has of one gradient."""
    model, index = numbered(WRAPPERS["fsdp2 over 2"][1])
    whole, generator = Model(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for (name, param), other in zip(model.named_parameters(), whole.parameters()):
            other.copy_(torch.randn(other.shape, generator=generator))
            local(param).copy_(other.flatten()[index[name]])
    arguments = {"lr": 0.03, "mask": GradDrop(0.3), "seed": seed}
    scaled = FusedGradDropAdamW(model.named_parameters(), **arguments, fused=fused)
    plain = FusedGradDropAdamW(whole.named_parameters(), **arguments)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        scaler.scale(torch.ones(()))
        for (name, param), other in zip(model.named_parameters(), whole.parameters()):
            other.grad = torch.randn(other.shape, generator=generator)
            param.grad = like(param, other.grad.flatten()[index[name]] * scaler.get_scale())
            if step == 1 and name == "head.weight" and torch.distributed.get_rank() == 1:
                local(param.grad)[-1, 0] = torch.inf
        if step != 1:
            plain.step()
        scaler.step(scaled)
        scaler.update()
    for (name, param), other in zip(model.named_parameters(), whole.parameters()):
        assert_same_bits(local(param.detach()), other.detach().flatten()[index[name]], name)
        assert scaled.state[param]["step"] == 3
    return scaler.get_scale()


@pytest.mark.parametrize("fused", [None, True])
def test_an_inf_on_one_rank_skips_the_step_on_all(fused, seed):
    assert run_ranks(2, scaled_steps, fused, seed) == [512.0, 512.0]


def accumulate(seed):
    """Two micro-batches a step; FSDP2 reduces gradients in the second only, and has none before."""
    torch.manual_seed(seed)
    model = WRAPPERS["fsdp2 over 2"][1](Model())
    optimizer = FusedGradDropAdamW(param_groups(model), lr=0.01, mask=GradDrop(0.3), seed=seed)
    before = {name: local(param.detach()).clone() for name, param in model.named_parameters()}
    counts = []
    for micro_batch in range(2):
        model.set_requires_gradient_sync(micro_batch == 1)
        ids = torch.randint(37, (8, 6))
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten() % 5).backward()
        optimizer.step()
        moved = [not torch.equal(local(param), before[name]) for name, param in model.named_parameters()]
        counts.append((any(moved), optimizer.param_groups[0]["completed_steps"]))
    return counts, {float(state["step"]) for state in optimizer.state.values()}


def test_without_reduced_gradients_there_is_no_step(seed):
    for counts, steps in run_ranks(2, accumulate, seed):
        assert counts == [(False, 0), (True, 1)] and steps == {1.0}


def looked_at(seed):
    """What can be asked of an optimizer of sharded parameters, and what is refused."""
    model = WRAPPERS["fsdp2 over 2"][1](Model())
    named, whole = (
        FusedGradDropAdamW(each.named_parameters(), mask=GradDrop(0.25), seed=seed) for each in (model, Model())
    )
    said = [[line for line in describe(each).splitlines() if not line.startswith("memory")] for each in (named, whole)]
    assert said[0] == said[1]  # of memory each process has its own
    assert named.active_fraction() == whole.active_fraction() == [0.75]
    own = named.mask("embedding.weight")
    assert own.shape == (37, HIDDEN) and own.placements == model.embedding.weight.placements
    whole_mask = own.full_tensor()
    with pytest.raises(ValueError, match="'0.0' is sharded and has no name.*named_parameters"):
        FusedGradDropAdamW(model.parameters())
    FusedGradDropAdamW(model.parameters(), mask=None)
    swapped, params = FusedGradDropAdamW(Model().parameters()), list(model.parameters())
    swapped.param_groups[0]["params"] = params  # as Accelerate does
    params[0].grad = torch.zeros_like(params[0])
    with pytest.raises(ValueError, match="'0.0' is sharded and has no name.*named_parameters"):
        swapped.step()
    return whole_mask, whole.mask("embedding.weight")


def test_an_optimizer_of_sharded_parameters_can_be_looked_at(seed):
    for sharded, whole in run_ranks(2, looked_at, seed):
        assert_same_bits(sharded, whole)
