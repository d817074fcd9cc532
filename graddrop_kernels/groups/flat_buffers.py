"""FlatBuffers: the pieces of parameters in the flat tensors that engines put among an optimizer's parameters."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .names import canonical_name


class FlatPiece(NamedTuple):
    """A contiguous range of a flat buffer that belongs to one parameter."""

    name: str  # the parameter's, as in model.named_parameters()
    local_start: int  # its first element in the buffer
    global_start: int  # the same element in the whole parameter, in contiguous order
    numel: int


Flat = Mapping[torch.Tensor, Sequence[FlatPiece]]  # what was attached to the flat buffers among the parameters


class FlatBuffers:
    """The flat buffers of an optimizer, with everything that `attach_pieces()` was given about them."""

    def __init__(self) -> None:
        self.pieces: dict[torch.Tensor, tuple[FlatPiece, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] | None = None  # of all parameters, where this process has only some
        self.last: frozenset[torch.Tensor] = frozenset()  # see attach_pieces(last=)
        self.has_gradients: Callable[[int], bool] = lambda index: False  # see attach_pieces(has_gradients=)
        # The ids of the tensors given by the user that are no nn.Parameters. None before note(): all count as given. No
        # references: strong ones would keep replaced tensors alive, and torch does not swap what has weak ones.
        self._given: set[int] | None = None

    def attach(
        self, pieces: Mapping[torch.Tensor, Sequence[FlatPiece]], shapes: Mapping[str, Sequence[int]] | None,
        last: Iterable[torch.Tensor], has_gradients: Callable[[int], bool] | None,
    ) -> None:  # fmt: skip
        """Keeps pieces that check_pieces() has checked."""
        self.pieces = self.pieces | {tensor: tuple(map(FlatPiece._make, own)) for tensor, own in pieces.items()}
        self.last |= frozenset(last)
        self.has_gradients = has_gradients or self.has_gradients
        if shapes is not None:
            self.shapes = {canonical_name(name): tuple(shape) for name, shape in shapes.items()}

    def note(self, groups: list[dict[str, Any]]) -> None:
        """Notes the last group's tensors as given by the user. Tensors that come into a group later are an engine's."""
        new = groups if self._given is None else groups[-1:]
        params = (param for group in new for param in group["params"])
        self._given = set() if self._given is None else self._given
        self._given.update(id(param) for param in params if not isinstance(param, nn.Parameter))

    def of_copies(self) -> "FlatBuffers":
        """Returns the same for copies of the parameters, as a compiled graph makes them. All of them count as given."""
        same = copy.copy(self)
        same._given = None
        return same

    def reason(self, param: torch.Tensor) -> str | None:
        """The reason why a parameter must not be stepped before ``attach_pieces``, or None.

        It is a flat buffer of unknown parameters, and a mask drawn for it would depend on the sharding.
        """
        if param in self.pieces:
            return None
        if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
            return "it is (a slice of) a flat parameter of FSDP1: call graddrop_kernels.attach_fsdp1(optimizer, model)"
        if self._given is not None and _may_be_flat(param) and id(param) not in self._given:
            return (
                "something has put this flat tensor in the place of the parameters: if it was DeepSpeed (ZeRO 1, 2 or "
                "3), call graddrop_kernels.attach_deepspeed(engine) after deepspeed.initialize(); otherwise tell what "
                "it holds with optimizer.attach_pieces()"
            )
        return None

    def completes_step(self, group: dict[str, Any]) -> bool:
        """Whether stepping the group's present parameters is the group's last call of ``step()`` in a training step."""
        return not self.last or any(param in self.last for param in group["params"])


def _may_be_flat(tensor: torch.Tensor) -> bool:
    """Whether it could be a buffer of an engine. DeepSpeed's buffers are vectors and no nn.Parameters."""
    return not isinstance(tensor, nn.Parameter) and tensor.dim() == 1 and not hasattr(tensor, "placements")


def check_pieces(buffer: torch.Tensor, pieces: Sequence[FlatPiece]) -> None:
    """Raises ValueError for pieces that overlap, are out of order, or are not in the buffer."""
    end = 0
    for piece in map(FlatPiece._make, pieces):
        if not end <= piece.local_start <= piece.local_start + piece.numel <= buffer.numel() or piece.global_start < 0:
            raise ValueError(
                f"{piece} does not fit into a flat buffer of {buffer.numel()} elements of which the first {end} are "
                "taken: pieces are given in order and do not overlap"
            )
        end = piece.local_start + piece.numel
