"""A model's weights as a whole, also when its processes hold a shard each; their fingerprint."""

import hashlib

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """{name without wrappers: CPU tensor}; of a sharded model, on the first process only (others get {})."""
    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # What is on the CPU already comes back as it is: the copy must not follow the training.
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def restore(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load what ``whole`` gave, on every process from the first one's."""
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=parallel))


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """sha256 over names and bits, in the order of names: two runs with the same one have the same weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
