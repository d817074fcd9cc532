"""The tests' cases, one table of policies x hyper-parameters x dtypes x sizes; the engines; comparison by bits."""

import itertools
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch

from graddrop_kernels import (
    ExponentialAnneal,
    FixedMask,
    FusedGradDropAdamW,
    LinearAnneal,
    TrainRows,
    available_backends,
)
from graddrop_kernels.backends import BACKENDS, cpu
from graddrop_kernels.backends.batch import ROUND_MOMENTS, ROUND_PARAMS
from graddrop_kernels.policies.paper import METHODS
from graddrop_kernels.policies.schedules import Schedule
from graddrop_kernels.tools.verify import cases as verify_cases
from graddrop_kernels.tools.verify import run_case
from graddrop_kernels.tools.verify.run_case import Findings

# --- engines ----------------------------------------------------------------------------------------------------------

_ROWS = {backend.name: backend for backend in BACKENDS}


def steps_cpu_tensors(backend: str) -> bool:
    """Says whether tests with tensors on the CPU can use the backend: triton only in its interpreter."""
    return "cpu" in (_ROWS[backend].devices or ("cpu",))


# cpu even if it is missing, so that require() fails
BACKEND_NAMES = tuple(filter(steps_cpu_tensors, dict.fromkeys(("cpu", *available_backends()))))
ISAS = cpu.available_isas()


def require(backend: str) -> None:
    """Fails the test if the backend is missing. Skips it only if GRADDROP_NO_EXT says that nothing was to be
    compiled.
    """
    reason = _ROWS[backend].unavailable()
    if reason and backend == "cpu" and os.environ.get("GRADDROP_NO_EXT", "0") not in ("", "0"):
        pytest.skip(f"GRADDROP_NO_EXT is set, and {reason}")
    assert not reason, f"the {backend} backend cannot run: {reason}"


class Engine(NamedTuple):
    """A backend and, for the cpu backend, one instruction set."""

    backend: str
    isa: str | None = None

    def __str__(self):
        return f"{self.backend}/{self.isa}" if self.isa else self.backend

    @property
    def device(self) -> str:
        devices = _ROWS[self.backend].devices
        return "cpu" if devices is None or "cpu" in devices else devices[0]

    def takes(self, dtypes: tuple[torch.dtype, torch.dtype]) -> bool:
        """``dtypes``: of what is stepped, with master weights the masters, and of the moments."""
        return dtypes in _ROWS[self.backend].dtypes


EXACT, PLAIN = Engine("exact"), Engine("reference")
_COMPILED = tuple(
    engine
    for name in available_backends()
    if name not in ("exact", "reference")
    for engine in (tuple(Engine(name, isa) for isa in ISAS) if name == "cpu" else (Engine(name),))
)
ENGINES = (*_COMPILED, EXACT, PLAIN)
# GRADDROP_TEST_BACKENDS="triton" leaves the others out: for runs in Triton's interpreter.
_CHOSEN = os.environ.get("GRADDROP_TEST_BACKENDS", "").split() or available_backends()
FUSED = tuple(engine for engine in _COMPILED if engine.backend in _CHOSEN)  # they must have the bits of "exact"


def fused_engines(dtypes: tuple[torch.dtype, torch.dtype]) -> list[Engine]:
    """The fused engines that take (dtype of what is stepped, moment dtype).

    Fails where a table of the cpu's dtypes would leave the test empty.
    """
    require("cpu")
    return [engine for engine in FUSED if engine.takes(dtypes)]


# --- the table --------------------------------------------------------------------------------------------------------

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# (parameter, moments) of the fused backends
DTYPES = ((F32, F32), (F32, BF16), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32))

SMALL_SIZES = (0, 1, 3, 4, 5, 31, 33, 1031)
SIZES = (0, 1, 3, 4, 5, 31, 33, 65537)  # the last is more than two threads' grains
EPOCH_OF_STEP = (
    *[0] * 5,
    *[1] * 5,
    *[2] * 4,
    *[1] * 2,
    *[4] * 2,
    *[7] * 2,
)  # an epoch visited again, one left out, one past the last

# For pytest.mark.filterwarnings: the warning that GradDropEpoch(toggle=True) rightly gives in a case that goes past its
# epochs.
PAST_THE_LAST_EPOCH = "ignore:.*GradDropEpoch.*toggle=True"

HYPERS = {
    "default": {"lr": 1e-3},
    "amsgrad": {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "amsgrad": True},
    "maximize": {"lr": 7e-3, "betas": (0.5, 0.9), "eps": 1e-6, "weight_decay": 0.0, "maximize": True},
    "all": {"lr": 2e-2, "betas": (0.0, 0.9999), "eps": 1e-5, "weight_decay": 0.3, "amsgrad": True, "maximize": True,
            "cautious_weight_decay": True},
    "cautious": {"lr": 2e-2, "betas": (0.7, 0.97), "eps": 1e-4, "weight_decay": 0.4, "cautious_weight_decay": True},
}


class Masking(NamedTuple):
    """The mask of a case: ``policy(named parameters)``, and the optimizer's arguments that go with it."""

    policy: Callable
    arguments: dict = {}


def _random_masks(named) -> FixedMask:
    """Makes masks of two thirds of the parameters, of every density. The others are dense."""
    generator = torch.Generator().manual_seed(len(named))
    drawn = {name: torch.rand(param.shape, generator=generator) < (i % 5) / 4 for i, (name, param) in enumerate(named)}
    return FixedMask({name: mask for i, (name, mask) in enumerate(drawn.items()) if i % 3}, scale=1.7)


def _rows(named) -> TrainRows:
    """Some rows of two thirds of the parameters that have any: single ones, and a run. The others are dense."""
    sizes = {name: param.shape[0] for name, param in named if param.dim() and param.shape[0]}
    rows = {name: {0, size - 1, *range(size // 3, size // 2)} for name, size in sizes.items()}
    return TrainRows({name: chosen for i, (name, chosen) in enumerate(rows.items()) if i % 3 != 1})


def of_all_rows(optimizer, param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A parameter's state tensor in the parameter's shape, with zeros where TrainRows keeps none."""
    if value.shape in (param.shape, ()):
        return value
    return torch.zeros(param.shape, dtype=value.dtype).masked_scatter(optimizer.mask(param), value)


_FROZEN, _GRADIENT, _UPDATE = ({"masked": masked} for masked in ("frozen", "gradient", "update"))
_GLOBAL = {"bias_correction": "global"}
BLOCKS = ("layers.*",)


def _of(row: str, epochs: int = 5, p: Schedule = 0.5, arguments: dict | None = None, **fields) -> Masking:
    """The policy of a row of the paper's table, with other values of some fields."""
    policy = METHODS[row](epochs, p, LinearAnneal(epochs=4, start=0.8, end="zero"), BLOCKS)
    policy = replace(policy, **fields) if fields else policy
    return Masking(lambda named: policy, arguments or {})


_FROM_ROWS = {  # a row's name in the tests, and what it is made with; another row keeps its name
    "sft": ("none", {}),
    "graddrop": ("graddrop", {"p": 0.2}),
    "graddrop-redrawn-each-epoch": ("graddrop-epoch", {"p": 0.37}),
    "anneal-graddrop": ("graddrop-anneal", {}),
    "gaussian-graddrop": ("gaussian", {"p": 0.3}),
    "layer-graddrop": ("layer", {}),
    "layer-graddrop-redrawn-each-epoch": ("layer-epoch-frozen", {"arguments": _FROZEN}),
    "anneal-layer-graddrop": ("layer-anneal", {}),
    "graddrop-epoch": ("buckets-recompute", {}),
    "graddrop-epoch-bitpacked": ("buckets", {}),
    "graddrop-epoch-toggle": ("buckets-toggle-recompute", {"epochs": 12}),
    "gradfreeze-topdown": ("freeze", {"epochs": 3}),
    "gradfreeze-bottomup": ("freeze-bottom-up-gradient", {"epochs": 4, "blocks_per_epoch": 1, "arguments": _GRADIENT}),
}
_PACKED = {"storage": "bitpacked"}
MASKINGS = {
    **{name: _of(row, **values) for row in METHODS for name, values in [_FROM_ROWS.get(row, (row, {}))]},
    "graddrop-0.9": _of("graddrop", p=0.9),
    "graddrop-frozen": _of("graddrop", p=ExponentialAnneal(0.6, 0.5), arguments=_FROZEN),
    "graddrop-epoch-frozen": _of("graddrop-redrawn-each-epoch", arguments=_FROZEN),
    "graddrop-frozen-global": _of("graddrop", p=0.3, arguments=_FROZEN | _GLOBAL),
    "layer-frozen-global": _of("layer-graddrop", arguments=_FROZEN | _GLOBAL),
    "buckets-toggle": _of("graddrop-epoch-toggle", 3, **_PACKED),
    "buckets-gradient": _of("graddrop-epoch", 4, arguments=_GRADIENT, **_PACKED),
    "buckets-gradient-recompute": _of("graddrop-epoch", 10, arguments=_GRADIENT),
    "buckets-global": _of("graddrop-epoch", 6, arguments=_GLOBAL, **_PACKED),
    # ages of up to 8, 16 and more buckets are looked up in different ways
    "buckets-12": _of("graddrop-epoch", 12, **_PACKED),
    "buckets-20": _of("graddrop-epoch", 20),
    "fixed": Masking(_random_masks),
    "fixed-gradient": Masking(_random_masks, _GRADIENT),
    "fixed-update": Masking(_random_masks, _UPDATE),
    "graddrop-update": _of("graddrop", p=0.7, arguments=_UPDATE),
    "layer-update": _of("layer-graddrop", arguments=_UPDATE),
    "buckets-update": _of("graddrop-epoch", 6, arguments=_UPDATE, **_PACKED),
    "buckets-update-recompute": _of("graddrop-epoch-toggle", 5, arguments=_UPDATE),
}
def masked_of(masking: str) -> str | None:
    """What a masking masks: "gradient", "frozen" or "update"; None: nothing is dropped."""
    how = MASKINGS[masking]
    policy = how.policy(_FOUR_BLOCKS)
    return policy and (how.arguments.get("masked") or policy.masked)


ALL_MASKINGS = {**MASKINGS, "rows": Masking(_rows)}  # also those whose moments may have other shapes than parameters


_FOUR_BLOCKS = [(f"layers.{i}.weight", torch.ones(3)) for i in range(4)]
# of verify's table: {(parameter dtype, moment dtype, master weights, bits of TensorBatch.stochastic): name}
_DTYPE_NAMES = {tuple(row): name for name, row in verify_cases.DTYPES.items()}


@dataclass(frozen=True)
class Case(verify_cases.Case):
    """A case of `verify` with a policy of MASKINGS, hyper-parameters of HYPERS and the epochs of EPOCH_OF_STEP."""

    hyper: str = "default"
    start: int = 0

    @classmethod
    def of(
        cls, masking: str, hyper: str, dtypes: tuple[torch.dtype, torch.dtype], sizes: tuple[int, ...] = (),
        masters: bool = False, stochastic: int = 0, steps: int = 1, start: int = 0,
    ) -> "Case":  # fmt: skip
        """``steps`` from the place ``start`` of EPOCH_OF_STEP on."""
        masked = masked_of(masking)
        on = tuple(name for name in ("amsgrad", "maximize") if HYPERS[hyper].get(name))
        switches = (masked,) * (masked in ("frozen", "update")) + on
        names = {**_DTYPE_NAMES, (F64, F64, False, False): "f64"}
        return cls(masking, names[(*dtypes, masters, stochastic)], switches, sizes, steps, "", hyper=hyper, start=start)

    def __str__(self):
        return f"{self.policy}-{self.hyper}-{self.dtypes.replace(' ', '-').replace('/', '-')}"

    @property
    def gaussian(self) -> bool:
        return self.policy == "gaussian"

    def epochs(self, rng) -> list[int]:
        return list(EPOCH_OF_STEP[self.start : self.start + self.steps])

    def arguments(self, rng, named, norm) -> dict:
        _, moments, masters, stochastic = verify_cases.DTYPES[self.dtypes]
        masking = MASKINGS[self.policy]
        return {
            "mask": masking.policy(named), "seed": rng.getrandbits(64), "betas": (0.9, 0.999), "weight_decay": 1e-2,
            "amsgrad": False, "cautious_weight_decay": False,
            "moment_dtype": moments if moments in (F32, BF16) else None, "master_weights": masters,
            "stochastic_rounding": bool(stochastic & ROUND_PARAMS),
            "stochastic_moments": bool(stochastic & ROUND_MOMENTS), **HYPERS[self.hyper], **masking.arguments,
        }  # fmt: skip

    def engines(self) -> list[Engine]:
        """The fused engines that can step it."""
        return fused_engines(verify_cases.DTYPES[self.dtypes].mode)

    def run(self, seed: int, engines: Iterable[Engine] | None = None) -> list[Findings]:
        """Steps it side by side on "exact" and on the engines, or on all fused ones; fails with what is found."""
        engines = self.engines() if engines is None else engines
        devices = [torch.device(engine.device) for engine in engines]
        rows = [
            run_case.Engine(_ROWS[engine.backend], device, engine.isa) for engine, device in zip(engines, devices)
        ]
        findings = {row: Findings() for row in rows}
        run_case.run_case(replace(self, seed=f"{seed} {self} {self.sizes}"), rows, findings)
        failures = [failure for found in findings.values() for failure in found.failures]
        assert not failures, "\n".join(failures)
        assert all(found.elements for found in findings.values()), "nothing was compared"
        return list(findings.values())


# Every policy under all hyper-parameters in float32; under each of them once in the other dtypes together. Over several
# epochs, one visited twice, one left out, one past the last.
ALL_CASES = [
    Case.of(masking, hyper, dtypes, SMALL_SIZES, steps=len(EPOCH_OF_STEP))
    for (i, masking), (h, hyper), (j, dtypes) in itertools.product(
        enumerate(MASKINGS), enumerate(HYPERS), enumerate(DTYPES)
    )
    if dtypes == (F32, F32) or (i + j - h) % 4 == 0
]
# Long tensors, every policy and dtype, the hyper-parameters in turn.
LONG_CASES = [
    Case.of(masking, list(HYPERS)[(i + j) % len(HYPERS)], dtypes, SIZES, steps=3, start=8)
    for (i, masking), (j, dtypes) in itertools.product(enumerate(MASKINGS), enumerate(DTYPES))
]
# (parameter and moment dtype, master weights, bits of TensorBatch.stochastic)
MODES = (
    ((BF16, F32), True, 0), ((F16, F32), True, 0),
    ((BF16, BF16), False, ROUND_PARAMS), ((BF16, F32), False, ROUND_PARAMS),
    ((F32, BF16), False, ROUND_MOMENTS), ((BF16, BF16), False, ROUND_MOMENTS),
    ((BF16, BF16), False, ROUND_PARAMS | ROUND_MOMENTS),
)  # fmt: skip
# Every policy in every mode, the hyper-parameters in turn; both short tensors and one of many units.
MODE_CASES = [
    Case.of(masking, list(HYPERS)[(i + j) % len(HYPERS)], *mode, steps=5, start=3)
    for (i, masking), (j, mode) in itertools.product(
        enumerate(MASKINGS), enumerate((dtypes, (*SMALL_SIZES, 9000), *flags) for dtypes, *flags in MODES)
    )
]


def named_values(sizes: Iterable, dtype: torch.dtype, generator: torch.Generator) -> list[tuple[str, torch.Tensor]]:
    """Returns (name, start value) of one parameter per size, spread over four blocks."""
    return [
        (f"layers.{i % 4}.weight{i}", torch.randn(size, generator=generator).to(dtype)) for i, size in enumerate(sizes)
    ]


class Training:
    """Parameters with start values and the optimizer of a case over them, on one engine."""

    def __init__(self, values: list[tuple[str, torch.Tensor]], engine: Engine, seed: int = 0, **arguments):
        self.engine = engine
        self.named = [(name, torch.nn.Parameter(value.clone().to(engine.device))) for name, value in values]
        self.optimizer = FusedGradDropAdamW(self.named, backend=engine.backend, seed=seed, **arguments)

    @classmethod
    def of(cls, case: Case, values, engine: Engine, seed: int) -> "Training":
        return cls(values, engine, **{**case.arguments(random.Random(seed), values, 0.0), "seed": seed})

    @property
    def params(self) -> list[torch.Tensor]:
        return [param for _, param in self.named]

    def step(self, grads: Iterable[torch.Tensor | None], epoch: int | None = None) -> None:
        if epoch is not None:
            self.optimizer.set_epoch(epoch)
        for param, grad in zip(self.params, grads):
            param.grad = None if grad is None else grad.to(param.device, copy=True)
        with cpu.using_isa(self.engine.isa):
            self.optimizer.step()

    def masks(self) -> list[torch.Tensor]:
        with cpu.using_isa(self.engine.isa):
            return [self.optimizer.mask(param).cpu() for param in self.params]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns copies of the parameters and of all of their state, on the CPU."""
        copies = {}
        for name, param in self.named:
            copies[name] = param.detach().cpu().clone()
            for key, value in self.optimizer.state[param].items():
                copies[f"{key} of {name}"] = value.detach().cpu().clone()
        return copies

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restores ``tensors()``, and creates state that is not there yet."""
        for name, param in self.named:
            param.data.copy_(tensors[name])
            for key in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param"):
                if f"{key} of {name}" in tensors:
                    self.optimizer.state[param][key] = tensors[f"{key} of {name}"].to(param.device, copy=True)


# --- comparison -------------------------------------------------------------------------------------------------------

_BITS = {F32: torch.int32, BF16: torch.int16, F16: torch.int16, F64: torch.int64}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_BITS[tensor.dtype]) if tensor.dtype in _BITS else tensor


def ulps_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns the number of steps between a and b among the floating-point numbers of their dtype, int64: 0 for equal
    bits, 1 for neighbours; -0 and 0 are one apart.
    """

    def in_order(tensor):
        bits = _bits(tensor).long()
        lowest = -(1 << (torch.iinfo(_BITS[tensor.dtype]).bits - 1))
        return torch.where(bits < 0, lowest - bits - 1, bits)

    return (in_order(a) - in_order(b)).abs()


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "tensor", any_nan: bool = False) -> None:
    """Fails with the shape, the count of differences, the first index and both values. With ``any_nan`` a NaN equals
    any other NaN.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype} is not {expected.dtype}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if actual.dtype in _BITS and torch.equal(_bits(actual), _bits(expected)):
        return
    wrong = _bits(actual) != _bits(expected)
    if any_nan:
        wrong &= ~(actual.isnan() & expected.isnan())
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        a, b = actual[index], expected[index]
        distance = (
            f", {ulps_apart(a, b).item()} ulp apart" if a.dtype in _BITS and a.isfinite() and b.isfinite() else ""
        )
        pytest.fail(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements differ in shape {tuple(wrong.shape)}; "
            f"the first at {index}: {a.item()!r} is not {b.item()!r}{distance}"
        )


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str = "") -> None:
    assert actual.keys() == expected.keys(), f"{what}: {sorted(actual.keys() ^ expected.keys())} on one side only"
    for name, tensor in actual.items():
        assert_same_bits(tensor, expected[name], f"{what}: {name}")
