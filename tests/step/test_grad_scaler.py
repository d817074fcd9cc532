"""torch.amp.GradScaler: bad batches leave no trace, whether the scaler unscales and skips or the fused step does."""

import copy

import pytest
import torch
from cases import BF16, F16, F32, Engine, assert_same_bits, fused_engines

from graddrop_kernels import FusedGradDropAdamW, GaussianGradDrop, GradDrop, GradDropEpoch, GradFreeze, LayerGradDrop
from graddrop_kernels.backends import cpu

BAD_STEPS = (1, 7, 8)
STEPS = 12
POLICIES = {
    "none": lambda: None,
    "graddrop": lambda: GradDrop(0.3),
    "graddrop-epoch": lambda: GradDrop(0.3, every="epoch"),
    "gaussian": lambda: GaussianGradDrop(0.3),
    "layer": lambda: LayerGradDrop(0.5, layers=("layers.*",)),
    "buckets": lambda: GradDropEpoch(3),
    "freeze": lambda: GradFreeze(3, layers=("layers.*",)),
}
ARGUMENTS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
ENGINES = [*fused_engines((F32, F32)), Engine("reference"), Engine("exact")]


def parameters(generator: torch.Generator, dtype=F32) -> list[tuple[str, torch.Tensor]]:
    return [(f"layers.{i}.w", torch.randn(shape, generator=generator).to(dtype)) for i, shape in enumerate(
        [(33,), (5, 7), (1,), (0,), (70,)]
    )]  # fmt: skip


def train(values, policy, engine: Engine, fused, batches, scaler=None) -> FusedGradDropAdamW:
    """One step a batch of gradients; with a scaler the gradients come scaled, as backward() would leave them."""
    named = [(name, torch.nn.Parameter(value.clone().to(engine.device))) for name, value in values]
    optimizer = FusedGradDropAdamW(named, **ARGUMENTS, mask=policy, backend=engine.backend, fused=fused)
    with cpu.using_isa(engine.isa):
        for epoch, grads in batches:
            optimizer.set_epoch(epoch)
            scale = scaler.scale(torch.ones((), device=engine.device)) if scaler else 1.0
            for (_, param), grad in zip(named, grads):
                param.grad = grad.to(engine.device) * scale
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
    return optimizer


def batches(values, generator: torch.Generator, bad: bool) -> list:
    made = []
    for step in range(STEPS):
        grads = [torch.randn(value.shape, generator=generator).to(value.dtype) for _, value in values]
        if step in BAD_STEPS:
            if not bad:
                continue
            grads[step % 2][..., -1] = (torch.inf, torch.nan)[step % 2]
        made.append((step // 5, grads))
    return made


def assert_alike(mine: FusedGradDropAdamW, expected: FusedGradDropAdamW) -> None:
    for group, other in zip(mine.state_dict()["param_groups"], expected.state_dict()["param_groups"]):
        assert group == other
    for a, b in zip(mine.param_groups[0]["params"], expected.param_groups[0]["params"]):
        assert_same_bits(a, b, "parameter")
        assert_same_bits(mine.mask(a), expected.mask(b), "next mask")
        for key in expected.state[b]:
            assert_same_bits(mine.state[a][key], expected.state[b][key], key)


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_bad_batches_leave_no_trace(engine, policy, fused, seed):
    """Infinities at steps 1, 7 and 8: parameters, moments, counters and masks of the run that never saw them.

    Scales are powers of two, so that scaling and unscaling are exact.
    """
    values = parameters(torch.Generator().manual_seed(seed))
    with_bad, without = (batches(values, torch.Generator().manual_seed(seed + 1), bad) for bad in (True, False))
    scaler = torch.amp.GradScaler(engine.device, init_scale=2.0**12, growth_interval=4)
    scaled = train(values, POLICIES[policy](), engine, fused, with_bad, scaler)
    assert scaler.get_scale() < 2.0**14  # it has met the infinities
    plain = train(values, POLICIES[policy](), engine, fused, without)
    assert_alike(scaled, plain)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F16, F16)], ids=str)
@pytest.mark.parametrize("policy", ["none", "graddrop", "layer", "buckets"])
def test_fused_unscaling_divides_in_float32_and_writes_back(policy, dtypes, seed):
    """A scale that is no power of two; strided gradients too. The update uses the quotient before it is rounded."""
    generator = torch.Generator().manual_seed(seed)
    values = [("layers.0.w", torch.randn(65, generator=generator).to(dtypes[0])),
              ("layers.1.w", torch.randn(12, 9, generator=generator).to(dtypes[0]))]  # fmt: skip
    grads = [torch.randn(value.shape, generator=generator).to(dtypes[0]) for _, value in values]
    wide = {"moment_dtype": dtypes[1]} if dtypes[1] is not dtypes[0] else {}
    after = {}
    for engine in [Engine("exact"), *fused_engines(dtypes)]:
        named = [(name, torch.nn.Parameter(value.clone().to(engine.device))) for name, value in values]
        optimizer = FusedGradDropAdamW(
            named, **ARGUMENTS, mask=POLICIES[policy](), backend=engine.backend, fused=True, **wide
        )
        for (_, param), grad in zip(named, grads):
            strided = grad.t().contiguous().t() if grad.dim() == 2 else grad.clone()
            param.grad = strided.to(engine.device)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.tensor(0.0)
        with cpu.using_isa(engine.isa):
            optimizer.step()
        for (name, param), grad in zip(named, grads):
            assert_same_bits(param.grad, (grad.float() / 3.0).to(dtypes[0]), f"gradient of {name} by {engine}")
        after[engine] = [param.detach().cpu() for _, param in named] + [
            optimizer.state[param][key].cpu() for _, param in named for key in ("exp_avg", "exp_avg_sq", "step")
        ]
    for engine, tensors in after.items():
        for tensor, expected in zip(tensors, after[Engine("exact")]):
            assert_same_bits(tensor, expected, str(engine))


@pytest.mark.parametrize("found", [1.0, 2.0, float("nan")])
def test_any_found_inf_but_zero_skips(found, backend):
    param = torch.nn.Parameter(torch.ones(9, dtype=F32))
    if Engine(backend).device != "cpu":
        param = torch.nn.Parameter(param.detach().to(Engine(backend).device))
    optimizer = FusedGradDropAdamW([("w", param)], backend=backend, fused=True)
    param.grad = torch.ones_like(param)
    optimizer.found_inf = torch.tensor(found, device=param.device)
    optimizer.step()
    assert (param == 1).all() and optimizer.state[param].get("step", 0) == 0
    assert optimizer.state_dict()["param_groups"][0]["completed_steps"] == 0
    optimizer.found_inf = torch.tensor(0.0, device=param.device)
    optimizer.step()
    assert (param != 1).any() and optimizer.state_dict()["param_groups"][0]["completed_steps"] == 1


def test_the_protocol_is_opt_in():
    new = lambda **arguments: FusedGradDropAdamW([torch.nn.Parameter(torch.ones(1))], **arguments)
    assert not new()._step_supports_amp_scaling and not new(fused=False)._step_supports_amp_scaling
    optimizer = new(fused=True)
    assert optimizer._step_supports_amp_scaling and copy.deepcopy(optimizer)._step_supports_amp_scaling


@pytest.mark.parametrize("fused", [None, True])
def test_a_step_without_any_gradient_is_none(fused):
    """As torch's: such a step changes nothing, and the scaler goes on."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedGradDropAdamW([("w", param)], **ARGUMENTS, mask=GradDrop(0.3), fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))  # as a loss that reaches no parameter
    if fused:
        scaler.step(optimizer)
    else:
        with pytest.raises(AssertionError, match="No inf checks"):  # of the scaler itself, with torch's AdamW too
            scaler.step(optimizer)
    assert torch.equal(param, torch.ones(3)) and not optimizer.state
