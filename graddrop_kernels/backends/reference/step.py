"""The whole step in plain PyTorch, on any device: the meaning that every other backend is compared with.

Read it beside csrc/adamw.h. Arithmetic is float32 (float64 for float64 parameters), rounded once on store.
``exact=True`` rounds every operation once, as the fused kernels do (rounding.py). In float32 it then gives the same
bits as they do. Without it an fma is a multiplication and an addition.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ...masks.philox import DOMAIN_MOMENTS, DOMAIN_ROUNDING, words32
from ...masks.plan import MaskPlan
from ...masks.rule import by_runs, keep_and_bucket
from ..batch import ROUND_MOMENTS, ROUND_PARAMS, Hyper, TensorBatch
from .gaussian import normals
from .rounding import EXACT, PLAIN, Rounding, stochastic_bfloat16


def masked_adamw_(batch: TensorBatch, exact: bool = False) -> None:
    """Makes one AdamW step with masked gradients on every row of the batch, in place. Advances the step counts."""
    if batch.found_inf is not None and batch.found_inf != 0:
        return
    for row, hyper_row in enumerate(batch.hyper_rows):
        _masked_adamw_row_(batch, row, batch.hypers[hyper_row], EXACT if exact else PLAIN)


def sum_of_squares(batch: TensorBatch, masked: bool, exact: bool = False) -> torch.Tensor:
    """The sum of the squares of all gradients: float64 tensor () on the batch's device. Changes nothing.

    Args:
        masked: the gradients are masked as in the next step, so a dropped element counts as 0 and a kept one is
            multiplied by its scale. Neither ``grad_scale`` nor ``clip_factor`` is applied.
    """
    total = torch.zeros((), dtype=torch.float64, device=batch.device)
    for row, hyper_row in enumerate(batch.hyper_rows):
        g = batch.grads[row].to(_working_dtype(batch.params[row])).flatten()
        if masked and not batch.hypers[hyper_row].plan.update:
            plan = batch.hypers[hyper_row].plan
            completed_steps = int(batch.steps[row])
            keep, _ = _keep_and_bucket(batch, row, plan, completed_steps)
            g = _masked_gradient(g, batch, row, plan, completed_steps, keep, EXACT if exact else PLAIN)
        total += g.double().square().sum()
    return total


def mask_gradients_(batch: TensorBatch, exact: bool = False) -> None:
    """Masks and scales the gradients of every row of the batch in place. Changes nothing else."""
    for row, hyper_row in enumerate(batch.hyper_rows):
        plan, grad = batch.hypers[hyper_row].plan, batch.grads[row]
        if plan.kind == "keep":
            continue
        completed_steps = int(batch.steps[row])
        keep, _ = _keep_and_bucket(batch, row, plan, completed_steps)
        g = grad.to(_working_dtype(grad)).flatten()
        g = _masked_gradient(g, batch, row, plan, completed_steps, keep, EXACT if exact else PLAIN)
        grad.copy_(g.view_as(grad))


def _masked_adamw_row_(batch: TensorBatch, row: int, hyper: Hyper, rounding: Rounding) -> None:
    plan, fma = hyper.plan, rounding.fma
    if plan.kind == "off" and plan.frozen:
        return  # nothing changes, nor does the step count
    param, max_exp_avg_sq = batch.params[row], batch.max_exp_avg_sqs[row]
    dtype = _working_dtype(param)
    before: list[Any] = [param, batch.exp_avgs[row], batch.exp_avg_sqs[row]]
    before += [max_exp_avg_sq] if hyper.amsgrad else []
    if torch.is_grad_enabled():  # differentiable=True: what a derivative needs must not be overwritten
        before = [tensor.clone() for tensor in before]
    p, m, v, *rest = (tensor.to(dtype).flatten() for tensor in before)
    vmax: Any = rest[0] if rest else None
    completed_steps = int(batch.steps[row])
    batch.steps[row].add_(1)
    grad = batch.grads[row]
    if batch.grad_scale is not None:
        unscaled = grad.to(dtype) / batch.grad_scale
        grad.copy_(unscaled)
        grad = unscaled
    if batch.clip_factor is not None:
        grad = grad.to(dtype) * batch.clip_factor

    keep, bucket = _keep_and_bucket(batch, row, plan, completed_steps)
    beta1, beta2, eps, neg_lr_wd, step_size, bias_correction2_sqrt = _scalars(
        hyper, completed_steps + 1, dtype, param.device
    )
    if plan.ages:  # every bucket has its own age
        step_size, bias_correction2_sqrt = step_size[bucket], bias_correction2_sqrt[bucket]

    g = grad.to(dtype).flatten()
    if hyper.maximize:
        g = -g
    if plan.update:
        step_size = step_size * step_size.new_tensor(plan.scale)
    else:
        g = _masked_gradient(g, batch, row, plan, completed_steps, keep, rounding)

    old: tuple[Any, ...] = p, m, v, vmax
    m = fma(beta1, m, fma(-beta1, g, g))
    g_squared = g * g
    # An infinite square gives an infinite v, by which nothing moves, and not infinity - infinity, which is NaN.
    v = fma(beta2, v, fma(-beta2, g_squared.clamp(max=torch.finfo(dtype).max), g_squared))
    vhat = v
    if hyper.amsgrad:
        vhat = vmax = torch.where(v > vmax, v, vmax)
    denom = rounding.sqrt(vhat) / bias_correction2_sqrt + eps
    numerator = step_size * m
    if hyper.weight_decay != 0:
        decayed = fma(neg_lr_wd, p, p)
        p = torch.where(numerator * p < 0, p, decayed) if hyper.cautious else decayed
    p = p - numerator / denom

    if batch.stochastic & ROUND_PARAMS:
        p = stochastic_bfloat16(p, _rounding_words(batch, row, completed_steps, DOMAIN_ROUNDING))
    if batch.stochastic & ROUND_MOMENTS:
        words = _rounding_words(batch, row, completed_steps, DOMAIN_MOMENTS)
        lower_half = (words & 0xFFFF) << 16
        m, v = stochastic_bfloat16(m, words), stochastic_bfloat16(v, lower_half)
        vmax = stochastic_bfloat16(vmax, lower_half) if hyper.amsgrad else None
    targets: list[Any] = [param, batch.exp_avgs[row], batch.exp_avg_sqs[row], max_exp_avg_sq]
    if batch.copies:  # of the master weights that have just been stepped
        targets.append(batch.copies[row])
        old += (batch.copies[row].flatten(),)
    if plan.kind == "off" and plan.update:
        keep = torch.zeros((), dtype=torch.bool, device=param.device)
    is_moment = False, True, True, True, False
    new_values = p, m, v, vmax, p.to(batch.grad_dtype or param.dtype)
    for target, new, kept, moment in zip(targets, new_values, old, is_moment):
        if new is not None:
            if keep is not None and (plan.frozen or plan.update and not moment):
                new = torch.where(keep, new, kept)
            target.copy_(new.view_as(target))


def _rounding_words(batch: TensorBatch, row: int, completed_steps: int, domain: int) -> torch.Tensor:
    """A word of 32 bits per element of a row, for stochastic rounding."""
    draws = partial(words32, batch.keys[row], completed_steps, domain)
    return by_runs(batch.layouts[row], batch.params[row].numel(), batch.device, draws)


def _working_dtype(param: torch.Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _masked_gradient(
    g: torch.Tensor, batch: TensorBatch, row: int, plan: MaskPlan, completed_steps: int, keep: torch.Tensor | None,
    rounding: Rounding,
) -> torch.Tensor:  # fmt: skip
    """Masks and scales a row's gradient g, which is flat and of the working dtype."""
    if plan.kind == "off":
        return torch.zeros_like(g)  # the fused backends do not even read it
    if plan.kind == "gaussian":
        numbers = partial(normals, batch.keys[row], completed_steps, rounding=rounding)
        z = by_runs(batch.layouts[row], g.numel() // batch.parts, g.device, numbers).repeat_interleave(batch.parts)
        return g * rounding.fma(z, z.new_tensor(plan.scale), z.new_tensor(1.0)).to(g.dtype)
    if keep is not None:
        # Selection, not multiplication: a dropped inf or NaN is dropped.
        return torch.where(keep, g * g.new_tensor(plan.scale), 0.0)
    return g


def _scalars(hyper: Hyper, step: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The scalars of one update as tensors of the working dtype. The last two have one entry per bucket if the plan has
    ages.

    Bias corrections are computed in float64 from the rounded betas, and rounded once.
    """
    plan = hyper.plan
    lr = torch.as_tensor(hyper.lr, dtype=dtype, device=device).reshape(())
    weight_decay = torch.as_tensor(hyper.weight_decay, dtype=dtype, device=device).reshape(())
    beta1, beta2, eps = torch.tensor((hyper.beta1, hyper.beta2, hyper.eps), dtype=dtype, device=device)
    ages: Sequence[float]
    if plan.ages:
        ages = [min(max(age, 1), step) for age in plan.ages] + [1] * (plan.buckets - len(plan.ages))
    else:
        ages = [plan.global_step or 1 + (step - 1) * plan.age_rate]
    bias_correction1 = torch.tensor([1 - float(beta1) ** age for age in ages], dtype=dtype, device=device)
    bias_correction2_sqrt = torch.tensor([(1 - float(beta2) ** age) ** 0.5 for age in ages], dtype=dtype, device=device)
    return beta1, beta2, eps, -(lr * weight_decay), lr / bias_correction1, bias_correction2_sqrt


def _keep_and_bucket(batch: TensorBatch, row: int, plan: MaskPlan, completed_steps: int) -> list[Any]:
    grad, layout, words = batch.grads[row], batch.layouts[row], batch.mask_words[row]
    found = keep_and_bucket(
        plan, batch.keys[row], completed_steps, layout, grad.numel() // batch.parts, words, grad.device
    )
    return [each if each is None else each.repeat_interleave(batch.parts) for each in found]
