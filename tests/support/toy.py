"""Shared by the tests of the optimizer: a toy transformer, an optimizer of every policy, values to compare."""

import contextlib
import copy
import io
import re
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from graddrop_kernels import (
    ExponentialAnneal,
    FixedMask,
    FusedGradDropAdamW,
    GradDrop,
    TrainRows,
    backends,
    param_groups,
)
from graddrop_kernels.policies.paper import METHODS

# The best backend that rounds every operation once.
ROUNDED_ONCE = "cpu" if "cpu" in backends.available_backends() else "exact"
# With four steps per epoch, the break is in the middle of epoch 1, and two more epochs begin after it.
BEFORE, AFTER = range(6), range(6, 13)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return x + self.norm(self.linear(x)).tanh()


class Encoder(nn.Module):
    """Embeddings, blocks ``layer.0`` ..., a head; always the same start values, none of them near 0."""

    def __init__(self, blocks=3, dtype=torch.float32):
        super().__init__()
        self.embeddings = nn.Embedding(7, 6)
        self.layer = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(6, 3)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.rand(param.shape, generator=generator) + 0.5)
        self.to(dtype)

    def forward(self, ids):
        x = self.embeddings(ids)
        for block in self.layer:
            x = block(x)
        return self.head(x.mean(1))


def random_grads(params, generator):
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)


def bits(tensor):
    """Returns a value that is equal exactly if dtype, shape and every bit are, NaN included."""
    if tensor is None:
        return None
    if tensor.layout is not torch.strided:
        return tensor.layout, bits(tensor._indices()), bits(tensor._values())
    if tensor.is_complex():
        return tensor.dtype, bits(torch.view_as_real(tensor))
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).flatten()
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).cpu().numpy().tobytes()


def snapshot(optimizer):
    """Returns everything that a step can change, as a value to compare."""

    def plain(value):
        return bits(value) if isinstance(value, torch.Tensor) else copy.deepcopy(value)

    groups = [
        {key: plain(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    params = [
        [(id(param), bits(param), bits(param.grad)) for param in group["params"]] for group in optimizer.param_groups
    ]
    state = {
        id(param): {key: plain(value) for key, value in values.items()} for param, values in optimizer.state.items()
    }
    return groups, params, state


def train(optimizer, params, steps, seed, set_epoch=True):
    """Makes the steps ``steps`` of a training of four steps per epoch. Gradients depend on seed and step only."""
    params = list(params)
    for step in steps:
        if step % 4 == 0 and set_epoch:
            optimizer.set_epoch(step // 4)
        random_grads(params, torch.Generator().manual_seed(seed + step))
        optimizer.step()


def half(epoch):
    return 0.5 / (epoch + 1)


def keep_some(model):
    return {
        name: torch.arange(param.numel()).view(param.shape) % 3 != 0
        for name, param in model.named_parameters()
        if "linear" in name
    }


# The tests' short names of rows; another row has its own name.
SHORT = {
    "sft": "plain", "graddrop-redrawn-each-epoch": "graddrop-epoch", "anneal-graddrop": "graddrop-anneal",
    "gaussian-graddrop": "gaussian", "layer-graddrop": "layer", "layer-graddrop-redrawn-each-epoch": "layer-epoch",
    "anneal-layer-graddrop": "layer-anneal", "graddrop-epoch": "epoch", "graddrop-epoch-bitpacked": "epoch-bitpacked",
    "graddrop-epoch-toggle": "toggle", "gradfreeze-topdown": "freeze", "gradfreeze-bottomup": "freeze-up",
}  # fmt: skip
_SCHEDULES = {"gaussian": ExponentialAnneal(0.6, 0.8), "layer": 0.4, "layer-epoch": half}  # else p is 0.3
_EPOCHS = {"epoch-bitpacked": 5}  # else 4
_FROM_ROWS = {
    SHORT.get(key, key): method(_EPOCHS.get(SHORT.get(key), 4), _SCHEDULES.get(SHORT.get(key), 0.3))
    for key, method in METHODS.items()
}
# One of every policy, for tests of all: name -> policy for a model.
POLICIES = {
    **{name: lambda model, policy=policy: policy for name, policy in _FROM_ROWS.items()},
    "graddrop-callable": lambda model: GradDrop(p=half),
    "freeze-up": lambda model: replace(_FROM_ROWS["freeze-up"], blocks_per_epoch=1),
    "fixed": lambda model: FixedMask(keep_some(model), scale=1.25),
    "rows": lambda model: TrainRows({name: [1, 2, -1] for name in keep_some(model)}),
}
BLOCK_POLICIES = [name for name, policy in POLICIES.items() if getattr(policy(Encoder()), "needs_blocks", False)]
every_policy = pytest.mark.parametrize("policy", POLICIES)


def build(policy, model=None, **arguments):
    """Returns (model, optimizer) over the paper's scope, with none of the defaults."""
    model = Encoder() if model is None else model
    arguments = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "seed": 11, **arguments}
    return model, FusedGradDropAdamW(param_groups(model, weight_decay=0.1), mask=POLICIES[policy](model), **arguments)


def state_bits(model, optimizer):
    """Returns the parameters and their state by name, for comparison."""
    state = lambda param: {key: bits(value) for key, value in optimizer.state.get(param, {}).items()}
    return {name: (bits(param), state(param)) for name, param in model.named_parameters()}


def assert_train_alike(pair, other, steps, seed):
    """Trains (model, optimizer) and another such pair on the same gradients. Their results must be equal to the bit."""
    for model, optimizer in (pair, other):
        train(optimizer, model.parameters(), steps, seed)
    assert state_bits(*pair) == state_bits(*other)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@contextlib.contextmanager
def refused(kind, *parts, optimizer=None, params=()):
    """Asserts that the block raises ``kind`` with a message that matches every regular expression, and changes
    nothing.
    """
    params = list(params)
    everything = lambda: (optimizer and snapshot(optimizer), [(bits(param), bits(param.grad)) for param in params])
    before = everything()
    with pytest.raises(kind) as error:
        yield
    for part in parts:
        assert re.search(part, str(error.value)), (part, str(error.value))
    assert everything() == before


def named_params(*names):
    return [(name, nn.Parameter(torch.linspace(1, 2, 6).view(2, 3))) for name in names or ("weight",)]


def warned(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in caught]



def emulate_cuda(monkeypatch):
    """Lets backend="cuda" step tensors on the CPU, by the emulation of its kernels."""
    row = replace(backends._BY_NAME["cuda"], devices=("cpu",), unavailable=lambda: None)
    monkeypatch.setitem(backends._BY_NAME, "cuda", row)
