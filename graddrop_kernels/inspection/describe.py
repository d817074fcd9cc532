"""describe(): a text table of what an optimizer's next step would mask. Changes nothing and draws nothing."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from .. import backends
from ..groups.masking import Masking, masking_of
from ..groups.names import join_names
from ..groups.owner import Owner
from ..groups.param_state import has_master, mode, stochastic
from ..groups.scope import idle_note
from ..policies import Policy
from .memory import memory

_HEADER = ("group", "blocks", "tensors", "parameters", "lr", "weight decay", "active now", "dropped", "policy")


def describe(optimizer: Owner) -> str:
    """Returns what the optimizer's next step would mask as a text table, with a line per parameter group and a total.

    Columns: the group's index and name; the number of transformer blocks that hold its tensors (``-``: no blocks are
    named); tensors; parameters; learning rate; weight decay; the share of its elements that is active at the next step
    (see ``active_fraction()``: exact for blocks and fixed masks, the keep probability for random elements); what
    dropping means (``gradient``, ``frozen``, ``-``: nothing is dropped); the policy. Below: epoch, completed steps and
    seed; for policies of whole blocks the blocks active at the next step; the backend by device and dtypes, or why
    there is none; the bytes of all tensors (see ``memory()``); notes on tensors without gradients and on an epoch that
    was never set. Works at any time, before the first step too.

    Args:
        optimizer: a FusedGradDropAdamW.

    Returns:
        The text, without a newline at its end.

    Raises:
        TypeError: another kind of optimizer.
        ValueError: a schedule without a usable p at the present epoch.

    Example:
        >>> import torch
        >>> from graddrop_kernels import FusedGradDropAdamW, GradDrop, describe
        >>> optimizer = FusedGradDropAdamW(torch.nn.Linear(4, 2).named_parameters(), lr=2e-5, mask=GradDrop(p=0.25))
        >>> print(describe(optimizer).splitlines()[1])
        0           -        2          10  2e-05          0.01         75%  gradient  GradDrop(p=0.25, every='step')
    """
    masking = masking_of("describe", optimizer)
    return describe_masks(masking, lambda: [*_backends(optimizer), _memory(optimizer)])


def describe_masks(
    masking: Masking, of_tensors: Callable[[], list[str]] = list, plain: str = "plain AdamW"
) -> str:
    """The text of ``describe``. ``of_tensors`` makes the lines about tensors. ``plain`` is a step without a mask."""
    rows, clocks, active_blocks, notes = [], [], [], []
    all_blocks, all_tensors, all_elements, active = set(), 0, 0, 0.0
    for index, group in enumerate(masking.groups):
        share, policy, params = masking.active_fraction(index), masking.policy(index), group["params"]
        blocks = _blocks_of_group(masking, index)
        numel = sum(param.numel() for param in params)
        all_blocks.update(blocks)
        all_tensors, all_elements, active = all_tensors + len(params), all_elements + numel, active + share * numel
        rows.append((
            f"{index} {group.get('name', '')}", *_counts(blocks, len(params), numel), _option(group, "lr"),
            _option(group, "weight_decay"), _percent(share, numel), _meaning(group, policy), policy_text(policy, plain),
        ))  # fmt: skip
        clocks.append((index, f"{clock_text(group)}, seed {group['seed']}"))
        if policy is not None and policy.needs_blocks:
            kept = [block for block in blocks if masking.plan(index, block).kind != "off"]
            active_blocks.append((index, f"{len(kept)} of {len(blocks)}: {join_names(kept) or 'none'}"))
            if idle := _idle_blocks(masking, policy.layers):
                notes.append((index, idle_note(idle)))
        notes += [(index, note) for note in _notes(group, policy)]
    share = active / all_elements if all_elements else 1.0
    counts = _counts(all_blocks, all_tensors, all_elements)
    rows.append(("total", *counts, "", "", _percent(share, all_elements), "", ""))
    return "\n".join([
        *_table(rows),
        *_by_group("position", clocks),
        *_by_group("active blocks", active_blocks),
        *of_tensors(),
        *_by_group("note", notes),
    ])  # fmt: skip


def policy_text(policy: Policy | None, plain: str = "plain AdamW") -> str:
    """The policy's repr, without the addresses of callables, which change from run to run."""
    return f"None: {plain}" if policy is None else re.sub(r" at 0x[0-9a-fA-F]+", "", repr(policy))


def clock_text(group: dict[str, Any]) -> str:
    """Says where a parameter group is in the training."""
    return f"epoch {group['epoch']}, {group['completed_steps']} completed steps"


def _blocks_of_group(masking: Masking, index: int) -> list[str]:
    """Names the blocks that hold the group's tensors, in forward order; [] if no blocks are named."""
    group, policy = masking[index], masking.policy(index)
    if policy is not None and policy.needs_blocks:
        known, own = masking.blocks(index), {record.unit for record in masking.records(index)}
    else:
        known = group.get("blocks", ())
        own = {group["block"]} if "block" in group else set(group.get("param_blocks", ()))
    return [block for block in known if block in own]


def _idle_blocks(masking: Masking, layers: tuple[str, ...] | None) -> list[str]:
    """The blocks of ``layers`` patterns that have no turn. Of the groups of ``param_groups`` it is a note already."""
    return masking.matches.of(layers, masking.groups, masking.buffers.pieces).idle() if layers else []


def _meaning(group: dict[str, Any], policy: Policy | None) -> str:
    if policy is None or policy.masked is None:
        return "-"
    return group["masked"] or policy.masked


def _notes(group: dict[str, Any], policy: Policy | None) -> list[str]:
    notes = list(group.get("notes", ()))
    untrained = sum(not param.requires_grad for param in group["params"])
    if untrained:
        notes.append(f"{untrained} tensors have requires_grad=False: they get no step")
    if policy is not None and policy.follows_epochs and not group["epoch_was_set"]:
        notes.append("the policy follows epochs, but set_epoch(epoch) has not been called")
    return notes


def _option(group: dict[str, Any], name: str) -> str:
    """A number of a group. Of other optimizers than ours it may not be there."""
    return "-" if group.get(name) is None else f"{float(group[name]):g}"


def _counts(blocks: Collection[str], tensors: int, numel: int) -> tuple[str, str, str]:
    return str(len(blocks) or "-"), str(tensors), f"{numel:,}"


def _percent(share: float, numel: int) -> str:
    return f"{100 * share:.4g}%" if numel else "-"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Aligns the columns of a table: the first and the last two are text, the others figures."""
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows)]
    figures = range(1, len(_HEADER) - 2)
    align: Callable[[int, str], str] = lambda i, cell: (cell.rjust if i in figures else cell.ljust)(widths[i])
    return ["  ".join(align(i, cell) for i, cell in enumerate(row)).rstrip() for row in (_HEADER, *rows)]


def _by_group(what: str, texts: list[tuple[int, str]]) -> list[str]:
    """Returns a line per distinct text, with the groups that it holds for."""
    groups = defaultdict(list)
    for index, text in texts:
        groups[text].append(str(index))
    return [f"{what} (group {', '.join(indices)}): {text}" for text, indices in groups.items()]


def _backends(owner: Owner) -> list[str]:
    """Returns a line per kind of tensor: the backend that would step it, or why none can."""
    kinds = Counter(
        (param.dtype, _rounding(param, group, asked[2]), asked)
        for group in owner.param_groups
        for param in group["params"]
        for asked in [mode(param, group, owner.state.get(param, {}))]
    )
    lines = []
    for (dtype, rounding, asked), tensors in kinds.items():
        device, _, moment_dtype = asked
        try:
            chosen = backends.select(owner.backend, *asked).name
        except (TypeError, ValueError, RuntimeError) as error:
            chosen = f"none: {error}"
        dtypes = f"{dtype}, moments {moment_dtype}{rounding}".replace("torch.", "")
        lines.append(f"backend ({tensors} tensors on {device}, {dtypes}): {chosen}")
    return lines


def _memory(owner: Owner) -> str:
    now, peak = (_size(when["total"]) for when in memory(owner).values())
    return f"memory: {now} now, {peak} at the peak (parameters, gradients, moments, masters, masks)"


def _size(count: float) -> str:
    """Bytes in three digits."""
    unit = 0
    while count >= 999.5 and unit < 4:
        count, unit = count / 1000, unit + 1
    return f"{count:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def _rounding(param: torch.Tensor, group: dict[str, Any], moments: torch.dtype) -> str:
    if has_master(param, group):
        return ", master weights"
    return ("", ", stochastic rounding", ", stochastic rounding of moments", ", stochastic rounding of both")[
        stochastic(param, group, moments)
    ]
