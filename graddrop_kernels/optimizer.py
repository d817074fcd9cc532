"""FusedGradDropAdamW: torch.optim.AdamW with the paper's gradient masks inside its one fused step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, overload

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from . import backends
from .backends.capture import capturing
from .groups import checks, load_state
from .groups.flat_buffers import FlatPiece, check_pieces
from .groups.masking import MaskedGroups
from .groups.names import canonical_name
from .groups.options import GROUP_DEFAULTS, check_max_grad_norm, check_options, moment_dtype_name
from .groups.records import spans_of
from .inspection import describe
from .policies import GradDrop, Policy
from .policies.clock import Clock
from .policies.registry import PolicyBook
from .step import graph, prepare
from .step.clip import clip_
from .step.in_backward import StepInBackward
from .step.prepared import PreparedStep, grad_of
from .step.skip_dropped import SkipBackward
from .step.warn_once import WarnOnce
from .tensors.local import as_sharded, local, local_grads, local_tensors

_Loss = TypeVar("_Loss")


class FusedGradDropAdamW(torch.optim.AdamW):
    """AdamW that masks the gradients as GradDrop and its variants do (O'Neill & Dutta),
    at the cost of a plain fused AdamW step.

    A drop-in for ``torch.optim.AdamW(..., fused=True)``: same arguments, same state (exp_avg, exp_avg_sq, step), state
    dicts load both ways. Masks act on the gradient once a step, after accumulation and clipping. They are a pure
    function of (seed, parameter name, step or epoch, element index in the whole parameter): equal on every backend,
    sharding and thread count and after a resume; no generator is consumed. DTensor parameters are stepped where they
    lie; for engines that flatten parameters see ``attach_fsdp1`` and ``attach_deepspeed``.

    Args:
        params: tensors, (name, tensor) pairs such as ``model.named_parameters()``, group dicts (each may have its own
            ``"mask"``), or ``graddrop_kernels.param_groups(model)``, which gives the paper's scope: blocks masked,
            embeddings and head dense. Floating point.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW.
        foreach: accepted, and without effect: the step is always one fused pass.
        fused: True lets ``torch.amp.GradScaler`` hand its scale to the step, which then unscales the gradients and
            skips itself when they are not finite, on the device, as torch's fused AdamW does. Without it the scaler
            unscales and skips before the step: the same training, in more passes over the gradients.
        capturable: accepted for parameters on a GPU, and without effect: a step there can always be captured in a CUDA
            graph, see ``advance_captured_step``.
        differentiable: record the step for autograd, as torch does, so that a loss after it can be differentiated by
            the gradients, the parameters before it, the moments and a tensor lr. Slow: it runs on the reference.
        mask: a policy of ``graddrop_kernels`` (default ``GradDrop(p=0.2)``), or None for plain AdamW.
        seed: int in [0, 2^64).
        masked: what dropping means: ``"gradient"``: the gradient is 0 (moments decay, momentum and weight decay still
            move the weight); ``"frozen"``: parameter and moments stay bit for bit. None: the policy's own, see the
            README's table.
        bias_correction: ``"active"`` counts the steps in which a frozen unit was active, so that it starts with steps
            of the size of lr; ``"global"`` counts all steps: the literal form, in which a late unit starts with 3 to 6
            times lr.
        moment_dtype: None for moments in the parameter's dtype (as torch), or torch.float32.
        master_weights: step a float32 copy of each bfloat16 or float16 parameter, kept in its state as
            ``master_param`` with float32 moments; the parameter is that copy rounded. The copy is the truth: load new
            weights before the first step.
        stochastic_rounding: round bfloat16 parameters up or down at random, so that updates smaller than half their
            last digit are kept on average; needs no memory.
        max_grad_norm: scale the gradients of all groups together so that their norm is at most this, as
            ``torch.nn.utils.clip_grad_norm_`` before the step, but inside it: gradients are read once more for the
            norm, and not written. ``optimizer.grad_norm`` is the norm of the last step, a 0-d tensor on the device.
        norm_after_mask: take the norm of what the masks leave of the gradients, scaled by 1/(1-p) where the policy
            does, instead of the norm of the gradients as they come.
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
        params: ParamsT,
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
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        norm_after_mask: bool = False,
        backend: str = "auto",
    ) -> None:
        self._backend = backends.check_name(backend)
        self._handle = graph.new_handle(self)
        self._groups = MaskedGroups(self, PolicyBook())
        self._prepared: PreparedStep | None = None
        self._warn_once = WarnOnce()
        self._skipped_steps: dict[int, torch.Tensor] = {}  # of each group, counted on the device
        self._in_backward: StepInBackward | None = None
        self._skip = SkipBackward(self)
        self._captured: PreparedStep | None = None  # by a CUDA graph, which holds its addresses
        self.max_grad_norm, self.norm_after_mask = check_max_grad_norm(max_grad_norm), norm_after_mask
        self.grad_norm: torch.Tensor | None = None
        self._own_defaults = {
            **GROUP_DEFAULTS, "mask": self._groups.policies.add(mask), "seed": seed, "masked": masked,
            "bias_correction": bias_correction, "moment_dtype": moment_dtype_name(moment_dtype),
            "master_weights": master_weights, "stochastic_rounding": stochastic_rounding,
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
        if differentiable and backend not in ("auto", "reference"):
            raise ValueError(f"differentiable=True runs on the reference only: leave backend='auto', got {backend!r}")
        for group in (self.defaults, *self.param_groups):
            group["fused"] = fused
        self._step_supports_amp_scaling = fused is True
        self.defaults.update(self._own_defaults)
        self._constructing = False
        self._own_groups = self.param_groups  # by a name that torch.compile does not know, see step_in_graph()
        self._groups.check()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], _Loss]) -> _Loss: ...
    def step(self, closure: Callable[[], _Loss] | None = None) -> _Loss | None:
        """One masked AdamW step of every parameter that has a gradient. Returns the closure's loss, or None.

        Args:
            closure: computes the loss and the gradients anew, as in torch.

        Raises:
            ValueError, TypeError, RuntimeError: a hyper-parameter or gradient that cannot be used.
                Nothing has changed then.
        """
        if torch.compiler.is_compiling():
            grad_enabled = torch.is_grad_enabled()
            with torch.no_grad():
                loss: _Loss | None = graph.step_in_graph(self, closure, grad_enabled)
                return loss
        return self._step_uncompiled(closure)

    @_disable_dynamo
    def _step_uncompiled(self, closure: Callable[[], _Loss] | None) -> _Loss | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [param for group in self.param_groups for param in group["params"]]
        amp_scalars = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._step_with(params, list(map(grad_of, params)), *amp_scalars, fresh=lambda: not self.state)
        return loss

    def _step_with(
        self, params: list[torch.Tensor], grads: list[torch.Tensor | None], grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None, fresh: Callable[[], bool],
    ) -> None:  # fmt: skip
        """The step of all parameters (those whose gradient is None are left out); the scalars as a GradScaler has
        put them on this optimizer; ``fresh``: whether there was no step before this one.
        """
        self._check_options()
        if self._skipped_steps:
            self._settle_skipped_steps(only_if_needed=True)
        grads = local_grads(params, self._skip.complete(params, grads, grad_scale))
        if grad_scale is not None:
            checks.check_written_grads(self, params, grads)
        prepared = self._prepared
        if prepared is None or not prepared.holds(local_tensors(params), grads, self.state, self._facts()):
            prepared = self._prepared = prepare.prepare(self, params, grads, fresh)
            if prepared is None:
                return
        grad_scale, found_inf = (
            scalar if scalar is None else torch.as_tensor(scalar, dtype=torch.float32)  # the int 0 if no gradient came
            for scalar in (grad_scale, found_inf)
        )
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf != 0:
            return
        clocks = list(map(self._groups.clock, self._groups.indices()))
        self._run(prepared, grads, clocks, grad_scale, found_inf)
        if any(capturing(batch.device) for batch in prepared.batches):
            self._captured = prepared  # nothing has run
            return
        elsewhere = set(filter(self._groups.has_gradients, self._groups.indices()))
        self._count_step(prepared.group_indices | self._stepped_in_backward() | elsewhere, clocks, found_inf)

    def advance_captured_step(self) -> None:
        """Call it before each replay of a CUDA graph in which ``step()`` was captured: it brings lr, p, the epoch and
        the masks of blocks up to date, without waiting for the GPU, and counts the step. Element masks, step counts and
        bias corrections advance on the GPU by themselves.

        Raises:
            RuntimeError: no step was captured; or this one needs other launches than the captured one, as when other
                blocks are frozen: capture it again.
        """
        if self._captured is None:
            raise RuntimeError("advance_captured_step() needs a step() that was captured in a CUDA graph")
        self._check_options()
        clocks = list(map(self._groups.clock, self._groups.indices()))
        for batch in self._captured.batches:
            batch.hypers = [self._groups.hyper(index, unit, clocks[index]) for index, unit in batch.plans_of]
            batch.table.refresh_captured(batch.hypers)
        self._count_step(self._captured.group_indices, clocks, None)

    def step_in_backward(self) -> "StepInBackward":
        """From now on steps each parameter in the backward pass, as its gradient arrives, and frees the gradient.
        ``step()`` stays in the loop and ends the step. Masks and results are those of a normal step.

        Returns:
            A handle, whose ``remove()`` goes back to normal.

        Raises:
            ValueError, RuntimeError: what needs all gradients at once: ``max_grad_norm``, a GradScaler
                (``fused=True``), more than one process; and in the backward pass accumulation.
        """
        self._skip.check_outside("step_in_backward()")
        return StepInBackward(self)

    @_disable_dynamo
    def set_epoch(self, epoch: int) -> None:
        """Tells the policies that an epoch begins.

        Call it at the start of every epoch, 0 first. Resuming restores the epoch by itself.

        Args:
            epoch: its number, at least 0.

        Raises:
            ValueError: no such number, or a schedule has no usable p at this epoch.
            RuntimeError: inside of ``skip_dropped()``.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"set_epoch(epoch) needs the number of the epoch, an int >= 0, got {epoch!r}")
        self._skip.check_outside("set_epoch()")
        self._settle_skipped_steps()
        for policy in map(self._groups.policy, self._groups.indices()):
            if policy is not None and policy.follows_epochs:
                policy.check_epoch(epoch)
                self._warn_once(policy.after_last_epoch(epoch))
        for group in self.param_groups:
            group["epoch"] = epoch
            group["epoch_was_set"] = True

    def mask(self, param: torch.Tensor | str, step: int | None = None) -> torch.Tensor:
        """The bool keep mask of a parameter, True where its elements are trained; shape and device of the parameter,
        a DTensor sharded like it beside a DTensor. Of a parameter in a flat buffer, by name: of its part in this
        process, flat.

        Args:
            param: the parameter, or its name.
            step: completed steps before the step in question (0 for the first): of the parameter for element masks,
                of its group for block masks. Default: the next step.
                Masks that follow epochs are those of the current epoch.

        Raises:
            KeyError: no such parameter.
        """
        self._settle_skipped_steps()
        index, position = self._groups.find(param)
        tensor, record = self.param_groups[index]["params"][position], self._groups.records(index)[position]
        checks.check_flat(self, record, tensor)
        clock = self._groups.clock(index)
        if step is not None:
            clock = Clock(clock.epoch, step, clock.history)
        state = self.state.get(tensor, {})
        own_step = step if step is not None else int(state["step"]) if "step" in state else 0
        keep = torch.zeros(local(tensor).numel(), dtype=torch.bool, device=tensor.device)
        spans = spans_of(tensor, record)
        for span, words in zip(spans, self._groups.mask_words(index, tensor, record)):
            plan = self._groups.plan(index, span.unit, clock)
            keep[span.start : span.start + span.numel] = backends.keep_mask(
                plan, span.key, own_step, span.layout, span.numel, words, tensor.device
            )
        if record.flat and isinstance(param, str):
            own = [span for span in spans if span.name == canonical_name(param)]
            return torch.cat([keep[:0], *(keep[span.start : span.start + span.numel] for span in own)])
        return as_sharded(keep, tensor)

    def active_fraction(self) -> list[float]:
        """The share of elements kept at the next step, one number in [0, 1] a group: exact for blocks and fixed masks,
        the keep probability for random elements.
        """
        self._settle_skipped_steps()
        return list(map(self._groups.active_fraction, self._groups.indices()))

    def describe(self) -> str:
        """What the next step would mask, as a table of text: see ``graddrop_kernels.describe``."""
        return describe.describe(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group may have its own ``"mask"`` (a policy or None), ``"seed"``, ``"masked"``,
        ``"bias_correction"``.

        Args:
            param_group: ``{"params": [...], ...}``.

        Raises:
            ValueError, TypeError: an option out of range, or a policy of blocks without blocks. Nothing has changed.
        """
        if isinstance(param_group, dict):
            clock = {} if self._constructing else {key: self.param_groups[0][key] for key in ("epoch", "epoch_was_set")}
            param_group = {**self._own_defaults, **clock, **param_group}
            param_group["mask"] = self._groups.policies.add(param_group["mask"])
            param_group["moment_dtype"] = moment_dtype_name(param_group["moment_dtype"])
        super().add_param_group(param_group)
        self._groups.remember(self.param_groups[-1]["params"])
        if not self._constructing:
            self._forget_caches()
            try:
                self._groups.check()
            except Exception:
                self.param_groups.pop()
                self._forget_caches()
                raise

    def attach_pieces(
        self,
        pieces: Mapping[torch.Tensor, Sequence[FlatPiece]],
        shapes: Mapping[str, Sequence[int]] | None = None,
        last: Iterable[torch.Tensor] = (),
        has_gradients: Callable[[int], bool] | None = None,
    ) -> None:
        """Says which parameters lie where in the flat buffers among this optimizer's parameters, so that their masks
        are those of the whole parameters. For engines that make such buffers: see ``attach_fsdp1`` and
        ``attach_deepspeed``.

        Args:
            pieces: of each buffer, its pieces in order. Elements between them are padding and are left as they are.
            shapes: of all parameters of the model, by name, of which this process may have some only: a FixedMask is
                checked against them.
            last: where an engine steps the buffers of a group one after the other, by a ``step()`` for each: the last
                buffer of every group. Its step ends the group's.
            has_gradients: of the number of a group, whether it has gradients in this step in any process. Needed where
                a process may have no element of a group, whose steps it would not count.

        Raises:
            KeyError: a tensor that is not a parameter of this optimizer.
            ValueError: pieces that overlap, or reach past the end of their buffer.
        """
        for tensor, own in pieces.items():
            self._groups.find(tensor)
            check_pieces(tensor, own)
        self._groups.flat.update((tensor, tuple(map(FlatPiece._make, own))) for tensor, own in pieces.items())
        self._groups.last_buffers |= frozenset(last)
        self._groups.has_gradients = has_gradients or self._groups.has_gradients
        if shapes is not None:
            self._groups.shapes = {canonical_name(name): tuple(shape) for name, shape in shapes.items()}
        self._forget_caches()
        self._groups.check()

    def state_dict(self) -> dict[str, Any]:
        """As torch's: the state of every parameter, and the groups with the policies and counts of ours."""
        self._skip.check_outside("state_dict()")
        self._settle_skipped_steps()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
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
        self._skip.check_outside("load_state_dict()")
        prepared: dict[str, Any] = {}

        def prepare(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            prepared.update(load_state.prepare(state_dict, self.param_groups, strict))
            return prepared

        last_hook = self.register_load_state_dict_pre_hook(prepare)  # after the user's own, which may adapt the file
        try:
            super().load_state_dict(state_dict)
        finally:
            last_hook.remove()
        load_state.restore_moment_dtypes(self, prepared)
        self._forget_caches()
        self._skipped_steps.clear()

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        super().zero_grad(set_to_none)
        self._skip.missing.clear()

    def skip_dropped(self, model: torch.nn.Module | None = None) -> AbstractContextManager[None]:
        """A context manager for the forward and backward passes of one optimizer step, accumulation included: the
        weight gradients of the blocks that the step will drop (LayerGradDrop, GradFreeze) are not computed. The
        training is the same bit for bit; other policies drop no whole blocks, and nothing changes for them.

        Inside of it the parameters of those blocks have ``requires_grad`` False. A parameter's first step is run in
        full: it shows whether the parameter has a gradient at all. One that has a gradient in some steps only counts as
        used in all that drop it.

        Args:
            model: as it is called, with its wrappers. Needed with more than one process, unless all parameters are
                DTensors (``fully_shard``); DistributedDataParallel needs ``find_unused_parameters=True``.

        Raises:
            RuntimeError, ValueError: what cannot be combined with it, and what to do: nested use; ``step()``,
                ``set_epoch()``, ``state_dict()`` or ``load_state_dict()`` inside of it; a step whose plan is no longer
                that of the backward pass; ``max_grad_norm`` without ``norm_after_mask``; ``differentiable``; a
                captured or compiled step; DistributedDataParallel without ``find_unused_parameters`` or with
                ``static_graph``; FSDP1; reentrant checkpointing, as far as the modules of ``model`` show it.
        """
        return self._skip.around(model)

    def __getstate__(self) -> dict[str, Any]:
        self._skip.check_outside("a copy of the optimizer")
        self._settle_skipped_steps()
        return {
            **super().__getstate__(),
            "_policies": self._groups.policies,
            "_backend": self._backend,
            "_own_defaults": self._own_defaults,
            "max_grad_norm": self.max_grad_norm,
            "norm_after_mask": self.norm_after_mask,
            "grad_norm": self.grad_norm,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_policies" in state:  # not from load_state_dict, which comes by here too
            self._groups = MaskedGroups(self, state.pop("_policies"))
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        self._own_groups = self.param_groups
        if "_handle" not in self.__dict__:
            self._handle = graph.new_handle(self)
        self.__dict__.setdefault("_warn_once", WarnOnce())
        self.__dict__.setdefault("_skipped_steps", {})
        self.__dict__.setdefault("_in_backward", None)
        self.__dict__.setdefault("_captured", None)
        if "_skip" not in self.__dict__:
            self._skip = SkipBackward(self)
        self._step_supports_amp_scaling = self.defaults.get("fused") is True
        self._constructing = False
        self._forget_caches()
        for group in self.param_groups:
            for name, value in GROUP_DEFAULTS.items():
                group.setdefault(name, value)

    # One step's pieces, in the order of step().

    def _run(
        self, prepared: PreparedStep, grads: list[torch.Tensor | None], clocks: list[Clock],
        grad_scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Masks and updates what is prepared; counts nothing but the parameters' own steps."""
        prepared.set_grads(grads)
        for batch in prepared.batches:
            batch.hypers = [self._groups.hyper(index, unit, clocks[index]) for index, unit in batch.plans_of]
            batch.clip_factor = None
            batch.grad_scale, batch.found_inf = (
                scalar if scalar is None else scalar.to(batch.device, non_blocking=True)
                for scalar in (grad_scale, found_inf)
            )
        chosen = [backends.select(self._backend_name(), *batch.mode) for batch in prepared.batches]
        if self.max_grad_norm is not None and prepared.batches:
            self.grad_norm = clip_(prepared.batches, chosen, self.max_grad_norm, self.norm_after_mask, grad_scale)
        for backend, batch in zip(chosen, prepared.batches):
            batch.step_with(backend.masked_adamw_)
        if grad_scale is not None:
            prepared.write_grads_back()
        prepared.forget_grads()

    def _facts(self) -> tuple[Any, ...]:
        """What of the options a prepared step depends on."""
        return self.max_grad_norm is not None, self._groups.facts()

    def _count_step(self, indices: set[int], clocks: list[Clock], found_inf: torch.Tensor | None) -> None:
        """Counts the step that these groups have made."""
        for index in filter(self._groups.completes_step, indices):
            group, clock = self.param_groups[index], clocks[index]
            if not clock.history or clock.history[-1][0] != clock.epoch:
                group["epoch_history"] = clock.with_this_step()
            group["completed_steps"] += 1
            if found_inf is not None:
                skipped = self._skipped_steps.get(index, 0)
                self._skipped_steps[index] = skipped + (found_inf != 0).to(torch.int64)

    def _stepped_in_backward(self) -> set[int]:
        return self._in_backward.finish() if self._in_backward is not None else set()

    def _backend_name(self) -> str:
        return "reference" if self.defaults["differentiable"] else self._backend

    def _check_options(self) -> None:
        for index, group in enumerate(self.param_groups):
            check_options(index, group)
            if group["differentiable"] != self.defaults["differentiable"]:
                raise ValueError(
                    f"differentiable of parameter group {index} is {group['differentiable']!r}, the optimizer's is "
                    f"{self.defaults['differentiable']!r}: choose it for all groups when the optimizer is made"
                )
        check_max_grad_norm(self.max_grad_norm)

    def _settle_skipped_steps(self, only_if_needed: bool = False) -> None:
        """Takes the steps that a GradScaler made no-ops out of the groups' counts.

        Only the device knows of them, and asking it waits for it: so only when the counts are looked at.
        """
        needed = not only_if_needed or any(map(self._groups.counts_steps, self._groups.indices()))
        if not self._skipped_steps or not needed:
            return
        for index, skipped in self._skipped_steps.items():
            self.param_groups[index]["completed_steps"] -= int(skipped)
        self._skipped_steps.clear()

    def _forget_caches(self) -> None:
        """Nothing that was derived from the groups survives a load or a new group."""
        self._groups.forget()
        self._prepared = None
