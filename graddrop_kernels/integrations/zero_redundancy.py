"""ZeroRedundancyOptimizer: gives the parameters of the optimizer inside their names."""

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from ..groups import load_state
from ..groups.flat_buffers import FlatPiece
from .engines import names_of, require, tensors_of

if TYPE_CHECKING:
    from torch.distributed.optim import ZeroRedundancyOptimizer


def attach_zero(zero: "ZeroRedundancyOptimizer", model: nn.Module) -> None:
    """Gives the optimizer inside a ZeroRedundancyOptimizer the names of its parameters, as the wrapper takes none.

    ``zero.optim.set_epoch(epoch)`` then sets the wrapper's epoch too. Otherwise the wrapper would put back its own copy
    of the epoch at the next step. ``zero.load_state_dict()`` then refuses what the optimizer's own does: a state dict
    of another policy, seed or ``masked``.

    Args:
        zero: made with ``optimizer_class=FusedGradDropAdamW``. For policies of whole blocks give it
            ``param_groups(model, per_block=True)``.
        model: the one whose parameters it has, wrapped or not.

    Raises:
        TypeError: another kind of optimizer inside.
        ValueError: a parameter that is not the model's, or ``max_grad_norm``, as no process has all gradients.
    """
    inner: Any = getattr(zero, "optim", None)
    what = "a ZeroRedundancyOptimizer(optimizer_class=FusedGradDropAdamW)"
    if require(inner, "attach_zero(zero, model)", what) is not inner:
        raise TypeError(f"attach_zero(zero, model) needs {what}, got {type(inner).__name__} with attach_mask")
    names = names_of(model)
    tensors = tensors_of(inner)
    if unknown := sum(id(tensor) not in names for tensor in tensors):
        raise ValueError(f"attach_zero: {unknown} of {len(tensors)} parameters are not of this {type(model).__name__}")
    pieces = {tensor: [FlatPiece(names[id(tensor)], 0, 0, tensor.numel())] for tensor in tensors}
    inner.attach_pieces(
        pieces,
        {name: param.shape for name, param in model.named_parameters()},
        # Every process has all gradients, but its inner optimizer has only some parameters, of a group perhaps none.
        has_gradients=lambda index: any(param.grad is not None for param in zero.param_groups[index]["params"]),
    )

    def set_epoch(epoch: int) -> None:
        type(inner).set_epoch(inner, epoch)
        wrapper: Any = zero
        wrapper._sync_param_groups(inner.param_groups, zero.param_groups)

    inner.set_epoch = set_epoch
    load = zero.load_state_dict

    def load_state_dict(state_dict: dict[str, Any]) -> None:
        # The wrapper would accept the file's policies and seed silently, keep its tensors, and empty its state.
        state_dict = {**state_dict, "state": copy.deepcopy(state_dict["state"])}
        load(load_state.prepare(state_dict, zero.param_groups, strict=inner.strict))
        inner.reloaded()

    zero.load_state_dict = load_state_dict  # type: ignore[method-assign]
