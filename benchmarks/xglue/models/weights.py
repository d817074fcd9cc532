"""A model's whole weights, even if each of its processes holds a shard, and their fingerprint."""

import hashlib

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns {name without wrappers: CPU tensor}; for a sharded model, on the first process only (others get {})."""
    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # Cloned, as tensors on the CPU come back as they are and would change with the training.
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def restore(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Loads what ``whole`` returned, on every process from the first one's."""
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=parallel))


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """Returns the sha256 of names and bits, in the order of names: runs with equal weights have equal ones."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
