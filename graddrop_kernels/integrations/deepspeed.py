"""DeepSpeed, ZeRO 1 to 3: describes to the optimizer which elements of which parameters its flat partitions hold."""

from typing import Any

import torch

from ..groups.flat_buffers import FlatPiece
from . import deepspeed_universal
from .engines import Pieces, names_of, require


def attach_deepspeed(engine: Any) -> None:
    """Describes to the optimizer inside a DeepSpeed engine what its flat partitions hold, under ZeRO 1, 2, 3. Without
    ZeRO the parameters are whole in float32, and this does nothing. In 16 bits without ZeRO it is refused, as DeepSpeed
    steps before ``initialize()`` returns. Stage 1 does the same.

    For policies of whole blocks make the optimizer from ``param_groups(model, per_block=True)``: DeepSpeed flattens
    each group by itself. Call it before ``engine.load_checkpoint()``, so that a universal checkpoint, perhaps of
    another number of ranks, is loaded in full.

    Args:
        engine: from ``deepspeed.initialize(model=..., optimizer=..., ...)``, where the optimizer is a
            FusedGradDropAdamW, or under ZeRO 1 and 2 another one with a mask by ``attach_mask``.

    Raises:
        TypeError: no engine, another kind of optimizer inside, or an unknown way to step it.
        ValueError: ``max_grad_norm``, as no process has all gradients (use DeepSpeed's ``gradient_clipping``);
            ``elastic_checkpoint``; a universal checkpoint was loaded already; ZeRO 3 or universal checkpoints with
            ``attach_mask``.
    """
    optimizer: Any = getattr(engine, "basic_optimizer", None)
    what = "a DeepSpeed engine with a FusedGradDropAdamW inside, or an optimizer with attach_mask"
    masks = require(optimizer, "attach_deepspeed(engine)", what)
    if engine.optimizer is optimizer:
        return
    if masks is not optimizer:
        _check_other(engine)
    pieces, zero = deepspeed_pieces(engine), engine.optimizer
    _check_checkpoints(engine)
    shapes = {name: getattr(param, "ds_shape", param.shape) for name, param in engine.module.named_parameters()}
    if not _is_zero3(zero):
        masks.attach_pieces(pieces, shapes)
        if masks is not optimizer:
            return
        deepspeed_universal.repair_loads(zero, optimizer)
        return
    # The groups are empty except while a step runs, which takes one sub-group after the other.
    groups = list(zip(map(zero.sub_group_to_group_id.get, range(len(pieces))), pieces))
    zero._set_fp32_optimizer_param_groups()
    try:
        optimizer.attach_pieces(pieces, shapes, last=dict(groups).values())
    finally:
        zero._clear_fp32_optimizer_param_groups()
    deepspeed_universal.repair_stage3_loads(zero, optimizer, groups)


def _check_other(engine: Any) -> None:
    """Raises ValueError for what only FusedGradDropAdamW can do."""
    reason = None
    if _is_zero3(engine.optimizer):
        reason = "ZeRO 3 steps the partitions of a group one after the other, and attach_mask counts a step as one"
    elif engine.load_universal_checkpoint():
        reason = "universal checkpoints are loaded past the optimizer's load_state_dict(), which attach_mask watches"
    if reason:
        raise ValueError(f"attach_deepspeed: {reason}: use ZeRO 1 or 2 and DeepSpeed's own checkpoints, or "
                         "FusedGradDropAdamW")  # fmt: skip


def _check_checkpoints(engine: Any) -> None:
    if engine.zero_elastic_checkpoint():
        raise ValueError(
            "zero_optimization.elastic_checkpoint=True: DeepSpeed cannot load what it then saves of an AdamW; leave it "
            "False, and go on with other numbers of ranks from a universal checkpoint (ds_to_universal)"
        )
    if engine.load_universal_checkpoint() and engine.loaded_checkpoint_dp_world_size is not None:
        raise ValueError(
            "attach_deepspeed: a universal checkpoint was loaded before: call it between deepspeed.initialize() and "
            "engine.load_checkpoint()"
        )


def deepspeed_pieces(engine: Any) -> Pieces:
    """Returns what each flat partition of a DeepSpeed engine holds in this process."""
    zero, names = engine.optimizer, names_of(engine.module)
    if _is_zero3(zero):
        return _zero3_pieces(zero, names)
    pieces: Pieces = {group["params"][0]: [] for group in zero.optimizer.param_groups}
    mapped = [param for param in engine.module.parameters() if getattr(param, "_hp_mapping", None) is not None]
    if not mapped:
        raise TypeError(
            f"attach_deepspeed: {type(zero).__name__} does not say what its flat buffers hold; use ZeRO stage 1, 2 or 3"
        )
    for param in mapped:
        fragment = param._hp_mapping
        flat = zero.optimizer.param_groups[fragment.param_group_index]["params"][0]
        local, whole = fragment.hp_fragment_address, fragment.lp_fragment_address
        pieces[flat].append(FlatPiece(names[id(param)], local.start, whole.start, local.numel))
    return {flat: sorted(each, key=lambda piece: piece.local_start) for flat, each in pieces.items()}


def _is_zero3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _zero3_pieces(zero: Any, names: dict[int, str]) -> Pieces:
    """Returns the pieces under stage 3, which puts the partitions of a sub-group's parameters side by side. A partition
    is the rank's share of the parameter, padded where the parameter ends before it.
    """
    pieces: Pieces = {}
    for params, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat):
        pieces[flat], local_start = [], 0
        for param in params:
            share = param.partition_numel()
            start = share * torch.distributed.get_rank(param.ds_process_group)
            numel = min(max(param.ds_numel - start, 0), share)
            if numel:
                pieces[flat].append(FlatPiece(names[id(param)], local_start, start, numel))
            local_start += share
        if local_start != flat.numel():
            raise TypeError(
                f"attach_deepspeed: a flat partition has {flat.numel()} elements, its parameters {local_start} in this "
                "process: optimizer states on NVMe are not supported"
            )
    return pieces
