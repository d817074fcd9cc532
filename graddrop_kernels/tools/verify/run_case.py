"""Runs one case of `verify`: "exact" and the backends step the same values side by side, compared after every step."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from ... import backends
from ...attached.handle import attach_mask
from ...backends import Backend, cpu
from ...backends.batch import ROUND_MOMENTS, ROUND_PARAMS
from ...optimizer import FusedGradDropAdamW
from .bounds import BOUNDS, EXACT, TIPPED, TIPPED_MOMENTS, bits, in_dtype, norm_limit, operand_sizes, ulp_at
from .cases import DTYPES, F16, Case

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Engine(NamedTuple):
    """A backend on a device and, for the cpu backend, one instruction set."""

    backend: Backend
    device: torch.device
    isa: str | None = None

    def __str__(self) -> str:
        return f"{self.backend.name}{f'/{self.isa}' if self.isa else ''} on {self.device}"


class Truth(NamedTuple):
    """Inputs and results of one step of "exact"."""

    mask: torch.Tensor
    ask_mask: bool  # whether the engines are asked for their masks
    grads: tuple[torch.Tensor, ...]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    norm: torch.Tensor | None  # of the gradients, shape (1,), if the case clips


class Mismatch(Exception):
    """Two tensors that should be equal differ. The message has the first index and both values."""


@dataclass
class Findings:
    """Results of the cases of one backend, device and policy."""

    cases: int = 0
    masks: int = 0  # cases whose masks show in the results of the steps
    wrong_masks: int = 0
    elements: int = 0
    differing: int = 0  # elements whose bits are not those of "exact"
    ulp: dict[str, float] = field(default_factory=dict)  # {column: the largest distance}
    failures: list[str] = field(default_factory=list)


class Training:
    """The parameters of a case, and the optimizer over them on one engine."""

    def __init__(self, case: Case, named: list[tuple[str, torch.Tensor]], engine: Engine, arguments: dict[str, Any]):
        self.engine, self._misaligned = engine, case.misaligned
        self.params = [
            torch.nn.Parameter(self._placed(value.to(engine.device), i)) for i, (_, value) in enumerate(named)
        ]
        names = [name for name, _ in named]
        self.optimizer = FusedGradDropAdamW(zip(names, self.params), backend=engine.backend.name, **arguments)
        for i, param in enumerate(self.params):
            for j, key in enumerate(_MOMENTS[: 2 + arguments["amsgrad"]]):
                zeros = torch.zeros_like(param.data, dtype=DTYPES[case.dtypes].moments)
                self.optimizer.state[param][key] = self._placed(zeros, i + j + 2)
            if arguments["master_weights"]:
                self.optimizer.state[param]["master_param"] = self._placed(param.detach().float(), i + 5)

    def _placed(self, tensor: torch.Tensor, place: int) -> torch.Tensor:
        """Returns a copy, which in a misaligned case begins 1 to 7 elements into its memory."""
        offset = 1 + place % 7 if self._misaligned else 0
        return torch.cat((tensor.new_zeros(offset), tensor))[offset:]

    def step(self, grads: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        """Makes one step. Returns ``tensors()``."""
        self.advance(grads)
        return self.tensors()

    def advance(self, grads: tuple[torch.Tensor, ...]) -> None:
        """Makes one step."""
        for i, (param, grad) in enumerate(zip(self.params, grads)):
            param.grad = self._placed(grad.to(self.engine.device), i + 1)
        with cpu.using_isa(self.engine.isa):
            self.optimizer.step()

    def mask(self) -> torch.Tensor:
        """Returns the masks of the next step, concatenated, on the CPU."""
        return torch.cat([self.optimizer.mask(param) for param in self.params]).cpu()

    def masked_gradients(self, grads: tuple[torch.Tensor, ...], epoch: int) -> torch.Tensor | None:
        """Returns what ``attach_mask`` makes of gradients before another optimizer's first step, concatenated, on the
        CPU; None for a policy that it refuses.
        """
        group = self.optimizer.param_groups[0]
        policy = self.optimizer.masking.policy(0)
        if policy is None or policy.masked == "update":
            return None
        params = [param.detach().clone().requires_grad_() for param in self.params]
        for i, (param, grad) in enumerate(zip(params, grads)):
            param.grad = self._placed(grad.to(self.engine.device), i + 1)
        other = torch.optim.SGD(params)
        handle = attach_mask(
            other, policy, named_parameters=zip(group["param_names"], params), seed=group["seed"],
            masked=policy.masked and "gradient", backend=self.engine.backend.name,
        )  # fmt: skip
        handle.set_epoch(epoch)
        with cpu.using_isa(self.engine.isa):
            other.step()
        masked: list[Any] = [param.grad for param in params]
        return torch.cat(masked).cpu()

    def norm(self) -> torch.Tensor | None:
        """Returns the norm of the last step's gradients, shape (1,), on the CPU; None without clipping."""
        norm = self.optimizer.grad_norm
        return norm if norm is None else norm.cpu().reshape(1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns copies of the parameters and of each part of their state, concatenated, on the CPU."""
        parts: dict[str, list[torch.Tensor]] = {}
        for param in self.params:
            for key, tensor in {"param": param.detach(), **self.optimizer.state[param]}.items():
                parts.setdefault(key, []).append(tensor.reshape(-1))
        return {key: torch.cat(tensors).cpu() for key, tensors in parts.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restores ``tensors()``."""
        for key, joined in tensors.items():
            targets = self.params if key == "param" else [self.optimizer.state[param][key] for param in self.params]
            for target, part in zip(targets, joined.split([target.numel() for target in targets])):
                target.copy_(part.view(target.shape))


class Drawn(NamedTuple):
    """What a case draws from its seed before its first step; the gradients come from ``generator``."""

    named: list[tuple[str, torch.Tensor]]
    scales: torch.Tensor  # of the gradients
    arguments: dict[str, Any]
    epochs: list[int]
    generator: torch.Generator


def _draw(case: Case) -> Drawn:
    rng = random.Random(case.seed)
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    param_dtype = DTYPES[case.dtypes].params
    named = [(_name(i), torch.randn(size, generator=generator).to(param_dtype)) for i, size in enumerate(case.sizes)]
    low, high = (-3, 0.5) if F16 in DTYPES[case.dtypes] else (-20, 2)  # squares underflow in float32 too: eps decides
    scales = 10 ** (low + (high - low) * torch.rand(sum(case.sizes), generator=generator))
    arguments = case.arguments(rng, named, scales.norm().item())
    return Drawn(named, scales, arguments, case.epochs(rng), generator)


def launch_case(case: Case, engine: Engine) -> None:
    """Makes every launch of the case on an engine, with gradients of 0; what comes of it is not looked at."""
    drawn = _draw(case)
    training = Training(case, drawn.named, engine, drawn.arguments)
    grads = tuple(torch.zeros_like(value) for _, value in drawn.named)
    for epoch in drawn.epochs:
        training.optimizer.set_epoch(epoch)
        training.mask()
        training.advance(grads)
    training.masked_gradients(grads, drawn.epochs[-1])


def run_case(case: Case, engines: list[Engine], findings: dict[Engine, Findings]) -> None:
    """Steps the case on "exact" and on each engine. An engine that fails leaves the case, and the failure is added to
    its findings.
    """
    drawn = _draw(case)
    named, scales, generator, arguments = drawn.named, drawn.scales, drawn.generator, drawn.arguments
    running: dict[Engine, Training] = {}

    def attempt(engine: Engine, when: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # any exception of a backend is a finding
            running.pop(engine, None)
            reason = str(error) if isinstance(error, Mismatch) else f"raised {type(error).__name__}: {error}"
            findings[engine].failures.append(f"FAIL {engine}: {case}: {when}: {reason}\n     with {arguments!r:.400}")

    for engine in engines:
        findings[engine].cases += 1
        findings[engine].masks += not case.gaussian
        begin = lambda engine=engine: running.update({engine: Training(case, named, engine, arguments)})
        attempt(engine, "at construction", begin)
    exact = Training(case, named, Engine(_exact(), case.reference), arguments)
    before = exact.tensors()
    for step, epoch in enumerate(drawn.epochs):
        for training in (exact, *running.values()):
            training.optimizer.set_epoch(epoch)
        grads = _gradients(case, before["exp_avg"], scales, generator)
        # mask() is shared code except for what a device computes, so each engine is asked only once per case.
        truth = Truth(exact.mask(), step == case.steps - 1, grads, before, exact.step(grads), exact.norm())
        for engine, training in list(running.items()):
            check = partial(_check_step, case, arguments, truth, training, findings[engine])
            attempt(engine, f"step {step}, epoch {epoch}", check)
        before = truth.after
    masked = exact.masked_gradients(grads, epoch)
    for engine, training in list(running.items()):
        check = partial(_check_masked_gradients, case, masked, training, grads, epoch, findings[engine])
        attempt(engine, f"attach_mask, epoch {epoch}", check)


def _exact() -> Backend:
    return next(backend for backend in backends.BACKENDS if backend.name == "exact")


def _name(i: int) -> str:
    return f"layers.{i % 4}.weight{i}"


def _gradients(
    case: Case, exp_avg: torch.Tensor, scales: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Makes gradients against the first moment, so that the moment of every trained element moves."""
    coin = torch.randint(2, scales.shape, generator=generator) * 2 - 1.0
    against = exp_avg.float().sign() * (1 if "maximize" in case.switches else -1)
    sizes = scales * (0.5 + torch.rand(scales.shape, generator=generator))
    grads = (torch.where(against == 0, coin, against) * sizes).to(DTYPES[case.dtypes].params)
    parts: tuple[torch.Tensor, ...] = grads.split(case.sizes)
    return parts


def _check_step(case: Case, arguments: dict[str, Any], truth: Truth, training: Training, found: Findings) -> None:
    """Steps ``training`` and compares its masks and tensors with those of "exact"; raises Mismatch."""
    mask, before, after = truth.mask, truth.before, truth.after
    bound, gaussian = BOUNDS.get(training.engine.backend.name, EXACT), case.gaussian
    beta1 = arguments["betas"][0]
    sizes = {}
    if bound != EXACT:
        training.load(before)
        lr_weight_decay, exact_moments = arguments["lr"] * arguments["weight_decay"], bound.of("exp_avg", gaussian) == 0
        cautious = arguments["cautious_weight_decay"]
        grad = torch.cat(truth.grads) * _clip_factor(truth, arguments) if gaussian else None
        sizes = operand_sizes(before, after, beta1, lr_weight_decay, exact_moments, cautious, grad)
    said = training.mask() if truth.ask_mask else mask
    stepped = training.step(truth.grads)
    if not gaussian:
        moment, old = stepped["exp_avg"], before["exp_avg"]
        wide = torch.promote_types(old.dtype, torch.float32)
        decayed = torch.tensor(beta1, dtype=wide) * old.to(wide)
        if case.masked == "update":  # the moments show no mask, and not every parameter that is trained moves
            trained = mask & said
        elif case.masked == "frozen":
            trained = bits(moment) != bits(old)
        elif DTYPES[case.dtypes].stochastic & ROUND_MOMENTS:  # either neighbour of what has decayed
            trained = (moment.to(wide) - decayed).abs() >= ulp_at(decayed, old.dtype)
        else:
            trained = moment != decayed.to(old.dtype)
        for what, actual in (("optimizer.mask", said), ("what it did", trained)):
            if not torch.equal(actual, mask):
                found.wrong_masks += 1
                raise _wrong_mask(case, what, actual, mask)
        kept = {"gradient": (), "frozen": before, "update": [key for key in before if "param" in key]}[case.masked]
        for key in kept:  # by itself, and not only as "exact" has it
            moved = (bits(stepped[key]) != bits(before[key])) & ~mask if key != "step" else mask[:0]
            if moved.any():
                raise Mismatch(f"{key}: a frozen element moved, {_place(case, int(moved.nonzero()[0]))}")
    if truth.norm is not None:
        norm: Any = training.norm()
        limit = norm_limit(gaussian and arguments["norm_after_mask"])
        _compare(case, "grad_norm", norm, truth.norm, limit, None, found)
        if not torch.equal(norm, truth.norm):
            # Each backend adds the squares in its own order, in float64. Once in millions of steps the norm rounds to
            # another float32, more often if Gaussian factors are rounded differently. Then the factor differs, and with
            # it the right bits. So this step is not compared, and the next one begins from the state of "exact".
            training.load(after)
            return
    for key, expected in after.items():
        limit = in_dtype(bound.of(key, gaussian), expected.dtype)
        if bound != EXACT and key == "param" and "master_param" in stepped:
            limit, expected = 0, stepped["master_param"].to(expected.dtype)  # the bound is the masters', not the copy's
        _compare(case, key, stepped[key], expected, limit, sizes.get(key), found)


def _check_masked_gradients(
    case: Case, expected: torch.Tensor | None, training: Training, grads: tuple[torch.Tensor, ...], epoch: int,
    found: Findings,
) -> None:  # fmt: skip
    """Compares gradients that ``attach_mask`` has masked with those of "exact"; raises Mismatch."""
    if expected is None:
        return
    actual: Any = training.masked_gradients(grads, epoch)
    bound = BOUNDS.get(training.engine.backend.name, EXACT)
    limit = in_dtype(bound.gaussian if case.gaussian else 0, expected.dtype)
    # The error of a Gaussian factor 1 + deviation * z is that of its second term.
    size = torch.cat(grads).abs() + expected.abs()
    _compare(case, "gradient", actual, expected, limit, size, found)


def _clip_factor(truth: Truth, arguments: dict[str, Any]) -> float:
    """Approximates the factor by which the step multiplied the gradients."""
    return 1.0 if truth.norm is None else min(1.0, arguments["max_grad_norm"] / max(truth.norm.item(), 1e-6))


def _wrong_mask(case: Case, what: str, actual: torch.Tensor, expected: torch.Tensor) -> Mismatch:
    index = int((actual != expected).nonzero()[0])
    say: Callable[[torch.Tensor], str] = lambda trained: "trained" if trained else "dropped"
    return Mismatch(
        f"mask, by {what}: {int((actual != expected).sum())} of {len(actual)} elements are wrong, the first "
        f"{_place(case, index)}: {say(actual[index])}, not {say(expected[index])}"
    )


def _compare(
    case: Case, key: str, actual: torch.Tensor, expected: torch.Tensor, limit: float,
    size: torch.Tensor | None, found: Findings,
) -> None:  # fmt: skip
    """Adds to the findings. Raises Mismatch if the tensors are more than ``limit`` ulp apart.

    An ulp is that of ``expected``'s dtype at ``size``, or if that is None at the larger of the two numbers.
    """
    found.elements += len(expected)
    found.ulp.setdefault(case.column, 0.0)
    differs = bits(actual) != bits(expected)
    if not differs.any():
        return
    found.differing += int(differs.sum())
    if size is None:
        size = actual.abs().maximum(expected.abs())
    ulp = (actual.double() - expected.double()).abs() / ulp_at(size, expected.dtype)
    ulp = ulp.nan_to_num(nan=torch.inf, posinf=torch.inf)
    found.ulp[case.column] = max(found.ulp[case.column], ulp.max().item())
    beyond = (ulp > limit if limit else differs).nonzero()
    if len(beyond):
        index = int(beyond[0])
        apart = f"{actual[index].item()!r} is not {expected[index].item()!r} ({ulp[index].item():.3g} ulp)"
        if key == "grad_norm":
            raise Mismatch(f"{key}: {apart}, more than {limit} ulp")
        raise Mismatch(
            f"{key}: {len(beyond)} of {len(expected)} elements are more than {limit:.4g} ulp apart, the first "
            f"{_name(index) if key == 'step' else _place(case, index)}: {apart}"
        )
    rounds, share = (ROUND_PARAMS, TIPPED) if key == "param" else (ROUND_MOMENTS, TIPPED_MOMENTS)
    tips = rounds & DTYPES[case.dtypes].stochastic and (key == "param" or key in _MOMENTS)
    if tips and differs.sum() > share * len(expected):
        raise Mismatch(
            f"{key}: {int(differs.sum())} of {len(expected)} elements are rounded to another number, more than 1 in "
            f"{1 / share:.0f}"
        )


def _place(case: Case, index: int) -> str:
    """Names the parameter and the element at an index into all of them."""
    for i, size in enumerate(case.sizes):
        if index < size:
            return f"{_name(i)}[{index}] of {size}"
        index -= size
    raise IndexError(index)
