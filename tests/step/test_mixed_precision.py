"""Training in 16 bits: what stochastic rounding and master weights promise, on every backend that offers them."""

import copy
import math

import pytest
import torch
from cases import BACKEND_NAMES, BF16, F16, F32
from toy import bits

from graddrop_kernels import FusedGradDropAdamW, GaussianGradDrop, GradDrop, GradDropEpoch, LayerGradDrop
from graddrop_kernels.backends.reference.rounding import stochastic_bfloat16
from graddrop_kernels.masks.philox import DOMAIN_MOMENTS, DOMAIN_ROUNDING, stream_key, words32

ARGUMENTS = {"lr": 3e-4, "betas": (0.75, 0.96875), "eps": 1e-5, "weight_decay": 0.2}
POLICIES = {
    "plain": (None, {}),
    "graddrop": (GradDrop(0.3), {}),
    "frozen": (GradDrop(0.4), {"masked": "frozen"}),
    "gaussian": (GaussianGradDrop(0.3), {}),
    "layer": (LayerGradDrop(0.5, layers=["layer.*"]), {}),
    "epoch": (GradDropEpoch(3), {}),
}
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
offered = pytest.mark.parametrize("backend", BACKEND_NAMES)


def make(dtype, seed, backend, policy="graddrop", **more):
    """(parameters, optimizer): two tensors in two blocks, at values that a bfloat16 holds and a float16 too (one in
    100,000 normal numbers is so small that float16 would round a bfloat16 again).
    """
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(size, generator=generator).bfloat16().half() for size in (1031, 64)]
    params = [torch.nn.Parameter(value.to(dtype)) for value in values]
    mask, masked = POLICIES[policy]
    optimizer = FusedGradDropAdamW(
        [(f"layer.{i}.weight", param) for i, param in enumerate(params)],
        **{**ARGUMENTS, **masked, **more}, mask=mask, seed=seed, backend=backend,
    )  # fmt: skip
    optimizer.set_epoch(1)
    return params, optimizer


def give_grads(params, step, seed):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).bfloat16().half().to(param.dtype)


# Stochastic rounding.


def test_mean_of_100_000_roundings_is_exact(seed):
    """Of values between two bfloat16, at many places, signs and sizes; 5 standard errors."""
    repeats, generator = 100_000, torch.Generator().manual_seed(seed)
    values = torch.randn(24, generator=generator) * torch.logspace(-30, 30, 24)
    key = stream_key("weight", seed)
    for i, value in enumerate(values):
        words = words32(key, i, DOMAIN_ROUNDING, 0, repeats, torch.device("cpu"))
        rounded = stochastic_bfloat16(value.expand(repeats).contiguous(), words)
        assert torch.equal(rounded, rounded.bfloat16().float())
        low = (value.view(torch.int32) & -65536).view(torch.float32).double().item()
        high = ((value.view(torch.int32) & -65536) + 65536).view(torch.float32).double().item()
        assert set(rounded.double().tolist()) <= {low, high}
        share = (value.double().item() - low) / (high - low)
        error = abs((rounded.double().mean().item() - low) / (high - low) - share)
        assert error < 5 * math.sqrt(share * (1 - share) / repeats) + 1e-9, (value.item(), error)


def test_what_is_a_bfloat16_stays_and_infinities_and_nan_too(seed):
    words = torch.randint(2**32, (2000,), generator=torch.Generator().manual_seed(seed))
    exact = torch.randn(2000, generator=torch.Generator().manual_seed(seed)).bfloat16().float()
    assert bits(stochastic_bfloat16(exact, words)) == bits(exact)
    special = torch.tensor([math.inf, -math.inf, 0.0, -0.0])
    assert bits(stochastic_bfloat16(special, words[:4])) == bits(special)
    nan = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(F32)  # -1: a negative NaN, all bits set
    assert stochastic_bfloat16(nan, torch.full((3,), 2**32 - 1)).bfloat16().isnan().all()


@offered
@pytest.mark.parametrize("policy", POLICIES)
def test_small_updates_survive_on_average(policy, backend, seed):
    """lr 3e-4 is below half the last digit of most values near 1: rounded to nearest they never move. Rounded
    stochastically the mean moves as in float32.
    """
    ends = {}
    for name, dtype, more in (
        ("float32", F32, {}),
        ("nearest", BF16, {"moment_dtype": F32}),
        ("stochastic", BF16, {"moment_dtype": F32, "stochastic_rounding": True}),
    ):
        torch.manual_seed(seed)
        param = torch.nn.Parameter(torch.ones(20_000, dtype=dtype))
        mask, masked = POLICIES[policy]
        arguments = {**ARGUMENTS, "weight_decay": 0.0, **masked, **more}
        optimizer = FusedGradDropAdamW([("layer.0.weight", param)], mask=mask, seed=seed, backend=backend, **arguments)
        optimizer.set_epoch(2)
        for _ in range(8):
            param.grad = torch.ones_like(param)
            optimizer.step()
        ends[name] = param.detach().double().mean().item() - 1
    assert ends["nearest"] == 0 > ends["float32"]
    # 2^-8 is the last digit below 1; a step is a coin of at most that size.
    assert abs(ends["stochastic"] - ends["float32"]) < 6 * 2**-8 * math.sqrt(8 / 20_000), ends


@offered
def test_other_dtypes_round_as_always(backend, seed):
    for dtype in (F32, F16):
        plain, stochastic = make(dtype, seed, backend), make(dtype, seed, backend, stochastic_rounding=True)
        for step in range(3):
            for params, optimizer in (plain, stochastic):
                give_grads(params, step, seed)
                optimizer.step()
        assert list(map(bits, plain[0])) == list(map(bits, stochastic[0]))


@offered
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_moments_fall_as_in_float32_on_average(dtype, backend, seed):
    """After large gradients none. Rounded to nearest with beta2 = 0.999, exp_avg_sq stays: a step takes less than half
    its last digit. Rounded stochastically, its mean falls as in float32, as do those of exp_avg and the maximum.
    """
    ends, steps = {}, 60
    for name, moments, more in (
        ("float32", F32, {}), ("nearest", BF16, {}), ("stochastic", BF16, {"stochastic_moments": True})
    ):  # fmt: skip
        param = torch.nn.Parameter(torch.zeros(20_000, dtype=dtype))
        optimizer = FusedGradDropAdamW(
            [("weight", param)], 1e-3, (0.99, 0.999), mask=None, seed=seed, backend=backend, moment_dtype=moments,
            amsgrad=True, **more,
        )  # fmt: skip
        param.grad = torch.full_like(param, 1.7)
        optimizer.step()
        param.grad.zero_()
        for _ in range(steps):
            optimizer.step()
        ends[name] = [optimizer.state[param][f"{key}"].double().mean().item() for key in MOMENTS]
    start = 0.001 * 1.7**2
    for place, (wide, nearest, rounded) in enumerate(zip(ends["float32"], ends["nearest"], ends["stochastic"])):
        # A step rounds by one digit at most, 2^-7 of the moment, up or down: its deviation is half of that or less.
        bound = 6 * 2**-8 * max(abs(wide), abs(nearest)) * math.sqrt((steps + 1) / 20_000)
        assert abs(rounded - wide) < bound, (MOMENTS[place], ends)
    assert ends["nearest"][1] > 0.995 * start > 1.04 * ends["float32"][1], "else this shows nothing"


@offered
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_what_the_moments_are_rounded_by(dtype, backend, seed):
    """Words of a domain of their own: exp_avg by their upper halves, exp_avg_sq and its maximum by the lower ones."""
    of_moments = {"moment_dtype": BF16, "stochastic_moments": True, "amsgrad": True}
    (param, _), optimizer = make(dtype, seed, backend, "plain", **of_moments)
    (wide_param, _), wide = make(F32, seed, backend, "plain", amsgrad=True)
    key = stream_key("layer.0.weight", seed)
    for step in range(3):
        give_grads([param, wide_param], step, seed)
        wide_param.grad = param.grad.float()
        if step:
            for name in MOMENTS:
                wide.state[wide_param][name].copy_(optimizer.state[param][name])
        optimizer.step()
        wide.step()
        words = words32(key, step, DOMAIN_MOMENTS, 0, param.numel(), torch.device("cpu"))
        for name, halves in zip(MOMENTS, (words >> 16, words & 0xFFFF, words & 0xFFFF)):
            moment, exact = optimizer.state[param][name], wide.state[wide_param][name]
            by_hand = ((exact.view(torch.int32).long() + halves) >> 16).to(torch.int16)
            assert torch.equal(moment.view(torch.int16), by_hand), (step, name)


@offered
def test_the_maximum_is_the_largest_stored(backend, seed):
    (param, _), optimizer = make(F32, seed, backend, moment_dtype=BF16, stochastic_moments=True, amsgrad=True)
    largest = torch.zeros_like(param)
    for step in range(9):
        give_grads([param], step, seed)
        optimizer.step()
        largest = torch.maximum(largest, optimizer.state[param]["exp_avg_sq"].float())
        assert torch.equal(optimizer.state[param]["max_exp_avg_sq"].float(), largest)


@offered
@pytest.mark.parametrize("dtype, more", [
    (F32, {}), (BF16, {"moment_dtype": F32}), (BF16, {"master_weights": True}), (F16, {}),
], ids=str)  # fmt: skip
def test_other_moments_are_rounded_as_always(dtype, more, backend, seed):
    plain, stochastic = make(dtype, seed, backend, **more), make(dtype, seed, backend, **more, stochastic_moments=True)
    for step in range(3):
        for params, optimizer in (plain, stochastic):
            give_grads(params, step, seed)
            optimizer.step()
    for param, other in zip(plain[0], stochastic[0]):
        for key, value in plain[1].state[param].items():
            assert bits(stochastic[1].state[other][key]) == bits(value), key


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_recorded_step_has_the_derivatives_of_one_rounded_to_nearest(dtype):
    """differentiable=True: of parameters and moments by the earlier parameters, the gradients and lr."""
    found = []
    for stochastic in (False, True):
        start = torch.linspace(0.5, 2, 7, dtype=dtype).requires_grad_()
        param, lr = start.clone(), torch.tensor(0.125, requires_grad=True)
        optimizer = FusedGradDropAdamW(
            [("weight", param)], lr, weight_decay=0.25, mask=None, differentiable=True, moment_dtype=BF16,
            stochastic_rounding=stochastic, stochastic_moments=stochastic,
        )  # fmt: skip
        param.grad = start * 2
        optimizer.step()
        total = param.float().sum() + sum(optimizer.state[param][key].float().sum() for key in MOMENTS[:2])
        found.append(torch.autograd.grad(total, (start, lr)))
    for nearest, stochastic in zip(*found):
        assert nearest.abs().min() > 0.1 and torch.allclose(nearest, stochastic, rtol=0.02)


# Master weights.


@offered
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_master_weights_are_those_of_a_float32_run(policy, dtype, backend, seed):
    """Bit for bit, given the same gradients; and the parameters are what they round to."""
    wide, narrow = make(F32, seed, backend, policy), make(dtype, seed, backend, policy, master_weights=True)
    for step in range(5):
        for params, optimizer in (wide, narrow):
            give_grads(params, step, seed)
            optimizer.step()
        for theirs, ours in zip(wide[0], narrow[0]):
            state = narrow[1].state[ours]
            assert bits(state["master_param"]) == bits(theirs)
            assert bits(ours) == bits(theirs.to(dtype))
            for key in ("exp_avg", "exp_avg_sq"):
                assert bits(state[key]) == bits(wide[1].state[theirs][key])


@offered
@pytest.mark.parametrize(
    "mode", [{"master_weights": True}, {"stochastic_rounding": True, "stochastic_moments": True}], ids=str
)
@pytest.mark.parametrize("policy", ["frozen", "epoch"])
def test_frozen_elements_stay_bit_for_bit(policy, mode, backend, seed):
    """Also those that no longer are what their master rounds to."""
    params, optimizer = make(BF16, seed, backend, policy, lr=0.05, **mode)
    give_grads(params, 0, seed)
    optimizer.step()
    with torch.no_grad():
        params[0].add_(1)
    before, keep = params[0].detach().clone(), optimizer.mask(params[0])
    moments = {key: optimizer.state[params[0]][key].clone() for key in MOMENTS[:2]}
    give_grads(params, 1, seed)
    optimizer.step()
    assert 0.2 < keep.float().mean() < 0.8
    for key, old in moments.items():
        assert bits(optimizer.state[params[0]][key][~keep]) == bits(old[~keep])
    assert bits(params[0][~keep]) == bits(before[~keep])
    assert (params[0][keep] != before[keep]).float().mean() > 0.5


@offered
@pytest.mark.parametrize(
    "mode", [{"master_weights": True}, {"stochastic_rounding": True}, {"stochastic_moments": True}], ids=str
)
def test_a_resumed_run_goes_on_bit_for_bit(mode, backend, seed, tmp_path):
    whole, first = make(BF16, seed, backend, "graddrop", **mode), make(BF16, seed, backend, "graddrop", **mode)
    for step in range(6):
        give_grads(whole[0], step, seed)
        whole[1].step()
    for step in range(3):
        give_grads(first[0], step, seed)
        first[1].step()
    torch.save({"params": first[0], "optimizer": first[1].state_dict()}, tmp_path / "file")
    saved = torch.load(tmp_path / "file", weights_only=True)
    params, optimizer = make(BF16, seed, backend, "graddrop", **mode)
    with torch.no_grad():
        for param, value in zip(params, saved["params"]):
            param.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(3, 6):
        give_grads(params, step, seed)
        optimizer.step()
    for ours, theirs in zip(params, whole[0]):
        assert bits(ours) == bits(theirs)
        for key, value in whole[1].state[theirs].items():
            assert bits(optimizer.state[ours][key]) == bits(value), key


@offered
def test_master_weights_begin_in_the_middle_of_a_run(backend, seed):
    """A checkpoint of torch's AdamW in bfloat16 is taken up: moments widened, masters made of the parameters."""
    params, _ = make(BF16, seed, backend)
    theirs = torch.optim.AdamW(params, lr=1e-3)
    give_grads(params, 0, seed)
    theirs.step()
    before = [param.detach().clone() for param in params]
    optimizer = FusedGradDropAdamW(params, **ARGUMENTS, mask=None, backend=backend, master_weights=True)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    wide = [torch.nn.Parameter(value.float()) for value in before]
    reference = FusedGradDropAdamW(wide, **ARGUMENTS, mask=None, backend=backend)
    reference.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for each in (optimizer, reference):
        each.param_groups[0].update(ARGUMENTS)
    give_grads(params, 1, seed)
    give_grads(wide, 1, seed)
    optimizer.step()
    reference.step()
    for ours, full in zip(params, wide):
        assert optimizer.state[ours]["step"] == 2 and optimizer.state[ours]["exp_avg"].dtype == F32
        assert bits(optimizer.state[ours]["master_param"]) == bits(full)


@offered
def test_masters_are_the_loading_optimizers_choice(backend, seed):
    """A file without masters is taken up by a run with them, and the other way round: whose option says so."""
    plain, master = make(BF16, seed, backend), make(BF16, seed, backend, master_weights=True)
    for params, optimizer in (plain, master):
        give_grads(params, 0, seed)
        optimizer.step()
    files = [copy.deepcopy(optimizer.state_dict()) for _, optimizer in (plain, master)]
    master[1].load_state_dict(files[0])
    plain[1].load_state_dict(files[1])
    for params, optimizer in (plain, master):
        give_grads(params, 1, seed)
        optimizer.step()
    for ours, wide in zip(plain[0], master[0]):
        assert "master_param" not in plain[1].state[ours] and plain[1].state[ours]["exp_avg"].dtype == F32
        assert master[1].state[wide]["exp_avg"].dtype == F32
        assert bits(wide) == bits(master[1].state[wide]["master_param"].bfloat16())


@offered
def test_float32_parameters_are_their_own_masters(backend, seed):
    """As of layer norms kept in float32 beside bfloat16 matrices: one group, one option."""
    params, optimizer = make(F32, seed, backend, master_weights=True)
    give_grads(params, 0, seed)
    optimizer.step()
    assert all("master_param" not in optimizer.state[param] for param in params)


# What is refused.


def test_both_at_once(seed):
    with pytest.raises(ValueError, match="master_weights and stochastic_rounding of parameter group 0 exclude"):
        make(BF16, seed, "auto", master_weights=True, stochastic_rounding=True)


@pytest.mark.parametrize(
    "spoiled", [torch.ones(1031, dtype=BF16), torch.ones(5), None], ids=["another dtype", "another shape", "none"]
)
def test_a_master_that_does_not_fit(spoiled, seed):
    params, optimizer = make(BF16, seed, "auto", master_weights=True)
    give_grads(params, 0, seed)
    optimizer.step()
    optimizer.state[params[0]]["master_param"] = spoiled
    before = [bits(param) for param in params]
    with pytest.raises(ValueError, match=r"master_param of 'layer\.0\.weight' must be float32 of shape \(1031,\)"):
        optimizer.step()
    assert [bits(param) for param in params] == before


def test_describe_names_the_mode(seed):
    _, optimizer = make(BF16, seed, "auto", master_weights=True)
    assert "bfloat16, moments float32, master weights" in optimizer.describe()
    _, optimizer = make(BF16, seed, "auto", stochastic_rounding=True)
    assert "bfloat16, moments bfloat16, stochastic rounding)" in optimizer.describe()
    _, optimizer = make(F32, seed, "auto", moment_dtype=BF16, stochastic_rounding=True, stochastic_moments=True)
    assert "float32, moments bfloat16, stochastic rounding of moments)" in optimizer.describe()
    _, optimizer = make(BF16, seed, "auto", stochastic_rounding=True, stochastic_moments=True)
    assert "bfloat16, moments bfloat16, stochastic rounding of both)" in optimizer.describe()


# bfloat16 moments of float32 parameters.


@offered
def test_bfloat16_moments_of_float32_parameters_are_rounded_once_a_step(backend, seed):
    """Beside a plain loop in float64, which rounds the moments after each step."""
    (param, _), optimizer = make(F32, seed, backend, "plain", moment_dtype=BF16, amsgrad=True)
    param.grad, (beta1, beta2) = None, ARGUMENTS["betas"]
    p, m, v, vmax = (torch.zeros(1031, dtype=torch.float64) for _ in range(4))
    p.copy_(param.detach())
    for step in range(1, 6):
        give_grads([param], step, seed)
        optimizer.step()
        g = param.grad.double()
        p *= 1 - ARGUMENTS["lr"] * ARGUMENTS["weight_decay"]
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        vmax = torch.maximum(v, vmax)
        p -= ARGUMENTS["lr"] / (1 - beta1**step) * m / ((vmax / (1 - beta2**step)).sqrt() + ARGUMENTS["eps"])
        m, v, vmax = (moment.bfloat16().double() for moment in (m, v, vmax))
        state = optimizer.state[param]
        for moment, wanted in ((state["exp_avg"], m), (state["exp_avg_sq"], v), (state["max_exp_avg_sq"], vmax)):
            assert moment.dtype is BF16 and (moment.double() - wanted).abs().le(2**-7 * wanted.abs() + 1e-30).all()
            assert (moment.double() != wanted).double().mean() < 0.01  # but for ties that float32 has moved
        m, v, vmax = (state[name].double() for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
        assert torch.allclose(param.detach().double(), p, rtol=1e-6, atol=1e-7)
        p.copy_(param.detach())


def test_bfloat16_moments_come_and_go_with_a_checkpoint(seed):
    pairs = [make(F32, seed, "auto", moment_dtype=BF16) for _ in range(2)]
    for params, optimizer in pairs[:1]:
        give_grads(params, 0, seed)
        optimizer.step()
    for param, other in zip(pairs[1][0], pairs[0][0]):
        param.data.copy_(other.data)
    pairs[1][1].load_state_dict(copy.deepcopy(pairs[0][1].state_dict()))
    for params, optimizer in pairs:
        give_grads(params, 1, seed)
        optimizer.step()
        assert {optimizer.state[param]["exp_avg"].dtype for param in params} == {BF16}
    assert [bits(param) for param in pairs[0][0]] == [bits(param) for param in pairs[1][0]]
    assert optimizer.memory()["now"]["moments"] == 2 * 2 * (1031 + 64) + 2 * 4
    # A file of float32 moments keeps them; one of a bfloat16 model is of its parameters' dtype.
    plain = make(F32, seed, "auto")
    give_grads(plain[0], 0, seed)
    plain[1].step()
    pairs[1][1].load_state_dict(plain[1].state_dict())
    assert pairs[1][1].state[pairs[1][0][0]]["exp_avg"].dtype is F32


def test_moments_that_the_user_has_made_keep_their_dtype(seed):
    """As with torch's newest fused step: state of another dtype, made before the first step."""
    params, optimizer = make(F32, seed, "auto")
    for param in params:
        optimizer.state[param] = {name: torch.zeros_like(param, dtype=BF16) for name in ("exp_avg", "exp_avg_sq")}
    wanted, other = make(F32, seed, "auto", moment_dtype=BF16)
    for each, stepped in ((params, optimizer), (wanted, other)):
        give_grads(each, 0, seed)
        stepped.step()
    assert [bits(param) for param in params] == [bits(param) for param in wanted]
    assert optimizer.state[params[0]]["exp_avg"].dtype is BF16


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_bfloat16_moments_are_for_float32_parameters(dtype, seed):
    params, optimizer = make(dtype, seed, "auto", moment_dtype=BF16)
    give_grads(params, 0, seed)
    optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].dtype is dtype
