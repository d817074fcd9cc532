"""Random sequences of captures, replays, eager steps and changes of an optimizer, beside a twin that steps eagerly.

After every action the two have the same bits, or the optimizer has raised a clear error and nothing has changed.
"""

import random
from collections import Counter

import pytest
import torch
from graphs import emulate_graphs
from test_captured_step import assert_alike, make
from toy import random_grads, snapshot

from graddrop_kernels import GradDrop
from graddrop_kernels.backends import cuda
from graddrop_kernels.policies.paper import METHODS

pytestmark = pytest.mark.skipif(
    cuda._load()[0] is None, reason="no CUDA library: nvcc was not there when the package was built"
)
LENGTH = 30
POLICIES = {
    **{key: method(5, 0.5 if method.needs_blocks else 0.3) for key, method in METHODS.items()},
    "frozen elements": GradDrop(0.4),
}
IN_TURNS = ("sample-blocks", "cycle-blocks")  # a graph can be replayed only when its blocks have their turn again
MASKED = {"frozen elements": "frozen"}  # else the policy's own choice
CLEAR = ("after one that was like it", "cannot carry out this one", "needs a step() that was captured")


class Worlds:
    """The optimizer, its eager twin, and the graphs that have captured the optimizer's step."""

    def __init__(self, policy, rng, graph, options):
        self.rng, self.graph, self.seen, self.device = rng, graph, Counter(), options.get("device", "cpu")
        (self.params, self.made), (self.others, self.eager) = (make(policy, **options) for _ in range(2))
        self.places = [torch.empty_like(param) for param in self.params]  # of the gradients of some eager steps
        self.graphs = []  # (what the optimizer keeps of it, what was recorded, its gradients)
        self.saved = None

    def both(self):
        return (self.params, self.made), (self.others, self.eager)

    def new_gradients(self, some=False):
        seed, left_out = self.rng.getrandbits(31), self.rng.randrange(len(self.others)) if some else None
        random_grads(self.others, torch.Generator().manual_seed(seed))
        if left_out is not None:
            self.others[left_out].grad = None

    def eager_step(self, grads):
        for param, grad in zip(self.params, grads):
            param.grad = grad
        self.made.step()
        self.eager.step()

    def step_anywhere(self):
        self.new_gradients(some=self.rng.random() < 0.3)
        self.eager_step([None if other.grad is None else other.grad.clone() for other in self.others])

    def step_in_place(self):
        """As with a caching allocator, which gives the gradients of every step the same memory."""
        self.new_gradients()
        for place, other in zip(self.places, self.others):
            place.copy_(other.grad)
        self.eager_step(self.places)

    def step_on_a_graphs_gradients(self):
        if self.graphs:
            self.new_gradients()
            *_, static = self.rng.choice(self.graphs)
            for grad, other in zip(static, self.others):
                grad.copy_(other.grad)
            self.eager_step(static)

    def capture(self):
        for param in self.params:
            param.grad = torch.zeros_like(param)
        static = [param.grad for param in self.params]
        recorded = self.refused_or(lambda: self.graph.capture(self.made.step))
        if recorded is not None:
            kept = self.made._stepper.captured
            self.graphs = [each for each in self.graphs if any(each[0] is own for own in kept)]
            self.graphs.append((kept[-1], recorded, static))

    def step_and_capture(self):
        self.step_in_place()
        self.capture()

    def replay(self):
        if not self.graphs:
            return
        self.new_gradients()
        _, recorded, static = self.rng.choice(self.graphs)
        for grad, other in zip(static, self.others):
            grad.copy_(other.grad)
        if self.refused_or(lambda: self.made.advance_captured_step() or True):
            self.graph.replay(recorded)
            self.eager.step()
            self.seen["replays"] += 1
        else:
            self.graphs = []  # as the text asks: capture again

    def refused_or(self, action):
        """What the action returns; None if it was refused, in which case it has changed nothing."""
        before = snapshot(self.made)
        try:
            return action()
        except RuntimeError as error:
            assert any(text in str(error) for text in CLEAR), error
            assert snapshot(self.made) == before
            self.seen["refused"] += 1
            return None

    def change_numbers(self):
        lr, beta, decay = self.rng.choice((0.1, 0.02, 0.003)), self.rng.choice((0.5, 0.8)), self.rng.choice((0, 0.1))
        kind = self.rng.choice(("number", "number", "float32", "float64"))
        for _, made in self.both():
            for group in made.param_groups:
                group["lr"], group["weight_decay"] = lr, decay
                for name in ("lr", "weight_decay") if kind != "number" else ():
                    group[name] = torch.tensor(group[name], dtype=getattr(torch, kind), device=self.device)
                group["betas"], group["maximize"] = (beta, 0.95), lr == 0.003

    def change_numbers_in_their_tensors(self):
        for _, made in self.both():
            for group in made.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].mul_(0.5)
                    group["weight_decay"].mul_(0.5)

    def change_norm(self):
        limit, after = self.rng.choice((None, 0.5, 2.0)), self.rng.random() < 0.5
        for _, made in self.both():
            made.max_grad_norm, made.norm_after_mask = limit, after

    def change_epoch(self):
        epoch = self.rng.randrange(5)
        for _, made in self.both():
            made.set_epoch(epoch)

    def save(self):
        self.saved = self.eager.state_dict()
        self.saved = {"state": {key: {name: value.clone() for name, value in each.items()}
                                for key, each in self.saved["state"].items()},
                      "param_groups": [dict(group) for group in self.saved["param_groups"]]}  # fmt: skip

    def load(self):
        if self.saved is not None and len(self.saved["param_groups"]) == len(self.made.param_groups):
            for _, made in self.both():
                made.load_state_dict(self.saved)

    def add_group(self):
        if len(self.params) > 12:
            return
        for params, made in self.both():
            param = torch.nn.Parameter(torch.linspace(1, 2, 9, device=self.device))
            made.add_param_group({"params": [(f"added{len(params)}", param)], "lr": 0.01})
            params.append(param)
        self.places.append(torch.empty(9, device=self.device))
        self.refused_or(self.made.advance_captured_step)
        self.graphs = []

    ACTIONS = {
        step_anywhere: 3, step_in_place: 4, step_on_a_graphs_gradients: 3, capture: 1, step_and_capture: 3, replay: 9,
        change_numbers: 2, change_numbers_in_their_tensors: 1, change_norm: 1, change_epoch: 1, save: 1,
        load: 1, add_group: 0.3,
    }  # fmt: skip


def run(policy, seed, graph, **where) -> Counter:
    """``where``: the device and the backend."""
    rng = random.Random(seed)
    options = dict(rng.choice(({}, {"max_grad_norm": 0.7}, {"max_grad_norm": 0.7, "norm_after_mask": True})))
    options |= where | {"amsgrad": rng.random() < 0.3, "masked": MASKED.get(policy)}
    worlds = Worlds(POLICIES[policy], rng, graph, options)
    for _, made in worlds.both():
        made.set_epoch(0)
    log = []
    for _ in range(LENGTH):
        (action,) = rng.choices(list(worlds.ACTIONS), list(worlds.ACTIONS.values()))
        log.append(action.__name__)
        action(worlds)
        assert_alike(worlds.params, worlds.made, worlds.others, worlds.eager, f"sequence {seed}: {' '.join(log)}")
    return worlds.seen


@pytest.mark.parametrize("policy", POLICIES)
def test_the_bits_of_the_eager_twin_or_a_clear_error(policy, monkeypatch, seed):
    graph, seen = emulate_graphs(monkeypatch), Counter()
    for i in range(4):
        seen += run(policy, seed + i, graph)
    assert seen["replays"] or policy in IN_TURNS, seen


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_many_such_sequences(policy, monkeypatch, seed):
    graph, seen = emulate_graphs(monkeypatch), Counter()
    for i in range(30):
        seen += run(policy, 1000 * seed + i, graph)
    assert seen["replays"] > (5 if policy in IN_TURNS else 50) and seen["refused"] > 5, seen
