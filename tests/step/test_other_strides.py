"""Parameters whose memory has another order than their indices: the bits of a contiguous one, and no copies."""

import copy
import gc
import random

import pytest
import torch
from cases import ISAS
from costs import allocated_by
from toy import bits, emulate_cuda

from graddrop_kernels import (
    FixedMask,
    FusedGradDropAdamW,
    GaussianGradDrop,
    GradDrop,
    GradDropEpoch,
    available_backends,
)
from graddrop_kernels.backends import cpu, cuda

needs_cpu = pytest.mark.skipif("cpu" not in available_backends(), reason="csrc was not compiled")

# The modes, and the bytes per element that a step may allocate with them.
MODES = {
    "plain": ({"mask": None}, 0),
    "graddrop": ({"mask": GradDrop(0.3)}, 1 / 8),
    "graddrop-frozen": ({"mask": GradDrop(0.3), "masked": "frozen"}, 1 / 8),
    "graddrop-epoch": ({"mask": GradDrop(0.3, every="epoch")}, 1 / 8),
    "epoch": ({"mask": GradDropEpoch(5)}, 3 / 8),
    "epoch-gradient": ({"mask": GradDropEpoch(100), "masked": "gradient"}, 7 / 8),
    "toggle": ({"mask": GradDropEpoch(5, toggle=True)}, 3 / 8),
    "epoch-bitpacked": ({"mask": GradDropEpoch(5, storage="bitpacked")}, 0),
    "fixed": ({"mask": None}, 0),  # see arguments_of
    "amsgrad": ({"mask": GradDrop(0.3), "amsgrad": True, "maximize": True}, 1 / 8),
    "clipping": ({"mask": GradDrop(0.3), "max_grad_norm": 0.5}, 1 / 8),
    "clipping-after": ({"mask": GradDropEpoch(5), "max_grad_norm": 0.5, "norm_after_mask": True}, 3 / 8),
    "masters": ({"mask": GradDrop(0.3), "master_weights": True}, 1 / 8),
    "bfloat16": ({"mask": GradDrop(0.3)}, 1 / 8),
    # Drawn in more than bits: stepped through copies that live as long as the step.
    "gaussian": ({"mask": GaussianGradDrop(0.3)}, 16),
    "stochastic": ({"mask": None, "stochastic_rounding": True}, 8),
    "stochastic moments": ({"mask": None, "moment_dtype": torch.bfloat16, "stochastic_moments": True}, 12),
}
WIDE = {"masters": torch.bfloat16, "bfloat16": torch.bfloat16, "stochastic": torch.bfloat16}


def permuted(tensor: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """A copy whose memory has the dimensions in this order, the outermost first."""
    inverse = [dims.index(dim) for dim in range(len(dims))]
    return tensor.permute(dims).contiguous().permute(inverse)


def some_shape(dice: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape and an order of memory. Tiles of the kernels are 64 x 64, and 512 columns at a time."""
    size = lambda: dice.choice([1, 2, 3, 7, 9, 31, 33, 63, 64, 65, 128])
    kind = dice.randrange(5)
    if kind == 0:
        return (dice.randrange(1, 4), size(), 3, dice.choice([1, 3])), (0, 2, 3, 1)  # channels_last
    if kind == 1:
        return (size(), size()), (1, 0)
    if kind == 2:
        return (dice.choice([2, 64, 100]), dice.choice([511, 512, 513, 1100])), (1, 0)
    if kind == 3:
        return (dice.choice([511, 512, 1100]), dice.choice([2, 64, 100])), (1, 0)
    dims = list(range(3))
    dice.shuffle(dims)
    return (size(), dice.randrange(1, 9), dice.randrange(1, 9)), tuple(dims)


def arguments_of(mode: str, shape: tuple[int, ...], seed: int) -> dict:
    arguments = {"lr": 0.03, "weight_decay": 0.2, "seed": seed, **MODES[mode][0]}
    if mode == "fixed":
        keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
        arguments["mask"] = FixedMask({"weight": keep}, scale=1.5)
    return arguments


def make(mode: str, weight: torch.Tensor, seed: int, **others) -> tuple[torch.nn.Parameter, FusedGradDropAdamW]:
    weight = torch.nn.Parameter(weight)
    optimizer = FusedGradDropAdamW([("weight", weight)], **arguments_of(mode, tuple(weight.shape), seed), **others)
    optimizer.set_epoch(2)
    return weight, optimizer


def state_of(weight, optimizer):
    return bits(weight), {key: bits(value) for key, value in optimizer.state[weight].items()}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", MODES)
@needs_cpu
def test_the_bits_are_those_of_a_contiguous_parameter(mode, isa, seed):
    dice = random.Random(f"{seed} {mode} {isa}")
    with cpu.using_isa(isa):
        for _ in range(6):
            shape, dims = some_shape(dice)
            start = torch.randn(shape, generator=torch.Generator().manual_seed(dice.randrange(1 << 30)))
            start = start.to(WIDE.get(mode, torch.float32))
            one, ones = make(mode, start.clone(), seed)
            other, others = make(mode, permuted(start, dims), seed)
            for step in range(4):
                for optimizer in (ones, others):
                    optimizer.set_epoch(step // 2)
                one.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(start.dtype)
                other.grad = permuted(one.grad, dims) if step < 3 else one.grad.clone()
                if mode.startswith("clipping"):  # sums over another order may round elsewhere
                    others.step()
                    ones.step()
                    assert torch.allclose(ones.grad_norm, others.grad_norm, rtol=1e-6)
                    assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
                    continue
                ones.step()
                others.step()
                assert state_of(one, ones) == state_of(other, others), (shape, dims, step)
                assert torch.equal(ones.mask("weight"), others.mask("weight"))
            assert other.stride() == permuted(start, dims).stride()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.skipif(cuda._load()[0] is None, reason="no CUDA library: nvcc was not there when the package was built")
def test_on_a_gpu_too(mode, seed, monkeypatch):
    """By the emulation of its kernels. What is drawn there goes through copies, which lie elsewhere in every step."""
    emulate_cuda(monkeypatch)
    dice, kept = random.Random(f"{seed} {mode}"), []
    for _ in range(4):
        shape, dims = some_shape(dice)
        start = torch.randn(shape).to(WIDE.get(mode, torch.float32))
        one, ones = make(mode, start.clone(), seed, backend="cuda")
        other, others = make(mode, permuted(start, dims), seed, backend="cuda")
        for step in range(3):
            one.grad = torch.randn(shape).to(start.dtype)
            other.grad = permuted(one.grad, dims)
            ones.step()
            others.step()
            kept.append(torch.zeros(shape))  # in the memory that the copies had
            if mode.startswith("clipping"):
                assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
            else:
                assert state_of(one, ones) == state_of(other, others), (shape, dims, step)


@pytest.mark.parametrize("mode", MODES)
@needs_cpu
def test_a_step_copies_no_tensor(mode, seed):
    for shape, dims in (((64, 32, 3, 3), (0, 2, 3, 1)), ((100, 160), (1, 0))):
        start = torch.randn(shape).to(WIDE.get(mode, torch.float32))
        weight, optimizer = make(mode, permuted(start, dims), seed)
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        optimizer.step()
        allowed = MODES[mode][1] * weight.numel() + 200
        assert allocated_by(optimizer.step) <= allowed
        other = torch.nn.Parameter(start.clone())
        other.grad = torch.randn_like(other)
        plain = {"mask": None, "stochastic_rounding": False, "stochastic_moments": False}
        optimizer.add_param_group({"params": [("other", other)], **plain})
        optimizer.step()
        optimizer.step()
        assert allocated_by(optimizer.step) <= allowed + 200


@pytest.mark.parametrize("mode", ["graddrop", "epoch", "epoch-bitpacked", "fixed", "gaussian"])
@needs_cpu
def test_nothing_is_kept_but_stored_masks(mode, seed):
    stored = {"epoch-bitpacked": 3 / 8, "fixed": 1 / 8}.get(mode, 0)
    start = torch.randn(64, 32, 3, 3).to(WIDE.get(mode, torch.float32))
    weight, optimizer = make(mode, permuted(start, (0, 2, 3, 1)), seed)
    before = set(storages())
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    optimizer.step()
    own = {each.untyped_storage()._cdata for each in (weight, weight.grad, *optimizer.state[weight].values())}
    kept = sum(size for storage, size in storages().items() if storage not in before | own)
    assert kept <= stored * weight.numel() + 300


def storages() -> dict[int, int]:
    """{storage: bytes} of all tensors that are alive."""
    tensors = (each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))
    return {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}


@needs_cpu
def test_a_gradient_with_other_strides_is_copied_alone(seed):
    weight, optimizer = make("graddrop", permuted(torch.randn(64, 32, 3, 3), (0, 2, 3, 1)), seed)
    for _ in range(3):
        weight.grad = torch.randn(64, 32, 3, 3)
        made = allocated_by(optimizer.step)
    assert 4 * weight.numel() <= made <= 4.2 * weight.numel()


@pytest.mark.parametrize("mode", ["plain", "graddrop", "masters", "amsgrad", "gaussian"])
@needs_cpu
def test_moments_of_a_checkpoint_take_the_order_of_the_parameter(mode, seed):
    """As when a model is turned to channels_last between two runs, or in the middle of one."""
    start = torch.randn(8, 16, 3, 3).to(WIDE.get(mode, torch.float32))
    one, ones = make(mode, start.clone(), seed)
    one.grad = torch.randn_like(one)
    ones.step()
    other, others = make(mode, one.detach().to(memory_format=torch.channels_last), seed)
    others.load_state_dict(copy.deepcopy(ones.state_dict()))
    for step in range(3):
        one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step)).to(start.dtype)
        other.grad = one.grad.to(memory_format=torch.channels_last)
        if step == 2:  # and back
            other.data = other.detach().contiguous()
            other.grad = one.grad.clone()
        ones.step()
        others.step()
        assert state_of(one, ones) == state_of(other, others)
        if step == 1 and mode != "gaussian":
            assert others.state[other]["exp_avg"].stride() == other.stride()
            assert allocated_by(others.step) <= other.numel() / 8 + 300
            ones.step()


@needs_cpu
def test_unscaled_gradients_are_written_where_they_lie(seed):
    """By fused=True, as a GradScaler asks."""
    weight, optimizer = make("graddrop", permuted(torch.randn(7, 12, 3, 3), (0, 2, 3, 1)), seed, fused=True)
    for grad in (torch.randn_like(weight), torch.randn(weight.shape)):
        weight.grad, scaled = grad, grad.clone()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        optimizer.step()
        assert weight.grad is grad and torch.equal(grad, scaled / 4)
