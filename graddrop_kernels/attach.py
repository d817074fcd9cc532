"""Engines that flatten or deal out parameters: each attach_...() tells an optimizer which elements of which parameters
its tensors hold, so that masks stay those of the whole parameters.

DistributedDataParallel and FSDP2 need none of this: their tensors say it themselves.
"""

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import checkpoint, universal_checkpoint
from .inspection import require_optimizer
from .names import canonical_name
from .parameters import FlatPiece

if TYPE_CHECKING:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    from .optimizer import FusedGradDropAdamW

Pieces = dict[torch.Tensor, list[FlatPiece]]


def attach_zero(zero: "ZeroRedundancyOptimizer", model: nn.Module) -> None:
    """Gives the optimizer inside a ZeroRedundancyOptimizer the names of its parameters: the wrapper takes none.

    ``zero.optim.set_epoch(epoch)`` is then seen by the wrapper too, which would otherwise put back its own copy of the
    epoch at the next step. ``zero.load_state_dict()`` then refuses what the optimizer's own does: a state dict of
    another policy, seed or meaning of masked.

    Args:
        zero: made with ``optimizer_class=FusedGradDropAdamW``. For policies of whole blocks give it
            ``param_groups(model, per_block=True)``.
        model: the one whose parameters it has, wrapped or not.

    Raises:
        TypeError: another kind of optimizer inside.
        ValueError: a parameter that is not the model's, or ``max_grad_norm``, as no process has all gradients.
    """
    inner: Any = getattr(zero, "optim", None)
    _require(inner, "attach_zero(zero, model)", "a ZeroRedundancyOptimizer(optimizer_class=FusedGradDropAdamW)")
    names = _names(model)
    tensors = _tensors(inner)
    if unknown := sum(id(tensor) not in names for tensor in tensors):
        raise ValueError(f"attach_zero: {unknown} of {len(tensors)} parameters are not of this {type(model).__name__}")
    pieces = {tensor: [FlatPiece(names[id(tensor)], 0, 0, tensor.numel())] for tensor in tensors}
    inner.attach_pieces(
        pieces,
        {name: param.shape for name, param in model.named_parameters()},
        # Every process has the gradients of all parameters, the inner optimizer some of them, or none of a group.
        has_gradients=lambda index: any(param.grad is not None for param in zero.param_groups[index]["params"]),
    )

    def set_epoch(epoch: int) -> None:
        type(inner).set_epoch(inner, epoch)
        wrapper: Any = zero
        wrapper._sync_param_groups(inner.param_groups, zero.param_groups)

    inner.set_epoch = set_epoch
    load = zero.load_state_dict

    def load_state_dict(state_dict: dict[str, Any]) -> None:
        # The wrapper would take the file's policies and seed without a word.
        load(checkpoint.prepare(state_dict, zero.param_groups, strict=True))
        inner._forget_caches()
        inner._skipped_steps.clear()

    zero.load_state_dict = load_state_dict  # type: ignore[method-assign]


def attach_fsdp1(optimizer: "FusedGradDropAdamW", model: nn.Module) -> None:
    """Tells the optimizer where FullyShardedDataParallel (FSDP1) has put the model's parameters, with either value of
    ``use_orig_params``. For policies of whole blocks each block must be a unit of its own (``auto_wrap_policy``), or
    ``use_orig_params=True``.

    Args:
        optimizer: made from the parameters of the wrapped model.
        model: the wrapped model, or one that holds wrapped ones.

    Raises:
        TypeError: another kind of optimizer.
        ValueError: the optimizer has none of the model's flat parameters, or ``max_grad_norm``, as no process has all
            gradients (use the model's ``clip_grad_norm_``).
    """
    _require(optimizer, "attach_fsdp1(optimizer, model)", "a FusedGradDropAdamW")
    pieces = fsdp1_pieces(model)
    stepped = {tensor: pieces[tensor] for tensor in _tensors(optimizer) if tensor in pieces}
    if not stepped:
        raise ValueError(
            "attach_fsdp1: the optimizer steps none of the model's sharded parameters: "
            "wrap the model first, then make the optimizer from the wrapped model's named_parameters()"
        )
    shapes = {name: shape for names, flat in _fsdp1_units(model) for name, shape in zip(names, flat._shapes)}
    flat_of = {param: flat for _, flat in _fsdp1_units(model) for param in flat._params or ()}
    own = weakref.proxy(optimizer)  # which holds the function below

    def has_gradients(index: int) -> bool:
        # A slice without elements in this process has no gradient either; its unit has.
        params = (param for param in own.param_groups[index]["params"] if param.requires_grad)
        return any(param in flat_of and flat_of[param].grad is not None for param in params)

    optimizer.attach_pieces(stepped, shapes, has_gradients=has_gradients)


def attach_deepspeed(engine: Any) -> None:
    """Tells the optimizer inside a DeepSpeed engine what its flat partitions hold, under ZeRO 1, 2, 3. In float32
    without ZeRO the parameters are whole, and there is nothing to tell; in 16 bits without ZeRO it cannot be told, as
    DeepSpeed steps before it returns: stage 1 does the same.

    For policies of whole blocks make the optimizer from ``param_groups(model, per_block=True)``: DeepSpeed flattens
    each group by itself. Call it before ``engine.load_checkpoint()``, so that a universal checkpoint, which may be of
    another number of ranks, is loaded in full.

    Args:
        engine: from ``deepspeed.initialize(model=..., optimizer=FusedGradDropAdamW(...), ...)``.

    Raises:
        TypeError: no engine, another kind of optimizer inside, or a way to step it that is not known here.
        ValueError: ``max_grad_norm``, as no process has all gradients (use DeepSpeed's ``gradient_clipping``);
            ``elastic_checkpoint``; a universal checkpoint was loaded already.
    """
    optimizer: Any = getattr(engine, "basic_optimizer", None)
    _require(optimizer, "attach_deepspeed(engine)", "a DeepSpeed engine with a FusedGradDropAdamW inside")
    if engine.optimizer is optimizer:
        return
    pieces, zero = deepspeed_pieces(engine), engine.optimizer
    _check_checkpoints(engine)
    shapes = {name: getattr(param, "ds_shape", param.shape) for name, param in engine.module.named_parameters()}
    if not _is_zero3(zero):
        optimizer.attach_pieces(pieces, shapes)
        universal_checkpoint.repair_loads(zero, optimizer)
        return
    # The groups are empty but for a step of one sub-group after the other.
    groups = list(zip(map(zero.sub_group_to_group_id.get, range(len(pieces))), pieces))
    zero._set_fp32_optimizer_param_groups()
    try:
        optimizer.attach_pieces(pieces, shapes, last=dict(groups).values())
    finally:
        zero._clear_fp32_optimizer_param_groups()
    universal_checkpoint.repair_stage3_loads(zero, optimizer, groups)


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


def fsdp1_pieces(model: nn.Module) -> Pieces:
    """What each tensor of an FSDP1 model that an optimizer may step holds in this process."""
    pieces: Pieces = {}
    for names, flat in _fsdp1_units(model):
        ranges = [
            FlatPiece(name, info.offset_in_shard, info.intra_param_start_idx, info.numel_in_shard)
            if info.in_shard
            else None
            for name, info in zip(names, flat._shard_param_infos)
        ]
        if flat._params is None:  # use_orig_params=False
            pieces[flat] = sorted(filter(None, ranges), key=lambda piece: piece.local_start)
            continue
        for param, piece in zip(flat._params, ranges):
            # Each is a slice of the flat parameter, which begins where the slice does.
            pieces[param] = [piece._replace(local_start=0)] if piece else []
    return pieces


def _fsdp1_units(model: nn.Module) -> Iterator[tuple[list[str], Any]]:
    """(the names of its parameters, its flat parameter) of every FSDP1 unit that has parameters."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for prefix, module in model.named_modules():
        handle = module._handle if isinstance(module, FullyShardedDataParallel) else None
        if handle is not None:
            flat = handle.flat_param
            yield [canonical_name(f"{prefix}.{name}".removeprefix(".")) for name in flat._fqns], flat


def deepspeed_pieces(engine: Any) -> Pieces:
    """What each flat partition of a DeepSpeed engine holds in this process."""
    zero, names = engine.optimizer, _names(engine.module)
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
    """Stage 3 puts the partitions of a sub-group's parameters side by side; a partition is the rank's share of the
    parameter, padded where the parameter ends before it.
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


def flat_buffer_reason(tensor: torch.Tensor, given: bool = True) -> str | None:
    """Why a tensor without pieces must not be stepped: it is a flat buffer, and a mask drawn for it would depend on the
    sharding. None: it is none.

    ``given``: whether the optimizer was given this tensor when it was made or got the group; False for one that has
    come into the group since, as DeepSpeed's partitions do.
    """
    if getattr(tensor, "_is_flat_param", False) or getattr(tensor, "_fsdp_flattened", False):
        return "it is (a slice of) a flat parameter of FSDP1: call graddrop_kernels.attach_fsdp1(optimizer, model)"
    if not given and tensor.dim() == 1 and not isinstance(tensor, nn.Parameter) and not hasattr(tensor, "placements"):
        return (
            "something has put this flat tensor in the place of the parameters: if it was DeepSpeed (ZeRO 1, 2 or 3), "
            "call graddrop_kernels.attach_deepspeed(engine) after deepspeed.initialize(); otherwise tell what it holds "
            "with optimizer.attach_pieces()"
        )
    return None


def _require(optimizer: Any, function: str, what: str) -> None:
    try:
        require_optimizer(function, optimizer)
    except TypeError:
        raise TypeError(f"{function} needs {what}, got {type(optimizer).__name__}") from None
    if optimizer.max_grad_norm is not None:
        raise ValueError(
            f"max_grad_norm={optimizer.max_grad_norm!r} would clip by the norm of this process's part of the "
            "gradients: set it to None and let the engine clip"
        )


def _names(model: nn.Module) -> dict[int, str]:
    return {id(param): canonical_name(name) for name, param in model.named_parameters()}


def _tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]
