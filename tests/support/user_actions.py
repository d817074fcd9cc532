"""Random sequences of what people do to an optimizer and to what it steps, beside torch.optim.AdamW.

Each sequence makes two worlds of equal parameters, one with ``FusedGradDropAdamW(mask=None)`` and one with torch's
AdamW, and does the same in both. After every action the worlds agree, or ours has raised a clear error and nothing of
it has changed. ``python tests/support/user_actions.py 10000`` runs that many sequences, ``--seed N`` repeats one.
"""

import argparse
import collections
import copy
import io
import random
import secrets
import sys

import torch

from graddrop_kernels import FusedGradDropAdamW

LENGTH = 50
# float32 holds these; ours computes with the rounded number where torch takes the exact one.
BETAS = ((0.875, 0.9921875), (0.5, 0.75))
DTYPES = (torch.float32, torch.float64)
SHAPES = ((), (1,), (5,), (0, 3), (3, 4), (2, 3, 2, 2))
# What ours refuses and torch takes, by a part of the text; any other refusal of ours alone is a fault.
REFUSED_HERE_ONLY = (
    "it was freed or resized", "was replaced after its state was made", "they must be alike",
    "in the state dict has shape", "must be a finite number", "of the state dict is of other parameters",
)  # fmt: skip


class World:
    """Parameters and the optimizer that steps them."""

    def __init__(self, ours: bool, seed: int):
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=rng.choice(DTYPES)))
            for shape in rng.sample(SHAPES, 4)
        ]
        self.ours, self.names = ours, len(self.params)
        self.optimizer = self.make(rng)
        self.saved = None

    def make(self, rng):
        options = {"lr": rng.choice((0.1, 1e-2)), "weight_decay": rng.choice((0.0, 0.3)), "amsgrad": rng.random() < 0.3}
        options["betas"] = rng.choice(BETAS)
        params = [(f"p{i}", p) for i, p in enumerate(self.params)] if rng.random() < 0.3 else list(self.params)
        if self.ours:
            return FusedGradDropAdamW(params, **options, mask=None)
        return torch.optim.AdamW(params, **options, foreach=False)

    def stepped(self):
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def place(self, rng):
        """(group, position) of a parameter."""
        group = rng.choice(self.optimizer.param_groups)
        return group, rng.randrange(len(group["params"]))

    def contents(self):
        """All values, as plain tensors and numbers, in an order of their own."""
        found = [param.requires_grad for param in self.stepped()]
        for param in self.stepped():
            state = self.optimizer.state.get(param, {})
            found += [value_of(param), value_of(param.grad)]
            found += [value_of(torch.as_tensor(state[name])) for name in sorted(state)]
        for group in self.optimizer.param_groups:
            found += [torch.as_tensor(each) for each in (group["lr"], *group["betas"], group["weight_decay"])]
        return found


def value_of(tensor):
    """A copy; None for no tensor and for one whose memory was freed."""
    if tensor is None or (tensor.numel() and tensor.untyped_storage().nbytes() == 0):
        return None
    return tensor.detach().clone()


def fresh(param, rng):
    """A random tensor in the parameter's shape, the same for the same ``rng``."""
    generator = torch.Generator().manual_seed(rng.getrandbits(31))
    return torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)


# Actions: (world, rng).


def give_gradients(world, rng):
    for param in world.stepped():
        values = fresh(param, rng)
        kind = rng.choice(("plain", "plain", "none", "expanded", "strided", "zeros", "slice"))
        if kind == "expanded" and param.dim():
            values = values[:1].expand(param.shape) if param.numel() else values
        elif kind == "strided" and param.dim() > 1:
            values = values.transpose(0, 1).contiguous().transpose(0, 1)
        elif kind == "slice":
            values = torch.cat([values.flatten(), values.flatten()])[param.numel() :].view(param.shape)
        elif kind == "zeros":
            values = torch.zeros_like(values)
        param.grad = None if kind == "none" else values


def backward(world, rng):
    trained = [param for param in world.stepped() if param.requires_grad and allocated(param)]
    if trained and all(param.grad is None or allocated(param.grad) for param in trained):
        sum(((param - 0.5) ** 2).sum().double() for param in trained).backward()


def allocated(tensor):
    return not tensor.numel() or tensor.untyped_storage().nbytes() > 0


def step(world, rng):
    world.optimizer.step()


def step_with_a_closure(world, rng):
    def closure():
        world.optimizer.zero_grad()
        backward(world, rng)
        return torch.zeros(())

    world.optimizer.step(closure)


def step_under_a_device(world, rng):
    with torch.device("meta"):
        world.optimizer.step()


def step_without_grad(world, rng):
    with torch.no_grad():
        world.optimizer.step()


def step_with_hooks(world, rng):
    def before(optimizer, args, kwargs):
        for param in world.stepped():
            if param.grad is not None and allocated(param.grad) and param.grad.is_contiguous():
                param.grad.mul_(0.5)

    hooks = [world.optimizer.register_step_pre_hook(before), world.optimizer.register_step_post_hook(lambda *_: None)]
    try:
        world.optimizer.step()
    finally:
        for hook in hooks:
            hook.remove()


def zero_grad(world, rng):
    to_none = rng.random() < 0.7 or not all(p.grad is None or allocated(p.grad) for p in world.stepped())
    for param in world.stepped():  # zeros cannot be written to an expanded gradient
        if not to_none and param.grad is not None and not param.grad.is_contiguous():
            param.grad = param.grad.contiguous()
    world.optimizer.zero_grad(set_to_none=to_none)


def replace_a_parameter(world, rng):
    group, i = world.place(rng)
    old = group["params"][i]
    if not allocated(old):
        return
    new = group["params"][i] = torch.nn.Parameter(old.detach().clone())
    state = world.optimizer.state.pop(old, None)
    if state is not None and rng.random() < 0.5:
        world.optimizer.state[new] = state


def swap_a_parameter(world, rng):
    group, i = world.place(rng)
    old = group["params"][i]
    if allocated(old) and old.grad is None and old.is_leaf:
        torch.utils.swap_tensors(old, torch.nn.Parameter(old.detach() * 0.5, requires_grad=old.requires_grad))


def move_a_parameter(world, rng):
    group, i = world.place(rng)
    param = group["params"][i]
    if not allocated(param):
        return
    kind = rng.choice(("clone", "strides", "buffer"))
    if kind == "strides" and param.dim() > 1:
        param.data = param.data.transpose(0, 1).contiguous().transpose(0, 1)
    elif kind == "buffer":
        param.data = torch.cat([param.data.flatten()] * 3)[param.numel() : 2 * param.numel()].view(param.shape)
    else:
        param.data = param.data.clone()


def move_the_state(world, rng):
    for state in world.optimizer.state.values():
        for key, value in list(state.items()):
            if isinstance(value, torch.Tensor) and rng.random() < 0.5:
                state[key] = value.clone() if rng.random() < 0.5 else value.to("cpu", copy=True)


def drop_the_state(world, rng):
    if rng.random() < 0.5:
        world.optimizer.state.clear()
    else:
        group, i = world.place(rng)
        world.optimizer.state.pop(group["params"][i], None)


def change_a_value(world, rng):
    group, i = world.place(rng)
    with torch.no_grad():
        if allocated(group["params"][i]):
            group["params"][i].mul_(0.9)


def freeze_or_unfreeze(world, rng):
    group, i = world.place(rng)
    group["params"][i].requires_grad_(not group["params"][i].requires_grad)


def free_a_gradient(world, rng):
    group, i = world.place(rng)
    grad = group["params"][i].grad
    if grad is not None and grad.numel():
        grad.untyped_storage().resize_(0)


def free_a_parameter(world, rng):
    """As FSDP does between two uses; the step comes while it is gone, or after it has come back."""
    group, i = world.place(rng)
    param = group["params"][i]
    storage = param.untyped_storage()
    if not param.numel():
        return
    if storage.nbytes():
        storage.resize_(0)
    else:
        param.data = fresh(param, rng)


def empty_a_parameter(world, rng):
    group, i = world.place(rng)
    param = group["params"][i]
    world.optimizer.state.pop(param, None)
    param.grad = None
    param.data = param.data.new_empty((0,))


def change_the_dtype(world, rng):
    """As ``model.double()``; the moments follow, or are made anew."""
    to, keep = rng.choice(DTYPES), rng.random() < 0.5
    for param in world.stepped():
        if not allocated(param) or (param.grad is not None and not allocated(param.grad)):
            return
    for param in world.stepped():
        grad, param.grad = param.grad, None
        param.data = param.data.to(to)
        param.grad = None if grad is None else grad.to(to)
        state = world.optimizer.state.get(param)
        if state and keep:
            state.update({key: value.to(to) for key, value in state.items() if key != "step"})
        elif state:
            del world.optimizer.state[param]


def add_a_group(world, rng):
    param = torch.nn.Parameter(torch.zeros(rng.choice(SHAPES)))
    param.data = fresh(param, rng)
    named = "param_names" in world.optimizer.param_groups[0] if world.optimizer.param_groups else False
    world.params.append(param)
    world.names += 1
    group = {"params": [(f"p{world.names}", param)] if named else [param], "lr": rng.choice((0.1, 1e-2))}
    world.optimizer.add_param_group({**group, "amsgrad": rng.random() < 0.5})


def add_a_group_twice(world, rng):
    group, i = world.place(rng)
    params = [group["params"][i]]
    if "param_names" in group:
        params = [("again", params[0])]
    world.optimizer.add_param_group({"params": params})


def add_a_bad_group(world, rng):
    world.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": -1.0})


def delete_a_parameter(world, rng):
    group, i = world.place(rng)
    if len(group["params"]) > 1:
        world.optimizer.state.pop(group["params"].pop(i), None)
        if "param_names" in group:
            del group["param_names"][i]


def start_anew(world, rng):
    params = world.stepped()
    named = "param_names" in world.optimizer.param_groups[0]
    world.optimizer.param_groups.clear()
    world.optimizer.state.clear()
    world.optimizer.add_param_group({"params": [(f"q{i}", p) for i, p in enumerate(params)] if named else params})


def change_options(world, rng):
    group, _ = world.place(rng)
    group["lr"] = rng.choice((0.05, 1e-3, torch.tensor(0.02)))
    group["betas"] = rng.choice(BETAS)
    group["weight_decay"], group["maximize"] = rng.choice((0.0, 0.1)), rng.random() < 0.3


def save(world, rng):
    world.saved = copy.deepcopy(world.optimizer.state_dict())


def load(world, rng):
    """Ours copies what it loads, so that a file can be loaded any number of times. torch's AdamW goes on in it."""
    if world.saved is not None:
        world.optimizer.load_state_dict(world.saved if world.ours else copy.deepcopy(world.saved))


def through_a_copy(world, rng):
    if all(map(allocated, world.stepped())) and all(p.grad is None or allocated(p.grad) for p in world.stepped()):
        world.params, world.optimizer = copy.deepcopy((world.stepped(), world.optimizer))


def through_a_file(world, rng):
    if all(map(allocated, world.stepped())):
        file = io.BytesIO()
        grads = [param.grad for param in world.stepped()]
        torch.save((world.stepped(), world.optimizer), file)
        file.seek(0)
        world.params, world.optimizer = torch.load(file, weights_only=False)
        for param, grad in zip(world.stepped(), grads):
            param.grad = grad


MANY = (give_gradients, give_gradients, backward, step, step, step, zero_grad)
ACTIONS = (
    *MANY, *MANY, step_with_a_closure, step_under_a_device, step_without_grad, step_with_hooks, replace_a_parameter,
    swap_a_parameter, move_a_parameter, move_the_state, drop_the_state, change_a_value, freeze_or_unfreeze,
    free_a_gradient, free_a_parameter, empty_a_parameter, change_the_dtype, add_a_group, add_a_group_twice,
    add_a_bad_group, delete_a_parameter, start_anew, change_options, save, load, through_a_copy, through_a_file,
)  # fmt: skip


# The comparison.


def differences(one, other, exact=False):
    """Says where two lists of contents differ: a text, or None."""
    if len(one) != len(other):
        return f"{len(one)} values against {len(other)}"
    for i, (a, b) in enumerate(zip(one, other)):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            # An ulp per step of float32, over the steps of one sequence, of values up to 8.
            near = (0.0, 0.0) if exact else (1e-5, 2e-5)
            if a.shape != b.shape or not torch.allclose(a.double(), b.double(), *near, equal_nan=True):
                return f"value {i}: {a.dtype} {a.flatten()[:4].tolist()} against {b.dtype} {b.flatten()[:4].tolist()}"
        elif a is not b and a != b:
            return f"value {i}: {a} against {b}"
    return None


def run(seed: int, refusals: collections.Counter, length: int = LENGTH) -> None:
    """One sequence. Raises AssertionError with the actions so far at the first difference."""
    ours, theirs = World(True, seed), World(False, seed)
    plan, done = random.Random(seed + 1), []
    for number in range(length):
        action = plan.choice(ACTIONS)
        rng = lambda: random.Random(f"{seed} {number}")  # noqa: B023 (used at once)
        if not ours.optimizer.param_groups:
            break
        done.append(action.__name__)
        story = f"seed {seed}: {', '.join(done)}"
        before = ours.contents()
        error = attempt(ours, action, rng())
        if error is not None:
            if "step" in action.__name__ and "closure" not in action.__name__ and "hooks" not in action.__name__:
                assert (what := differences(before, ours.contents(), exact=True)) is None, f"{story}: {error!r}, {what}"
            if any(text in str(error) for text in REFUSED_HERE_ONLY):
                assert isinstance(error, (ValueError, TypeError)), f"{story}: {error!r}"
            else:
                assert attempt(theirs, action, rng()) is not None, f"{story}: refused here only: {error!r}"
            refusals[f"{action.__name__}: {type(error).__name__}: {error}"[:160]] += 1
            repair(ours), repair(theirs)
            if "closure" in action.__name__ or "hooks" in action.__name__:
                break  # a closure has changed the gradients already
            continue
        if (error := attempt(theirs, action, rng())) is not None:
            if "use_count" in str(error) or "gradient edge" in str(error):
                return  # autograd holds the parameter that torch is to swap
            raise AssertionError(f"{story}: torch alone raises {error!r}") from error
        what = differences(ours.contents(), theirs.contents())
        assert what is None, f"{story}: {what}"


def attempt(world, action, rng):
    """The error that an action ends with, or None."""
    try:
        action(world, rng)
    except Exception as error:  # whatever it is, run() judges it
        error.__context__ = error.__cause__ = None
        return error.with_traceback(None)  # its frames would hold tensors, which torch then does not swap
    return None


def repair(world):
    """Gives back what was freed, so that a sequence can go on."""
    for param in world.stepped():
        if not allocated(param):
            param.data = torch.ones(param.shape, dtype=param.dtype)
        if param.grad is not None and (not allocated(param.grad) or param.grad.dtype != param.dtype):
            param.grad = None
        state = world.optimizer.state.get(param, {})
        if any(isinstance(v, torch.Tensor) and k != "step" and v.shape != param.shape for k, v in state.items()):
            del world.optimizer.state[param]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=100)
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args()
    refusals = collections.Counter()
    first = secrets.randbits(30) if arguments.seed is None else arguments.seed
    faults = 0
    for seed in range(first, first + (1 if arguments.seed is not None else arguments.count)):
        try:
            run(seed, refusals)
        except AssertionError as error:
            faults += 1
            print(error, flush=True)
        if (seed - first) % 1000 == 999:
            print(f"{seed - first + 1} sequences, {faults} faults", flush=True)
    for text, count in refusals.most_common(30):
        print(f"{count:6} x {text}")
    print(f"{arguments.count} sequences from seed {first}, {faults} with a difference")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
