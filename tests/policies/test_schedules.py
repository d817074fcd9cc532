"""Schedules: p by epoch, the paper's end points, quantisation to 16 bits, and what is refused."""

import dataclasses
import re
from fractions import Fraction

import pytest
import torch

from graddrop_kernels import ExponentialAnneal, LinearAnneal
from graddrop_kernels.policies.schedules import drop_probability, quantize, require_epochs, require_probability

NOT_PROBABILITIES = [
    True,
    False,
    "0.2",
    float("nan"),
    -0.1,
    -1e-300,
    1,
    1.0,
    1.5,
    float("inf"),
    None,
    torch.tensor(0.2),
]


@pytest.mark.parametrize(
    "epochs, values",
    [
        (3, [0.9, 0.56667, 0.23333]),  # does not reach 0 (paper, section III-B, as printed)
        (4, [0.9, 0.65, 0.4, 0.15]),
        (5, [0.9, 0.7, 0.5, 0.3, 0.1]),
        (10, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]),
    ],
)
def test_linear_as_printed_in_the_paper(epochs, values):
    schedule = LinearAnneal(epochs=epochs)
    assert [round(schedule(epoch), 5) for epoch in range(epochs)] == values


def test_linear_as_printed_is_clamped_at_zero():
    schedule = LinearAnneal(epochs=20)
    assert schedule(17) == pytest.approx(0.05, abs=1e-12)
    assert [schedule(epoch) for epoch in (18, 19, 20, 1000)] == [0.0] * 4  # unclamped, epoch 19 is -0.05
    assert LinearAnneal(epochs=10)(9) == 0.0  # exactly


@pytest.mark.parametrize("start", [0.9, 0.37])
def test_linear_against_exact_fractions(start):
    for epochs in range(1, 60):
        schedule = LinearAnneal(epochs=epochs, start=start)
        rescaled = LinearAnneal(epochs=epochs, start=start, end="zero")
        for epoch in range(epochs + 3):
            exact = max(Fraction(0), Fraction(start) - Fraction(epoch, epochs))
            assert abs(schedule(epoch) - exact) < 1e-15
            down = Fraction(epoch, epochs - 1) if epochs > 1 and epoch < epochs else 1
            assert abs(rescaled(epoch) - Fraction(start) * (1 - down)) < 1e-15


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 10, 13, 4096])
def test_linear_to_zero_ends_at_exactly_zero(epochs):
    schedule = LinearAnneal(epochs=epochs, start=0.7, end="zero")
    assert schedule(epochs - 1) == 0.0 and schedule(epochs) == 0.0 and schedule(epochs + 100) == 0.0
    if epochs > 1:
        assert schedule(0) == 0.7
        assert schedule(epochs - 2) > 0
    with pytest.raises(ValueError):
        LinearAnneal(epochs=epochs, start=1.0, end="zero")


def test_exponential():
    schedule = ExponentialAnneal(start=0.8, decay=0.75)
    for epoch in range(12):
        assert abs(schedule(epoch) - Fraction(8, 10) * Fraction(3, 4) ** epoch) < 1e-15
    assert ExponentialAnneal(0.3, decay=1)(1000) == 0.3


@pytest.mark.parametrize(
    "schedule",
    [
        ExponentialAnneal(0.5, 0.5),  # is exactly half a step of the quantised p at epoch 16
        ExponentialAnneal(0.9, 0.1),
        ExponentialAnneal(0.9, 0.99),
        ExponentialAnneal(2.0**-17, 1.0),
        LinearAnneal(epochs=10, start=3 * 0.1),  # 0.30000000000000004: 6e-17 is left over at epoch 3
        LinearAnneal(epochs=10, start=0.1 + 0.7),
        LinearAnneal(epochs=100_000, start=0.5, end="zero"),
        LinearAnneal(epochs=100_000, start=0.3),
    ],
    ids=repr,
)
def test_our_own_schedules_have_a_usable_p_at_every_epoch(schedule):
    """A schedule that dies out must not stop a training in the middle: p below the resolution is 0."""
    for epoch in [*range(300), *range(29_990, 30_010), *range(99_990, 100_010)]:
        p = drop_probability(schedule, epoch)
        assert (quantize(p) == 0) == (p == 0)


def test_any_callable():
    assert drop_probability(lambda epoch: 0.125 * (epoch + 1), 2) == 0.375
    assert drop_probability(0.25, 7) == 0.25
    assert type(drop_probability(lambda epoch: 0, 0)) is float


@pytest.mark.parametrize("value", NOT_PROBABILITIES, ids=repr)
def test_a_callable_that_returns_no_probability_is_refused_with_its_epoch(value):
    with pytest.raises(ValueError, match=r"p at epoch 5 must be a drop probability in \[0, 1\), got ") as refused:
        drop_probability(lambda epoch: value, 5)
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize("value", NOT_PROBABILITIES, ids=repr)
def test_what_is_no_probability_is_refused_with_its_value(value):
    with pytest.raises(ValueError, match=r"thing must be a drop probability in \[0, 1\), got ") as refused:
        require_probability("thing", value)
    assert repr(value) in str(refused.value)
    for make in (lambda: LinearAnneal(epochs=3, start=value), lambda: ExponentialAnneal(value, 0.5)):
        with pytest.raises(ValueError, match="Anneal\\(start=\\) must be a drop probability"):
            make()


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "3", float("nan")], ids=repr)
def test_epochs_must_be_a_positive_int(value):
    with pytest.raises(
        ValueError, match=r"LinearAnneal\(epochs=\) must be the number of training epochs, an int >= 1, got "
    ) as refused:
        LinearAnneal(epochs=value)
    assert repr(value) in str(refused.value)
    with pytest.raises(ValueError):
        require_epochs("anything", value)


def test_epochs_cannot_be_left_out():
    with pytest.raises(TypeError, match="epochs"):
        LinearAnneal()


@pytest.mark.parametrize("end", ["Zero", None, 0, ""], ids=repr)
def test_unknown_end_is_refused(end):
    with pytest.raises(ValueError, match="LinearAnneal\\(end=\\) must be 'paper' or 'zero'"):
        LinearAnneal(epochs=3, end=end)


@pytest.mark.parametrize("decay", [0, -0.5, 1.0001, float("nan"), float("inf")], ids=repr)
def test_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"ExponentialAnneal\(decay=\) must be in \(0, 1\], got "):
        ExponentialAnneal(0.5, decay)


def test_quantize_rounds_to_the_nearest_threshold(seed):
    generator = torch.Generator().manual_seed(seed)
    usable = torch.rand(2000, generator=generator, dtype=torch.float64) * (1 - 2**-16) + 2**-17
    for p in usable.tolist():
        threshold = quantize(p)
        assert abs(Fraction(threshold) - Fraction(p) * 65536) <= Fraction(1, 2)
    assert quantize(0.0) == 0
    assert quantize(0.2) == 13107
    assert quantize(1 / 65536) == 1
    assert quantize(65535 / 65536) == 65535


@pytest.mark.parametrize("p", [1e-300, 1e-6, 0.49 / 65536])
def test_p_that_rounds_to_zero_names_the_nearest_usable_one(p):
    with pytest.raises(ValueError) as refused:
        quantize(p)
    message = str(refused.value)
    assert repr(p) in message and "use p = 0 or p >= " in message
    nearest = float(re.search(r"p >= (\S+)", message)[1])
    assert quantize(nearest) == 1


@pytest.mark.parametrize("p", [1 - 1e-9, 1 - 0.49 / 65536])
def test_p_that_rounds_to_one_names_the_nearest_usable_one(p):
    with pytest.raises(ValueError) as refused:
        quantize(p)
    message = str(refused.value)
    assert repr(p) in message
    nearest = float(re.search(r"largest usable p is (\S+)", message)[1])
    assert quantize(nearest) == 65535


def test_schedules_are_values():
    assert LinearAnneal(5) == LinearAnneal(epochs=5, start=0.9, end="paper") != LinearAnneal(6)
    assert hash(LinearAnneal(5)) == hash(LinearAnneal(5))
    assert ExponentialAnneal(0.5, 0.25) == ExponentialAnneal(start=0.5, decay=0.25)
    for schedule in (LinearAnneal(5), ExponentialAnneal(0.5, 0.25)):
        forwards = [schedule(epoch) for epoch in range(5)]
        assert [schedule(epoch) for epoch in reversed(range(5))] == forwards[::-1]  # no state
        with pytest.raises(dataclasses.FrozenInstanceError):
            schedule.start = 0.1
