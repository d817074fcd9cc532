"""What the optimizer keeps of tensors that are not its own: nothing beyond a step."""

import gc
import weakref

import pytest
import torch
from torch import nn

from graddrop_kernels import FixedMask, FusedGradDropAdamW, GradDrop, GradDropEpoch, available_backends, backends
from graddrop_kernels.groups.spans import spans_of

BACKENDS = [name for name in ("cpu", "reference") if name in available_backends()]
MODES = {
    "plain": {},
    "clipping": {"max_grad_norm": 0.5},
    "masters": {"master_weights": True, "amsgrad": True},
    "words": {"mask": GradDropEpoch(epochs=3, storage="bitpacked")},
    "fixed": {"mask": FixedMask({"weight": torch.ones(6, 5, dtype=torch.bool)})},
    "strided": {},
}
every_mode = pytest.mark.parametrize("mode", MODES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def stepped(mode: str, backend: str, seed: int) -> FusedGradDropAdamW:
    """An optimizer after two steps: the second finds everything prepared."""
    torch.manual_seed(seed)
    weight = torch.randn(6, 5, dtype=torch.bfloat16 if mode == "masters" else torch.float32)
    weight = nn.Parameter(weight.t() if mode == "strided" else weight)
    arguments = {"mask": GradDrop(p=0.3), **MODES[mode]}
    named = [("weight", weight), ("bias", nn.Parameter(torch.randn(5, dtype=weight.dtype)))]
    optimizer = FusedGradDropAdamW(named, lr=0.03, weight_decay=0.2, backend=backend, **arguments)
    optimizer.set_epoch(1)
    for _ in range(2):
        give_grads(optimizer)
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def give_grads(optimizer: FusedGradDropAdamW) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.randn_like(param)


@every_mode
@every_backend
def test_a_replaced_state_tensor_is_free_at_once(mode, backend, seed):
    optimizer = stepped(mode, backend, seed)
    gc.disable()
    try:
        for param in optimizer.param_groups[0]["params"]:
            state = optimizer.state[param]
            for name in state:
                old = weakref.ref(state[name])
                state[name] = state[name].clone()
                assert old() is None, name
        refs = [weakref.ref(value) for state in optimizer.state.values() for value in state.values()]
        del state
        optimizer.state.clear()
        assert len(refs) > 5 and not any(ref() is not None for ref in refs)
    finally:
        gc.enable()
    give_grads(optimizer)
    optimizer.step()
    assert all(int(state["step"]) == 1 for state in optimizer.state.values())


@every_mode
@every_backend
def test_a_replaced_parameter_is_free_at_once(mode, backend, seed):
    optimizer = stepped(mode, backend, seed)
    params = optimizer.param_groups[0]["params"]
    old = weakref.ref(params[0])
    new = nn.Parameter(params[0].detach().clone())
    gc.disable()
    try:
        optimizer.state[new] = optimizer.state.pop(params[0])
        params[0] = new
        assert old() is None
    finally:
        gc.enable()
    give_grads(optimizer)
    optimizer.step()
    assert int(optimizer.state[new]["step"]) == 3


@every_mode
@every_backend
def test_parameters_can_be_swapped(mode, backend, seed):
    """As module.to() and load_state_dict() do under torch.__future__.set_swap_module_params_on_conversion(True), for
    torchao and FSDP2. torch refuses it for a tensor that has weak references.
    """
    optimizer = stepped(mode, backend, seed)
    for param in optimizer.param_groups[0]["params"]:
        assert not weakref.getweakrefs(param)
        torch.utils.swap_tensors(param, nn.Parameter(param.detach().clone() + 1))
    before = [param.detach().clone() for param in optimizer.param_groups[0]["params"]]
    give_grads(optimizer)
    optimizer.step()
    for param, old in zip(optimizer.param_groups[0]["params"], before):
        assert int(optimizer.state[param]["step"]) == 3 and (mode == "masters" or not torch.equal(param, old))


@every_backend
@pytest.mark.parametrize("same_id", [False, True])
def test_another_state_tensor_in_the_memory_of_an_old_one_is_seen(backend, same_id, seed):
    """Freed memory is given again, and so are ids: what was prepared for the old tensor must not serve the new one."""
    optimizer = stepped("plain", backend, seed)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    memory, shape = state["exp_avg"].untyped_storage(), state["exp_avg"].shape
    others, old_id = [state["exp_avg"]] * (not same_id), id(state.pop("exp_avg"))
    for _ in range(1000):
        half = torch.empty(0, dtype=torch.float16).set_(memory, 0, shape)
        if (id(half) == old_id) is same_id:
            break
        others.append(half)
    assert (id(half) == old_id) is same_id
    state["exp_avg"] = half
    give_grads(optimizer)
    with pytest.raises(ValueError, match="moments of 'weight' have different dtypes"):
        optimizer.step()


def test_bit_planes_are_made_once_for_buffers_that_take_turns(seed, monkeypatch):
    """DeepSpeed's stage 3 puts one flat buffer after the other into a group, and steps each."""
    named = [(name, nn.Parameter(torch.randn(6, 8))) for name in "ab"]
    optimizer = FusedGradDropAdamW(named, mask=GradDropEpoch(epochs=4, storage="bitpacked"), seed=seed)
    group, buffers = optimizer.param_groups[0], [torch.randn(48) for _ in named]
    group["params"] = buffers
    pieces = {buffer: [(name, 0, 0, 48)] for buffer, (name, _) in zip(buffers, named)}
    optimizer.attach_pieces(pieces, {name: (6, 8) for name, _ in named}, last=buffers[-1:])
    optimizer.set_epoch(0)
    made, make = [], backends.bucket_planes
    monkeypatch.setattr(backends, "bucket_planes", lambda *question: made.append(question) or make(*question))
    for _ in range(3):
        for buffer in buffers:
            group["params"], buffer.grad = [buffer], torch.randn(48)
            optimizer.step()
    assert len(made) == 2


def test_bit_planes_of_replaced_parameters_are_gone(seed):
    """As 3D Gaussian splatting replaces parameters, by ones of other sizes."""
    optimizer = FusedGradDropAdamW(
        [("weight", nn.Parameter(torch.randn(4)))], mask=GradDropEpoch(epochs=4, storage="bitpacked"), seed=seed
    )
    optimizer.set_epoch(1)
    params, planes = optimizer.param_groups[0]["params"], []
    for count in range(5, 25):
        optimizer.state.pop(params[0], None)
        params[0] = nn.Parameter(torch.randn(count))
        params[0].grad = torch.randn(count)
        optimizer.step()
        masking = optimizer.masking
        planes.append(weakref.ref(masking.words(0, params[0], spans_of(params[0], masking.records(0)[0]))[0]))
        assert optimizer.mask("weight").shape == (count,)
    gc.collect()
    assert [ref() is not None for ref in planes] == [False] * 19 + [True]


def test_autograd_that_is_switched_on_later_is_recorded():
    weight = nn.Parameter(torch.randn(4), requires_grad=False)
    optimizer = FusedGradDropAdamW([("weight", weight)], lr=0.1, mask=None)
    weight.grad = torch.randn(4)
    optimizer.step()
    for group in (optimizer.defaults, *optimizer.param_groups):
        group["differentiable"] = True
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, requires_grad=True)
    optimizer.step()
    assert weight.grad_fn is not None
