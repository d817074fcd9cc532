"""A step in a CUDA graph, replayed: here by the cuda backend's emulation and that of graphs (support/graphs.py). On a
GPU: test_triton_gpu.py.
"""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from graphs import emulate_graphs
from toy import Encoder, bits, random_grads, refused

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradDropEpoch, GradFreeze, backends, param_groups
from graddrop_kernels.backends import capture, cuda
from graddrop_kernels.policies.paper import METHODS
from graddrop_kernels.step.stepper import Stepper

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
CLIPPING = [{}, {"max_grad_norm": 1.0}, {"max_grad_norm": 1.0, "norm_after_mask": True}]


@pytest.fixture
def graph(monkeypatch):
    return emulate_graphs(monkeypatch)


def make(policy, device="cpu", **more):
    model = Encoder().to(device)
    mask, masked = POLICIES[policy] if isinstance(policy, str) else (policy, {})
    made = FusedGradDropAdamW(
        param_groups(model, weight_decay=0.1), mask=mask,
        **{"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4, "seed": 3, "backend": "cuda", **masked, **more},
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
    return list(map(bits, params)), state, groups, bits(made.grad_norm)


def assert_alike(params, made, others, eager, when=""):
    """Asserts that the optimizer and its twin have the same bits."""
    parts = ("parameters", "state", "groups", "grad_norm")
    pairs = zip(parts, everything(params, made), everything(others, eager))
    assert not [part for part, mine, twins in pairs if mine != twins], when


def captured(graph, policy, seed, **more):
    """(parameters, optimizer, gradients in the graph) after two eager steps and a capture, in epoch 1."""
    params, made = eager_twin(policy, seed, 2, **more)
    for param in params:  # those of the graph have memory of their own
        param.grad = torch.zeros_like(param)
    before = everything(params, made)
    graph.capture(made.step)
    assert everything(params, made) == before, "capturing a step is not a step"
    return params, made, [param.grad for param in params]


def replay_beside(eager_step, params, made, static, others, graph, recorded=None):
    """A replay on the gradients that the twin has."""
    eager_step()
    for grad, other in zip(static, others):
        grad.copy_(other.grad)
    made.advance_captured_step()
    graph.replay(recorded)


@pytest.mark.parametrize("more", [{"amsgrad": True, "maximize": True}, *CLIPPING], ids=str)
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
        if i == 3:
            eager.step()
            for param, other in zip(params, others):
                param.grad = other.grad.clone()
            made.step()
        else:
            replay_beside(eager.step, params, made, static, others, graph)
        assert_alike(params, made, others, eager, i)


def other_memory(clipped):
    """(parameters, optimizer) of a transposed parameter, a flat buffer of two pieces (without clipping), a strided one
    with a strided gradient, and a master: the step works on copies, on spans, and rounds.
    """
    generator = torch.Generator().manual_seed(1)
    drawn = lambda *shape: torch.rand(shape, generator=generator) + 0.5
    flat = torch.nn.Parameter(drawn(40))
    params = [
        torch.nn.Parameter(drawn(6, 5).t()), flat, torch.nn.Parameter(drawn(4, 6)[:, ::2]),
        torch.nn.Parameter(drawn(9).bfloat16()),
    ]  # fmt: skip
    made = FusedGradDropAdamW(
        [(f"w{i}", param) for i, param in enumerate(params)], mask=GradDrop(0.4), lr=0.02, seed=3, backend="cuda",
        max_grad_norm=1.0 if clipped else None, norm_after_mask=True, master_weights=True,
    )  # fmt: skip
    if not clipped:
        made.attach_pieces({flat: [("a", 0, 0, 15), ("b", 15, 7, 20)]})
    return params, made


@pytest.mark.parametrize("clipped", [False, True])
def test_replays_of_copies_and_spans(clipped, graph, seed):
    (params, made), (others, eager) = other_memory(clipped), other_memory(clipped)
    generator = torch.Generator().manual_seed(seed)

    def gradients():
        for other in others:
            other.grad = torch.randn(other.shape, generator=generator).to(other.dtype)
        others[2].grad = torch.randn(4, 6, generator=generator)[:, ::2]

    def take_gradients():
        for param, other in zip(params, others):
            param.grad = other.grad.as_strided(other.grad.shape, other.grad.stride()).clone()
        params[2].grad = torch.zeros(4, 6)[:, ::2].copy_(others[2].grad)

    for i in range(7):
        gradients()
        if i in (2, 4):
            static = [param.grad for param in params]
            graph.capture(made.step)
        if i in (3, 5, 6):
            replay_beside(eager.step, params, made, static, others, graph)
        else:
            take_gradients()
            made.step()
            eager.step()
        assert_alike(params, made, others, eager, i)


def test_a_step_after_the_capture_and_before_any_replay(graph, seed):
    """With the gradients of the graph, whose addresses no replay has brought to the device yet."""
    params, made, static = captured(graph, "graddrop", seed)
    others, eager = eager_twin("graddrop", seed, 3)
    for grad, other in zip(static, others):
        grad.copy_(other.grad)
    made.step()
    assert_alike(params, made, others, eager)


def test_other_launches_are_refused(graph, seed):
    """A frozen block has no launch: when another one freezes the graph is of another step."""
    params, made, _ = captured(graph, GradFreeze(3), seed)
    made.advance_captured_step()
    graph.replay()
    made.set_epoch(2)
    with refused(RuntimeError, "cannot carry out this one: its masks are of another kind.*capture it again",
                 optimizer=made, params=params):  # fmt: skip
        made.advance_captured_step()


# Refused before anything is made.


def refuse_capture(graph, step, text, made, params=()):
    """Asserts that nothing was launched, copied or made in the capture either."""
    with refused(RuntimeError, text, optimizer=made, params=params):
        graph.capture(step)
    assert graph.recorded == [] and not made._stepper.captured


@pytest.mark.parametrize("more", CLIPPING, ids=str)
def test_the_first_step_cannot_be_captured(more, graph, seed):
    """No state, table or counter is made in the capture, where it would hold garbage: the eager step after it is right.
    """
    (params, made), (others, eager) = make("graddrop", **more), make("graddrop", **more)
    for each in (params, others):
        random_grads(each, torch.Generator().manual_seed(seed))
    refuse_capture(graph, made.step, r"after one that was like it: call step\(\) once before", made, params)
    assert not made.state and made._stepper.prepared is None
    made.step()
    eager.step()
    assert_alike(params, made, others, eager)


def changed(made, params, what):
    if what == "parameters":
        params[0].grad = None
    elif what == "new group":
        made.add_param_group({"params": [("new", torch.nn.Parameter(torch.ones(5)))], "lr": 0.1})
        made.param_groups[-1]["params"][0].grad = torch.ones(5)
    elif what == "replaced parameter":
        params[1].data = params[1].data.clone()
    elif what == "moments":
        made.state[params[1]]["exp_avg"] = made.state[params[1]]["exp_avg"].clone()
    elif what == "load":
        made.load_state_dict(made.state_dict())
    elif what == "max_grad_norm":
        made.max_grad_norm = 0.25
    elif what == "no max_grad_norm":
        made.max_grad_norm = None
    elif what == "norm_after_mask":
        made.norm_after_mask = not made.norm_after_mask
    elif what == "amsgrad":
        made.param_groups[0]["amsgrad"] = True
    elif what == "epoch":
        made.set_epoch(2)
    elif what == "misaligned":
        params[-2].grad = torch.zeros(params[-2].numel() + 1)[1:].view_as(params[-2])


@pytest.mark.parametrize(
    "what",
    ["parameters", "new group", "replaced parameter", "moments", "load", "no max_grad_norm", "norm_after_mask",
     "amsgrad", "epoch", "misaligned"],
)  # fmt: skip
def test_a_step_unlike_the_one_before_it_cannot_be_captured(what, graph, seed):
    """Something would have to be made for it in the capture. After the step that the text asks for it can be, and its
    replays are right.
    """
    policy = GradFreeze(3) if what == "epoch" else "graddrop"
    pairs = [eager_twin(policy, seed, 2, max_grad_norm=1.0, norm_after_mask=True) for _ in range(2)]
    for params, made in pairs:
        changed(made, params, what)
    (params, made), (others, eager) = pairs
    with refused(RuntimeError, "after one that was like it", optimizer=made, params=params):
        graph.capture(made.step)
    assert not made._stepper.captured
    for _, each in pairs:
        each.step()
    assert_alike(params, made, others, eager)
    graph.capture(made.step)
    for _ in range(2):
        eager.step()
        made.advance_captured_step()
        graph.replay()
        assert_alike(params, made, others, eager)


@pytest.mark.parametrize(
    "what", ["new group", "replaced parameter", "moments", "max_grad_norm", "no max_grad_norm", "norm_after_mask",
             "amsgrad"]
)  # fmt: skip
def test_a_replay_that_would_not_be_the_next_step_is_refused(what, graph, seed):
    params, made, _ = captured(graph, "graddrop", seed, max_grad_norm=1.0)
    changed(made, params, what)
    with refused(RuntimeError, "the step that was captured cannot carry out this one: its .*capture it again",
                 optimizer=made, params=params):  # fmt: skip
        made.advance_captured_step()


@pytest.mark.parametrize("what", ["load", "pieces"])
def test_a_load_and_other_streams_let_no_graph_be_replayed(what, graph, seed):
    params, made, _ = captured(graph, "graddrop", seed)
    if what == "load":
        made.load_state_dict(made.state_dict())
    else:  # the masks of this parameter are drawn in another way now
        made.attach_pieces({params[1]: [("piece", 0, 7, params[1].numel())]})
    with refused(RuntimeError, "the optimizer was loaded or changed: capture it again", optimizer=made, params=params):
        made.advance_captured_step()


def test_steps_in_the_backward_pass_are_not_captured(graph, seed):
    """Their hooks would run in the capture only, and count on the host what no GPU has done."""
    def backward():
        sum((param * param).sum() for param in params).backward()

    params, made = eager_twin("graddrop", seed, 2)
    others, eager = eager_twin("graddrop", seed, 2)
    made.zero_grad()
    eager.zero_grad()
    text = r"steps in the backward pass.*remove\(\) the handle of step_in_backward\(\) before the capture"
    refuse_capture(graph, made.step_in_backward, text, made, params)
    handle = made.step_in_backward()
    with pytest.raises(RuntimeError, match=text):
        graph.capture(backward)
    refuse_capture(graph, made.step, text, made)
    made.zero_grad()
    assert_alike(params, made, others, eager)
    backward()
    made.step()
    handle.remove()
    sum((param * param).sum() for param in others).backward()
    eager.step()
    assert_alike(params, made, others, eager)


def test_no_replay_between_a_backward_pass_and_the_step_that_ends_it(graph, seed):
    """With steps in the backward pass some parameters have made the step that the replay would count."""
    params, made, _ = captured(graph, "graddrop", seed)
    made.zero_grad()
    made.step_in_backward()
    sum((param * param).sum() for param in params).backward()
    with refused(RuntimeError, r"advance_captured_step\(\) between backward\(\) and optimizer.step\(\)",
                 optimizer=made, params=params):  # fmt: skip
        made.advance_captured_step()
    made.step()
    made.advance_captured_step()
    graph.replay()
    assert {made.state[param]["step"].item() for param in params} == {4.0}


def test_a_step_under_a_grad_scaler_is_not_captured(graph, seed):
    params, made = eager_twin("graddrop", seed, 2, fused=True)
    made.grad_scale, made.found_inf = torch.ones(()), torch.zeros(())
    refuse_capture(graph, made.step, r"GradScaler.*call scaler.step\(optimizer\) outside", made, params)


def test_a_backend_that_reads_the_gpu_is_not_captured(graph, seed):
    params, made = eager_twin("graddrop", seed, 2, backend="exact")
    refuse_capture(graph, made.step, "a step of the backend 'exact' cannot be captured", made, params)


def test_parameters_outside_of_the_graph_are_not_stepped_in_its_capture(graph, seed, monkeypatch):
    """A launch on a device whose stream is not captured would run at once, and in no replay."""
    params, made = eager_twin("graddrop", seed, 2)
    batch = made._stepper.prepared.parts[0].batch
    monkeypatch.setattr(capture, "capturing", lambda device: graph.capturing and device.type == "cpu")
    monkeypatch.setattr(batch, "device", torch.device("cuda", 1))
    made._stepper.prepared.parts.append(replace(made._stepper.prepared.parts[0], batch=replace(batch)))
    monkeypatch.setattr(batch, "device", torch.device("cpu"))
    refuse_capture(graph, made.step, "parameters on cuda:1 would be stepped outside of it", made, params)


def test_the_planning_of_a_replay_is_not_captured(graph, seed):
    params, made, _ = captured(graph, "graddrop", seed)
    with refused(RuntimeError, "inside of a capture.*call it outside of the graph", optimizer=made, params=params):
        graph.capture(made.advance_captured_step)
    assert graph.recorded == []


def test_without_a_captured_step(graph):
    _, made = make("graddrop")
    with pytest.raises(RuntimeError, match=r"needs a step\(\) that was captured in a CUDA graph$"):
        made.advance_captured_step()


def test_a_capture_that_fails_half_way_is_no_capture(graph, seed, monkeypatch):
    """As when memory runs out. The next step is right, and can be captured after it."""
    pairs = [eager_twin("graddrop", seed, 2, max_grad_norm=1.0) for _ in range(2)]
    (params, made), (others, eager) = pairs
    before = everything(params, made)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Stepper, "_keep", lambda *_: (_ for _ in ()).throw(MemoryError))
        graph.capture(made.step)
    assert everything(params, made) == before
    with refused(RuntimeError, "once before each capture", optimizer=made, params=params):
        graph.capture(made.step)
    for _, each in pairs:
        each.step()
    graph.capture(made.step)
    for _ in range(2):
        eager.step()
        made.advance_captured_step()
        graph.replay()
        assert_alike(params, made, others, eager)


# Several graphs, and what each of them holds.


@pytest.mark.parametrize("more", CLIPPING, ids=str)
def test_two_graphs_of_one_optimizer(more, graph, seed):
    """Gradients of their own each, as of two batch shapes; a step between the captures."""
    params, made, first = captured(graph, "graddrop", seed, **more)
    others, eager = eager_twin("graddrop", seed, 3, **more)
    one = graph.recorded
    with pytest.raises(RuntimeError, match="once before each capture"):
        graph.capture(made.step)
    for param, other in zip(params, others):
        param.grad = other.grad.clone()
    made.step()
    for param in params:
        param.grad = torch.zeros_like(param)
    two = graph.capture(made.step)
    second = [param.grad for param in params]
    for i, (recorded, static) in enumerate(((one, first), (two, second), (one, first))):
        random_grads(others, torch.Generator().manual_seed(seed + i))
        replay_beside(eager.step, params, made, static, others, graph, recorded)
        assert_alike(params, made, others, eager, i)


def tensors_of(tables):
    upload = tables.upload
    chunks = [launch.chunks for launches in tables._launches.values() for launch in launches]
    return [tables.step_rows, tables.by_age, tables.sums, tables.arrived, upload.device, upload._image, *chunks]


def test_a_graph_keeps_what_it_reads(graph, seed):
    """Chunk lists, sums, counters, tables, ages, pinned memory: whatever later steps need, and after other captures and
    loads.
    """
    params, made = eager_twin(GradDropEpoch(9, storage="recompute"), seed, 2, max_grad_norm=1.0, norm_after_mask=True)
    graph.capture(made.step)
    held = [weakref.ref(each) for table in made._stepper.captured[0]._tables for each in tensors_of(table)]
    moments = weakref.ref(made.state[params[0]]["exp_avg"])
    assert len(held) >= 7
    alive = lambda: gc.collect() is not None and all(each() is not None for each in held)
    made.set_epoch(7)  # more ages
    for i in range(12):  # more sets of launches than a table remembers
        params[i % len(params)].grad = torch.zeros(params[i % len(params)].numel() + 1)[1:].view_as(
            params[i % len(params)]
        )
        made.step()
    assert alive()
    params[0].grad = None  # another batch
    made.step()
    assert alive()
    made.load_state_dict(made.state_dict())
    made.step()
    assert alive() and moments() is not None
    graph.capture(made.step)
    assert alive(), "nobody knows when a graph is gone"
    assert moments() is None, "moments are as large as the model: the next capture lets those of a load go"


def test_other_parameters_in_an_eager_step_do_not_disturb_a_graph(graph, seed):
    params, made, static = captured(graph, "graddrop", seed)
    others, eager = eager_twin("graddrop", seed, 2)
    for i in range(4):
        random_grads(others, torch.Generator().manual_seed(seed + i))
        if i % 2:
            replay_beside(eager.step, params, made, static, others, graph)
        else:
            others[0].grad = None
            for param, other in zip(params, others):
                param.grad = other.grad
            made.step()
            eager.step()
        assert_alike(params, made, others, eager, i)


def test_backends_that_can_be_captured():
    assert [backend.name for backend in backends.BACKENDS if backend.capturable] == ["triton", "cuda"]
