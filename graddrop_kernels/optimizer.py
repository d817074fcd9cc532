"""FusedGradDropAdamW: torch.optim.AdamW with the paper's gradient masks inside its one fused step."""

import warnings
from collections.abc import Callable

import torch

from . import backends, bitmask, checkpoint, inspection, operator
from .group_options import GROUP_DEFAULTS, check_options, moment_dtype_name
from .layout import RowBlock
from .multi_tensor import Hyper, PreparedStep, Row, grad_of, present
from .names import canonical_name
from .parameters import (
    ParamRecord,
    check_fixed_mask,
    check_grad,
    check_memory,
    check_param,
    check_state,
    make_records,
    overlaps_itself,
)
from .plan import Clock, MaskPlan, PlanContext
from .policies import KEEP, FixedMask, GradDrop, GradDropEpoch, Policy
from .policy_book import PolicyBook


class FusedGradDropAdamW(torch.optim.AdamW):
    """AdamW that masks the gradients as GradDrop and its variants do (O'Neill & Dutta),
    at the cost of a plain fused AdamW step.

    A drop-in for ``torch.optim.AdamW(..., fused=True)``: same arguments, same state (exp_avg, exp_avg_sq, step), state
    dicts load both ways. Masks act on the gradient once a step, after accumulation and clipping. They are a pure
    function of (seed, parameter name, step or epoch, element index): equal on every backend and thread count and after
    a resume; no generator is consumed.

    Args:
        params: tensors, (name, tensor) pairs such as ``model.named_parameters()``, group dicts (each may have its own
            ``"mask"``), or ``graddrop_kernels.param_groups(model)``, which gives the paper's scope: blocks masked,
            embeddings and head dense. Floating point.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW.
        foreach: accepted, and without effect: the step is always one fused pass.
        fused: True lets ``torch.amp.GradScaler`` hand its scale to the step, which then unscales the gradients and
            skips itself when they are not finite, on the device, as torch's fused AdamW does. Without it the scaler
            unscales and skips before the step: the same training, in more passes over the gradients.
        capturable, differentiable: must be False.
        mask: a policy of ``graddrop_kernels`` (default ``GradDrop(p=0.2)``), or None for plain AdamW.
        seed: int in [0, 2^64).
        masked: what dropping means: ``"gradient"``: the gradient is 0 (moments decay, momentum and weight decay still
            move the weight); ``"frozen"``: parameter and moments stay bit for bit. None: the policy's own, see the
            README's table.
        bias_correction: ``"active"`` counts the steps in which a frozen unit was active, so that it starts with steps
            of the size of lr; ``"global"`` counts all steps: the literal form, in which a late unit starts with 3 to 6
            times lr.
        moment_dtype: None for moments in the parameter's dtype (as torch), or torch.float32.
        backend: ``"auto"``, or one of ``available_backends()``.

    Raises:
        ValueError, TypeError: an argument out of range, with its name, value and remedy.
        RuntimeError: a named backend that cannot run here.

    Example:
        >>> import torch
        >>> from graddrop_kernels import FusedGradDropAdamW, GradDrop
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = FusedGradDropAdamW(model.named_parameters(), lr=2e-5, mask=GradDrop(p=0.2))
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.mask("weight", step=0).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        mask: Policy | None = GradDrop(),  # noqa: B008 (immutable)
        seed: int = 0,
        masked: str | None = None,
        bias_correction: str = "active",
        moment_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ):
        self._backend = backends.check_name(backend)
        self._handle = operator.new_handle(self)
        self._policies = PolicyBook()
        self._forget_caches()
        self._warned: set[str] = set()
        self._skipped_steps: dict[int, torch.Tensor] = {}  # of each group, counted on the device
        self._own_defaults = {
            **GROUP_DEFAULTS, "mask": self._policies.add(mask), "seed": seed, "masked": masked,
            "bias_correction": bias_correction, "moment_dtype": moment_dtype_name(moment_dtype),
        }  # fmt: skip
        self._constructing = True
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
        )
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        for group in (self.defaults, *self.param_groups):
            group["fused"] = fused
        self._step_supports_amp_scaling = fused is True
        self.defaults.update(self._own_defaults)
        self._constructing = False
        self._check_groups()
        self._warn_of_position_names()

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None):
        """One masked AdamW step. Returns the closure's loss, or None.

        Raises:
            ValueError, TypeError, RuntimeError: a hyper-parameter or gradient that cannot be used.
                Nothing has changed then.
        """
        if torch.compiler.is_compiling():
            return operator.step_in_graph(self, closure)
        return self._step_uncompiled(closure)

    @torch._disable_dynamo
    def _step_uncompiled(self, closure: Callable[[], torch.Tensor] | None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [param for group in self.param_groups for param in group["params"]]
        amp_scalars = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._step_with(params, list(map(grad_of, params)), *amp_scalars, fresh=lambda: not self.state)
        return loss

    def _step_with(self, params, grads, grad_scale, found_inf, fresh: Callable[[], bool]) -> None:
        """The step of all parameters (those whose gradient is None are left out); the scalars as a GradScaler has
        put them on this optimizer; ``fresh``: whether there was no step before this one.
        """
        for index, group in enumerate(self.param_groups):
            check_options(index, group)
        self._settle_skipped_steps(only_if_needed=True)
        if grad_scale is not None:
            self._check_written_grads(params, grads)
        prepared = self._prepared
        if prepared is None or not prepared.holds(params, grads, self.state, self._group_facts()):
            prepared = self._prepared = self._prepare(params, grads, fresh)
            if prepared is None:
                return
        grad_scale, found_inf = (
            scalar if scalar is None else scalar.to(torch.float32) for scalar in (grad_scale, found_inf)
        )
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf != 0:
            return
        prepared.set_grads(grads)
        clocks = [self._clock(group) for group in self.param_groups]
        for batch in prepared.batches:
            batch.hypers = [self._hyper(index, unit, clocks[index]) for index, unit in batch.plans_of]
            batch.grad_scale, batch.found_inf = (
                scalar if scalar is None else scalar.to(batch.device, non_blocking=True)
                for scalar in (grad_scale, found_inf)
            )
        chosen = [
            backends.select(self._backend, batch.device, batch.param_dtype, batch.moment_dtype)
            for batch in prepared.batches
        ]
        for backend, batch in zip(chosen, prepared.batches):
            backend.masked_adamw_(batch)
        prepared.write_back(grads if grad_scale is not None else ())
        for index in {index for batch in prepared.batches for index, _ in batch.plans_of}:
            group, clock = self.param_groups[index], clocks[index]
            if not clock.history or clock.history[-1][0] != clock.epoch:
                group["epoch_history"] = clock.with_this_step()
            group["completed_steps"] += 1
            if found_inf is not None:
                skipped = self._skipped_steps.get(index, 0)
                self._skipped_steps[index] = skipped + (found_inf != 0).to(torch.int64)

    @torch._disable_dynamo
    def set_epoch(self, epoch: int) -> None:
        """Tells the policies that an epoch begins.

        Call it at the start of every epoch, 0 first. Resuming restores the epoch by itself.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"set_epoch(epoch) needs the number of the epoch, an int >= 0, got {epoch!r}")
        self._settle_skipped_steps()
        for group in self.param_groups:
            policy = self._policy(group)
            if policy is not None and policy.follows_epochs:
                policy.check_epoch(epoch)
                self._warn_once(policy.after_last_epoch(epoch))
        for group in self.param_groups:
            group["epoch"] = epoch
            group["epoch_was_set"] = True

    def mask(self, param: torch.Tensor | str, step: int | None = None) -> torch.Tensor:
        """The bool keep mask of a parameter, True where its elements are trained; shape and device of the parameter.

        Args:
            param: the parameter, or its name.
            step: completed steps before the step in question (0 for the first): of the parameter for element masks,
                of its group for block masks. Default: the next step.
                Masks that follow epochs are those of the current epoch.

        Raises:
            KeyError: no such parameter.
        """
        self._settle_skipped_steps()
        index, position = self._find(param)
        group = self.param_groups[index]
        records, blocks = self._records(index)
        tensor, record = group["params"][position], records[position]
        clock = self._clock(group)
        if step is not None:
            clock = Clock(clock.epoch, step, clock.history)
        plan = self._plan(group, record.unit, blocks, clock)
        state = self.state.get(tensor, {})
        own_step = step if step is not None else int(state["step"]) if "step" in state else 0
        words = self._mask_words(group, tensor, record)
        numel, layout = tensor.numel(), RowBlock.whole(tensor.numel())
        keep = backends.keep_mask(plan, record.key, own_step, layout, numel, words, tensor.device)
        return keep.view(tensor.shape)

    def active_fraction(self) -> list[float]:
        """The share of elements kept at the next step, one number a group: exact for blocks and fixed masks,
        the keep probability for random elements.
        """
        self._settle_skipped_steps()
        fractions = []
        for index, group in enumerate(self.param_groups):
            records, blocks = self._records(index)
            clock = self._clock(group)
            plans: dict = {}
            active = total = 0
            for param, record in zip(group["params"], records):
                if record.unit not in plans:
                    plans[record.unit] = self._plan(group, record.unit, blocks, clock)
                plan = plans[record.unit]
                share = plan.active_fraction
                if plan.kind == "fixed":
                    share = bitmask.count_kept(self._policy(group).words[record.name]) / max(param.numel(), 1)
                active += share * param.numel()
                total += param.numel()
            fractions.append(active / total if total else 1.0)
        return fractions

    def describe(self) -> str:
        """What the next step would mask, as a table of text: see ``graddrop_kernels.describe``."""
        return inspection.describe(self)

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; the group may have its own ``"mask"`` (a policy or None), ``"seed"``, ``"masked"``,
        ``"bias_correction"``.
        """
        if isinstance(param_group, dict):
            clock = {} if self._constructing else {key: self.param_groups[0][key] for key in ("epoch", "epoch_was_set")}
            param_group = {**self._own_defaults, **clock, **param_group}
            param_group["mask"] = self._policies.add(param_group["mask"])
            param_group["moment_dtype"] = moment_dtype_name(param_group["moment_dtype"])
        super().add_param_group(param_group)
        if not self._constructing:
            self._forget_caches()
            try:
                self._check_groups()
            except Exception:
                self.param_groups.pop()
                self._forget_caches()
                raise

    def state_dict(self) -> dict:
        """As torch's: the state of every parameter, and the groups with the policies and counts of ours."""
        self._settle_skipped_steps()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict, strict: bool = True) -> None:
        """Loads a state dict of this class or of torch.optim.AdamW; moments keep the dtype they were saved with.

        Args:
            state_dict: from ``state_dict()``. Names, blocks and policies stay this optimizer's own;
                state is matched by name where both have names.
            strict: refuse a state dict that was saved under another mask policy, seed or meaning of masked,
                which could not continue bit for bit.

        Raises:
            ValueError: other groups or parameters than this optimizer's, or, if strict, another policy.
                Nothing has changed then.
        """
        prepared = {}

        def prepare(_, state_dict):
            prepared.update(checkpoint.prepare(state_dict, self.param_groups, strict))
            return prepared

        last_hook = self.register_load_state_dict_pre_hook(prepare)  # after the user's own, which may adapt the file
        try:
            super().load_state_dict(state_dict)
        finally:
            last_hook.remove()
        checkpoint.restore_moment_dtypes(self, prepared)
        self._forget_caches()
        self._skipped_steps.clear()

    def __getstate__(self) -> dict:
        self._settle_skipped_steps()
        return {
            **super().__getstate__(),
            "_policies": self._policies,
            "_backend": self._backend,
            "_own_defaults": self._own_defaults,
        }

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "_handle" not in self.__dict__:
            self._handle = operator.new_handle(self)
        self.__dict__.setdefault("_warned", set())
        self.__dict__.setdefault("_skipped_steps", {})
        self._step_supports_amp_scaling = self.defaults.get("fused") is True
        self._constructing = False
        self._forget_caches()
        for group in self.param_groups:
            for name, value in GROUP_DEFAULTS.items():
                group.setdefault(name, value)

    # One step's pieces, in the order of step().

    def _settle_skipped_steps(self, only_if_needed: bool = False) -> None:
        """Takes the steps that a GradScaler made no-ops out of the groups' counts.

        Only the device knows of them, and asking it waits for it: so only when the counts are looked at.
        """
        if not self._skipped_steps or (only_if_needed and not any(map(self._counts_steps, self.param_groups))):
            return
        for index, skipped in self._skipped_steps.items():
            self.param_groups[index]["completed_steps"] -= int(skipped)
        self._skipped_steps.clear()

    def _counts_steps(self, group: dict) -> bool:
        policy = self._policy(group)
        return policy is not None and policy.counts_steps((group["masked"] or policy.masked) == "frozen")

    def _check_written_grads(self, params: list[torch.Tensor], grads: list[torch.Tensor | None]) -> None:
        """Raises ValueError for a gradient that cannot be unscaled in place."""
        for param, grad in zip(params, grads):
            if grad is not None and not grad.is_contiguous() and overlaps_itself(grad):
                index, position = self._find(param)
                raise ValueError(
                    f"the gradient of {self._records(index)[0][position].name!r} has overlapping memory, as after "
                    "expand(): it cannot be unscaled in place; give param.grad a copy (.clone())"
                )

    def _group_facts(self) -> list[tuple]:
        """What of the groups a prepared step depends on."""
        return [
            (group["mask"], group["seed"], group["amsgrad"], len(group["params"]), group.get("param_names"))
            for group in self.param_groups
        ]

    def _prepare(
        self, params: list[torch.Tensor], grads: list[torch.Tensor | None], fresh: Callable[[], bool]
    ) -> PreparedStep | None:
        """Checks every parameter and gradient, then makes missing state and masks.

        None: this was a question for the state, not a step.

        Raises before anything has changed.
        """
        found, all_grads = [], iter(grads)  # each group's zip takes its own from it
        for index, group in enumerate(self.param_groups):
            for param, record, grad in zip(group["params"], self._records(index)[0], all_grads):
                if grad is not None:
                    check_param(record.name, param)
                    check_grad(record.name, param, grad)
                    check_state(record.name, param, self.state.get(param, {}))
                    check_memory(f"parameter {record.name!r}", param)
                    check_memory(f"the gradient of {record.name!r}", grad)
                    found.append((index, group, param, grad, record))
        for _, group, param, _, _ in found:
            backends.select(self._backend, param.device, param.dtype, self._moment_dtype(param, group))
        probe = self._is_state_probe(grads, fresh)
        for _, group, param, _, _ in found:
            self._init_state(param, group)
        if probe:
            return None
        rows = []
        for index, group, param, grad, record in found:
            words = self._mask_words(group, param, record)
            layout = RowBlock.whole(param.numel())
            rows.append(
                Row(
                    param,
                    grad,
                    self.state[param],
                    group["amsgrad"],
                    record.key,
                    layout,
                    (index, record.unit),
                    words,
                )
            )
        return PreparedStep(params, rows, self.state, self._group_facts())

    def _is_state_probe(self, grads: list[torch.Tensor | None], fresh: Callable[[], bool]) -> bool:
        """torch.distributed.checkpoint asks a fresh optimizer for its state by a step with lr 0 and zero gradients:
        that must not count as one.
        """
        return (
            any(grad is not None for grad in grads)
            and all(float(group["lr"]) == 0 for group in self.param_groups)
            and fresh()
            and not any(grad.any() for grad in present(grads))
        )

    def _hyper(self, index: int, unit, clock: Clock) -> Hyper:
        """The hyper-parameters and the mask of this step, for one unit of one group."""
        group, policy = self.param_groups[index], self._policy(self.param_groups[index])
        if policy is not None and policy.follows_epochs and not group["epoch_was_set"]:
            self._warn_once(
                f"{type(policy).__name__} follows epochs, but set_epoch(epoch) was not called: "
                "call it at the start of every epoch, 0 first"
            )
        beta1, beta2 = map(float, group["betas"])
        plan = self._plan(group, unit, self._records(index)[1], clock)
        return Hyper(
            float(group["lr"]),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            group["amsgrad"],
            group["maximize"],
            plan,
        )

    def _plan(self, group: dict, unit, blocks: tuple[str, ...], clock: Clock) -> MaskPlan:
        policy = self._policy(group)
        if policy is None:
            return KEEP
        frozen = (group["masked"] or policy.masked) == "frozen"
        return policy.plan(
            PlanContext(clock, group["seed"], frozen, group["bias_correction"] == "active", blocks), unit
        )

    def _clock(self, group: dict) -> Clock:
        return Clock(group["epoch"], group["completed_steps"], Clock.parse_history(group["epoch_history"]))

    def _moment_dtype(self, param: torch.Tensor, group: dict) -> torch.dtype:
        state = self.state.get(param)
        if state and "exp_avg" in state:
            return state["exp_avg"].dtype
        return torch.float32 if group["moment_dtype"] == "float32" and param.dtype != torch.float64 else param.dtype

    def _init_state(self, param: torch.Tensor, group: dict) -> None:
        """Makes what the parameter's state lacks, as torch does: zeros in the parameter's strides."""
        dtype, state = self._moment_dtype(param, group), self.state[param]
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 2 + group["amsgrad"]]:
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        else:  # torch's own AdamW keeps it on the CPU, in the default dtype
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)

    def _mask_words(self, group: dict, param: torch.Tensor, record: ParamRecord) -> torch.Tensor | None:
        """Bit-planes of the buckets or the bits of a fixed mask, made once a parameter and kept on its device;
        None where the policy stores none.
        """
        policy = self._policy(group)
        if isinstance(policy, FixedMask):
            buckets = 0
            if record.name not in policy.words:
                return None
        elif isinstance(policy, GradDropEpoch) and policy.storage == "bitpacked":
            buckets = policy.epochs
        else:
            return None
        made_for = (record.key, buckets, param.device, param.numel())
        cached = self._words.get(param)
        if cached is None or cached[0] != made_for:
            if buckets:
                words = backends.bucket_planes(
                    record.key, buckets, RowBlock.whole(param.numel()), param.numel(), param.device
                )
            else:
                words = policy.words[record.name].to(param.device)
            cached = self._words[param] = (made_for, words)
        return cached[1]

    # Policies, names and what is derived from them.

    def _policy(self, group: dict) -> Policy | None:
        return self._policies.get(group["mask"])

    def _forget_caches(self) -> None:
        """Everything here can be made again from param_groups; nothing of it survives a load or a new group."""
        self._records_of: dict[int, tuple] = {}
        self._words: dict[torch.Tensor, tuple] = {}
        self._prepared: PreparedStep | None = None

    def _records(self, index: int) -> tuple[list[ParamRecord], tuple[str, ...]]:
        group = self.param_groups[index]
        made_from = (group["seed"], group["mask"], len(group["params"]), group.get("param_names"))
        cached = self._records_of.get(index)
        if cached is None or cached[0] != made_from:
            cached = self._records_of[index] = (made_from, make_records(self.param_groups, index, self._policy(group)))
        return cached[1]

    def _find(self, param: torch.Tensor | str) -> tuple[int, int]:
        wanted = canonical_name(param) if isinstance(param, str) else None
        for index, group in enumerate(self.param_groups):
            for position, (tensor, record) in enumerate(zip(group["params"], self._records(index)[0])):
                if tensor is param or record.name == wanted:
                    return index, position
        raise KeyError(
            f"{param!r} is not a parameter of this optimizer"
            if wanted
            else "this tensor is not a parameter of this optimizer"
        )

    def _check_groups(self) -> None:
        fixed: dict[FixedMask, dict[str, torch.Tensor]] = {}
        for index, group in enumerate(self.param_groups):
            check_options(index, group)
            policy = self._policy(group)
            if policy is not None and policy.masked is None and group["masked"] is not None:
                raise ValueError(
                    f"masked={group['masked']!r} does not apply to {type(policy).__name__}, which drops nothing; "
                    "leave it None"
                )
            records, _ = self._records(index)
            for param, record in zip(group["params"], records):
                check_param(record.name, param)
            if len(set(group["params"])) != len(group["params"]):
                raise ValueError(f"a parameter appears twice in parameter group {index}; give each parameter once")
            if isinstance(policy, FixedMask):
                fixed.setdefault(policy, {}).update(
                    {record.name: param for param, record in zip(group["params"], records)}
                )
        for policy, named in fixed.items():
            check_fixed_mask(policy, named)

    def _warn_of_position_names(self) -> None:
        distributed = (
            torch.distributed.is_available()
            and torch.distributed.is_initialized()
            and torch.distributed.get_world_size() > 1
        )
        if distributed and any(group["mask"] is not None and "param_names" not in group for group in self.param_groups):
            self._warn_once(
                "masks are keyed by each parameter's place in the optimizer, as it was given no names; "
                "pass model.named_parameters()"
            )

    def _warn_once(self, message: str | None) -> None:
        if message is not None and message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)
