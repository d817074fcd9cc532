"""Tensors in odd memory, and state that does not fit: the right result or an error that names the parameter and leaves
everything as it was, on every backend. torch's fused step is silently wrong in several of these, or writes elsewhere.
"""

import copy
import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BACKEND_NAMES, BF16, F16, F32, F64, Engine
from toy import bits, random_grads

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradDropEpoch

SHAPE = (4, 6, 3, 1)
MASKS = {
    "none": (lambda: None, {}),
    "graddrop": (lambda: GradDrop(0.3), {}),
    "frozen": (lambda: GradDrop(0.4), {"masked": "frozen"}),
    "epoch": (lambda: GradDropEpoch(3, storage="bitpacked"), {}),
}
ARGUMENTS = {"lr": 0.05, "betas": (0.75, 0.96875), "eps": 1e-4, "weight_decay": 0.2, "amsgrad": True}


def inner(value):
    base = torch.full((value.size(0), value.size(1) + 2, *value.shape[2:]), 7.0, dtype=value.dtype)
    base[:, 1:-1] = value
    return base[:, 1:-1]


def at_offset(value):
    base = torch.full((value.numel() + 5,), 7.0, dtype=value.dtype)
    base[3:-2] = value.flatten()
    return base[3:-2].view(value.shape)


# The same values in other memory.
MEMORY = {
    "contiguous": lambda value: value.clone(),
    "channels last": lambda value: value.to(memory_format=torch.channels_last, copy=True),
    "transposed": lambda value: value.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda value: torch.stack((value, torch.full_like(value, 7.0)), -1)[..., 0],
    "inner": inner,
    "at an offset": at_offset,
    "odd stride of a size 1": lambda value: value.clone().as_strided(value.shape, (*value.stride()[:-1], 99)),
}
GRADS = {
    **MEMORY,
    "expanded": lambda value: value[:, :, :1, :1].expand(SHAPE),
    "one number": lambda value: value[0, 0, 0, 0].expand(SHAPE),
    "negative": lambda value: torch._neg_view(-value),
    "imaginary": lambda value: torch.complex(value, -value).conj().imag,
}


def optimizer_of(named, backend, mask="none", seed=0, **more):
    policy, arguments = MASKS[mask]
    optimizer = FusedGradDropAdamW(
        named, **{**ARGUMENTS, **arguments, **more}, mask=policy(), seed=seed, backend=backend
    )
    optimizer.set_epoch(1)
    return optimizer


def outside(tensor):
    """The memory of a tensor's storage that is not the tensor's."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    mine = torch.zeros(whole.numel(), dtype=torch.bool)
    mine.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return bits(whole[~mine])


def state_of(optimizer, param):
    return {key: bits(value) for key, value in sorted(optimizer.state[param].items())}


# Strides.


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("moments", ["as made", "contiguous", "every second", "channels last", "inner"])
def test_strides_of_their_own(moments, mask, dtype, backend, seed):
    """Parameter, gradient and moments in every memory, a quarter of the pairs every run; each as the contiguous twin,
    and no neighbour is touched.
    """
    pairs = list(itertools.product(MEMORY, GRADS))[seed % 4 :: 4]
    for i, (param_memory, grad_memory) in enumerate(pairs):
        generator = torch.Generator().manual_seed(seed + i)
        value = torch.randn(SHAPE, generator=generator).to(dtype)
        param, twin = torch.nn.Parameter(MEMORY[param_memory](value)), torch.nn.Parameter(value.clone())
        ours, reference = (optimizer_of([("weight", each)], backend, mask, seed) for each in (param, twin))
        for step in range(2):
            if dtype == BF16 and grad_memory == "imaginary":
                break  # there are no complex numbers of two bfloat16
            grad = torch.randn(SHAPE, generator=generator).to(dtype)
            param.grad = GRADS[grad_memory](grad)
            twin.grad = param.grad.resolve_neg().clone(memory_format=torch.contiguous_format)
            if step == 1 and moments != "as made":
                for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                    ours.state[param][key] = MEMORY[moments](ours.state[param][key])
            kept = [param, param.grad, *(ours.state[param].values() if step else ())]
            around, gradient = [outside(tensor) for tensor in kept], bits(param.grad.resolve_neg())
            ours.step()
            reference.step()
            where = f"parameter {param_memory}, gradient {grad_memory}, step {step}"
            assert bits(param) == bits(twin), where
            assert state_of(ours, param) == state_of(reference, twin), where
            assert [outside(tensor) for tensor in kept] == around, f"{where}: a neighbour was written"
            assert bits(param.grad.resolve_neg()) == gradient, where


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_that_change_their_memory_between_steps(mask, backend, seed):
    """A plan that was made for one must not be used for another of the same address."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(SHAPE, generator=generator)
    param, twin = torch.nn.Parameter(value.clone()), torch.nn.Parameter(value.clone())
    ours, reference = (optimizer_of([("weight", each)], backend, mask, seed) for each in (param, twin))
    for memory in ("negative", *GRADS, *reversed(GRADS), "negative", None, *GRADS):
        grad = torch.randn(SHAPE, generator=generator)
        param.grad = None if memory is None else GRADS[memory](grad)
        twin.grad = None if memory is None else param.grad.resolve_neg().clone(memory_format=torch.contiguous_format)
        ours.step()
        reference.step()
        assert bits(param) == bits(twin), memory


def test_one_number_with_its_negative_bit_set(backend):
    """The imaginary part of a conjugate is contiguous when it is one number: its memory holds the opposite sign."""
    param, twin = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    ours, reference = (optimizer_of([("weight", each)], backend) for each in (param, twin))
    param.grad = torch.full((1,), 0.5j).conj().imag
    assert param.grad.is_neg() and param.grad.is_contiguous()
    twin.grad = torch.tensor([-0.5])
    ours.step()
    reference.step()
    assert bits(param) == bits(twin) and param > 1


# GradScaler's protocol.


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("grad_memory", GRADS)
def test_gradients_are_unscaled_in_any_memory(grad_memory, mask, backend, seed):
    """By a power of two, which is exact, and written back as torch's fused step does where that can be done."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(SHAPE, generator=generator)
    param, twin = torch.nn.Parameter(value.clone()), torch.nn.Parameter(value.clone())
    ours, reference = (optimizer_of([("weight", each)], backend, mask, seed, fused=True) for each in (param, twin))
    for _ in range(2):
        param.grad = GRADS[grad_memory](torch.randn(SHAPE, generator=generator))
        twin.grad = param.grad.resolve_neg().clone(memory_format=torch.contiguous_format) / 8
        ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        around = outside(param.grad)
        try:
            ours.step()
        except (ValueError, RuntimeError) as refused:  # one number for many elements cannot be written
            assert "'weight'" in str(refused) and grad_memory in ("expanded", "one number"), str(refused)
            assert bits(param) == bits(value) and not ours.state
            return
        reference.step()
        assert bits(param) == bits(twin) and state_of(ours, param) == state_of(reference, twin)
        assert bits(param.grad.resolve_neg()) == bits(twin.grad) or grad_memory in ("expanded", "one number")
        assert outside(param.grad) == around


@pytest.mark.parametrize("found_inf", [1.0, 2.0, 8.0, 0.5, float("inf")])
@pytest.mark.parametrize("mask", MASKS)
def test_any_number_of_overflows_skips_the_step(found_inf, mask, backend, seed):
    """Flags of several devices are summed. torch steps at 2, and counts a step less."""
    param = torch.nn.Parameter(torch.ones(8))
    optimizer = optimizer_of([("weight", param)], backend, mask, seed, fused=True)
    param.grad = torch.full((8,), 0.5)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    optimizer.step()
    before = bits(param), state_of(optimizer, param), bits(optimizer.mask(param))
    optimizer.found_inf = torch.tensor(found_inf)
    optimizer.step()
    assert (bits(param), state_of(optimizer, param), bits(optimizer.mask(param))) == before


# Groups.


def test_dtypes_and_empty_tensors_mixed_in_one_group(backend, seed):
    """One empty tensor first, in the middle, last, or nothing but empty ones: as each parameter alone."""
    dtypes = [dtype for dtype in (F32, BF16, F16, F64) if Engine(backend).takes((dtype, dtype))]
    for sizes in ([0, 5, 0, 33, 0], [7, 0], [0], [0, 0], [4, 5, 0]):
        named = [
            (f"{dtype}.{i}", torch.randn(size, generator=torch.Generator().manual_seed(seed + i)).to(dtype))
            for i, size in enumerate(sizes)
            for dtype in dtypes
        ]
        together, alone = ([(name, torch.nn.Parameter(value.clone())) for name, value in named] for _ in range(2))
        optimizers = [optimizer_of(together, backend, "graddrop", seed)]
        optimizers += [optimizer_of([pair], backend, "graddrop", seed) for pair in alone]
        for step in range(3):
            for params in (together, alone):
                random_grads([param for _, param in params], torch.Generator().manual_seed(seed + step))
            for optimizer in optimizers:
                optimizer.step()
        for (name, a), (_, b), optimizer in zip(together, alone, optimizers[1:], strict=True):
            assert bits(a) == bits(b) and state_of(optimizers[0], a) == state_of(optimizer, b), (sizes, name)
            assert optimizers[0].state[a]["step"] == 3


@pytest.mark.parametrize("first", ["cpu", "meta"])
def test_a_parameter_that_has_no_memory_yet(first, backend):
    """A model on the meta device may get an optimizer, as in torch; a step is refused before anything has moved."""
    devices = [first, "cpu" if first == "meta" else "meta"]
    named = [(f"on {device}", torch.nn.Parameter(torch.ones(5, device=device))) for device in devices]
    optimizer = optimizer_of(named, backend)
    on_cpu = dict(named)["on cpu"]
    on_cpu.grad = torch.ones(5)
    optimizer.step()  # only one has a gradient
    moved, state = bits(on_cpu), state_of(optimizer, on_cpu)
    dict(named)["on meta"].grad = torch.ones(5, device="meta")
    with pytest.raises((ValueError, TypeError, RuntimeError), match="meta"):
        optimizer.step()
    assert bits(on_cpu) == moved and state_of(optimizer, on_cpu) == state
    assert len(optimizer.state) == 1


def test_a_parameter_that_gets_its_shape_later(backend):
    """torch's AdamW takes the parameters of a LazyLinear before its first call."""
    model = torch.nn.LazyLinear(3)
    optimizer = FusedGradDropAdamW(model.named_parameters(), mask=None, backend=backend)
    model(torch.ones(2, 4)).sum().backward()
    before = bits(model.weight)
    optimizer.step()
    assert bits(model.weight) != before and optimizer.state[model.weight]["exp_avg"].shape == (3, 4)


def test_two_parameters_in_the_same_memory(backend, seed):
    """Tied by their .data, as some models do: one after the other, as torch does, on any number of threads."""
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2):
            torch.set_num_threads(count)
            generator = torch.Generator().manual_seed(seed)
            a = torch.nn.Parameter(torch.randn(300_000, generator=generator))
            b = torch.nn.Parameter(a.data)
            optimizer = optimizer_of([("a", a), ("b", b)], backend)
            random_grads([a, b], generator)
            optimizer.step()
            runs.append(bits(a))
        theirs = torch.nn.Parameter(torch.randn(300_000, generator=generator.manual_seed(seed)))
        other = torch.nn.Parameter(theirs.data)
        reference = torch.optim.AdamW([theirs, other], **ARGUMENTS)
        theirs.grad, other.grad = a.grad, b.grad
        reference.step()
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(a, theirs, rtol=0, atol=1e-6)
    assert runs[0] == runs[1]


# State that does not fit. "right": as the state of the usual kind with the same numbers.


def roomy(tensor):
    """The same in the middle of much memory: a kernel that takes it for float32 ends no process by it."""
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return tensor
    room = torch.zeros(8 * tensor.numel() + 16, dtype=tensor.dtype)
    return room[8 : 8 + tensor.numel()].view(tensor.shape).copy_(tensor)


def replaced(key, make):
    def spoil(state):
        state[key] = roomy(make(state[key]))

    return spoil


def both_moments(make):
    def spoil(state):
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            state[key] = roomy(make(state[key]))

    return spoil


def without(key):
    return lambda state: state.pop(key)


def same_memory(state):
    state["exp_avg_sq"] = state["exp_avg"]


def half_the_memory(state):
    whole = torch.zeros(13)
    state["exp_avg"], state["exp_avg_sq"] = whole[:8].copy_(state["exp_avg"]), whole[5:].copy_(state["exp_avg_sq"])


def everything(optimizer):
    """As toy.snapshot, for state of any kind."""
    (param,) = optimizer.param_groups[0]["params"]
    shown = lambda value: bits(value) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else repr(value)
    return bits(param), bits(param.grad), {key: shown(value) for key, value in optimizer.state.get(param, {}).items()}


SPOILED = {
    "exp_avg_sq in another dtype": replaced("exp_avg_sq", torch.Tensor.bfloat16),
    "exp_avg_sq in a wider dtype": replaced("exp_avg_sq", torch.Tensor.double),
    "max_exp_avg_sq in another dtype": replaced("max_exp_avg_sq", torch.Tensor.half),
    "exp_avg in another dtype": replaced("exp_avg", torch.Tensor.bfloat16),
    "moments in float64": both_moments(torch.Tensor.double),
    "moments in int32": both_moments(torch.Tensor.int),
    "expanded moment": replaced("exp_avg", lambda value: value[:1].clone().expand(value.shape)),
    "expanded view of the moment's own memory": replaced("exp_avg", lambda value: value[:1].expand(value.shape)),
    "sparse moment": lambda state: state.update(exp_avg_sq=state["exp_avg_sq"].to_sparse()),
    "moment with its negative bit": lambda state: state.update(exp_avg=torch._neg_view(-state["exp_avg"])),
    "moment that is None": replaced("exp_avg_sq", lambda value: None),
    "moment on another device": replaced("max_exp_avg_sq", lambda value: value.to("meta")),
    "moment of another shape": replaced("exp_avg", lambda value: value[:-1].clone()),
    "moments that are one tensor": same_memory,
    "moments that overlap": half_the_memory,
    "step in int64": replaced("step", torch.Tensor.long),
    "step in float64": replaced("step", torch.Tensor.double),
    "step in float16": replaced("step", torch.Tensor.half),
    "step of shape (1,)": replaced("step", lambda value: value.view(1)),
    "step of two numbers": replaced("step", lambda value: value.repeat(2)),
    "step as a float": replaced("step", float),
    "step as an int": replaced("step", int),
    "step on another device": replaced("step", lambda value: value.to("meta")),
    "no step": without("step"),
    "no exp_avg_sq": without("exp_avg_sq"),
    "no max_exp_avg_sq": without("max_exp_avg_sq"),
}
# torch makes state only where there is none at all; ours makes what is missing, as a fresh parameter has it.
MADE_ANEW = {"no step": "step", "no exp_avg_sq": "exp_avg_sq", "no max_exp_avg_sq": "max_exp_avg_sq"}


@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize("mask", ["none", "frozen"])
def test_state_that_does_not_fit(spoiled, mask, backend, seed):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(8, generator=generator)
    param, twin = torch.nn.Parameter(value.clone()), torch.nn.Parameter(value.clone())
    ours, reference = (optimizer_of([("weight", each)], backend, mask, seed) for each in (param, twin))
    for _ in range(2):
        param.grad = torch.randn(8, generator=generator)
        twin.grad = param.grad.clone()
        ours.step()
        reference.step()
    SPOILED[spoiled](ours.state[param])
    if spoiled in MADE_ANEW:
        reference.state[twin][MADE_ANEW[spoiled]].zero_()
    before = everything(ours)
    try:
        ours.step()
    except (ValueError, TypeError, RuntimeError, KeyError) as refused:
        # the second: the backends' own words on dtypes that they do not take
        assert re.search("'weight'|does not take float32 parameters with", str(refused)), f"{type(refused)}: {refused}"
        assert everything(ours) == before
        return
    reference.step()
    assert bits(param) == bits(twin), "neither refused nor right"
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(ours.state[param][key].float(), reference.state[twin][key]), key
    assert float(ours.state[param]["step"]) == float(reference.state[twin]["step"])


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_a_file_with_moments_of_two_dtypes(moment, dtype, backend, seed):
    """One moment in float32 beside others in the parameter's dtype: loaded as they can be stepped, or refused."""
    param, twin = (torch.nn.Parameter(torch.linspace(1, 2, 9).to(dtype)) for _ in range(2))
    ours, reference = (optimizer_of([("weight", each)], backend) for each in (param, twin))
    for each, optimizer in ((param, ours), (twin, reference)):
        random_grads([each], torch.Generator().manual_seed(seed))
        optimizer.step()
    saved = copy.deepcopy(reference.state_dict())  # its state would else be the optimizer's own
    saved["state"][0][moment] = saved["state"][0][moment].float()
    before = bits(param)
    try:
        ours.load_state_dict(saved)
        ours.state[param].update({key: roomy(value) for key, value in ours.state[param].items()})
        ours.step()
    except (ValueError, TypeError, RuntimeError) as refused:
        assert "weight" in str(refused) or moment in str(refused), str(refused)
        assert bits(param) == before
        return
    reference.step()
    off = (param.detach().float() - twin.detach().float()).abs() / twin.detach().float()
    assert off.max() <= 2 * torch.finfo(dtype).eps
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        a, b = ours.state[param][key].float(), reference.state[twin][key].float()
        assert torch.allclose(a, b, rtol=2 * torch.finfo(dtype).eps), key


# Values of a group that no step can use: refused by name before anything has moved.


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", torch.tensor([0.1, 0.2])), ("lr", torch.tensor(0.1, device="meta")), ("lr", "0.1"), ("lr", None),
        ("lr", 0.1j), ("lr", torch.tensor([])), ("eps", None), ("weight_decay", torch.tensor([0.1, 0.2])),
        ("betas", (0.9,)), ("betas", (0.9, 0.9, 0.9)), ("betas", None), ("betas", "ab"), ("betas", 0.9),
        ("betas", (torch.tensor([0.9, 0.8]), 0.9)), ("capturable", True), ("differentiable", True),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("steps", [0, 2])
def test_values_that_no_step_can_use(name, value, steps, backend):
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = optimizer_of([("weight", param)], backend)
    param.grad = torch.ones(5)
    for _ in range(steps):
        optimizer.step()
    optimizer.param_groups[0][name] = value
    before = everything(optimizer)
    with pytest.raises((ValueError, TypeError), match=name):
        optimizer.step()
    assert everything(optimizer) == before


# What would end the process: in a process of its own, a child a case.

CRASHES = {
    "zero tensor as a gradient": "param.grad = torch._efficientzerotensor(8)",
    "wrapper as a gradient": "param.grad = TwoTensor(torch.ones(8), torch.ones(8))",
    "wrapper as a parameter": "make(TwoTensor(torch.ones(8), torch.ones(8))); param.grad = param.detach().clone()",
    "freed parameter": "param.untyped_storage().resize_(0)",
    "freed gradient": "param.grad.untyped_storage().resize_(0)",
    "freed moment": "optimizer.step(); optimizer.state[param]['exp_avg'].untyped_storage().resize_(0)",
    "short parameter": "param.untyped_storage().resize_(16)",
    "short gradient": "param.grad.untyped_storage().resize_(16)",
    "step without a number": "optimizer.step(); optimizer.state[param]['step'] = torch.tensor([])",
    "masks on another default device": "make(torch.ones(8), mask=G.GradDropEpoch(3, storage='bitpacked')); "
    "torch.set_default_device('meta'); param.grad = torch.ones(8, device='cpu')",
    "fixed masks on another default device": "make(torch.ones(8), mask=G.FixedMask({'weight': torch.ones(8).bool()})); "
    "torch.set_default_device('meta'); param.grad = torch.ones(8, device='cpu')",
}
SCRIPT = """
import itertools, os, resource, sys
import torch
import graddrop_kernels as G
from torch.testing._internal.two_tensor import TwoTensor
backends, cases = map(eval, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

def make(value, mask=None):
    global param, optimizer
    param = torch.nn.Parameter(value)
    optimizer = G.FusedGradDropAdamW([("weight", param)], lr=0.5, mask=mask, backend=backend)
    optimizer.set_epoch(2)

backend = "reference"
make(torch.ones(8))
optimizer.step()  # imports what each child would
for backend, (name, code) in itertools.product(backends, cases.items()):
    name = f"{backend}: {name}"
    child = os.fork()
    if not child:
        try:
            make(torch.ones(8))
            param.grad = torch.ones(8)
            exec(code)
            optimizer.step()
            said = "stepped: " + repr(param.detach())
        except Exception as error:
            said = f"refused: {type(error).__name__}: {error}"
        print(name, "|", said.replace(chr(10), " "), flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        print(name, "| ended by signal", status, flush=True)
"""


@functools.lru_cache
def outcomes():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, repr(BACKEND_NAMES), repr(CRASHES)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return dict(line.split(" | ", 1) for line in run.stdout.splitlines())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that may die is made with fork")
@pytest.mark.parametrize("crash", CRASHES)
def test_no_step_ends_the_process(crash, backend):
    """A kernel gets addresses: what has none, or less memory than it shows, must never reach it."""
    said = outcomes()[f"{backend}: {crash}"]
    refused = said.startswith("refused") and "'weight'" in said
    moved = "0.9950" if "zero tensor" in crash else "0.4950"  # decay alone; decay and a first step of the size of lr
    stepped = said.startswith("stepped") and moved in said and "freed" not in crash and "short" not in crash
    assert refused or stepped, said


VIEWS_OF_ONE = {  # two parameters in one memory of 6 x 8
    "contiguous": (lambda room: room[:4], lambda room: room[2:]),
    "columns": (lambda room: room[:, :5], lambda room: room[:, 3:]),
    "transposed": (lambda room: room[:4].t(), lambda room: room[2:].t()),
    "one strided": (lambda room: room[:, ::2], lambda room: room),
    "only woven": (lambda room: room[:, ::2], lambda room: room[:, 1::2]),
}


@pytest.mark.parametrize("views", VIEWS_OF_ONE)
def test_parameters_in_one_memory_are_stepped_in_turn(views, backend, seed):
    """As torch's optimizer without foreach does; three steps, so that what was prepared for the first is used again."""
    generator = torch.Generator().manual_seed(seed)
    room = torch.randn(6, 8, generator=generator)
    together, apart = room.clone(), room.clone()
    ours = [torch.nn.Parameter(view(together)) for view in VIEWS_OF_ONE[views]]
    theirs = [torch.nn.Parameter(view(apart)) for view in VIEWS_OF_ONE[views]]
    both = optimizer_of([(f"w{i}", param) for i, param in enumerate(ours)], backend, seed=seed)
    in_turn = [optimizer_of([(f"w{i}", param)], backend, seed=seed) for i, param in enumerate(theirs)]
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        both.step()
        for optimizer in in_turn:
            optimizer.step()
        assert bits(together) == bits(apart)
