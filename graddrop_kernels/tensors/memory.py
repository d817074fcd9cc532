"""Memory of tensors: strides, overlaps, storages that are too short. The kernels get addresses and trust them."""

from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_marked(tensor: torch.Tensor) -> bool:
    """Whether it is a view that torch negates or conjugates when it is read, or a tensor of zeros without memory."""
    return tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor()


def lies_as(tensor: torch.Tensor, stride: tuple[int, ...] | None) -> bool:
    """Whether the tensor's memory holds its values in the order of these strides; None: in that of their indices."""
    if stride is None:
        return tensor.is_contiguous() and not is_marked(tensor)
    alike = (own == other or size == 1 for own, other, size in zip(tensor.stride(), stride, tensor.shape))
    return all(alike) and not is_marked(tensor)


def laid_out(tensor: torch.Tensor, stride: tuple[int, ...] | None) -> torch.Tensor:
    """A copy with the same values and these strides; None: contiguous. It negates and conjugates values where a view
    only marks it.
    """
    if stride is None:
        return tensor.clone(memory_format=torch.contiguous_format)
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether the tensor is one of FakeTensorMode, which has facts and no memory."""
    return isinstance(tensor, FakeTensor)


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """A complex tensor as pairs of real numbers in the same memory; any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def reach(tensor: torch.Tensor) -> int:
    """The number of bytes from a strided tensor's first element to the end of its last."""
    return tensor.element_size() * (1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape)))


def needed_bytes(tensor: torch.Tensor) -> int:
    """The size of the smallest storage that a strided tensor fits into. 0 if it has no elements, or only zeros."""
    if not tensor.numel() or tensor._is_zerotensor():
        return 0
    return int(tensor.storage_offset()) * tensor.element_size() + reach(tensor)


def storage_bytes(tensors: list[torch.Tensor]) -> Iterator[int]:
    """The size of each tensor's storage."""
    return map(torch.UntypedStorage.nbytes, map(torch.Tensor.untyped_storage, tensors))


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of a strided tensor may share memory. The answer is exact for expanded, transposed and
    sliced tensors, and on the safe side for others.
    """
    span = 0  # the farthest offset that the smaller strides reach
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride <= span:
                return tensor.numel() > 1
            span += stride * (size - 1)
    return False


def check_memory(what: str, tensor: torch.Tensor) -> None:
    """Raises TypeError, ValueError or RuntimeError for a tensor without the memory that its shape needs."""
    if tensor.device.type == "meta":  # the first words are torch's
        raise RuntimeError(
            "`fused=True` requires all the params to be floating point Tensors of supported devices, but "
            f"{what} is on the meta device, without memory: move the model with to_empty(device=...), load its weights"
        )
    if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor) or is_fake(tensor):
        raise TypeError(
            f"{what} is a {type(tensor).__name__} of layout {tensor.layout} on {tensor.device}, which has no memory of "
            "its own to step in; give the optimizer a plain tensor"
        )
    if needed := needed_bytes(tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes() < needed or storage.data_ptr() == 0:
            raise ValueError(
                f"{what} needs {needed} bytes, but its storage has {storage.nbytes()}: it was freed or resized; "
                "step while it is allocated"
            )


def turns_of(memory: list[tuple[int, int]]) -> dict[int, int]:
    """{position: turn} of the spans of addresses that overlap others. Each turn needs a batch of its own, since the
    threads of one batch would step them at the same time.
    """
    spans = sorted((start, stop, position) for position, (start, stop) in enumerate(memory) if start < stop)
    shared: set[int] = set()
    end = last = 0
    for start, stop, position in spans:
        if start < end:
            shared |= {last, position}
        if stop > end:
            end, last = stop, position
    return {position: turn for turn, position in enumerate(sorted(shared), 1)}
