"""What only a GPU can show, of every backend that runs there: torch's own bits, no synchronisation, CUDA graphs,
tensors of more than 2^31 elements.
"""

import pytest
import test_graphs_in_any_order
import torch
from cases import BF16, F32, assert_same_bits

from graddrop_kernels import (
    FusedGradDropAdamW,
    GradDrop,
    GradDropEpoch,
    LayerGradDrop,
    LinearAnneal,
    available_backends,
)
from graddrop_kernels.masks.philox import DOMAIN_ELEMENT, stream_key, uniform16

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
BACKENDS = [name for name in ("triton", "cuda") if name in available_backends()] or ["triton"]
ARGUMENTS = {"lr": 1e-2, "eps": 1e-6, "weight_decay": 0.1}


def parameters(sizes, seed: int, dtype=F32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to("cuda", dtype)) for size in sizes]


def give_gradients(params, generator: torch.Generator) -> None:
    """New tensors every time, so that their addresses move."""
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("flags", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
def test_without_a_mask_the_bits_are_those_of_torch(name, flags, seed):
    """Betas that are powers of two: torch's float32 pow() is exact there, and so are the bias corrections of both."""
    sizes = [(1000,), (33, 65), (1,), (2**20 + 3,)]
    ours, theirs = parameters(sizes, seed), parameters(sizes, seed)
    arguments = {**ARGUMENTS, "betas": (0.5, 0.25), **flags}
    mine = FusedGradDropAdamW(ours, mask=None, backend=name, **arguments)
    torchs = torch.optim.AdamW(theirs, fused=True, **arguments)
    generator = torch.Generator().manual_seed(seed + 1)
    for step in range(20):
        give_gradients(ours, generator)
        for a, b in zip(ours, theirs):
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
        for a, b in zip(ours, theirs):
            assert_same_bits(a, b, f"parameter after step {step}")
            for key in torchs.state[b]:
                assert_same_bits(mine.state[a][key], torchs.state[b][key], f"{key} after step {step}")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("policy", [GradDrop(0.3), GradDropEpoch(3), LayerGradDrop(0.5, layers=("*",))], ids=str)
@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 0.5}, {"max_grad_norm": 0.5, "norm_after_mask": True}], ids=str)
def test_a_step_waits_for_nothing(name, policy, more, seed):
    """Gradients that move and an lr that changes at every step; torch raises at any synchronisation."""
    params = parameters([(1000,), (77,), (4096,)], seed)
    named = [(f"w{i}.x", param) for i, param in enumerate(params)]
    optimizer = FusedGradDropAdamW(named, mask=policy, backend=name, **ARGUMENTS, **more)
    generator = torch.Generator().manual_seed(seed)
    optimizer.set_epoch(0)
    give_gradients(params, generator)
    optimizer.step()  # makes the state and compiles
    moved = [[torch.randn_like(param) for param in params] for _ in range(4)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i, grads in enumerate(moved):
            optimizer.param_groups[0]["lr"] = 1e-2 / (i + 1)
            for param, grad in zip(params, grads):
                param.grad = grad
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(optimizer.state[param]["step"] == 5 for param in params)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_captured_step_replays_to_the_same_bits(name, seed):
    """The counters live on the device: every replay draws its own masks."""
    params = parameters([(1000,), (77,), (70_001,)], seed)
    optimizer = FusedGradDropAdamW(params, mask=GradDrop(0.3), backend=name, **ARGUMENTS)
    give_gradients(params, torch.Generator().manual_seed(seed))
    for _ in range(3):
        optimizer.step()
    tensors = [tensor for param in params for tensor in (param.detach(), *optimizer.state[param].values())]
    start = [tensor.clone() for tensor in tensors]
    for _ in range(4):
        optimizer.step()
    expected = [tensor.clone() for tensor in tensors]
    for tensor, value in zip(tensors, start):
        tensor.copy_(value)
    graph = captured(optimizer)
    for _ in range(4):
        optimizer.advance_captured_step()
        graph.replay()
    for tensor, value in zip(tensors, expected):
        assert_same_bits(tensor, value, "after four replays")


def captured(optimizer) -> torch.cuda.CUDAGraph:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        optimizer.step()
    return graph


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "policy", [GradDrop(LinearAnneal(epochs=6)), GradDropEpoch(5), LayerGradDrop(0.5, layers=("*",))], ids=str
)
@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_replays_under_a_changing_lr_p_and_epoch(name, policy, more, seed):
    """Beside a twin that steps eagerly. The graph has gradients of its own, filled before each replay."""
    pairs = []
    for _ in range(2):
        params = parameters([(1000,), (77,), (70_001,)], seed)
        named = [(f"w{i}.x", param) for i, param in enumerate(params)]
        pairs.append((params, FusedGradDropAdamW(named, mask=policy, backend=name, **ARGUMENTS, **more)))
    (params, mine), (others, eager) = pairs
    for each, optimizer in pairs:
        generator = torch.Generator().manual_seed(seed)
        optimizer.set_epoch(1)
        for _ in range(2):
            give_gradients(each, generator)
            optimizer.step()
    for param in params:
        param.grad = torch.zeros_like(param)
    static, graph = [param.grad for param in params], captured(mine)
    for i, epoch in enumerate((1, 2, 2, 3, 3)):
        give_gradients(others, torch.Generator().manual_seed(seed + i))
        for optimizer in (mine, eager):
            optimizer.set_epoch(epoch)
            optimizer.param_groups[0]["lr"] = 1e-2 / (i + 1)
        eager.step()
        torch._foreach_copy_(static, [other.grad for other in others])
        mine.advance_captured_step()
        graph.replay()
        for a, b in zip(params, others):
            assert_same_bits(a, b, f"parameter after replay {i}")
            for key, value in eager.state[b].items():
                assert_same_bits(mine.state[a][key], value, f"{key} after replay {i}")


class DeviceGraphs:
    """As support/graphs.py emulates them."""

    def capture(self, step):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return [graph.replay]

    def replay(self, recorded):
        for replay in recorded:
            replay()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("policy", ["graddrop", "layer-graddrop", "graddrop-epoch", "gradfreeze-topdown"])
def test_graphs_and_eager_steps_in_any_order(policy, name, seed):
    """Random sequences of captures, replays, eager steps and changes: the bits of an eager twin, or a clear error."""
    seen = [test_graphs_in_any_order.run(policy, seed + i, DeviceGraphs(), device="cuda", backend=name) for i in (0, 1)]
    assert sum(each["replays"] for each in seen)


@pytest.mark.parametrize("name", BACKENDS)
def test_captured_steps_of_dtensors(name, seed):
    """On a mesh of one GPU, whose shards are the whole: parameters, gradients and moments as FSDP2 has them."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cuda", [0])
        shard = lambda tensor: DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)
        plain = parameters([(1000,), (77, 3), (70_001,)], seed)
        sharded = [torch.nn.Parameter(shard(param.detach().clone())) for param in plain]
        steps = [
            FusedGradDropAdamW([(f"w{i}", param) for i, param in enumerate(params)], mask=GradDrop(0.3), backend=name,
                               max_grad_norm=0.5, **ARGUMENTS)
            for params in (plain, sharded)
        ]  # fmt: skip
        give_gradients(plain, torch.Generator().manual_seed(seed))
        for param, other in zip(plain, sharded):
            other.grad = shard(param.grad.clone())
        for optimizer in steps:
            optimizer.step()
        graph = captured(steps[1])
        for _ in range(3):
            steps[0].step()
            steps[1].advance_captured_step()
            graph.replay()
        for a, b in zip(plain, sharded):
            assert_same_bits(b.detach().to_local(), a, "parameter")
            for key, value in steps[0].state[a].items():
                own = steps[1].state[b][key]
                assert_same_bits(own if key == "step" else own.to_local(), value, key)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("mode", [{"master_weights": True}, {"stochastic_rounding": True}], ids=str)
def test_modes_have_the_bits_of_the_exact_reference(name, mode, seed):
    mine, exact = parameters([(1000,), (33, 65)], seed, BF16), parameters([(1000,), (33, 65)], seed, BF16)
    arguments = {**ARGUMENTS, **mode, "mask": GradDrop(0.3), "seed": seed}
    pairs = [(each, FusedGradDropAdamW(each, backend=backend, **arguments))
             for each, backend in ((mine, name), (exact, "exact"))]  # fmt: skip
    for step in range(5):
        for params, optimizer in pairs:
            give_gradients(params, torch.Generator().manual_seed(seed + step))
            optimizer.step()
        for a, b in zip(mine, exact):
            assert_same_bits(a, b, f"parameter after step {step}")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("after", [False, True])
def test_the_norm_is_that_of_the_reference(name, after, seed):
    """In float32, of a sum in float64 whose order differs."""
    norms = []
    for backend in (name, "reference"):
        params = parameters([(1000,), (33, 65), (2**20 + 3,)], seed)
        arguments = {"mask": GradDrop(0.3), "seed": seed, "max_grad_norm": 0.5, "norm_after_mask": after}
        optimizer = FusedGradDropAdamW(params, backend=backend, **arguments, **ARGUMENTS)
        give_gradients(params, torch.Generator().manual_seed(seed))
        optimizer.step()
        norms.append(optimizer.grad_norm.item())
    assert abs(norms[0] - norms[1]) <= 2**-22 * norms[1]


@pytest.mark.parametrize("number", ["lr", "weight_decay"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_number_on_the_gpu_is_never_fetched(name, number, seed):
    params = parameters([(1000,), (77,)], seed)
    value = torch.tensor(1e-2, device="cuda")
    arguments = {**ARGUMENTS, number: value, "max_grad_norm": 1.0}
    optimizer = FusedGradDropAdamW(params, **arguments, mask=GradDrop(0.3), backend=name)
    give_gradients(params, torch.Generator().manual_seed(seed))
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            value.mul_(0.5)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_step_is_an_eager_one(seed):
    pairs = []
    for _ in range(2):
        params = parameters([(1000,), (77,)], seed)
        pairs.append((params, FusedGradDropAdamW(params, mask=GradDrop(0.3), **ARGUMENTS)))
    step = torch.compile(pairs[0][1].step, fullgraph=True)
    for i in range(5):
        for (params, optimizer), do in zip(pairs, (step, pairs[1][1].step)):
            optimizer.param_groups[0]["lr"] = 1e-2 / (i + 1)
            give_gradients(params, torch.Generator().manual_seed(seed + i))
            do()
    for a, b in zip(pairs[0][0], pairs[1][0]):
        assert_same_bits(a, b, "parameter")


@pytest.mark.parametrize("name", BACKENDS)
def test_more_than_two_to_the_31_elements(name, seed):
    """The last elements of a tensor of 2^31 + 2^20 elements are masked by their own draws, and the first too."""
    numel = 2**31 + 2**20
    if torch.cuda.mem_get_info()[0] < 5 * numel * 2:
        pytest.skip("needs 22 GB of the GPU's memory")
    param = torch.nn.Parameter(torch.ones(numel, dtype=BF16, device="cuda"))
    optimizer = FusedGradDropAdamW([("w", param)], mask=GradDrop(0.5), seed=seed, backend=name, weight_decay=0.0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    moments = optimizer.state[param]["exp_avg"]
    for first in (0, 2**31 - 500, numel - 1000):
        expected = uniform16(stream_key("w", seed), 0, DOMAIN_ELEMENT, first, 1000) >= 32768
        assert_same_bits((moments[first : first + 1000] != 0).cpu(), expected, f"from element {first}")
