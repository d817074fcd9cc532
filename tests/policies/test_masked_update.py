"""masked="update", SkipUpdate and cautious weight decay, beside a loop in plain PyTorch."""

import math
from contextlib import nullcontext

import pytest
import torch
from cases import ENGINES, assert_same_bits
from toy import Encoder, keep_some, random_grads, refused

from graddrop_kernels import (
    FixedMask,
    FusedGradDropAdamW,
    GaussianGradDrop,
    GradDrop,
    GradDropEpoch,
    LayerGradDrop,
    SkipUpdate,
    TrainRows,
    param_groups,
)
from graddrop_kernels.backends import cpu

HYPER = {"lr": 0.03, "betas": (0.7, 0.93), "eps": 1e-4, "weight_decay": 0.3}
POLICIES = {
    "elements": (lambda model: GradDrop(0.4), 65536 / (65536 - round(0.4 * 65536))),
    "given": (lambda model: FixedMask(keep_some(model), 1.3), 1.3),
    "buckets": (lambda model: GradDropEpoch(3), 1.0),
    "blocks": (lambda model: LayerGradDrop(0.5), 1.0),
    "parameters": (lambda model: SkipUpdate(0.4), 65536 / (65536 - round(0.4 * 65536))),
}


class Loop:
    """AdamW in float64: the moments see every gradient, and kept elements take lr*wd*p + scale*step."""

    def __init__(self, params, scale, cautious=False, maximize=False):
        self.values = [param.detach().double().clone() for param in params]
        self.m, self.v = ([torch.zeros_like(value) for value in self.values] for _ in range(2))
        self.scale, self.cautious, self.sign, self.t = scale, cautious, -1 if maximize else 1, 0
        self.sure = [torch.ones_like(value, dtype=torch.bool) for value in self.values]  # of each moment's sign

    def step(self, grads, masks):
        self.t += 1
        (beta1, beta2), lr = HYPER["betas"], HYPER["lr"]
        for i, (grad, mask) in enumerate(zip(grads, masks)):
            g = self.sign * grad.double()
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * g * g
            direction = self.m[i] / (1 - beta1**self.t) / ((self.v[i] / (1 - beta2**self.t)).sqrt() + HYPER["eps"])
            decay = HYPER["weight_decay"] * self.values[i]
            if self.cautious:
                decay = decay * (self.m[i] * self.values[i] >= 0)
                self.sure[i] &= self.m[i].abs() > 1e-6
            moved = self.values[i] - lr * (decay + self.scale * direction)
            self.values[i] = torch.where(mask, moved, self.values[i])


def make(mask, engine, **arguments):
    model = Encoder()
    groups = [{"params": group["params"], **{k: v for k, v in group.items() if k in ("blocks", "param_blocks")}}
              for group in param_groups(model)]  # fmt: skip
    params = [param for group in groups for _, param in group["params"]]
    for group in groups:
        if "blocks" not in group:
            group["mask"] = None
    optimizer = FusedGradDropAdamW(groups, mask=mask(model), seed=5, backend=engine.backend, **HYPER, **arguments)
    return model, params, optimizer


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_loop_in_plain_pytorch(engine, policy, cautious, maximize, seed):
    torch.manual_seed(seed)
    mask, scale = POLICIES[policy]
    model, params, optimizer = make(
        mask, engine, masked="update", cautious_weight_decay=cautious, maximize=maximize
    )
    named = keep_some(model)
    is_dense = lambda group, name: group["mask"] is None or policy == "given" and name not in named
    dense = [
        param
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"])
        if is_dense(group, name)
    ]
    masked = [param for param in params if all(param is not other for other in dense)]
    loops = (masked, Loop(masked, scale, cautious, maximize)), (dense, Loop(dense, 1.0, cautious, maximize))
    dropped = 0
    with cpu.using_isa(engine.isa) if engine.isa else nullcontext():
        for step in range(6):
            optimizer.set_epoch(step // 3)
            random_grads(params, torch.Generator().manual_seed(seed + step))
            before = [param.detach().clone() for param in masked]
            for some, loop in loops:
                loop.step([param.grad for param in some], [optimizer.mask(param) for param in some])
            masks = [optimizer.mask(param) for param in masked]
            optimizer.step()
            for param, old, mask in zip(masked, before, masks):
                dropped += int((~mask).sum())
                assert_same_bits(param.detach()[~mask], old[~mask], "a dropped element")
    assert dropped
    for some, loop in loops:
        for param, value, m, v, sure in zip(some, loop.values, loop.m, loop.v, loop.sure):
            assert sure.double().mean() > 0.9
            state = optimizer.state[param]
            assert state["step"] == 6
            pairs = (param.detach()[sure], value[sure]), (state["exp_avg"], m), (state["exp_avg_sq"], v)
            for found, wanted in pairs:
                torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-6)


def test_the_moments_are_those_of_adamw(seed):
    """Bit for bit, whatever is dropped."""
    states = []
    for mask in (GradDrop(0.6), SkipUpdate(), None):
        model = Encoder()
        arguments = {} if mask is None else {"masked": "update"}
        optimizer = FusedGradDropAdamW(model.named_parameters(), mask=mask, **HYPER, **arguments)
        for step in range(5):
            random_grads(list(model.parameters()), torch.Generator().manual_seed(seed + step))
            optimizer.step()
        states.append([optimizer.state[param] for param in model.parameters()])
    for other in states[:2]:
        for found, wanted in zip(other, states[2]):
            for key in ("exp_avg", "exp_avg_sq", "step"):
                assert_same_bits(found[key], wanted[key], key)


def test_each_parameter_is_drawn_for_itself(seed):
    model = Encoder()
    optimizer = FusedGradDropAdamW(model.named_parameters(), mask=SkipUpdate(0.3), seed=seed, **HYPER)
    kept = {name: [] for name, _ in model.named_parameters()}
    for _ in range(300):
        for name, param in model.named_parameters():
            param.grad = torch.zeros_like(param)
            mask = optimizer.mask(name)
            assert mask.all() or not mask.any()
            kept[name].append(bool(mask.all()))
        optimizer.step()
    rates = torch.tensor(list(kept.values())).double().mean(1)
    assert (rates - 0.7).abs().max() < 6 * math.sqrt(0.3 * 0.7 / 300)
    assert len({tuple(each) for each in kept.values()}) == len(kept), "two parameters are drawn alike"


def test_a_resume_goes_on_with_the_same_bits(seed):
    def training(steps, states=None):
        model, params, optimizer = make(POLICIES["parameters"][0], ENGINES[0], cautious_weight_decay=True)
        if states:
            model.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
        for step in steps:
            random_grads(params, torch.Generator().manual_seed(seed + step))
            optimizer.step()
        return model, optimizer

    whole, _ = training(range(9))
    first, optimizer = training(range(4))
    assert optimizer.param_groups[0]["cautious_weight_decay"] is True
    second, _ = training(range(4, 9), (first.state_dict(), optimizer.state_dict()))
    for a, b in zip(second.parameters(), whole.parameters()):
        assert_same_bits(a, b, "resumed")


def test_skipping_the_backward_pass_skips_nothing(seed):
    """The moments of what is dropped need its gradients."""
    model, params, optimizer = make(POLICIES["blocks"][0], ENGINES[0], masked="update")
    random_grads(params, torch.Generator().manual_seed(seed))
    optimizer.step()
    for _ in range(4):
        with optimizer.skip_dropped():
            assert all(param.requires_grad for param in params)
        optimizer.step()


def test_the_norm_after_the_mask_is_that_of_whole_gradients(seed):
    model, params, optimizer = make(
        POLICIES["elements"][0], ENGINES[0], masked="update", max_grad_norm=1.0, norm_after_mask=True
    )
    random_grads(params, torch.Generator().manual_seed(seed))
    expected = torch.nn.utils.get_total_norm([param.grad for param in params])
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, expected)


def test_what_cannot_be_meant_is_refused():
    model = Encoder()
    for mask, arguments, words in (
        (SkipUpdate(), {"masked": "gradient"}, ["SkipUpdate has a meaning with masked='update' only", "'gradient'"]),
        (SkipUpdate(), {"masked": "frozen"}, ["SkipUpdate has a meaning with masked='update' only", "'frozen'"]),
        (TrainRows({"a": [1]}), {"masked": "update"}, ["TrainRows has a meaning with masked='frozen' only"]),
        (GaussianGradDrop(), {"masked": "update"}, ["masked='update' does not apply to GaussianGradDrop"]),
        (GradDrop(), {"masked": "updates"}, ["masked of parameter group 0", "'update'", "got 'updates'"]),
        (GradDrop(), {"cautious_weight_decay": 1}, ["cautious_weight_decay of parameter group 0", "True or False"]),
        (None, {"stochastic_moments": None}, ["stochastic_moments of parameter group 0", "True or False", "None"]),
        (None, {"stochastic_rounding": "yes"}, ["stochastic_rounding of parameter group 0", "True or False", "'yes'"]),
        (None, {"master_weights": 1}, ["master_weights of parameter group 0", "True or False", "got 1"]),
    ):
        with refused(ValueError, *words):
            FusedGradDropAdamW(model.named_parameters(), mask=mask, **arguments)
    for p in (1.0, -0.1, 1e-6, "half"):
        with pytest.raises((ValueError, TypeError)):
            SkipUpdate(p)
