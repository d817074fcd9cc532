"""memory(): the bytes of an optimizer's tensors, now and at the peak of its schedule."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # not in torch's stub

from ..groups.masking import masking_of
from ..groups.owner import Owner
from ..groups.param_state import has_master, moment_dtype, state_shape
from ..groups.records import ParamRecord
from ..groups.spans import spans_of, trained_rows
from ..masks.bitmask import num_planes, num_words
from ..masks.row_block import RowBlock
from ..policies import FixedMask, GradDropEpoch, Policy
from ..tensors.local import local

KINDS = ("parameters", "gradients", "moments", "masters", "masks")
_OF_STATE = {"exp_avg": "moments", "exp_avg_sq": "moments", "max_exp_avg_sq": "moments", "step": "moments",
             "master_param": "masters"}  # fmt: skip


def memory(optimizer: Owner) -> dict[str, dict[str, int]]:
    """Returns the bytes of the optimizer's tensors in this process, before they are needed.

    Of sharded parameters the local part counts. Gradients count as for a normal backward pass, which makes them for
    every parameter that is trained; ``skip_dropped()`` and ``step_in_backward()`` make fewer at a time. Not counted
    are activations, and what torch's allocator keeps.

    Args:
        optimizer: a FusedGradDropAdamW.

    Returns:
        ``{"now": bytes, "peak": bytes}``, each ``{"parameters", "gradients", "moments", "masters", "masks", "total"}``.
        Step counts are among the moments, 4 bytes per tensor. ``"peak"`` is the largest that a step of the schedule
        needs: every parameter that is trained has a gradient and a state. With ``idle_state="drop"`` only the largest
        blocks that can have their turn at once have moments.

    Raises:
        TypeError: another kind of optimizer.

    Example:
        >>> import torch
        >>> from graddrop_kernels import FusedGradDropAdamW, memory
        >>> optimizer = FusedGradDropAdamW(torch.nn.Linear(100, 10).named_parameters(), mask=None)
        >>> memory(optimizer)["peak"]
        {'parameters': 4040, 'gradients': 4040, 'moments': 8088, 'masters': 0, 'masks': 0, 'total': 16168}
    """
    masking = masking_of("memory", optimizer)
    now, peak = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    now["masks"] = sum({words.data_ptr(): words.nbytes for words in masking.stored()}.values())
    fixed = {policy for policy in map(masking.policy, masking.indices()) if isinstance(policy, FixedMask)}
    peak["masks"] = sum(words.nbytes for policy in fixed for words in policy.words.values())
    idle: dict[Any, dict[Any, int]] = defaultdict(lambda: defaultdict(int))  # policy: block: bytes of its moments
    for index, group in enumerate(masking.groups):
        policy = masking.policy(index)
        drops = getattr(policy, "idle_state", "keep") == "drop"
        for param, record in zip(group["params"], masking.records(index)):
            tensor, state = local(param), optimizer.state.get(param, {})
            now["parameters"] += _bytes(tensor)
            now["gradients"] += _bytes(local(param.grad)) if param.grad is not None else 0
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    now[_OF_STATE.get(name, "moments")] += local(value).nbytes
            peak["parameters"] += _bytes(tensor)
            if not _can_be_stepped(tensor) or not (param.requires_grad or param.grad is not None or state):
                continue
            peak["gradients"] += _bytes(tensor)
            peak["masks"] += _mask_bytes(policy, param, record)
            numel = math.prod(state_shape(tensor, trained_rows(param, record)))
            peak["masters"] += 4 * numel * has_master(param, group)
            moments = (2 + group["amsgrad"]) * numel * moment_dtype(param, group, state).itemsize
            peak["moments"] += 4  # the step count, which stays
            if drops and record.unit is not None:
                idle[policy][record.unit] += moments
            else:
                peak["moments"] += moments
    for policy, blocks in idle.items():
        peak["moments"] += sum(sorted(blocks.values(), reverse=True)[: getattr(policy, "k", 1)])
    return {when: {**kinds, "total": sum(kinds.values())} for when, kinds in (("now", now), ("peak", peak))}


def _can_be_stepped(tensor: torch.Tensor) -> bool:
    """Not a sparse parameter, nor one that a lazy module has not made yet."""
    return tensor.layout is torch.strided and not isinstance(tensor, UninitializedTensorMixin)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.nbytes if _can_be_stepped(tensor) else 0


def _mask_bytes(policy: Policy | None, param: torch.Tensor, record: ParamRecord) -> int:
    """The bytes of the masks that a step stores for a parameter, beside those that the user has given."""
    spans = spans_of(param, record)
    if isinstance(policy, GradDropEpoch) and policy.storage == "bitpacked":
        return sum(4 * num_planes(policy.epochs) * num_words(span.numel) for span in spans)
    if isinstance(policy, FixedMask):  # the whole of a parameter on the CPU reads what was given
        masked = [span for span in spans if span.name in policy.words]
        parts = [span for span in masked if param.device.type != "cpu" or span.layout != RowBlock.whole(span.numel)
                 or policy.words[span.name].numel() != num_words(span.numel)]  # fmt: skip
        return sum(4 * num_words(span.numel) for span in parts)
    return 0
