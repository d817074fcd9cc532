"""weight_decay as a tensor, for decay that is coupled to a schedule: the bits of the same number as a float."""

import copy
import math
import pickle

import pytest
import torch
from cases import F16, F32, F64
from torch._subclasses.fake_tensor import FakeTensorMode
from toy import Encoder, build, emulate_cuda, named_params, random_grads, refused, state_bits, through_a_file, train

from graddrop_kernels import FusedGradDropAdamW, GradDrop, param_groups
from graddrop_kernels.groups import masking
from graddrop_kernels.groups.options import check_options

# Exact in every dtype. In a step with 0 nothing decays, and an infinite weight stays what it is.
DECAYS = (0.0, 0.25, 0.5, 0.0, 0.125)


def decayed(groups):
    return [group for group in groups if group["name"] == "blocks"]


def train_by(how, policy, backend, seed, dtype=F32, shape=(), **arguments):
    """(model, optimizer) after a step with each of DECAYS, given to the blocks as a float or in a tensor."""
    arguments = {"betas": (0.7, 0.9), "eps": 1e-3, "backend": backend, **arguments}
    model, optimizer = build(policy, Encoder(2), **arguments)
    with torch.no_grad():
        model.layer[0].linear.weight[0, 0] = math.inf
    tensor = torch.full(shape, 7.0, dtype=dtype)
    for step, decay in enumerate(DECAYS):
        if how == "in place":
            tensor.fill_(decay)
        given = {"float": decay, "in place": tensor, "replaced": torch.full(shape, decay, dtype=dtype)}[how]
        for group in decayed(optimizer.param_groups):
            group["weight_decay"] = given
        train(optimizer, model.parameters(), [step], seed)
        assert step or model.layer[0].linear.weight[0, 0].isinf()
    return model, optimizer


@pytest.mark.parametrize("policy", ["plain", "graddrop", "epoch", "layer"])
@pytest.mark.parametrize("how", ["in place", "replaced"])
@pytest.mark.parametrize("kind", [((), F32), ((1,), F64), ((1, 1), F16)], ids=str)
def test_a_tensor_has_the_bits_of_the_float(kind, how, policy, backend, seed):
    shape, dtype = kind
    expected = state_bits(*train_by("float", policy, backend, seed))
    assert state_bits(*train_by(how, policy, backend, seed, dtype, shape)) == expected


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference", "exact"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_tensor_on_the_parameters_device(dtype, backend, amsgrad, seed, monkeypatch):
    """Kernels read it at its address, as on a GPU: no copy on the host, and none that becomes stale."""
    if backend == "cuda":
        emulate_cuda(monkeypatch)
    try:
        expected = state_bits(*train_by("float", "graddrop", backend, seed, amsgrad=amsgrad))
    except RuntimeError as missing:
        pytest.skip(str(missing))
    monkeypatch.setattr(masking, "_read", lambda number: number)
    for how in ("in place", "replaced"):
        assert state_bits(*train_by(how, "graddrop", backend, seed, dtype, amsgrad=amsgrad)) == expected


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_one_on_a_gpu_is_not_read_by_the_host(name):
    """Neither by the checks of a step nor for its table."""
    optimizer = FusedGradDropAdamW(named_params(), mask=None)
    with FakeTensorMode():
        value = optimizer.param_groups[0][name] = torch.empty((), device="cuda")
    with pytest.raises(RuntimeError):
        float(value)
    check_options(0, optimizer.param_groups[0])
    hyper = optimizer.masking.hyper(0, None, optimizer.masking.clock(0))
    assert getattr(hyper, name) is value


def test_every_way_to_give_it(backend, seed):
    """To the constructor, in a group, by param_groups(), by add_param_group() and set later."""
    number, tensor = 0.25, torch.tensor(0.25)

    def trained(decay):
        model = Encoder(2)
        groups = param_groups(model, weight_decay=decay)
        optimizer = FusedGradDropAdamW(groups[:2], lr=0.1, mask=GradDrop(0.3), seed=seed, backend=backend)
        for group in groups[2:]:
            optimizer.add_param_group(group)
        extra = [torch.nn.Parameter(torch.full((5,), float(i))) for i in (1, 2, 3)]
        others = FusedGradDropAdamW([("a", extra[0])], 0.1, weight_decay=decay, mask=None, backend=backend)
        others.add_param_group({"params": [("b", extra[1])], "weight_decay": decay})
        others.add_param_group({"params": [("c", extra[2])], "weight_decay": 0.0})
        others.param_groups[2]["weight_decay"] = decay
        assert all(group["weight_decay"] is decay for group in others.param_groups)
        for step in range(2):
            random_grads([*model.parameters(), *extra], torch.Generator().manual_seed(seed + step))
            optimizer.step()
            others.step()
        bare = torch.nn.ParameterList(extra)
        return state_bits(model, optimizer), state_bits(bare, others)

    found = trained(tensor)
    assert found == trained(number) and found != trained(0.0)
    assert tensor == number


@pytest.mark.parametrize("way", ["file", "deepcopy", "pickle"])
def test_copies_and_files_have_one_of_their_own(way, seed):
    model, optimizer = train_by("in place", "graddrop", "auto", seed)
    own = decayed(optimizer.param_groups)[0]["weight_decay"]
    if way == "file":
        twin, other = build("graddrop", Encoder(2), betas=(0.7, 0.9), eps=1e-3)
        saved = through_a_file(optimizer.state_dict())
        other.load_state_dict(saved)
        twin.load_state_dict(model.state_dict())
        assert decayed(saved["param_groups"])[0]["weight_decay"] is not decayed(other.param_groups)[0]["weight_decay"]
    else:
        copied = copy.deepcopy if way == "deepcopy" else lambda pair: pickle.loads(pickle.dumps(pair))
        twin, other = copied((model, optimizer))
    theirs = decayed(other.param_groups)[0]["weight_decay"]
    assert theirs is not own and torch.equal(theirs, own) and theirs.dtype is own.dtype
    for each, decay, pair in ((0.5, own, (model, optimizer)), (0.5, theirs, (twin, other))):
        decay.fill_(each)
        train(pair[1], pair[0].parameters(), [5], seed)
    assert state_bits(model, optimizer) == state_bits(twin, other)


WRONG = {
    "negative": torch.tensor(-0.1), "nan": torch.tensor(math.nan), "inf": torch.tensor([math.inf]),
    "two": torch.tensor([0.1, 0.2]), "none": torch.tensor([]), "meta": torch.tensor(0.1, device="meta"),
    "complex": torch.tensor(0.1j),
}  # fmt: skip


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
def test_what_no_step_can_use(value, backend):
    """Refused by name wherever it is given, and no parameter has moved."""
    named = named_params()
    with refused(ValueError, "weight_decay must be a"):
        FusedGradDropAdamW(named, weight_decay=value, mask=None, backend=backend)
    optimizer = FusedGradDropAdamW(named, mask=None, backend=backend)
    extra = {"params": named_params("another"), "weight_decay": value}
    with refused(ValueError, "weight_decay of parameter group 1 must be a", optimizer=optimizer):
        optimizer.add_param_group(extra)
    named[0][1].grad = torch.ones(2, 3)
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = value
    with refused(ValueError, "weight_decay of parameter group 0 must be a", params=[named[0][1]]):
        optimizer.step()
