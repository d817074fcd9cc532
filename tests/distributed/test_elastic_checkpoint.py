"""torch.distributed.checkpoint under FSDP2: training that goes on with other numbers of ranks ends with the bits of one
process that trains in one go.

Gradients are given by step and name, equal in all runs.
"""

import functools
import os
import signal
from pathlib import Path

import pytest
import torch
from cases import ALL_MASKINGS, PAST_THE_LAST_EPOCH, assert_same_tensors, of_all_rows
from ranks import RankFailure, run_ranks
from test_sharded_modules import fully_sharded, mesh_of
from torch import nn

from graddrop_kernels import FusedGradDropAdamW

pytestmark = pytest.mark.filterwarnings(PAST_THE_LAST_EPOCH)

STEPS_AN_EPOCH = 4  # so that a training is broken off in mid-epoch
RANKS = (2, 4, 1, 3)  # one after the other, three steps each


class Model(nn.Module):
    """Few tensors, as each costs a checkpoint milliseconds. Rows divide unevenly, the head leaves one rank none."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(37, 3), nn.Linear(3, 5)
        self.layers = nn.ModuleList(nn.Linear(13, 11, bias=number == 1) for number in range(3))


def gradient(name, shape, step, seed):
    from hashlib import blake2b

    number = int.from_bytes(blake2b(f"{name} {step} {seed}".encode(), digest_size=6).digest(), "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def build(masking, seed, mesh=None, reverse=False):
    """(model, optimizer), sharded over the mesh if there is one."""
    model = Model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    values = [(name, param.detach()) for name, param in model.named_parameters()]
    if mesh is not None:
        fully_sharded(model, mesh)
    named = list(model.named_parameters())
    optimizer = FusedGradDropAdamW(
        named[::-1] if reverse else named, lr=0.03, betas=(0.8, 0.95), weight_decay=0.1, amsgrad=True,
        seed=0xDEADBEEFCAFEF00D, mask=ALL_MASKINGS[masking].policy(values), **ALL_MASKINGS[masking].arguments,
    )  # fmt: skip
    return model, optimizer


def train(model, optimizer, steps, seed):
    from torch.distributed.tensor import DTensor, distribute_tensor

    for step in steps:
        optimizer.set_epoch(step // STEPS_AN_EPOCH)
        for name, param in model.named_parameters():
            grad = gradient(name, param.shape, step, seed)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
            param.grad = grad
        optimizer.step()
        optimizer.zero_grad()


def all_ranks():
    return mesh_of(torch.distributed.get_world_size())


def state_of(model, optimizer, flat):
    from torch.distributed.checkpoint import state_dict as of

    options = of.StateDictOptions(flatten_optimizer_state_dict=flat)
    return {
        "model": of.get_model_state_dict(model),
        "optim": of.get_optimizer_state_dict(model, optimizer, options=options),
    }


def set_state(model, optimizer, flat, state):
    from torch.distributed.checkpoint import state_dict as of

    of.set_model_state_dict(model, state["model"])
    options = of.StateDictOptions(flatten_optimizer_state_dict=flat)
    of.set_optimizer_state_dict(model, optimizer, state["optim"], options=options)


def save(folder, runs):
    """One checkpoint of several trainings, {name: (model, optimizer, whether its state is flattened)}."""
    import torch.distributed.checkpoint as dcp

    dcp.save({name: state_of(*run) for name, run in runs.items()}, checkpoint_id=folder)


def load(folder, runs):
    import torch.distributed.checkpoint as dcp

    states = {name: state_of(*run) for name, run in runs.items()}
    dcp.load(states, checkpoint_id=folder)
    for name, run in runs.items():
        set_state(*run, states[name])


def whole(tensor):
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def everything(model, optimizer):
    """Parameters and state, whole, by name; and the counts of the groups."""
    found = {name: whole(param) for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        state = optimizer.state[param].items()
        found |= {f"{key} of {name}": of_all_rows(optimizer, param, whole(value)) for key, value in state}
    return found, [
        (group["completed_steps"], group["epoch"], group["epoch_history"]) for group in optimizer.param_groups
    ]


def leg(folder, number, steps, seed):
    """One part of the training of every policy: from the checkpoint before it, if there is one, to one of its own.
    States are flattened in every other of them, and in every other the parameters are in another order.
    """
    mesh = all_ranks()
    runs = {masking: build(masking, seed, mesh, reverse=number % 2 == 1) for masking in ALL_MASKINGS}

    def with_form(number):
        return {masking: (*run, (index + number) % 2 == 1) for index, (masking, run) in enumerate(runs.items())}

    if number:
        load(f"{folder}/{number - 1}", with_form(number - 1))
    for index, (model, optimizer) in enumerate(runs.values()):
        train(model, optimizer, steps, seed)
        if index % 3 == 0:  # as where a layer is frozen by hand
            model.layers[1].requires_grad_(False)
    if number < len(RANKS) - 1:
        save(f"{folder}/{number}", with_form(number))
        return None
    return {masking: everything(*run) for masking, run in runs.items()}


@functools.cache
def in_one_go(masking, steps, seed):
    model, optimizer = build(masking, seed)
    train(model, optimizer, range(steps), seed)
    return everything(model, optimizer)


def assert_equal_runs(run, expected, what=""):
    (tensors, counts), (expected_tensors, expected_counts) = run, expected
    assert counts == expected_counts, what
    assert_same_tensors(tensors, expected_tensors, what)


@pytest.mark.slow
def test_every_policy_goes_on_bit_for_bit_on_other_numbers_of_ranks(seed, tmp_path):
    for number, world in enumerate(RANKS):
        steps = range(3 * number, 3 * number + 3)
        results = run_ranks(world, leg, str(tmp_path), number, steps, seed, timeout=300)
    for runs in results:
        assert runs.keys() == ALL_MASKINGS.keys()
        for masking, run in runs.items():
            assert_equal_runs(run, in_one_go(masking, 3 * len(RANKS), seed), masking)


def state_of_fresh(seed):
    """What torch.distributed.checkpoint does to an optimizer that has not stepped, with and without it."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    runs = []
    for asked in (True, False):
        model, optimizer = build("graddrop", seed, all_ranks())
        if asked:
            state = get_optimizer_state_dict(model, optimizer)["state"]
            assert {float(each["step"]) for each in state.values()} == {0.0}
        train(model, optimizer, range(2), seed)
        runs.append(everything(model, optimizer))
    return runs


def test_asking_a_fresh_optimizer_for_its_state_is_no_step(seed):
    for asked, never_asked in run_ranks(2, state_of_fresh, seed):
        assert_equal_runs(asked, never_asked)


def warm_up(seed):
    """A first step with lr 0, as a warm-up begins; all the gradient that is not 0 is on rank 0."""
    model, optimizer = build("graddrop", seed, all_ranks())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    if torch.distributed.get_rank() == 0:
        model.head.weight.grad.to_local()[0, 0] = 1.0
    optimizer.step()
    return [float(optimizer.state[param]["step"]) for param in model.parameters()], optimizer.param_groups[0][
        "completed_steps"
    ]


def test_a_first_step_of_lr_0_counts_on_every_rank(seed):
    for steps, completed in run_ranks(3, warm_up, seed):
        assert set(steps) == {1.0} and completed == 1


def save_and_die(folder, seed):
    """A checkpoint after five steps; a second one, in which rank 1 is killed."""
    import torch.distributed.checkpoint as dcp

    model, optimizer = build("graddrop", seed, all_ranks())
    train(model, optimizer, range(5), seed)
    save(f"{folder}/5", {"run": (model, optimizer, False)})
    train(model, optimizer, range(5, 8), seed)
    if torch.distributed.get_rank() == 1:
        write = dcp.FileSystemWriter.write_data

        def half(self, plan, planner):
            plan.items[len(plan.items) // 2 :] = []
            write(self, plan, planner).wait()
            os.kill(os.getpid(), signal.SIGKILL)

        dcp.FileSystemWriter.write_data = half
    save(f"{folder}/8", {"run": (model, optimizer, False)})


def go_on(folder, seed):
    complete = [int(file.parent.name) for file in Path(folder).glob("*/.metadata")]  # torch writes it last
    model, optimizer = build("graddrop", seed, all_ranks())
    load(f"{folder}/{max(complete)}", {"run": (model, optimizer, False)})
    train(model, optimizer, range(max(complete), 10), seed)
    return max(complete), everything(model, optimizer)


def test_a_rank_killed_while_it_saves_leaves_the_checkpoint_before(seed, tmp_path):
    with pytest.raises(RankFailure, match="SIGKILL"):
        run_ranks(2, save_and_die, str(tmp_path), seed)
    assert any((tmp_path / "8").iterdir()), "it was killed before it had written anything"
    for start, run in run_ranks(3, go_on, str(tmp_path), seed):
        assert start == 5
        assert_equal_runs(run, in_one_go("graddrop", 10, seed))
