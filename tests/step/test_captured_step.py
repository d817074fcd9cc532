"""A step in a CUDA graph, replayed: here by the cuda backend's emulation, with launches and copies recorded and run
again as a graph does it. On a GPU: test_triton_gpu.py.
"""

import ctypes

import pytest
import torch
from toy import Encoder, bits, emulate_cuda, random_grads

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradFreeze, param_groups
from graddrop_kernels.backends import cuda, device_tables
from graddrop_kernels.backends.upload import Upload
from graddrop_kernels.policies.paper import METHODS
from graddrop_kernels.step import stepper

pytestmark = pytest.mark.skipif(
    cuda._load()[0] is None, reason="no CUDA library: nvcc was not there when the package was built"
)
# Of every row but those that freeze blocks, which launch one block less or more from epoch to epoch.
POLICIES = {
    name: (method(7, 0.5 if method.needs_blocks else 0.3), {})
    for name, method in METHODS.items()
    if not (method.needs_blocks and method.masked == "frozen")
}
POLICIES["frozen"] = (GradDrop(0.4), {"masked": "frozen"})


class Graph:
    """What is launched and copied while it is captured, to be done again."""

    def __init__(self):
        self.recorded, self.capturing = [], False

    def capture(self, step):
        self.capturing = True
        try:
            step()
        finally:
            self.capturing = False

    def replay(self):
        for action in self.recorded:
            action()


@pytest.fixture
def graph(monkeypatch):
    graph, call, write = Graph(), cuda._call, Upload.write_captured

    def recording_call(name, device, *arguments):
        if graph.capturing and name == "masked_adamw":  # its one argument is the address of what lives for the call
            spec = cuda.LaunchSpec.from_buffer_copy(ctypes.string_at(arguments[0], ctypes.sizeof(cuda.LaunchSpec)))
            graph.recorded.append(lambda: call(name, device, ctypes.addressof(spec)))
        elif graph.capturing:
            graph.recorded.append(lambda: call(name, device, *arguments))
        else:
            call(name, device, *arguments)

    def recording_write(upload, data):
        before, copied = upload.device.clone(), len(upload.captured)
        write(upload, data)
        upload.device.copy_(before)  # recorded, not done
        if len(upload.captured) > copied:
            buffer = upload.captured[-1]
            graph.recorded.append(lambda: upload.device[: len(data)].copy_(buffer[: len(data)]))

    def ordinary_write(upload, data, begin, write=Upload.write):
        assert not graph.capturing, "a copy of this step's numbers would be copied again at every replay"
        write(upload, data, begin)

    emulate_cuda(monkeypatch)
    monkeypatch.setattr(cuda, "_call", recording_call)
    monkeypatch.setattr(Upload, "write_captured", recording_write)
    monkeypatch.setattr(Upload, "write", ordinary_write)
    for module in (device_tables, stepper):
        monkeypatch.setattr(module, "capturing", lambda device: graph.capturing)
    return graph


def make(policy, **more):
    model = Encoder()
    mask, masked = POLICIES[policy]
    made = FusedGradDropAdamW(
        param_groups(model, weight_decay=0.1), lr=0.02, betas=(0.8, 0.95), eps=1e-4, mask=mask, seed=3,
        backend="cuda", **masked, **more,
    )  # fmt: skip
    return list(model.parameters()), made


def eager_twin(policy, seed, steps, **more):
    """(parameters, optimizer) after so many steps on the gradients of ``captured``, in epoch 1."""
    params, made = make(policy, **more)
    generator = torch.Generator().manual_seed(seed)
    made.set_epoch(1)
    for _ in range(steps):
        random_grads(params, generator)
        made.step()
    return params, made


def everything(params, made):
    state = [{key: bits(value) for key, value in made.state[param].items()} for param in params]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in made.param_groups]
    return list(map(bits, params)), state, groups


def captured(graph, policy, seed, **more):
    """(parameters, optimizer, gradients in the graph) after two eager steps and a capture, in epoch 1."""
    params, made = eager_twin(policy, seed, 2, **more)
    for param in params:  # those of the graph have memory of their own
        param.grad = torch.zeros_like(param)
    before = everything(params, made)
    graph.capture(made.step)
    assert everything(params, made) == before, "capturing a step is not a step"
    return params, made, [param.grad for param in params]


@pytest.mark.parametrize("more", [{}, {"amsgrad": True, "maximize": True}], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_replays_are_steps(policy, more, graph, seed):
    """With an lr that changes at every one, and an epoch (and so p) at some; an eager step between them too."""
    params, made, static = captured(graph, policy, seed, **more)
    others, eager = eager_twin(policy, seed, 2, **more)
    for i, epoch in enumerate((1, 1, 2, 2, 4, 4)):
        random_grads(others, torch.Generator().manual_seed(seed + i))
        for each in (made, eager):
            each.set_epoch(epoch)
            for group in each.param_groups:
                group["lr"] = 0.02 / (i + 1)
        eager.step()
        if i == 3:
            for param, other in zip(params, others):
                param.grad = other.grad.clone()
            made.step()
        else:
            for grad, other in zip(static, others):
                grad.copy_(other.grad)
            made.advance_captured_step()
            graph.replay()
        assert everything(params, made) == everything(others, eager), i


def test_a_step_after_the_capture_and_before_any_replay(graph, seed):
    """With the gradients of the graph, whose addresses no replay has brought to the device yet."""
    params, made, static = captured(graph, "graddrop", seed)
    others, eager = eager_twin("graddrop", seed, 3)
    for grad, other in zip(static, others):
        grad.copy_(other.grad)
    made.step()
    assert everything(params, made) == everything(others, eager)


def test_other_launches_are_refused(graph, seed):
    """A frozen block has no launch: when another one freezes the graph is of another step."""
    POLICIES["freeze"] = (GradFreeze(3), {})
    params, made, _ = captured(graph, "freeze", seed)
    made.advance_captured_step()
    graph.replay()
    made.set_epoch(2)
    before = everything(params, made)
    with pytest.raises(RuntimeError, match="cannot carry out this one.*capture it again"):
        made.advance_captured_step()
    assert everything(params, made) == before


def test_the_first_step_cannot_be_captured(graph, seed):
    params, made = make("graddrop")
    random_grads(params, torch.Generator().manual_seed(seed))
    with pytest.raises(RuntimeError, match=r"after one that was like it: call step\(\) once before"):
        graph.capture(made.step)


def test_without_a_captured_step(graph):
    _, made = make("graddrop")
    with pytest.raises(RuntimeError, match="needs a step"):
        made.advance_captured_step()


def test_two_graphs_of_one_optimizer(graph, seed):
    """Gradients of their own each, as of two batch shapes; a step between the captures."""
    params, made, first = captured(graph, "graddrop", seed)
    others, eager = eager_twin("graddrop", seed, 3)
    for param, other in zip(params, others):
        param.grad = other.grad.clone()
    made.step()
    one, graph.recorded = graph.recorded, []
    for param in params:
        param.grad = torch.zeros_like(param)
    graph.capture(made.step)
    two, second = graph.recorded, [param.grad for param in params]
    for i, (recorded, static) in enumerate(((one, first), (two, second), (one, first))):
        random_grads(others, torch.Generator().manual_seed(seed + i))
        eager.step()
        for grad, other in zip(static, others):
            grad.copy_(other.grad)
        made.advance_captured_step()
        graph.recorded = recorded
        graph.replay()
        assert everything(params, made) == everything(others, eager), i
