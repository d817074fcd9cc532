"""Every backend against the reference: the bits of "exact", close to plain "reference"; any memory, any values."""

import dataclasses
import itertools
import math
import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from batches import LAYOUTS, PLANS, assert_same_batches, batch_of, copy_of, generator_of
from cases import (
    ALL_CASES,
    BF16,
    DTYPES,
    ENGINES,
    EXACT,
    F16,
    F32,
    F64,
    ISAS,
    LONG_CASES,
    MASKINGS,
    MODE_CASES,
    MODES,
    PAST_THE_LAST_EPOCH,
    PLAIN,
    Case,
    Training,
    assert_same_bits,
    assert_same_tensors,
    fused_engines,
    masked_of,
    named_values,
    require,
)  # fmt: skip

from graddrop_kernels import GradDrop, backends
from graddrop_kernels.backends import cpu
from graddrop_kernels.backends.reference.rounding import EXACT as EXACT_ROUNDING
from graddrop_kernels.backends.reference.rounding import PLAIN as PLAIN_ROUNDING
from graddrop_kernels.masks.row_block import RowBlock
from graddrop_kernels.tools.verify import cases as verify_cases

pytestmark = pytest.mark.filterwarnings(PAST_THE_LAST_EPOCH)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_fused_backends_have_the_exact_bits(case, seed):
    """Parameters, moments, step counts and masks after each step."""
    case.run(seed)


@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_fused_backends_have_the_exact_bits_on_long_tensors(case, seed):
    case.run(seed)


@pytest.mark.parametrize("case", MODE_CASES, ids=str)
def test_fused_backends_have_the_exact_bits_in_every_mode(case, seed):
    """Master weights and stochastic rounding: the masters too."""
    case.run(seed)


@pytest.mark.parametrize("case", ALL_CASES[::5], ids=str)
def test_plain_reference_is_close_to_exact(case, seed):
    """Step by step from the same state."""
    dataclasses.replace(case, steps=8, start=3).run(seed, [PLAIN])


@pytest.mark.parametrize("masking", [name for name in MASKINGS if name != "gaussian"])
def test_float64_has_the_same_masks_and_is_exact_as_it_is(masking, seed, monkeypatch):
    """In float64 both references are the same operations (but for the Gaussian numbers, which are float32 in both)."""
    monkeypatch.setitem(verify_cases.DTYPES, "f64", verify_cases.Dtypes(F64, F64))
    (found,) = Case.of(masking, "all", (F64, F64), (0, 1, 33, 130), steps=12, start=3).run(seed, [PLAIN])
    assert found.differing == 0


# --- any memory -------------------------------------------------------------------------------------------------------


def strided_views(dtype: torch.dtype, generator: torch.Generator) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{what: (a view, the tensor whose memory it lies in)}."""
    new = lambda *shape: torch.randn(shape, generator=generator).to(dtype)
    bases = {
        name: new(*shape)
        for name, shape in {
            "transposed": (7, 33),
            "sliced": (9, 120),
            "column": (40, 5),
            "permuted": (6, 5, 11),
        }.items()
    }
    views = {
        "transposed": bases["transposed"].t(),
        "sliced": bases["sliced"][1::2, 3:110:3],
        "column": bases["column"][:, 3:4],
        "permuted": bases["permuted"].permute(2, 0, 1)[1:, :, 1:],
    }
    bases |= {"channels_last": new(2, 3, 5, 7).to(memory_format=torch.channels_last), "scalar": new(3)}
    views |= {"channels_last": bases["channels_last"], "scalar": bases["scalar"][2]}
    for offset, length in ((1, 777), (3, 64), (7, 1030)):  # contiguous, off the alignment of vectors
        bases[f"offset {offset}"] = new(length + offset + 9)
        views[f"offset {offset}"] = bases[f"offset {offset}"][offset : offset + length]
    assert not any(
        views[what].is_contiguous() for what in ("transposed", "sliced", "column", "permuted", "channels_last")
    )
    return {what: (view, bases[what]) for what, view in views.items()}


def strided_gradients(views, generator: torch.Generator) -> list[torch.Tensor]:
    """Gradients of the views' shapes, in turn contiguous, transposed, sliced, expanded."""
    new = lambda dtype, *shape: torch.randn(shape, generator=generator).to(dtype)
    kinds = (
        lambda dtype, shape: new(dtype, *shape),
        lambda dtype, shape: new(dtype, *shape[::-1]).permute(tuple(range(len(shape)))[::-1]),
        lambda dtype, shape: new(dtype, *shape, 3)[..., 1],
        lambda dtype, shape: new(dtype, *shape[-1:]).expand(shape),
    )
    first = int(torch.randint(4, (), generator=generator))
    return [kinds[(first + i) % 4](view.dtype, view.shape) for i, (view, _) in enumerate(views.values())]


@pytest.mark.parametrize("masking", ["none", "graddrop", "gaussian", "buckets", "buckets-gradient-recompute", "fixed"])
@pytest.mark.parametrize(
    "dtypes", [(F32, F32), (BF16, F32), (F16, F16)], ids=["float32", "bfloat16-float32", "float16"]
)
def test_strides_do_not_matter(masking, dtypes, seed):
    """Views step as their contiguous copies do, element for element in contiguous order, and what lies between and
    around them stays.
    """
    case = Case.of(masking, "amsgrad", dtypes)
    for engine in [*fused_engines(dtypes), PLAIN]:
        generator = generator_of(seed, case)
        views = strided_views(dtypes[0], generator)
        values = [(f"layers.0.{what}", view.contiguous()) for what, (view, _) in views.items()]
        contiguous, strided = (Training.of(case, values, engine, seed) for _ in range(2))
        bases = {}
        for (name, param), (view, base) in zip(strided.named, views.values()):
            bases[name] = base, base.to(engine.device).clone(memory_format=torch.preserve_format)
            param.data = bases[name][1].as_strided(view.size(), view.stride(), view.storage_offset())
        for step in range(4):
            grads = strided_gradients(views, generator)
            contiguous.step([grad.contiguous() for grad in grads], epoch=step)
            strided.optimizer.set_epoch(step)
            for param, grad in zip(strided.params, grads):
                param.grad = grad.to(engine.device)
                assert param.grad.stride() == grad.stride()
            with cpu.using_isa(engine.isa):
                strided.optimizer.step()
            assert_same_tensors(strided.tensors(), contiguous.tensors(), f"{engine} after step {step}")
        for (name, _), (view, _) in zip(strided.named, views.values()):
            inside = torch.zeros(bases[name][0].shape, dtype=torch.bool)
            inside = inside.contiguous(memory_format=torch.channels_last) if "channels_last" in name else inside
            inside.as_strided(view.size(), view.stride(), view.storage_offset()).fill_(True)
            around, now = bases[name][0][~inside], bases[name][1].cpu()[~inside]
            assert_same_bits(now, around, f"what lies around {name}, by {engine}")
            assert "offset" not in name or around.numel() > 9


@pytest.mark.parametrize(
    "dtypes, masters, stochastic", [*((dtypes, False, False) for dtypes in DTYPES), *MODES], ids=str
)
def test_alignment_does_not_matter(dtypes, masters, stochastic, seed):
    """Parameter, gradient, master and every moment each at its own odd offset in memory."""
    case = Case.of("buckets", "amsgrad", dtypes, (1031, 15, 64), masters, stochastic)
    for engine in case.engines():
        generator = generator_of(seed, case)
        values = named_values(case.sizes, dtypes[0], generator)
        aligned, shifted = (Training.of(case, values, engine, seed) for _ in range(2))
        shift = lambda tensor, by: torch.cat((tensor.new_zeros(by), tensor, tensor.new_zeros(3)))[
            by : by + tensor.numel()
        ]  # noqa: B023
        for step in range(4):
            grads = [torch.randn(value.shape, generator=generator).to(dtypes[0]) for _, value in values]
            aligned.step(grads, epoch=step)
            shifted.optimizer.set_epoch(step)
            for i, (param, grad) in enumerate(zip(shifted.params, grads)):
                param.grad = shift(grad.to(param.device), 1 + (i + step) % 7)
                param.data = shift(param.data, 1 + (i + 2 * step) % 5)
                for j, key in enumerate((*MOMENTS, "master_param")):
                    if key in shifted.optimizer.state[param]:
                        shifted.optimizer.state[param][key] = shift(
                            shifted.optimizer.state[param][key], 1 + (i + j + step) % 6
                        )
            with cpu.using_isa(engine.isa):
                shifted.optimizer.step()
            assert_same_tensors(shifted.tensors(), aligned.tensors(), f"{engine} after step {step}")


MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


# --- gradients scaled by two numbers that lie on the device ---------------------------------------------------------


CLIPPED_MODES = (((F32, F32), False, False), ((F16, F16), False, False), *MODES)


@pytest.mark.parametrize("mode", CLIPPED_MODES, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_clip_factors_have_the_exact_bits(name, mode, seed):
    """In registers, after the division by grad_scale, which alone is written back; whole tensors and shards. In turn
    with a scale, off the alignment, with amsgrad, maximizing.
    """
    (dtypes, masters, stochastic), place = mode, list(PLANS).index(name) + CLIPPED_MODES.index(mode)
    scaled, offset = place % 2 == 0, place % 4 // 2
    layouts = [(size, RowBlock.whole(size)) for size in (0, 1, 33, 1031)] + list(LAYOUTS)
    batch = batch_of(
        generator_of(seed, name), [PLANS[name]], dtypes, layouts, offset, place % 5 == 0, place % 3 == 0,
        masters=masters, stochastic=stochastic,
    )  # fmt: skip
    unclipped = copy_of(batch)
    batch.clip_factor, batch.grad_scale = torch.tensor(0.37), torch.tensor(3.7) if scaled else None
    expected = copy_of(batch)
    backends._BY_NAME["exact"].masked_adamw_(expected)
    for engine in fused_engines((F32, F32) if masters else dtypes):
        stepped = copy_of(batch, engine.device)
        with cpu.using_isa(engine.isa):
            backends._BY_NAME[engine.backend].masked_adamw_(stepped)
        assert_same_batches(stepped, expected, f"{engine}")
    written = [grad.float() / 3.7 if scaled else grad for grad in batch.grads]
    if PLANS[name].kind != "off":
        for grad, clipped in zip(written, expected.grads):
            assert_same_bits(clipped, grad.to(dtypes[0]), "gradients are not clipped in memory", any_nan=True)
    backends._BY_NAME["exact"].masked_adamw_(unclipped)
    moments = zip(unclipped.exp_avgs, expected.exp_avgs)
    assert any(not torch.equal(a, b) for a, b in moments) or PLANS[name].kind == "off"


# (group, parameter, its state) -> None
EXCHANGES = {
    "nothing": lambda group, param, state: None,
    "the parameter's memory": lambda group, param, state: setattr(param, "data", param.data.clone()),
    "the parameter's values": lambda group, param, state: param.data.add_(1),
    "lr": lambda group, param, state: group.update(lr=0.3),
    "betas": lambda group, param, state: group.update(betas=(0.5, 0.6)),
    "eps": lambda group, param, state: group.update(eps=0.1),
    "weight_decay": lambda group, param, state: group.update(weight_decay=0.4),
    "maximize": lambda group, param, state: group.update(maximize=True),
    "amsgrad": lambda group, param, state: group.update(amsgrad=False),
    "masked": lambda group, param, state: group.update(masked="frozen", bias_correction="global"),
    "seed": lambda group, param, state: group.update(seed=group["seed"] + 1),
    "mask": lambda group, param, state: group.update(mask=GradDrop(p=0.6).to_json()),
    **{key: lambda group, param, state, key=key: state.update({key: state[key] + 1}) for key in (*MOMENTS, "step")},
    **{f"values of {key}": lambda group, param, state, key=key: state[key].add_(1) for key in (*MOMENTS, "step")},
}


@pytest.mark.parametrize("what", EXCHANGES)
def test_what_changes_between_steps_is_seen(what, seed, backend):
    """What a step keeps for the next must not outlive it: after an exchange a training steps as one begun with it."""
    engine = next(engine for engine in ENGINES if engine.backend == backend)
    generator = generator_of(seed, what)
    randn = lambda: [torch.randn(size, generator=generator) for size in (70, 33, 1)]
    arguments = {"amsgrad": True, "mask": GradDrop(p=0.3), "lr": 1e-2}
    training = Training([(f"w{i}", value) for i, value in enumerate(randn())], engine, seed, **arguments)
    training.step(randn())
    training.step(randn())
    ours, param = training.optimizer.param_groups[0], training.params[0]
    EXCHANGES[what](ours, param, training.optimizer.state[param])
    fresh = Training([(name, param.detach()) for name, param in training.named], engine, seed, **arguments)
    fresh.load(training.tensors())
    fresh.optimizer.param_groups[0].update({key: ours[key] for key in ours if key not in ("params", "param_names")})
    for grads in (randn(), [None, *randn()[1:]], randn()):
        training.step(grads)
        fresh.step(grads)
        assert_same_tensors(training.tensors(), fresh.tensors(), f"{what} exchanged, by {engine}")


@pytest.mark.parametrize(
    "masking", ["none", "graddrop", "graddrop-frozen", "gaussian", "buckets", "buckets-20", "fixed"]
)
def test_thread_counts_give_the_same_bits(masking, seed):
    """One tensor far longer than a thread's share, small ones before and after it; bit planes are made under each
    count, too.
    """
    case = Case.of(masking, "amsgrad", (F32, F32), (33, 200_003, 5, 0, 70_001))
    used = torch.get_num_threads()
    for engine in case.engines():
        values = named_values(case.sizes, F32, generator_of(seed, case))
        results = {}
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                training, generator = Training.of(case, values, engine, seed), generator_of(seed, "gradients")
                for epoch in range(3):
                    training.step([torch.randn(value.shape, generator=generator) for _, value in values], epoch)
                results[threads] = training.tensors()
        finally:
            torch.set_num_threads(used)
        for threads in (2, 3):
            assert_same_tensors(results[threads], results[1], f"{engine} with {threads} threads against 1")


# --- any values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masking", [name for name in MASKINGS if masked_of(name) in ("gradient", "frozen")])
@pytest.mark.parametrize(
    "dtypes", [(F32, F32), (BF16, BF16), (F16, F32)], ids=["float32", "bfloat16", "float16-float32"]
)
def test_infinities_and_nans_of_dropped_gradients_are_dropped(masking, dtypes, seed):
    """Masked by selection: what stands in a dropped gradient is never seen, neither by the moments nor by the
    parameter.
    """
    case = Case.of(masking, "all", dtypes, (5, 33, 1031, 64))
    for engine in [*fused_engines(dtypes), EXACT, PLAIN]:
        generator = generator_of(seed, case)
        values = named_values(case.sizes, dtypes[0], generator)
        clean, poisoned = (Training.of(case, values, engine, seed) for _ in range(2))
        for step, epoch in enumerate((0, 0, 1, 2)):
            clean.optimizer.set_epoch(epoch)
            grads, bad = [], []
            for mask in clean.masks():
                grad = torch.randn(mask.shape, generator=generator).to(dtypes[0])
                poison = torch.tensor([math.inf, -math.inf, math.nan])[
                    torch.randint(3, mask.shape, generator=generator)
                ].to(dtypes[0])
                grads.append(grad)
                bad.append(torch.where(mask, grad, poison))
            # blocks may all be kept by chance, or be unfrozen
            assert any(not grad.isfinite().all() for grad in bad) or masking.startswith(("layer", "freeze"))
            clean.step(grads, epoch)
            poisoned.step(bad, epoch)
            assert_same_tensors(poisoned.tensors(), clean.tensors(), f"{engine} after step {step}")
        assert all(value.isfinite().all() for value in poisoned.tensors().values())


def patterns(dtype: torch.dtype, count: int, generator: torch.Generator) -> torch.Tensor:
    """Random bit patterns of a dtype: denormals, infinities and NaNs among them; every pattern of a 16-bit dtype
    from 65536 elements on.
    """
    if dtype is F32:
        bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
        special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-39, 3.4e38, -3.4e38])
        values = bits.view(F32)
        values[torch.randint(count, (count // 8,), generator=generator)] = special[
            torch.randint(10, (count // 8,), generator=generator)
        ]
        return values
    shuffled = [torch.randperm(65536, generator=generator) - 32768 for _ in range(-(-count // 65536))]
    return torch.cat(shuffled)[:count].to(torch.int16).view(dtype)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_bit_pattern(dtypes, amsgrad, seed):
    """Parameters, moments and gradients of random bits. betas of 1/2 put many results half-way between two 16-bit
    numbers.
    """
    check_patterns(
        dtypes,
        generator_of(seed, dtypes),
        1 << 17,
        3,
        {"betas": (0.5, 0.5), "weight_decay": 0.5, "eps": 0.5, "amsgrad": amsgrad},
    )


def test_every_bit_pattern_under_many_bias_corrections(seed):
    """The kernels divide by sqrt(1 - beta2^t) through its reciprocal, rounded as a division is: random values of
    it, random square roots.
    """
    generator, numbers = generator_of(seed, "corrections"), random.Random(seed)
    for _ in range(40):
        beta2, step = 1 - 10 ** numbers.uniform(-5, -0.01), int(10 ** numbers.uniform(0, 4))
        check_patterns((F32, F32), generator, 1 << 14, step, {"betas": (0.5, beta2), "weight_decay": 0.0, "eps": 0.0})


def check_patterns(dtypes, generator, count: int, steps: int, arguments: dict) -> None:
    values = [("w", patterns(dtypes[0], count, generator))]
    grads = [patterns(dtypes[0], count, generator)]
    arguments, amsgrad = {"lr": 0.25, "mask": GradDrop(p=0.5), **arguments}, arguments.get("amsgrad", False)
    state = {"w": values[0][1], "step of w": torch.tensor(float(steps))}
    for key in MOMENTS[: 2 + amsgrad]:
        moment = patterns(dtypes[1], count, generator)
        state[f"{key} of w"] = moment if key == "exp_avg" else moment.abs()
    after = {}
    for engine in (EXACT, *fused_engines(dtypes)):
        wide = {"moment_dtype": dtypes[1]} if dtypes[1] is not dtypes[0] else {}
        training = Training(values, engine, **arguments, **wide)
        training.load(state)
        training.step(grads)
        after[engine] = training.tensors()
    for engine, tensors in after.items():
        for name, tensor in tensors.items():
            assert_same_bits(tensor, after[EXACT][name], f"{name} by {engine}", any_nan=True)
    assert (
        after[EXACT]["w"].isnan().any()
        and after[EXACT]["w"].isinf().any()
        and after[EXACT]["exp_avg of w"].isfinite().any()
    )


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("masking", ["none", "graddrop", "gaussian", "layer", "buckets-gradient", "fixed-gradient"])
def test_every_combination_of_signed_zeros(masking, maximize, seed):
    """Parameters, gradients and moments of either zero, one, and the smallest number, under an lr and betas of 0 too:
    products that vanish, sums whose sign is that of their last zero. Kept, dropped and of a dropped block.
    """
    numbers = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45])
    p, g, m, v = (each.flatten() for each in torch.meshgrid(numbers, numbers, numbers, numbers[::2], indexing="ij"))
    values = [(f"layers.{i}.weight", p) for i in range(4)]
    for lr, beta1, beta2 in itertools.product((0.0, 0.25), (0.0, 0.5), (0.0, 0.5)):
        after = {}
        for engine in (EXACT, *fused_engines((F32, F32))):
            training = Training(
                values, engine, seed, lr=lr, betas=(beta1, beta2), weight_decay=0.5, maximize=maximize,
                mask=MASKINGS[masking].policy(values), **MASKINGS[masking].arguments,
            )  # fmt: skip
            state = {"step": torch.tensor(3.0), "exp_avg": m, "exp_avg_sq": v}
            training.load(dict(values) | {f"{key} of {name}": state[key] for key in state for name, _ in values})
            training.step([g] * 4, 0)
            after[engine] = training.tensors()
        for engine, tensors in after.items():
            assert_same_tensors(tensors, after[EXACT], f"lr {lr}, betas {beta1}, {beta2}, {engine}")


@pytest.mark.parametrize("dtypes", [dtypes for dtypes in DTYPES if dtypes[0] is not F32], ids=str)
def test_sixteen_bit_parameters_that_do_not_move_stay(dtypes, seed):
    """Every 16-bit pattern through load and store: lr 0, no decay. NaNs stay NaNs."""
    for engine in fused_engines(dtypes):
        start = (torch.arange(65536) - 32768).to(torch.int16).view(dtypes[0])
        training = Training([("w", start)], engine, seed, lr=0.0, weight_decay=0.0, mask=None)
        training.step([torch.ones(65536, dtype=dtypes[0])])
        assert training.optimizer.state[training.params[0]]["step"] == 1
        assert_same_bits(training.params[0], start, f"parameters by {engine}", any_nan=True)


# --- what the comparison rests on -------------------------------------------------------------------------------------


def rounded_to_float32(value: Fraction) -> float:
    """To nearest, ties to even, by integer arithmetic. Normal range only."""
    if value == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(value)))
    exponent += (abs(value) >= Fraction(2) ** (exponent + 1)) - (abs(value) < Fraction(2) ** exponent)
    unit = Fraction(2) ** (exponent - 23)
    return float(round(value / unit) * unit)  # round() of a Fraction takes ties to even


def fma_operands(seed: int) -> list[torch.Tensor]:
    """a, b, c float32: random ones, cancelling ones, and products half-way between two float32 with a c that tips
    the balance.
    """
    generator = torch.Generator().manual_seed(seed)
    new = lambda: torch.randn(1000, generator=generator)
    a, b = new(), new()
    ties = (
        1 + (2 * torch.randint(1 << 11, (1000,), generator=generator) + 1) * 2.0**-12
    )  # (1 + k/4096)^2 ends in a 2^-24
    sign = torch.randint(2, (1000,), generator=generator) * 2 - 1.0
    tip = sign * 2.0 ** -torch.randint(55, 110, (1000,), generator=generator)
    tiny = sign * 2.0 ** -torch.randint(20, 40, (1000,), generator=generator)
    return [torch.cat(parts) for parts in ((a, a, a, ties), (b, b, b, ties), (new(), -a * b, new() * tiny, tip))]


def test_exact_fma_rounds_once(seed):
    a, b, c = fma_operands(seed)
    expected = torch.tensor(
        [
            rounded_to_float32(Fraction(x) * Fraction(y) + Fraction(z))
            for x, y, z in zip(a.tolist(), b.tolist(), c.tolist())
        ]
    )
    assert_same_bits(EXACT_ROUNDING.fma(a, b, c), expected)
    twice = (a.double() * b.double() + c.double()).float()
    assert (twice != expected).any() and (PLAIN_ROUNDING.fma(a, b, c) != expected).any()  # the operands can tell


def test_exact_sqrt_rounds_once(seed):
    x = torch.randn(3000, generator=torch.Generator().manual_seed(seed)).abs() * 10.0 ** torch.arange(-15, 15).repeat(
        100
    )
    for value, root in zip(x.tolist(), EXACT_ROUNDING.sqrt(x).tolist()):
        below, above = (
            Fraction(root) + Fraction(torch.nextafter(torch.tensor(root), torch.tensor(to)).item())
            for to in (0.0, math.inf)
        )
        assert (below / 2) ** 2 <= Fraction(value) <= (above / 2) ** 2


def test_every_instruction_set_of_the_processor_is_tested():
    """What torch uses itself is a lower bound for what this processor has."""
    require("cpu")
    assert "portable" in ISAS
    capability = torch.backends.cpu.get_cpu_capability().lower()
    assert capability not in ("avx512", "avx2") or capability in ISAS
    cpuinfo = Path("/proc/cpuinfo")
    assert not cpuinfo.exists() or ("avx512_bf16" in cpuinfo.read_text().split()) == ("avx512_bf16" in ISAS)
    assert {engine.isa for engine in ENGINES if engine.backend == "cpu"} == set(ISAS)


def test_backend_of_a_batch_is_the_one_asked_for(backend, seed):
    """The comparisons above would mean nothing if two names led to one implementation."""
    called = []
    row = backends._BY_NAME[backend]
    engine = next(engine for engine in ENGINES if engine.backend == backend)
    training = Training([("w", torch.ones(3))], engine, seed)
    spy = dataclasses.replace(row, masked_adamw_=lambda batch: called.append(row.name) or row.masked_adamw_(batch))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._BY_NAME, backend, spy)
        training.step([torch.ones(3)])
    assert called == [backend]
