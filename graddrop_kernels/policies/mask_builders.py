"""Masks for FixedMask by a score of each element: top_magnitude, top_gradient, top_change.

Scores are float32 and not negative, so that their bits are in their order. The k-th largest is found by two counts, of
the upper and of the lower half of the bits. So a score is needed three times for one tensor at a time, and never for
the whole model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..masks.names import canonical_name

_HALF = 1 << 16  # values of half of the bits
Masks = dict[str, torch.Tensor]
Groups = list[dict[str, Any]] | None  # as param_groups(model) returns


def top_magnitude(model: nn.Module, density: float, over: str = "all", groups: Groups = None) -> Masks:
    """Masks of the largest weights in magnitude. Scores are compared in float32.

    Args:
        model: its parameters with ``requires_grad`` get masks.
        density: share of the elements that is kept, in (0, 1). Exactly round(density * numel) are; of equal ones those
            of the lowest index, in the order of ``named_parameters``.
        over: ``"all"`` compares the elements of all parameters, ``"tensor"`` those of each parameter.
        groups: what ``param_groups(model)`` returns, to mask only what it masks: the transformer blocks.

    Returns:
        {name: bool tensor on the CPU, of the parameter's shape}, for ``FixedMask(masks)``.

    Raises:
        ValueError: ``density`` or ``over`` out of range, a score that is NaN, nothing to be trained, or a parameter
            that is sharded already.

    Example:
        >>> import torch
        >>> from graddrop_kernels import FixedMask, FusedGradDropAdamW, top_magnitude
        >>> model = torch.nn.Linear(4, 2)
        >>> mask = FixedMask(top_magnitude(model, 0.3))
        >>> FusedGradDropAdamW(model.named_parameters(), mask=mask).active_fraction()
        [0.3]
    """
    return _top(_trained(model, groups), lambda name, param: param.detach(), density, over)


def top_change(
    before: nn.Module | Mapping[str, torch.Tensor], after: nn.Module, density: float, over: str = "all",
    groups: Groups = None,
) -> Masks:  # fmt: skip
    """Masks of the elements that a training has changed most, as in LT-SFT (Ansell et al., 2022). Train densely, reset
    the weights, and train these alone.

    Args:
        before: the model as it was, or its state dict.
        after: as it is now. Its parameters with ``requires_grad`` get masks.
        density, over, groups: as in ``top_magnitude``.

    Returns:
        As ``top_magnitude``.

    Raises:
        ValueError: as ``top_magnitude``; a parameter that ``before`` lacks, or has in another shape.
    """
    states = before.state_dict() if isinstance(before, nn.Module) else before
    earlier = {canonical_name(name): value for name, value in states.items()}
    params = _trained(after, groups)
    for name, param in params.items():
        if name not in earlier or earlier[name].shape != param.shape:
            found = tuple(earlier[name].shape) if name in earlier else None
            raise ValueError(
                f"top_change(before=) must have {name!r} in the shape {tuple(param.shape)}, got {found}: give the "
                "state dict of the same model, copied before the training"
            )
    change: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, param: (
        param.detach() - earlier[name].to(param.device, param.dtype)
    )
    return _top(params, change, density, over)


def top_gradient(
    model: nn.Module, batches: Iterable[Any], density: float, over: str = "all",
    groups: Groups = None, loss_of: Callable[[nn.Module, Any], torch.Tensor] | None = None,
) -> Masks:  # fmt: skip
    """Masks of the elements with the largest sums of squared gradients over some batches: the diagonal of the empirical
    Fisher matrix, as in Child-Tuning-D (Xu et al., 2021). Keeps one float32 per element until it returns, and each
    gradient only until its square was added. Gradients that the model had are lost.

    Args:
        model: in the mode (train or eval) that is wanted. Its parameters with ``requires_grad`` get masks.
        batches: what ``loss_of`` takes, one backward pass each.
        density, over, groups: as in ``top_magnitude``.
        loss_of: (model, batch) -> the loss. Default: ``model(**batch).loss``.

    Returns:
        As ``top_magnitude``.

    Raises:
        ValueError: as ``top_magnitude``; there is no batch.
    """
    _check(density, over)
    params = _trained(model, groups)
    sums = {name: torch.zeros_like(param, dtype=torch.float32) for name, param in params.items()}
    names = {param: name for name, param in params.items()}

    def add(param: torch.Tensor) -> None:
        if param.grad is not None:
            sums[names[param]] += param.grad.detach().float().square()
            param.grad = None

    model.zero_grad(set_to_none=True)
    hooks = [param.register_post_accumulate_grad_hook(add) for param in params.values()]
    seen = 0
    try:
        for batch in _shown(batches, "batch"):
            loss = model(**batch).loss if loss_of is None else loss_of(model, batch)
            loss.backward()
            seen += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError("top_gradient(batches=) has no batch; a generator can be read only once: give a list")
    return _top(params, lambda name, param: sums[name], density, over)


def _check(density: float, over: str) -> None:
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density < 1:
        raise ValueError(f"density= must be the share of elements to train, in (0, 1), got {density!r}")
    if over not in ("all", "tensor"):
        raise ValueError(f"over= must be 'all' or 'tensor', got {over!r}")


def _trained(model: nn.Module, groups: Groups) -> dict[str, torch.Tensor]:
    masked = (group for group in groups or () if group.get("mask", ...) is not None)
    wanted = {canonical_name(name) for group in masked for name, _ in group["params"]}
    params: dict[str, torch.Tensor] = {
        name: param
        for name, param in ((canonical_name(name), param) for name, param in model.named_parameters())
        if param.requires_grad and (groups is None or name in wanted)
    }
    marks = ("placements", "_is_flat_param", "_fsdp_flattened")  # of a DTensor, of FSDP1
    if sharded := [name for name, param in params.items() if any(getattr(param, mark, False) for mark in marks)]:
        raise ValueError(f"parameter {sharded[0]!r} is sharded already: make masks of the whole model, before it is")
    if not sum(param.numel() for param in params.values()):
        raise ValueError("the model has no parameter with requires_grad=True, so there is nothing to mask")
    return params


def _top(
    params: dict[str, torch.Tensor], score: Callable[[str, torch.Tensor], torch.Tensor], density: float, over: str
) -> Masks:
    _check(density, over)
    if not any(bool(_bits(name, score(name, param)).any()) for name, param in params.items()):
        raise ValueError(
            "every score is 0, so there is nothing to choose by: a state dict that was not copied before the training, "
            "a loss that does not reach the model, or weights of 0"
        )
    if over == "tensor":
        masks: Masks = {}
        for name in _shown(list(params), "tensor"):
            masks |= _largest({name: params[name]}, score, density)
        return masks
    return _largest(params, score, density)


def _largest(
    params: dict[str, torch.Tensor], score: Callable[[str, torch.Tensor], torch.Tensor], density: float
) -> Masks:
    """Masks of the largest scores of all of these parameters together."""

    def each_bits(what: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name in _shown(list(params), what) if len(params) > 1 else params:
            yield name, _bits(name, score(name, params[name]))

    wanted = round(density * sum(param.numel() for param in params.values()))
    upper = sum(torch.bincount(bits >> 16, minlength=_HALF) for _, bits in each_bits("tensor counted"))
    high, wanted = _place_of(upper, wanted)
    lower = sum(
        torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=_HALF) for _, bits in each_bits("tensor counted")
    )
    low, ties = _place_of(lower, wanted)
    threshold, masks = high << 16 | low, {}
    for name, bits in each_bits("tensor masked"):
        mask, equal = bits > threshold, bits == threshold
        mask |= equal & (equal.cumsum(0) <= ties)
        ties -= min(ties, int(equal.sum()))
        masks[name] = mask.view(params[name].shape)
    return masks


def _place_of(counts: Any, wanted: int) -> tuple[int, int]:
    """(the bin of the ``wanted``-th largest value, how many of that bin are among them)."""
    above = counts.flip(0).cumsum(0)  # values in this bin or a larger one, the largest bin first
    place = int((above < wanted).sum()) if wanted else 0
    before = int(above[place - 1]) if place else 0
    return _HALF - 1 - place, wanted - before


def _bits(name: str, values: torch.Tensor) -> torch.Tensor:
    """The magnitudes as integers of the same order, flat and on the CPU: int64."""
    magnitudes = values.detach().abs().to("cpu", torch.float32).flatten()
    if magnitudes.isnan().any():
        raise ValueError(f"a score of {name!r} is NaN: look for NaN in the weights, or in the gradients")
    return magnitudes.view(torch.int32).long()


def _shown(items: Iterable[Any], what: str) -> Iterator[Any]:
    """The items, with a progress bar on a terminal where tqdm is installed."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]  # it has no stubs
    except ImportError:
        return iter(items)
    return iter(tqdm(items, unit=what, disable=None, leave=False))
