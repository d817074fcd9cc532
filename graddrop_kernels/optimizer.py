"""FusedGradDropAdamW: torch.optim.AdamW with the paper's gradient masks inside its one fused step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from typing import Any, TypeVar, overload

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from . import backends
from .groups import load_state
from .groups.checks import check_groups
from .groups.flat_buffers import FlatPiece
from .groups.masking import Masking
from .groups.options import (
    GROUP_DEFAULTS,
    SHARED_BY_GROUPS,
    check_at_least_0,
    check_epoch,
    check_max_grad_norm,
    moment_dtype_name,
)
from .groups.param_state import note_moments
from .inspection import describe, memory
from .policies import GradDrop, Policy, PolicyBook
from .step.graph import GraphStep, step_in_graph
from .step.in_backward import StepInBackward
from .step.prepared import grad_of
from .step.skip_dropped import SkipDropped
from .step.stepper import Stepper

_Loss = TypeVar("_Loss")


class FusedGradDropAdamW(torch.optim.AdamW):
    """AdamW with the gradient masks of GradDrop and its variants (O'Neill & Dutta), at the cost of a plain fused step.

    A drop-in for ``torch.optim.AdamW(..., fused=True)``: same arguments, same state (exp_avg, exp_avg_sq, step). State
    dicts load both ways. Masks act on the gradient once per step, after accumulation and clipping. They are a pure
    function of (seed, parameter name, step or epoch, element index in the whole parameter), hence equal on every
    backend, sharding and thread count and after a resume. No generator is consumed. DTensor parameters are stepped in
    place. For engines that flatten parameters see ``attach_fsdp1`` and ``attach_deepspeed``.

    Args:
        params: floating-point tensors, (name, tensor) pairs such as ``model.named_parameters()``, group dicts (each may
            have its own ``"mask"``), or ``graddrop_kernels.param_groups(model)`` for the paper's scope: blocks masked,
            embeddings and head dense.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW. lr and weight_decay may be tensors of
            one element, changed in place or replaced between steps; the host does not wait for one on the parameters'
            GPU.
        foreach: accepted without effect. The step is always one fused pass.
        fused: True lets ``torch.amp.GradScaler`` pass its scale to the step, as to torch's fused AdamW. The step then
            unscales the gradients and skips itself if they are not finite, all on the device. Otherwise the scaler does
            so before the step: the same training, in more passes over the gradients.
        capturable: accepted for parameters on a GPU, without effect. A step there can always be captured in a CUDA
            graph, see ``advance_captured_step``.
        differentiable: record the step for autograd, as torch does: a later loss can be differentiated with respect to
            the gradients, the previous parameters, the moments and a tensor lr or weight_decay. Slow, because it runs
            on the reference.
        mask: a policy of ``graddrop_kernels`` (default ``GradDrop(p=0.2)``), or None for plain AdamW.
        seed: int in [0, 2^64).
        masked: what happens to dropped elements. ``"gradient"``: their gradient is 0; moments decay, momentum and
            weight decay still move the weight. ``"frozen"``: parameter and moments stay bit for bit. ``"update"``: the
            parameter does, and the moments see the whole gradient; the mask's scale is on the update, not on the
            gradient and not on weight decay. None: the policy's own choice, see the README's table.
        bias_correction: ``"active"`` counts the steps in which a frozen unit was active: its first steps have the size
            of lr. ``"global"``, the literal form, counts all steps: a late unit starts with 3 to 6 times lr.
        cautious_weight_decay: leave out weight decay where the update moves a weight away from 0, as it does where
            exp_avg and the weight have opposite signs (arXiv 2510.12402).
        moment_dtype: None for moments in the parameter's dtype (as torch); torch.float32, for 16-bit parameters;
            torch.bfloat16, for float32 ones.
        master_weights: step a float32 copy of each bfloat16 or float16 parameter, with float32 moments; the parameter
            is that copy rounded. The state keeps it as ``master_param``. It overrides the parameter: load new weights
            before the first step.
        stochastic_rounding: round bfloat16 parameters up or down at random, which keeps updates below half their last
            digit on average. Needs no memory.
        stochastic_moments: round bfloat16 moments so. Rounded to nearest with beta2 = 0.999, exp_avg_sq cannot fall:
            a step takes less of it than half its last digit.
        max_grad_norm: scale the gradients of all groups together to a norm of at most this, as
            ``torch.nn.utils.clip_grad_norm_`` does, but inside the step. The step reads the gradients once more and
            does not write them. ``optimizer.grad_norm`` is the last step's norm, a 0-d tensor on the device.
        norm_after_mask: take the norm after the masks, and their scale 1/(1-p) where the policy has one, not before.
        backend: ``"auto"``, or one of ``available_backends()``.
        strict: what ``load_state_dict`` does unless it is told. False lets a run of plain AdamW go on under a mask, and
            a schedule be lengthened, also where a framework loads the state.

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
        weight_decay: float | torch.Tensor = 1e-2,
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
        cautious_weight_decay: bool = False,
        moment_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        stochastic_moments: bool = False,
        max_grad_norm: float | None = None,
        norm_after_mask: bool = False,
        backend: str = "auto",
        strict: bool = True,
    ) -> None:
        self.backend, self.strict = backends.check_name(backend), strict
        self.grad_norm: torch.Tensor | None = None
        self._assemble(PolicyBook())
        self._own_defaults = {
            **GROUP_DEFAULTS, "mask": self._masking.policies.add(mask), "seed": seed, "masked": masked,
            "bias_correction": bias_correction, "cautious_weight_decay": cautious_weight_decay,
            "moment_dtype": moment_dtype_name(moment_dtype),
            "master_weights": master_weights, "stochastic_rounding": stochastic_rounding,
            "stochastic_moments": stochastic_moments,
            "max_grad_norm": check_max_grad_norm(max_grad_norm), "norm_after_mask": norm_after_mask,
        }  # fmt: skip
        self._constructing = True
        if isinstance(weight_decay, torch.Tensor):  # torch takes it for a number
            check_at_least_0("weight_decay", weight_decay)
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,  # type: ignore[arg-type]  # torch computes with a tensor too
            maximize=maximize, foreach=foreach, capturable=capturable, differentiable=differentiable,
        )  # fmt: skip
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
        self._graph = GraphStep(self._stepper, self._skip_dropped, self._in_backward, self.param_groups)
        check_groups(self._masking)

    def _assemble(self, policies: PolicyBook) -> None:
        """Makes the objects that do the work. They hold this optimizer weakly."""
        self._masking = Masking(self, policies)
        self._stepper = Stepper(self, self._masking)
        self._in_backward = StepInBackward(self._stepper)
        self._skip_dropped = SkipDropped(self._stepper)

    # Frameworks wrap an optimizer in an object of a subclass that has other attributes, but its groups. What is set on
    # one of those, or in the groups, must arrive.

    @property
    def max_grad_norm(self) -> float | None:
        """The limit on the norm of all gradients, which may change between steps. The groups hold it."""
        limit: float | None = self._of_all_groups("max_grad_norm")
        return limit

    @max_grad_norm.setter
    def max_grad_norm(self, limit: float | None) -> None:
        self._set_in_all_groups("max_grad_norm", check_max_grad_norm(limit))

    @property
    def norm_after_mask(self) -> bool:
        """Whether that norm is of the masked gradients. May change between steps. The groups hold it."""
        after_mask: bool = self._of_all_groups("norm_after_mask")
        return after_mask

    @norm_after_mask.setter
    def norm_after_mask(self, after_mask: bool) -> None:
        self._set_in_all_groups("norm_after_mask", after_mask)

    def _of_all_groups(self, option: str) -> Any:
        return next(iter(self.param_groups), self._own_defaults)[option]

    def _set_in_all_groups(self, option: str, value: Any) -> None:
        for values in (self._own_defaults, *self.param_groups):
            values[option] = value

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], _Loss]) -> _Loss: ...
    def step(self, closure: Callable[[], _Loss] | None = None) -> _Loss | None:
        """Makes one masked AdamW step of every parameter that has a gradient. Returns the closure's loss, or None.

        Args:
            closure: computes the loss and the gradients anew, as in torch.

        Raises:
            ValueError, TypeError, RuntimeError: an unusable hyper-parameter or gradient. Nothing has changed then.
        """
        if torch.compiler.is_compiling():
            grad_enabled = torch.is_grad_enabled()
            with torch.no_grad():
                loss: _Loss | None = step_in_graph(self, self._graph, closure, self._step_eagerly, grad_enabled)
                return loss
        return self._step_eagerly(closure)

    @_disable_dynamo
    def _step_eagerly(self, closure: Callable[[], _Loss] | None) -> _Loss | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward.is_on:
            self._in_backward.check_not_captured()
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            grads = self._skip_dropped.complete(
                params, list(map(grad_of, params)), grad_scale, self._in_backward.under_way
            )
            self._stepper.step(
                params, grads, grad_scale, found_inf, fresh=self._has_not_stepped, stepped=self._in_backward.finish
            )
        return loss

    def _has_not_stepped(self) -> bool:
        return not any(group["completed_steps"] for group in self.param_groups)

    def advance_captured_step(self) -> None:
        """Prepares a replay of a CUDA graph in which ``step()`` was captured; call it right before each one. Updates
        lr, weight decay, p, the epoch and the masks of blocks without waiting for the GPU, and counts the step. Element
        masks, step counts and bias corrections advance on the GPU by themselves.

        Steps outside of the graph may come in between. Several graphs of the same parameters may be captured, with a
        ``step()`` outside before each capture; one call then prepares whichever is replayed.

        Raises:
            RuntimeError: no step was captured, or what was captured is not the next step (other blocks are frozen,
                ``max_grad_norm`` is another, the optimizer was loaded or has a new group). Nothing has changed. Capture
                it again, and replay no graph of before.
        """
        self._skip_dropped.check_outside("advance_captured_step()")
        self._in_backward.check_ended("advance_captured_step()")
        self._stepper.advance_captured()

    def step_in_backward(self) -> StepInBackward:
        """Steps each parameter in the backward pass from now on, as its gradient arrives, and frees the gradient.
        ``step()`` stays in the loop and ends the step. Masks and results are those of a normal step.

        Returns:
            A handle, whose ``remove()`` goes back to normal.

        Raises:
            ValueError, RuntimeError: ``max_grad_norm``, a GradScaler (``fused=True``) or more than one process, which
                need all gradients at once. Accumulation also, but only in the backward pass.
        """
        self._skip_dropped.check_outside("step_in_backward()")
        return self._in_backward.start()

    def skip_dropped(self, model: torch.nn.Module | None = None) -> AbstractContextManager[None]:
        """Leaves out the weight gradients of the blocks that the coming step will drop (LayerGradDrop, GradFreeze,
        SampleBlocks, CycleBlocks): a context manager for the forward and backward passes of one optimizer step,
        accumulation included. The training is the same bit for bit. Other policies drop no whole blocks, and nothing
        changes for them.

        Inside, the parameters of those blocks have ``requires_grad`` False. A parameter's first step is run in full,
        but under ``idle_state="drop"``: it shows whether the parameter has a gradient at all. A parameter with a
        gradient in some steps only counts as used in all that drop it.

        Args:
            model: as it is called, with its wrappers. Needed with more than one process, unless all parameters are
                DTensors (``fully_shard``). DistributedDataParallel needs ``find_unused_parameters=True``.

        Raises:
            RuntimeError, ValueError: an unsupported combination, with its remedy: nested use; ``step()``,
                ``set_epoch()`` or ``load_state_dict()`` inside; a plan that has changed since the
                backward pass; ``max_grad_norm`` without ``norm_after_mask``; ``differentiable``; a captured or compiled
                step; DistributedDataParallel without ``find_unused_parameters`` or with ``static_graph``; FSDP1;
                reentrant checkpointing, as far as the modules of ``model`` show it.
        """
        return self._skip_dropped.around(model)

    @_disable_dynamo
    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that policies follow. Call it at the start of each, 0 first. A resume restores it by itself.

        Args:
            epoch: its number, at least 0.

        Raises:
            ValueError: no such number, or a schedule without a usable p at this epoch.
            RuntimeError: inside ``skip_dropped()``.
        """
        check_epoch(epoch)
        self._skip_dropped.check_outside("set_epoch()")
        self._in_backward.check_ended("set_epoch()")
        self.masking.set_epoch(epoch, self._stepper.warn)

    @property
    def masking(self) -> Masking:
        """The masks and clocks of the groups, for describe(), the plots and the integrations. Steps that a GradScaler
        made no-ops are taken out of the groups' counts first.
        """
        self._stepper.settle()
        return self._masking

    def mask(self, param: torch.Tensor | str, step: int | None = None) -> torch.Tensor:
        """Returns a parameter's keep mask: bool, True where elements are trained, with the parameter's shape and
        device. For a DTensor it is a DTensor of the same sharding. For the name of a parameter in a flat buffer it is
        flat, and covers the part in this process.

        Args:
            param: the parameter, or its name.
            step: completed steps before the step in question (0 for the first): the parameter's for element masks, its
                group's for block masks. Default: the next step. The epoch is always the current one.

        Raises:
            KeyError: no such parameter.
        """
        return self.masking.keep(param, step)

    def active_fraction(self) -> list[float]:
        """Returns the share of elements that the next step keeps, in [0, 1] per group. Exact for blocks and fixed
        masks, the keep probability for random elements.
        """
        masking = self.masking
        return list(map(masking.active_fraction, masking.indices()))

    def describe(self) -> str:
        """Returns a text table of what the next step would mask, see ``graddrop_kernels.describe``."""
        return describe.describe(self)

    def memory(self) -> dict[str, dict[str, int]]:
        """Returns the bytes of parameters, gradients, moments, masters and masks, now and at the peak, see
        ``graddrop_kernels.memory``.
        """
        return memory.memory(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. The group may have its own ``"mask"``, ``"seed"``, ``"masked"``, ``"bias_correction"``.

        Args:
            param_group: ``{"params": [...], ...}``; its ``"mask"`` is a policy or None.

        Raises:
            ValueError, TypeError: an option out of range, or a policy of blocks without blocks. Nothing has changed.
        """
        if isinstance(param_group, dict):
            beside = self.param_groups[:1] if not self._constructing else ()  # empty after param_groups.clear()
            shared = {key: group[key] for group in beside for key in SHARED_BY_GROUPS}
            param_group = {**self._own_defaults, **shared, **param_group}
            param_group["mask"] = self._masking.policies.add(param_group["mask"])
            param_group["moment_dtype"] = moment_dtype_name(param_group["moment_dtype"])
        super().add_param_group(param_group)
        self._masking.buffers.note(self.param_groups)
        if not self._constructing:
            try:
                check_groups(self._masking, first=len(self.param_groups) - 1)
            except Exception:
                self.param_groups.pop()
                self._stepper.forget()
                raise

    def attach_pieces(
        self,
        pieces: Mapping[torch.Tensor, Sequence[FlatPiece]],
        shapes: Mapping[str, Sequence[int]] | None = None,
        last: Iterable[torch.Tensor] = (),
        has_gradients: Callable[[int], bool] | None = None,
    ) -> None:
        """Describes the flat buffers among this optimizer's parameters, so that their masks are those of the whole
        parameters. For engines that make such buffers, see ``attach_fsdp1`` and ``attach_deepspeed``.

        Args:
            pieces: the pieces of each buffer, in order. Elements between them are padding and stay as they are.
            shapes: of all parameters of the model by name, even of those in other processes only: to check a FixedMask,
                and to know the rows of TrainRows.
            last: the last buffer of each group, where an engine steps the buffers of a group one after the other, with
                a ``step()`` for each. Its step ends the group's.
            has_gradients: group index -> whether any process has gradients of the group in this step. Needed where a
                process may have no element of a group, whose steps it would not count.

        Raises:
            KeyError: a tensor that is not a parameter of this optimizer.
            ValueError: pieces that overlap, or reach past the end of their buffer, or that do not suit the masks.
                Nothing has changed.
        """
        check = partial(check_groups, self._masking)
        self._masking.attach_pieces(pieces, shapes, last, has_gradients, check)
        self._stepper.forget()
        self._stepper.retire_captured()

    def state_dict(self) -> dict[str, Any]:
        """As torch's; the groups also hold the policies and our counts."""
        self._in_backward.check_ended("state_dict()")
        self._stepper.settle()
        for group in self.param_groups:
            note_moments(group, self.state)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool | None = None) -> None:
        """Loads a copy of a state dict of this class or of torch.optim.AdamW. Moments keep the dtype they were saved
        in.

        Args:
            state_dict: from ``state_dict()``. Blocks, policies and ``max_grad_norm`` stay this optimizer's own. Names
                also, unless it has none and the file has. Groups and state are matched by name where both have names.
            strict: refuse a state dict of another mask policy, seed or ``masked``, of parameters grouped in another
                way, or without names where masks are drawn by name: it could not continue bit for bit. Default: the
                constructor's.

        Raises:
            ValueError: another kind of optimizer's, other parameters, or, if strict, another policy. Nothing has
                changed then.
        """
        self._skip_dropped.check_outside("load_state_dict()")
        strict = self.strict if strict is None else strict
        load_state.load(self, self._masking, super().load_state_dict, state_dict, strict)
        self.reloaded()

    def reloaded(self) -> None:
        """Forgets what was derived from the groups. For engines that load a checkpoint past ``load_state_dict()``."""
        self._in_backward.finish()
        self._stepper.reloaded()

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        super().zero_grad(set_to_none)
        self._skip_dropped.missing.clear()

    def __getstate__(self) -> dict[str, Any]:
        self._skip_dropped.check_outside("a copy of the optimizer")
        self._in_backward.check_ended("a copy of the optimizer")
        self._stepper.settle()
        own = ("backend", "strict", "grad_norm", "_own_defaults")
        own_state = {name: getattr(self, name) for name in own}
        return {**super().__getstate__(), "policies": self._masking.policies, **own_state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        copied = "policies" in state  # else called by load_state_dict
        if copied:
            self._assemble(state.pop("policies"))
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        self._step_supports_amp_scaling = self.defaults.get("fused") is True
        self._constructing = False
        if copied:
            self._graph = GraphStep(self._stepper, self._skip_dropped, self._in_backward, self.param_groups)
        self._graph.groups = self.param_groups
        self._stepper.forget()
        for group in self.param_groups:
            for name, value in GROUP_DEFAULTS.items():
                group.setdefault(name, value)
