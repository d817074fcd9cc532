"""docs/semantics.md written down in NumPy by a stranger to the code: backends must give the same bits.

From the package come the optimizer, the policies and the schedules, and nothing else. Where a number below is not said
by the page, the page is at fault.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from graddrop_kernels import (
    CycleBlocks,
    ExponentialAnneal,
    FixedMask,
    FusedGradDropAdamW,
    GaussianGradDrop,
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    RandomMask,
    SampleBlocks,
    SkipUpdate,
    TrainRows,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*GradDropEpoch.*toggle=True"),
    pytest.mark.filterwarnings("ignore:two optimizers are stepped in turn"),  # one for each backend
]

F16, F32, F64, U32, U64 = np.float16, np.float32, np.float64, np.uint32, np.uint64
MASK = U64(0xFFFFFFFF)

# --- arithmetic -------------------------------------------------------------------------------------------------------


def fma(a, b, c):
    """a * b + c: rounded once in float32, twice in float64."""
    a, b, c = np.broadcast_arrays(a, b, c)
    if c.dtype == F64:
        return a * b + c
    product, c = a.astype(F64) * b.astype(F64), c.astype(F64)  # exact: 24 + 24 bits
    total = product + c
    part = total - product
    rest = (product - (total - part)) + (c - part)  # what the sum has lost, exactly (Knuth)
    odd = np.nextafter(total, np.where(rest > 0, np.inf, -np.inf))
    inexact_and_even = (rest != 0) & (total.view(np.int64) & 1 == 0)
    return np.where(inexact_and_even, odd, total).astype(F32)  # rounded to odd, then once (Boldo and Melquiond)


def to_bfloat16(x, words=None):
    """The nearest bfloat16 as float32, ties to even; with words one of the two around it."""
    bits = x.view(U32).astype(U64)
    added = (bits >> U64(16) & U64(1)) + U64(0x7FFF) if words is None else words >> U64(16)
    return ((bits + added) & U64(0xFFFF0000)).astype(U32).view(F32)


STORED = {
    torch.bfloat16: to_bfloat16,
    torch.float16: lambda x: x.astype(F16).astype(F32),
    torch.float32: lambda x: x,
    torch.float64: lambda x: x,
    torch.complex64: lambda x: x,
}

# --- the draw ---------------------------------------------------------------------------------------------------------


def philox4x32_10(c0, c1, c2, c3, k0, k1):
    c = np.broadcast_arrays(*(np.asarray(word, U64) for word in (c0, c1, c2, c3)))
    for _ in range(10):
        a, b = U64(0xD2511F53) * c[0], U64(0xCD9E8D57) * c[2]
        c = [b >> U64(32) ^ c[1] ^ U64(k0), b & MASK, a >> U64(32) ^ c[3] ^ U64(k1), a & MASK]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack(c)


WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
ELEMENT, BLOCK, BUCKET, GAUSSIAN, ROUNDING, MOMENTS = range(6)


def bare(name):
    *path, own = name.split(".")
    return ".".join([part for part in path if part not in WRAPPERS] + [own])


class Stream(NamedTuple):
    """The random numbers of one name."""

    name: str
    seed: int

    def key(self):
        digest = hashlib.blake2b(self.name.encode("utf-8"), digest_size=8, key=self.seed.to_bytes(8, "little")).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def calls(self, q, draw, domain):
        return philox4x32_10(q & MASK, q >> U64(32), draw % 2**32, domain, *self.key())

    def u16(self, draw, domain, count):
        i = np.arange(count, dtype=U64)
        words = self.calls(i >> U64(3), draw, domain)[i >> U64(1) & U64(3), np.arange(count)]
        return words >> U64(16) * (i & U64(1)) & U64(0xFFFF)

    def words(self, draw, domain, count):
        i = np.arange(count, dtype=U64)
        return self.calls(i >> U64(2), draw, domain)[i & U64(3), np.arange(count)]


LOG = (0.21372777, -0.3234426, 0.3413759, -0.3981573, 0.49969336, -0.66669166, 1.0000015)
COS = (0.2196968, -1.3318802, 4.058412, -4.934793, 0.99999994)
SIN = (0.077659406, -0.5982922, 2.5500777, -5.1677103, 3.1415927)


def horner(coefficients, x):
    result = np.full_like(x, F32(coefficients[0]))
    for coefficient in coefficients[1:]:
        result = fma(result, x, F32(coefficient))
    return result


def between_one_and_two(bits):
    return (bits | U64(0x3F800000)).astype(np.uint32).view(F32)


def normal(words):
    """Standard normal float32 numbers, one per word, of a whole number of pairs."""
    first, second = words[::2], words[1::2]
    y = F32(2) - between_one_and_two(first >> U64(9))
    x = F32(1.5) - between_one_and_two(second >> U64(8) & U64(0x7FFFFF))
    bits = y.view(np.int32) - np.int32(0x3F3504F3)
    e, f = (bits >> 23).astype(F32), ((bits & 0x7FFFFF) + 0x3F3504F3).astype(np.int32).view(F32) - F32(1)
    r = np.sqrt(fma(e, F32(-2 * math.log(2)), fma(horner(LOG, f), f * f, F32(-2) * f)))
    r = np.where(second >= U64(2**31), -r, r)
    return np.stack((r * horner(COS, x * x), r * (x * horner(SIN, x * x))), axis=1).ravel()


# --- masks ------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What one step does to a parameter."""

    keep: Any = True  # bool, or one per element
    factor: Any = 1.0  # of kept gradients; a number or float32 per element
    t: Any = None  # of the bias correction, per element or for all; None: the parameter's own step


class Moment(NamedTuple):
    """What a plan depends on."""

    stream: Stream
    count: int  # elements
    step: int  # of the parameter, before this update
    epoch: int
    past: list  # the epochs of the group's completed steps
    most: int  # steps that any group has completed
    frozen: bool  # what is dropped, with its moments
    active: bool  # the bias correction counts ages


def threshold(p):
    return round(p * 65536)


class Rule(NamedTuple):
    policy: Any
    masked: str  # by default
    plan: Callable[[Moment], Plan]


def graddrop(p, p_of, every="step"):
    def plan(at: Moment) -> Plan:
        cut = threshold(p_of(at.epoch))
        keep = at.stream.u16(at.epoch if every == "epoch" else at.step, ELEMENT, at.count) >= U64(cut)
        rates = [
            1 if (every, epoch) == ("epoch", at.epoch) else 1 - threshold(p_of(epoch)) / 65536 for epoch in at.past
        ]
        t = 1 + at.step * (sum(rates) / len(rates) if rates else 1.0)
        return Plan(keep, 65536 / (65536 - cut), t if at.frozen and at.active else None)

    return Rule(GradDrop(p, every=every), "gradient", plan)


def gaussian(p, p_of):
    def plan(at: Moment) -> Plan:
        cut = threshold(p_of(at.epoch))
        deviation = F32(math.sqrt(cut / (65536 - cut)))
        z = normal(at.stream.words(at.step, GAUSSIAN, at.count + at.count % 2))[: at.count]
        return Plan(factor=fma(z, deviation, F32(1)) if cut else 1.0)

    return Rule(GaussianGradDrop(p), "gradient", plan)


def buckets(epochs, toggle, storage):
    def plan(at: Moment) -> Plan:
        now = min(at.epoch, epochs - 1)
        bucket = at.stream.u16(0, BUCKET, at.count) * U64(epochs) >> U64(16)
        active = lambda epoch: bucket == U64(epoch) if toggle else bucket <= U64(epoch)
        age = 1 + sum((active(min(epoch, epochs - 1)).astype(int) for epoch in at.past), np.zeros(at.count, int))
        age = np.minimum(age, at.step + 1)
        return Plan(active(now), t=age if at.frozen and at.active else None)

    return Rule(GradDropEpoch(epochs, toggle=toggle, storage=storage), "frozen", plan)


BLOCKS = [f"layers.{i}" for i in range(5)]
PATTERN = "layers.*"


def of_blocks(policy, masked, keeps, completed=lambda at: len(at.past)):
    """Parameters outside of the blocks are dense."""

    def plan(at: Moment) -> Plan:
        block = ".".join(at.stream.name.split(".")[:2])
        if block not in BLOCKS:
            return Plan()
        return Plan(keeps(at, block), t=completed(at) + 1 if at.frozen and not at.active else None)

    return Rule(policy, masked, plan)


def layer(p, p_of, every="step"):
    def keeps(at: Moment, block: str) -> bool:
        draw = at.epoch if every == "epoch" else len(at.past)
        return bool(Stream(block, at.stream.seed).u16(draw, BLOCK, 1)[0] >= threshold(p_of(at.epoch)))

    return of_blocks(LayerGradDrop(p, every=every, layers=PATTERN), "gradient", keeps)


def freeze(epochs, direction, per_epoch=None):
    def keeps(at: Moment, block: str) -> bool:
        count = per_epoch * (at.epoch + 1) if per_epoch else math.ceil(len(BLOCKS) * (at.epoch + 1) / epochs)
        order = BLOCKS[::-1] if direction == "top_down" else BLOCKS
        return block in order[:count]

    return of_blocks(GradFreeze(epochs, direction, per_epoch, layers=PATTERN), "frozen", keeps)


def shuffled(seed, draw):
    def drawn(block):
        low, high = Stream(block, seed).words(draw, BLOCK, 2)
        return int(low) + 2**32 * int(high), block

    return sorted(BLOCKS, key=drawn)


def sample(k, every):
    keeps = lambda at, block: block in shuffled(at.stream.seed, at.most // every)[:k]
    return of_blocks(SampleBlocks(k, every, layers=PATTERN), "frozen", keeps, lambda at: at.most)


def cycle(every, order):
    def keeps(at: Moment, block: str) -> bool:
        turn = at.most // every
        orders = {"forward": BLOCKS, "backward": BLOCKS[::-1], "random": shuffled(at.stream.seed, turn // len(BLOCKS))}
        return block == orders[order][turn % len(BLOCKS)]

    return of_blocks(CycleBlocks(every, order, layers=PATTERN), "frozen", keeps, lambda at: at.most)


def random_mask(density):
    def plan(at: Moment) -> Plan:
        return Plan(at.stream.u16(0, ELEMENT, at.count) >= U64(65536 - round(65536 * density)))

    return Rule(RandomMask(density), "frozen", plan)


def skip_update(p, p_of):
    def plan(at: Moment) -> Plan:
        cut = threshold(p_of(at.epoch))
        return Plan(bool(at.stream.u16(len(at.past), BLOCK, 1)[0] >= cut), 65536 / (65536 - cut))

    return Rule(SkipUpdate(p), "update", plan)


def fixed(masks, scale):
    def plan(at: Moment) -> Plan:
        keep = masks.get(at.stream.name)
        return Plan() if keep is None else Plan(keep, scale)

    return Rule(FixedMask({name: torch.tensor(mask) for name, mask in masks.items()}, scale), "frozen", plan)


def rows(masks):
    """Of vectors, whose rows are their elements."""
    chosen = {name: mask for name, mask in masks.items() if mask.any()} or {"head": np.arange(SIZES["head"]) % 3 == 0}
    return fixed(chosen, 1.0)._replace(policy=TrainRows(chosen))


def annealed(rng):
    """(schedule, the same in a line)."""
    start, epochs, decay = float(rng.uniform(0.3, 0.9)), int(rng.integers(2, 7)), float(rng.uniform(0.2, 1))
    last = epochs - 1
    alive = lambda p: p if p * 65536 > 0.5 else 0.0
    return [
        (LinearAnneal(epochs, start), lambda e: alive(max(0.0, start - e / epochs))),
        (LinearAnneal(epochs, start, end="zero"), lambda e: alive(start * (1 - e / last) if e < last else 0.0)),
        (ExponentialAnneal(start, decay), lambda e: alive(start * decay**e)),
    ][rng.integers(3)]


def some_p(rng):
    p = float(rng.uniform(0.05, 0.95))
    return p, lambda epoch: p


def random_masks(rng):
    sizes = {bare(name): size for name, size in SIZES.items()}
    return {name: rng.random(size) < 0.5 for name, size in sizes.items() if rng.random() < 0.7} or {
        "head": rng.random(SIZES["head"]) < 0.5
    }


RULES = {
    "none": lambda rng: Rule(None, "gradient", lambda at: Plan()),
    "graddrop": lambda rng: graddrop(*some_p(rng)),
    "graddrop, every epoch": lambda rng: graddrop(*some_p(rng), every="epoch"),
    "graddrop, annealed": lambda rng: graddrop(*annealed(rng)),
    "graddrop, annealed, every epoch": lambda rng: graddrop(*annealed(rng), every="epoch"),
    "gaussian": lambda rng: gaussian(*some_p(rng)),
    "gaussian, annealed": lambda rng: gaussian(*annealed(rng)),
    "buckets": lambda rng: buckets(int(rng.integers(2, 30)), False, "recompute"),
    "buckets, few, bitpacked": lambda rng: buckets(int(rng.integers(1, 5)), False, "bitpacked"),
    "buckets, toggle": lambda rng: buckets(int(rng.integers(1, 5)), True, "recompute"),
    "layer": lambda rng: layer(*some_p(rng)),
    "layer, every epoch": lambda rng: layer(*some_p(rng), every="epoch"),
    "layer, annealed": lambda rng: layer(*annealed(rng)),
    "freeze, top down": lambda rng: freeze(int(rng.integers(1, 7)), "top_down"),
    "freeze, bottom up": lambda rng: freeze(int(rng.integers(1, 7)), "bottom_up"),
    "freeze, by number": lambda rng: freeze(4, "top_down", int(rng.integers(1, 3))),
    "fixed": lambda rng: fixed(random_masks(rng), float(rng.uniform(0.5, 2))),
    "rows": lambda rng: rows(random_masks(rng)),
    "random mask": lambda rng: random_mask(float(rng.uniform(0.05, 0.95))),
    "skipped updates": lambda rng: skip_update(*some_p(rng)),
    "skipped updates, annealed": lambda rng: skip_update(*annealed(rng)),
    "sampled blocks": lambda rng: sample(int(rng.integers(1, 6)), int(rng.integers(1, 4))),
    "blocks in turns": lambda rng: cycle(
        int(rng.integers(1, 3)), ["forward", "backward", "random"][rng.integers(3)]
    ),
}

# --- the step ---------------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """Dtypes and how they are stored."""

    param: torch.dtype = torch.float32
    moments: torch.dtype | None = None
    master: bool = False
    stochastic: bool = False
    stochastic_moments: bool = False
    backends: tuple = ("exact", "cpu")

    @property
    def work(self):
        return F64 if self.param == torch.float64 else F32

    @property
    def parts(self):
        return 2 if self.param.is_complex else 1

    @property
    def arguments(self):
        return {
            "moment_dtype": self.moments, "master_weights": self.master, "stochastic_rounding": self.stochastic,
            "stochastic_moments": self.stochastic_moments,
        }  # fmt: skip


KINDS = {
    "float32": Kind(),
    "float32, bfloat16 moments": Kind(moments=torch.bfloat16),
    "bfloat16": Kind(torch.bfloat16),
    "bfloat16, float32 moments": Kind(torch.bfloat16, torch.float32),
    "bfloat16, masters": Kind(torch.bfloat16, master=True),
    "bfloat16, stochastic": Kind(torch.bfloat16, stochastic=True),
    "bfloat16, stochastic, float32 moments": Kind(torch.bfloat16, torch.float32, stochastic=True),
    "float32, stochastic bfloat16 moments": Kind(moments=torch.bfloat16, stochastic_moments=True),
    "bfloat16, both stochastic": Kind(torch.bfloat16, stochastic=True, stochastic_moments=True),
    "float16": Kind(torch.float16),
    "float64": Kind(torch.float64, backends=("exact",)),
    "complex64": Kind(torch.complex64, backends=("exact",)),
}


class Param:
    """A parameter and its state, as arrays of the working dtype."""

    def __init__(self, value):
        self.p = self.master = value
        self.m = self.v = self.vmax = np.zeros_like(value)
        self.step = 0


def update(one: Param, grad, plan: Plan, hyper: dict, kind: Kind, masked: str, stream: Stream, unscale, clip) -> None:
    work = kind.work
    keep = np.repeat(plan.keep, kind.parts) if np.ndim(plan.keep) else np.full(grad.shape, plan.keep)
    if masked == "frozen" and np.ndim(plan.keep) == 0 and not plan.keep:
        return
    step, one.step = one.step, one.step + 1
    lr, b1, b2, eps, decay = (
        work(each) for each in (hyper["lr"], *hyper["betas"], hyper["eps"], hyper["weight_decay"])
    )
    ages = np.repeat(plan.t, kind.parts) if np.ndim(plan.t) else [one.step if plan.t is None else plan.t]
    ages, which = np.unique(ages, return_inverse=True)
    bc1 = np.array([1 - float(b1) ** float(age) for age in ages]).astype(work)[which]
    root2 = np.array([math.sqrt(1 - float(b2) ** float(age)) for age in ages]).astype(work)[which]

    g = grad
    if unscale is not None:
        g = g / work(unscale)
    if clip is not None:
        g = g * work(clip)
    g = -g if hyper["maximize"] else g
    factor = np.repeat(plan.factor, kind.parts) if np.ndim(plan.factor) else work(plan.factor)
    rate = lr / bc1
    if masked == "update":
        rate = rate * factor
    else:
        g = np.where(keep, g * factor.astype(work), work(0))

    old = one.p, one.master, one.m, one.v, one.vmax
    p = one.master if kind.master else one.p
    m = fma(b1, one.m, fma(-b1, g, g))
    g2 = g * g
    v = fma(b2, one.v, fma(-b2, np.minimum(g2, np.finfo(work).max), g2))
    vmax = np.where(v > one.vmax, v, one.vmax)
    u = rate * m
    if decay:
        decays = ~(u * p < 0) if hyper["cautious_weight_decay"] else True
        p = np.where(decays, fma(-(lr * decay), p, p), p)
    p = p - u / (np.sqrt(vmax if hyper["amsgrad"] else v) / root2 + eps)

    param = to_bfloat16(p, stream.words(step, ROUNDING, len(p))) if kind.stochastic else STORED[kind.param](p)
    moment = STORED[kind.moments or (torch.float32 if kind.master else kind.param)]
    if kind.stochastic_moments:
        words = stream.words(step, MOMENTS, len(p))
        lower_half = (words & U64(0xFFFF)) << U64(16)
        m, v, vmax = to_bfloat16(m, words), to_bfloat16(v, lower_half), to_bfloat16(vmax, lower_half)
    new = param, p, moment(m), moment(v), moment(vmax)
    if masked != "gradient":
        frozen = 5 if masked == "frozen" else 2  # of the five
        new = (*(np.where(keep, *pair) for pair in zip(new[:frozen], old)), *new[frozen:])
    one.p, one.master, one.m, one.v, one.vmax = new


# --- trainings --------------------------------------------------------------------------------------------------------

# Three wrappers, one of them within a name, and names that only look like one.
SIZES = {
    "module.layers.0.weight": 67,
    "layers.1._orig_mod.weight": 33,
    "layers.1.module": 5,
    "layers.2._checkpoint_wrapped_module._fsdp_wrapped_module.submodule.weight": 40,
    "layers.3.weight": 0,
    "layers.3.bias": 1,
    "layers.4.weight": 260,
    "head": 31,
}
SECOND_GROUP = ("layers.1._orig_mod.weight", "layers.4.weight", "head")


def hyper_parameters(rng):
    return {
        "lr": float(10 ** rng.uniform(-4, -1)),
        "betas": (float(rng.choice([0, rng.uniform(0.5, 0.99)])), float(rng.uniform(0.8, 0.9999))),
        "eps": float(10 ** rng.uniform(-9, -3)),
        "weight_decay": float(rng.choice([0, rng.uniform(0.01, 0.5)])),
        "amsgrad": bool(rng.random() < 0.5),
        "maximize": bool(rng.random() < 0.5),
        "cautious_weight_decay": bool(rng.random() < 0.5),
    }


EPOCHS = (0, 0, 0, 1, 1, 0, 3, 3, 3, 7)  # one visited again, some left out, one past the last


def torch_of(array, dtype, parts):
    tensor = torch.from_numpy(array.copy())
    return torch.view_as_complex(tensor.view(-1, 2)) if parts == 2 else tensor.to(dtype)


def numpy_of(tensor, work):
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor).flatten() if tensor.is_complex() else tensor
    return tensor.to(torch.float64 if work is F64 else torch.float32).numpy()


def drawn(rng, size, kind):
    """Numbers that the dtype can hold, of many magnitudes, and a few zeros of both signs."""
    values = rng.standard_normal(size * kind.parts) * 10 ** rng.uniform(-3, 1, size * kind.parts)
    values *= rng.random(size * kind.parts) < 0.9
    return STORED[kind.param](values.astype(kind.work))


def assert_same(found, wanted, what):
    if wanted.dtype == F64:  # the bits are torch's own
        wrong = np.flatnonzero(abs(found - wanted) > 1e-13 * np.maximum(1, abs(wanted)))
    else:
        wrong = np.flatnonzero(found.view(U32) != wanted.view(U32))
    assert not len(wrong), (
        f"{what}: {len(wrong)} of {len(wanted)} elements differ, first {wrong[0]}: "
        f"{found[wrong[0]]!r}, by the page {wanted[wrong[0]]!r}"
    )


class Run:
    """A training by the page beside that of each backend: two groups of their own hyper-parameters."""

    def __init__(self, rule: Rule, kind: Kind, arguments: dict, rng, named=True, **optimizer_arguments):
        self.rule, self.kind, self.rng = rule, kind, rng
        self.masked = arguments.get("masked") or rule.masked
        self.active = arguments.get("bias_correction", "active") == "active"
        self.seed = int(rng.integers(2**64, dtype=U64))
        self.groups = [{"hyper": hyper_parameters(rng), "past": [], "names": []} for _ in range(2)]
        for name in SIZES:
            self.groups[name in SECOND_GROUP]["names"].append(name)
        self.params = {name: Param(drawn(rng, size, kind)) for name, size in SIZES.items()}
        self.streams = {name: Stream(bare(name), self.seed) for name in SIZES}
        if not named:
            positions = [(i, j, name) for i, group in enumerate(self.groups) for j, name in enumerate(group["names"])]
            self.streams = {name: Stream(f"{i}.{j}", self.seed) for i, j, name in positions}
        self.optimizers = []
        for backend in kind.backends:
            tensors = {
                name: torch.nn.Parameter(torch_of(one.p, kind.param, kind.parts)) for name, one in self.params.items()
            }
            groups = [
                {"params": [(name, tensors[name]) if named else tensors[name] for name in group["names"]]}
                | group["hyper"]
                for group in self.groups
            ]
            optimizer = FusedGradDropAdamW(
                groups, mask=rule.policy, seed=self.seed, backend=backend, **arguments, **kind.arguments,
                **optimizer_arguments,
            )  # fmt: skip
            self.optimizers.append((optimizer, tensors))

    def plan(self, group: dict, name: str, epoch: int) -> Plan:
        step, most = self.params[name].step, max(len(each["past"]) for each in self.groups)
        return self.rule.plan(
            Moment(
                self.streams[name], SIZES[name], step, epoch, group["past"], most, self.masked == "frozen", self.active
            )
        )

    def step(self, epoch: int, grads: dict, unscale=None, clip=None) -> None:
        """Compares every mask before the step, and every number after it."""
        for optimizer, tensors in self.optimizers:
            optimizer.set_epoch(epoch)
            for name, tensor in tensors.items():
                tensor.grad = torch_of(grads[name], self.kind.param, self.kind.parts) if name in grads else None
        planned = [{name: self.plan(group, name, epoch) for name in group["names"]} for group in self.groups]
        for group, plans in zip(self.groups, planned):
            for name, plan in plans.items():
                keep = np.broadcast_to(plan.keep, SIZES[name])
                for optimizer, tensors in self.optimizers:
                    assert np.array_equal(optimizer.mask(tensors[name]).numpy(), keep), f"mask of {name}, epoch {epoch}"
                if name in grads:
                    update(
                        self.params[name], grads[name], plan, group["hyper"], self.kind, self.masked,
                        self.streams[name], unscale, clip,
                    )  # fmt: skip
            if any(name in grads for name in group["names"]):
                group["past"].append(epoch)
        for optimizer, tensors in self.optimizers:
            optimizer.step()
            for group in self.groups:
                for name in group["names"]:
                    what = f"{name} after a step of epoch {epoch} with {optimizer.backend}"
                    check(optimizer, tensors[name], self.params[name], group["hyper"], self.kind, what)

    def gradients(self) -> dict:
        """Of most parameters."""
        return {name: drawn(self.rng, size, self.kind) for name, size in SIZES.items() if self.rng.random() < 0.9}


def check(optimizer, tensor, one, hyper, kind, what):
    assert_same(numpy_of(tensor, kind.work), one.p, f"parameter {what}")
    state = optimizer.state[tensor]
    assert (state["step"].item() if state else 0) == one.step, what
    wanted = {"exp_avg": one.m, "exp_avg_sq": one.v}
    wanted |= {"max_exp_avg_sq": one.vmax} if hyper["amsgrad"] else {}
    wanted |= {"master_param": one.master} if kind.master else {}
    for key, value in wanted.items():
        if state:
            if state[key].shape != tensor.shape:  # of the trained rows
                value = value[np.repeat(optimizer.mask(tensor).numpy(), kind.parts)]
            assert_same(numpy_of(state[key], kind.work), value, f"{key} of {what}")


MEANINGS = {
    "as it is": {},
    "gradient": {"masked": "gradient"},
    "frozen": {"masked": "frozen"},
    "update": {"masked": "update"},
    "frozen, global": {"masked": "frozen", "bias_correction": "global"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_training_has_the_bits_of_the_page(rule, kind, seed):
    """float32 under every meaning of "dropped", other dtypes under a drawn one."""
    refused = {
        **dict.fromkeys(("gaussian", "skipped updates"), MEANINGS.keys() - {"as it is"}),
        "rows": {"gradient", "update"},
    }.get(rule.split(",")[0], ())
    meanings = [meaning for meaning in MEANINGS if meaning not in refused]
    rng = np.random.default_rng([seed, list(RULES).index(rule), list(KINDS).index(kind)])
    for meaning in meanings if kind == "float32" else [rng.choice(meanings)]:
        print(f"dropped: {meaning}")
        run = Run(RULES[rule](rng), KINDS[kind], MEANINGS[meaning], rng)
        for step, epoch in enumerate(EPOCHS):
            grads = run.gradients()
            if step == 2:  # the groups' counts differ from now on
                grads = {name: grad for name, grad in grads.items() if name not in SECOND_GROUP}
            run.step(epoch, grads)


def test_parameters_without_names_are_named_by_their_place(seed):
    rng = np.random.default_rng(seed)
    run = Run(RULES["graddrop"](rng), KINDS["bfloat16, stochastic"], {}, rng, named=False)
    for epoch in (0, 0, 1):
        run.step(epoch, run.gradients())


def test_weight_decay_is_one_fma(seed):
    """p less a product that is nearly half of p's last digit: a sum in float64 would be a tie, which goes to even."""
    rng, cases = np.random.default_rng(seed), []
    while len(cases) < 20:
        b = int(rng.integers(2**23, 2**24))
        a = round(2**47 / b)
        rest = a * b - 2**47  # in units of 2^-71, half of the last digit being 2^-24
        if a < 2**24 and 0 < abs(rest) < 2**18 and (b % 2 == 1) is (rest < 0):
            cases.append((F32(b / 2**23), F32(a / 2**48), F32((b - (rest > 0)) / 2**23)))
    for p, decay, wanted in cases:
        assert fma(-decay, p, p) == wanted != F32(F64(p) - F64(decay) * F64(p))
    for backend in ("exact", "cpu"):
        tensors = [torch.nn.Parameter(torch.tensor([p])) for p, _, _ in cases]
        groups = [
            {"params": [tensor], "weight_decay": 2 * float(decay)} for tensor, (_, decay, _) in zip(tensors, cases)
        ]
        optimizer = FusedGradDropAdamW(groups, lr=0.5, mask=None, backend=backend)
        for tensor in tensors:
            tensor.grad = torch.zeros(1)
        optimizer.step()
        assert [tensor.item() for tensor in tensors] == [wanted for _, _, wanted in cases], backend


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("after_mask", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_clipping_and_unscaling_have_the_bits_of_the_page(kind, after_mask, unscaled, seed):
    """Gradients are small integers and the factor is 2, so that no order of the sum can change it."""
    rng = np.random.default_rng(seed)
    half = (0.5, lambda epoch: 0.5)
    limit = float(rng.uniform(1, 20))
    arguments = {"max_grad_norm": limit, "norm_after_mask": after_mask, "fused": unscaled or None}
    run = Run(graddrop(*half), KINDS[kind], {}, rng, **arguments)
    for step in range(4):
        grads = {
            name: rng.integers(-9, 10, size).astype(F32) * F32(step < 3)  # a norm of 0, last
            for name, size in SIZES.items()
        }
        scale = F32(rng.uniform(0.5, 3)) if unscaled else None
        for optimizer, _ in run.optimizers:
            if unscaled:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        seen = [
            np.where(run.plan(group, name, 0).keep, 2 * grads[name], 0) if after_mask else grads[name]
            for group in run.groups
            for name in group["names"]
        ]
        norm = math.sqrt(sum((each.astype(F64) ** 2).sum() for each in seen))
        norm = F32(norm / F64(scale) if unscaled else norm)
        run.step(0, grads, scale, min(F32(1), F32(limit) * (F32(1) / (norm + F32(1e-6)))))
        for optimizer, tensors in run.optimizers:
            assert optimizer.grad_norm.item() == norm
            for name, tensor in tensors.items():
                wanted = STORED[KINDS[kind].param](grads[name] / scale) if unscaled else grads[name]
                assert_same(numpy_of(tensor.grad, F32), wanted, f"the gradient of {name} that was written back")


def test_words_become_the_page_s_normal_numbers():
    """What the page says of them; the trainings show their bits."""
    words = np.random.default_rng(0).integers(0, 2**32, 2**18, dtype=U64)
    words[:4] = 2**32 - 1, 2**30, 2**32 - 1, 2**31 + 2**30
    z = normal(words)
    assert abs(z).max() == z[0] and 5.64 < z[0] <= 5.65 and z[2] == -z[0]
    assert abs(z.mean()) < 0.014 and abs(z.std() - 1) < 0.01
