"""The meanings of "masked" as properties of random cases: frozen is untouched; gradient is AdamW on that gradient."""

from dataclasses import dataclass

import pytest
import torch
from cases import (
    BF16,
    ENGINES,
    F16,
    F32,
    F64,
    PAST_THE_LAST_EPOCH,
    Engine,
    Training,
    assert_same_bits,
    assert_same_tensors,
    require,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from graddrop_kernels import FixedMask, GradDrop, GradDropEpoch, GradFreeze, LayerGradDrop

pytestmark = pytest.mark.filterwarnings(PAST_THE_LAST_EPOCH)

settings.register_profile("numerics", deadline=None, max_examples=40, print_blob=True)
settings.load_profile("numerics")

ALL_DTYPES = [(F32, F32), (F32, BF16), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F64, F64)]
LAYERS = ("layers.*",)


@st.composite
def hyper_parameters(draw):
    number = lambda low, high: st.floats(low, high, allow_nan=False)
    return {
        "lr": draw(number(1e-6, 0.5)),
        "betas": (draw(st.one_of(st.just(0.0), number(0.1, 0.99))), draw(number(0.5, 0.9999))),
        "eps": draw(st.sampled_from([1e-8, 1e-5, 1e-3])),
        "weight_decay": draw(st.one_of(st.just(0.0), number(1e-4, 0.5))),
        "amsgrad": draw(st.booleans()),
        "maximize": draw(st.booleans()),
    }


@dataclass(frozen=True)
class Drawn:
    """Everything of a random training but its engine, in plain numbers, so that a failure can be read."""

    dtypes: tuple[torch.dtype, torch.dtype]
    sizes: list[int]
    epochs: list[int]  # of each step
    policy: object  # or (density, scale) of a FixedMask
    arguments: dict
    seed: int

    def tensors(self):
        """(start values, gradients of each step, policy)."""
        generator = torch.Generator().manual_seed(self.seed)
        randn = lambda: [torch.randn(size, generator=generator).to(self.dtypes[0]) for size in self.sizes]
        values = [(f"layers.{i % 3}.{i}", value) for i, value in enumerate(randn())]
        policy = self.policy
        if isinstance(policy, tuple):
            density, scale = policy
            policy = FixedMask(
                {name: torch.rand(value.shape, generator=generator) < density for name, value in values}, scale
            )
        return values, [randn() for _ in self.epochs], policy


@st.composite
def trainings(draw, masked: str):
    dtypes = draw(st.sampled_from(ALL_DTYPES))
    # a scaled gradient has no place in a 16-bit tensor unless the scale is a power of two, and not below 1
    p = st.sampled_from([0.5, 0.75, 0.875]) if dtypes[0] in (BF16, F16) else st.floats(1e-4, 0.99)
    policies = st.one_of(
        st.builds(GradDrop, p, st.sampled_from(["step", "epoch"])),
        st.builds(GradDropEpoch, st.integers(2, 70), st.booleans(), st.sampled_from(["bitpacked", "recompute"])),
        st.builds(LayerGradDrop, p, st.sampled_from(["step", "epoch"]), st.just(LAYERS)),
        st.builds(
            GradFreeze, st.integers(1, 5), st.sampled_from(["top_down", "bottom_up"]), st.just(None), st.just(LAYERS)
        ),
        st.tuples(st.floats(0, 1), st.sampled_from([1.0, 2.0, 4.0])),
    )
    return Drawn(
        dtypes,
        sizes=draw(st.lists(st.integers(0, 300), min_size=2, max_size=4)),
        epochs=sorted(draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))),
        policy=draw(policies),
        arguments=draw(hyper_parameters()) | {"masked": masked, "seed": draw(st.integers(0, 2**64 - 1))},
        seed=draw(st.integers(0, 2**32)),
    )


def scale_of(policy, epoch: int) -> float:
    """The factor on kept gradients: 1 / (exact keep probability) for random elements, the mask's own for a fixed
    one, else 1.
    """
    if isinstance(policy, GradDrop):
        return 65536 / (65536 - round(policy.p * 65536))
    return policy.scale if isinstance(policy, FixedMask) else 1.0


def engines(dtypes) -> list[Engine]:
    require("cpu")
    return [engine for engine in ENGINES if engine.takes(dtypes)]


def moments(dtypes) -> dict:
    return {"moment_dtype": dtypes[1]} if dtypes[1] is not dtypes[0] else {}


@given(trainings("gradient"))
def test_masked_gradient_is_adamw_on_that_gradient(case):
    """Bit for bit: the same engine with mask=None, fed keep ? g * scale : 0, so that moments decay and momentum and
    weight decay go on.
    """
    (values, grads, policy), epochs, arguments, dtypes = case.tensors(), case.epochs, case.arguments, case.dtypes
    for engine in engines(dtypes):
        masked = Training(values, engine, mask=policy, **arguments, **moments(dtypes))
        plain = Training(values, engine, mask=None, **{**arguments, "masked": None}, **moments(dtypes))
        for step, (each, epoch) in enumerate(zip(grads, epochs)):
            masked.optimizer.set_epoch(epoch)
            scale = torch.tensor(scale_of(policy, epoch), dtype=F64 if dtypes[0] is F64 else F32)
            fed = [
                torch.where(mask, (grad.to(scale.dtype) * scale).to(grad.dtype), 0)
                for mask, grad in zip(masked.masks(), each)
            ]
            masked.step(each, epoch)
            plain.step(fed)
            assert_same_tensors(masked.tensors(), plain.tensors(), f"{engine} after step {step} under {policy}")


@given(trainings("frozen"), st.sampled_from(["active", "global"]))
def test_frozen_elements_stay_bit_for_bit(case, bias_correction):
    """Parameter, both moments and their maximum where the mask is False; a wholly frozen block's step count too.

    The others do move.
    """
    (values, grads, policy), epochs, arguments, dtypes = case.tensors(), case.epochs, case.arguments, case.dtypes
    for engine in engines(dtypes):
        training = Training(
            values, engine, mask=policy, bias_correction=bias_correction, **arguments, **moments(dtypes)
        )
        for step, (each, epoch) in enumerate(zip(grads, epochs)):
            training.optimizer.set_epoch(epoch)
            before, masks = training.tensors(), training.masks()
            training.step(each, epoch)
            after = training.tensors()
            for (name, _), mask, grad in zip(values, masks, each):
                for key in (f"{kind}{name}" for kind in ("", "exp_avg of ", "exp_avg_sq of ", "max_exp_avg_sq of ")):
                    if key in after:
                        old = before.get(key, torch.zeros_like(after[key]))
                        assert_same_bits(
                            after[key][~mask], old[~mask], f"frozen elements of {key}, {engine}, step {step}, {policy}"
                        )
                moment = f"exp_avg of {name}"
                if step == 0:  # float16 holds no moment of a gradient below 1e-6
                    assert (after[moment][mask & (grad.abs() > 1e-3)] != 0).all(), (
                        f"{engine} does not train all of {name}"
                    )
                if isinstance(policy, (LayerGradDrop, GradFreeze)) and mask.numel():
                    assert after[f"step of {name}"] == before.get(f"step of {name}", 0.0) + mask.any()


@given(trainings("frozen"))
def test_kept_elements_of_a_frozen_mask_step_as_in_adamw(case):
    """bias_correction="global": from the same state, the kept elements step as mask=None makes them, on the scaled
    gradient.
    """
    (values, grads, policy), epochs, arguments, dtypes = case.tensors(), case.epochs, case.arguments, case.dtypes
    for engine in engines(dtypes):
        masked = Training(values, engine, mask=policy, bias_correction="global", **arguments, **moments(dtypes))
        plain = Training(values, engine, mask=None, **{**arguments, "masked": None}, **moments(dtypes))
        for step, (each, epoch) in enumerate(zip(grads, epochs)):
            masked.optimizer.set_epoch(epoch)
            masks = masked.masks()
            scale = torch.tensor(scale_of(policy, epoch), dtype=F64 if dtypes[0] is F64 else F32)
            plain.load(masked.tensors())
            for param in plain.params:  # a block's own count stands still while it is frozen; "global" counts all steps
                if param in plain.optimizer.state and len(plain.optimizer.state[param]):
                    plain.optimizer.state[param]["step"].fill_(float(step))
            masked.step(each, epoch)
            plain.step([(grad.to(scale.dtype) * scale).to(grad.dtype) for grad in each])
            after, expected = masked.tensors(), plain.tensors()
            for (name, _), mask in zip(values, masks):
                for key in (f"{kind}{name}" for kind in ("", "exp_avg of ", "exp_avg_sq of ", "max_exp_avg_sq of ")):
                    if key in after:
                        assert_same_bits(
                            after[key][mask],
                            expected[key][mask],
                            f"kept elements of {key}, {engine}, step {step}, {policy}",
                        )


@given(st.data())
def test_mask_of_a_past_step_is_the_one_it_used(data):
    """optimizer.mask(param, step=k) tells afterwards what optimizer.mask(param) told before step k; by name as by
    tensor.
    """
    case = data.draw(trainings("gradient"))
    (values, grads, _), arguments, dtypes = case.tensors(), case.arguments, case.dtypes
    policy = data.draw(st.sampled_from([GradDrop(p=0.3), LayerGradDrop(p=0.5, layers=LAYERS)]))
    training = Training(values, ENGINES[0] if ENGINES[0].takes(dtypes) else ENGINES[-1], mask=policy, **arguments)
    told = []
    for each in grads:
        told.append(training.masks())
        training.step(each)
    for step, masks in enumerate(told):
        for (name, param), mask in zip(training.named, masks):
            assert_same_bits(training.optimizer.mask(param, step=step).cpu(), mask, f"{name} at step {step}")
            assert_same_bits(training.optimizer.mask(name, step=step).cpu(), mask, f"{name} at step {step}, by name")


@given(st.integers(1, 65535), st.integers(0, 2**32))
def test_kept_gradients_are_scaled_by_the_inverse_of_the_exact_keep_probability(threshold, seed):
    """p anywhere in the half step around threshold / 65536 gives the same draws and the scale 65536 / (65536 -
    threshold), rounded to float32.
    """
    p = (threshold + (-0.4 if threshold == 65535 else 0.4)) / 65536
    grad = torch.randn(4099, generator=torch.Generator().manual_seed(seed))
    for engine in ENGINES:
        training = Training([("w", torch.zeros(4099))], engine, seed, lr=1e-3, betas=(0.0, 0.5), mask=GradDrop(p=p))
        (mask,) = training.masks()
        training.step([grad])
        expected = torch.where(mask, grad * torch.tensor(65536 / (65536 - threshold), dtype=F32), 0)
        assert_same_bits(training.tensors()["exp_avg of w"] + 0.0, expected + 0.0, f"exp_avg with beta1 = 0, {engine}")
        assert training.optimizer.active_fraction() == [1 - threshold / 65536]


@given(st.floats(0.05, 0.95), st.integers(0, 2**32), st.integers(1, 40))
def test_frozen_random_masks_count_the_expected_number_of_active_steps(p, seed, steps):
    """bias_correction="active" under a random frozen mask: an element kept at step t is taken to be 1 + (t - 1) (1
    - p) steps old.
    """
    generator = torch.Generator().manual_seed(seed)
    engine = ENGINES[0]
    training = Training(
        [("w", torch.zeros(64))],
        engine,
        seed,
        lr=1e-2,
        betas=(0.8, 0.95),
        weight_decay=0.0,
        mask=GradDrop(p=p),
        masked="frozen",
    )
    for _ in range(steps):
        (mask,), before = training.masks(), training.tensors()
        training.step([torch.randn(64, generator=generator) + 3])
    after = training.tensors()
    age = 1 + (steps - 1) * (1 - round(p * 65536) / 65536)
    m, v = (after[f"{key} of w"].double()[mask] for key in ("exp_avg", "exp_avg_sq"))
    update = 1e-2 / (1 - 0.8**age) * m / ((v / (1 - 0.95**age)).sqrt() + 1e-8)
    moved = before["w"].double()[mask] - after["w"].double()[mask]
    assert ((moved - update).abs() <= 4e-6 * update.abs() + 2.0**-23 * after["w"].double()[mask].abs()).all()
