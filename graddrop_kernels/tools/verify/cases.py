"""The cases of `verify`: policies x dtypes x switches x sizes, with everything else drawn at random from a seed."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ...backends.batch import ROUND_MOMENTS, ROUND_PARAMS
from ...policies import FixedMask, Policy
from ...policies.paper import METHODS, Method
from ...policies.schedules import LinearAnneal

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Dtypes(NamedTuple):
    """A row of DTYPES."""

    params: torch.dtype
    moments: torch.dtype
    masters: bool = False
    stochastic: int = 0  # bits of TensorBatch.stochastic

    @property
    def mode(self) -> tuple[Any, ...]:
        """(stepped dtype, moment dtype) as Backend.misfit() takes them; with master weights the masters are stepped."""
        return F32 if self.masters else self.params, self.moments


# Parameters/moments, and the mode; float64 belongs to the reference alone.
DTYPES = {
    "f32": Dtypes(F32, F32),
    "f32/bf16": Dtypes(F32, BF16),
    "bf16": Dtypes(BF16, BF16),
    "bf16/f32": Dtypes(BF16, F32),
    "f16": Dtypes(F16, F16),
    "f16/f32": Dtypes(F16, F32),
    "bf16 masters": Dtypes(BF16, F32, masters=True),
    "f16 masters": Dtypes(F16, F32, masters=True),
    "bf16 stochastic": Dtypes(BF16, BF16, stochastic=ROUND_PARAMS),
    "bf16/f32 stochastic": Dtypes(BF16, F32, stochastic=ROUND_PARAMS),
    "f32/bf16 moments": Dtypes(F32, BF16, stochastic=ROUND_MOMENTS),
    "bf16 moments": Dtypes(BF16, BF16, stochastic=ROUND_MOMENTS),
    "bf16 both moments": Dtypes(BF16, BF16, stochastic=ROUND_PARAMS | ROUND_MOMENTS),
}
# The dtypes of one mode share a column of the table, and the cases that are made for it.
COLUMNS: dict[str, list[str]] = {}
for _name in DTYPES:
    COLUMNS.setdefault(_name.split()[-1], []).append(_name)
MASKED = ("gradient", "frozen", "update")
SWITCHES = ("amsgrad", "maximize", "decay", *MASKED[1:], "clip", "cautious")
SMALL_SIZES = (0, 1, 3, 4, 5, 31, 33, 1031)
SIZES = (*SMALL_SIZES, 65537)  # the last is more than two threads' shares
LARGE_SIZES = (2**22 + 3, 33)  # for a GPU: more blocks than run at a time

_Maker = Callable[[random.Random, list[tuple[str, torch.Tensor]]], Policy | None]


def _of_row(method: Method) -> _Maker:
    """Makes the row's policy, with what it does not say drawn at random."""

    def make(rng: random.Random, named: list[tuple[str, torch.Tensor]]) -> Policy | None:
        # Ages of up to 8, 16 and more buckets are looked up in different ways. Four blocks wake in four epochs.
        epochs = 4 if method.needs_blocks else rng.choice((2, 5, 12, 20))
        p = 0.5 if method.needs_blocks else rng.uniform(0.05, 0.95)
        anneal = LinearAnneal(epochs=4, start=rng.uniform(0.5, 0.9), end=rng.choice(("paper", "zero")))
        return method(epochs, p, anneal, layers=("layers.*",))

    return make


def _fixed_mask(rng: random.Random, named: list[tuple[str, torch.Tensor]]) -> FixedMask:
    """Masks of two thirds of the parameters; the others are trained densely."""
    generator, density = torch.Generator().manual_seed(rng.getrandbits(40)), rng.uniform(0.05, 0.95)
    masks = {name: torch.rand(value.shape, generator=generator) < density for name, value in named}
    return FixedMask({name: mask for i, (name, mask) in enumerate(masks.items()) if i % 3 != 1}, rng.uniform(0.5, 2))


# (random numbers, named values) -> policy, by the names of the output.
POLICIES: dict[str, _Maker] = {method.name.replace(",", ""): _of_row(method) for method in METHODS.values()}
POLICIES["FixedMask"] = _fixed_mask
_DROPS_NOTHING = {method.name.replace(",", "") for method in METHODS.values() if method.masked is None}


def _masked_of(policy: str) -> tuple[str, ...]:
    """The meanings of dropping that a policy can have."""
    if policy in _DROPS_NOTHING:
        return MASKED[:1]
    return ("update",) if policy == "SkipUpdate" else MASKED


@dataclass(frozen=True)
class Case:
    """``switches``: those of SWITCHES that are on; ``reference``: the device on which "exact" steps it; ``eager``:
    whether backends that launch a kernel for each operation step it on a GPU.
    """

    policy: str
    dtypes: str
    switches: tuple[str, ...]
    sizes: tuple[int, ...]
    steps: int
    seed: str
    misaligned: bool = False  # every tensor begins at an odd element of its memory
    reference: torch.device = torch.device("cpu")
    eager: bool = False

    def __str__(self) -> str:
        return ", ".join((self.policy, self.dtypes, *self.switches, *["misaligned"] * self.misaligned))

    @property
    def gaussian(self) -> bool:
        """Whether gradients have Gaussian factors, which drop none: no step shows a mask."""
        return self.policy == "GaussianGradDrop"

    @property
    def masked(self) -> str:
        return next((switch for switch in MASKED if switch in self.switches), MASKED[0])

    @property
    def column(self) -> str:
        """Its key in COLUMNS."""
        return self.dtypes.split()[-1]

    def epochs(self, rng: random.Random) -> list[int]:
        """The epoch of each step."""
        return rng.choices(range(5), k=self.steps)

    def arguments(self, rng: random.Random, named: list[tuple[str, torch.Tensor]], norm: float) -> dict[str, Any]:
        """The optimizer's arguments, random where the case does not say; ``norm``: about that of its gradients."""
        _, moments, masters, stochastic = DTYPES[self.dtypes]
        # A float16 moment of a small square is 0: only eps keeps its update finite.
        eps = (-3, -2) if moments is F16 else (-8, -3)
        arguments: dict[str, Any] = {
            "mask": POLICIES[self.policy](rng, named),
            "seed": rng.getrandbits(64),
            "lr": 10 ** rng.uniform(-3.5, -1.5),
            "betas": (rng.choice((0.0, 0.5, 0.8, 0.9, 0.95)), rng.choice((0.9, 0.99, 0.999, 0.9999))),
            "eps": 10 ** rng.uniform(*eps),
            "weight_decay": 10 ** rng.uniform(-2, -0.5) if "decay" in self.switches else 0.0,
            "amsgrad": "amsgrad" in self.switches,
            "maximize": "maximize" in self.switches,
            "cautious_weight_decay": "cautious" in self.switches,
            "moment_dtype": moments if moments in (F32, BF16) else None,
            "master_weights": masters,
            "stochastic_rounding": bool(stochastic & ROUND_PARAMS),
            "stochastic_moments": bool(stochastic & ROUND_MOMENTS),
        }
        if "clip" in self.switches:
            arguments["max_grad_norm"] = norm * rng.uniform(0.3, 0.7)
            arguments["norm_after_mask"] = rng.random() < 0.5
        if self.policy not in _DROPS_NOTHING:
            arguments["masked"] = self.masked
            arguments["bias_correction"] = rng.choice(("active", "active", "global"))
        return arguments


def make_cases(seed: int, quick: bool, gpus: list[torch.device]) -> list[Case]:
    """Every policy with all columns: under every combination of the switches in float32, 4 or 6 of them in the others,
    or with ``quick`` under one each; on a GPU also with a long tensor. Clipping and cautious decay, which leave the
    rest of a step as it is, are coins of each case. The policies take turns, so that the first cases hold something of
    each.
    """
    rng = random.Random(f"{seed} cases")
    coins: Callable[[], tuple[str, ...]] = lambda: ("clip",) * rng.randrange(2) + ("cautious",) * rng.randrange(2)
    by_policy = []
    for policy in POLICIES:
        cases = []
        combinations = [
            tuple(itertools.compress(SWITCHES, on)) + ((masked,) if masked in SWITCHES else ())
            for on in itertools.product((False, True), repeat=3)
            for masked in _masked_of(policy)
        ]
        eager = rng.choice(list(COLUMNS)) if quick else None  # None: all
        for column, names in COLUMNS.items():
            few = max(4, 2 * len(names))  # each of the dtypes with both lists of sizes
            chosen = rng.sample(combinations, 1 if quick else len(combinations) if column == "f32" else few)
            names = rng.sample(names, len(names))
            for i, switches in enumerate(chosen):
                own_seed = f"{seed} {policy} {column} {i}"
                sizes = SIZES if i % few < len(names) else SMALL_SIZES
                cases.append(Case(policy, names[i % len(names)], switches + coins(), sizes, 3, own_seed,
                                  rng.random() < 0.3, eager=i == 0 and eager in (None, column)))  # fmt: skip
        # "exact" on the GPU is fast enough for long tensors. An eager case of the dtypes compares it with the CPU's.
        for gpu in gpus:
            dtypes = rng.choice([case.dtypes for case in cases if case.eager])
            switches, own_seed = rng.choice(combinations) + coins(), f"{seed} {policy} large"
            cases.append(Case(policy, dtypes, switches, LARGE_SIZES, 2, own_seed, rng.random() < 0.3, gpu, not quick))
        by_policy.append(cases)
    return [case for turn in itertools.zip_longest(*by_policy) for case in turn if case]
