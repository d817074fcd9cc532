"""Training checkpoints, written whole or not at all, read back without executing anything."""

import os
from pathlib import Path

import torch


def save(path: Path, contents: dict) -> None:
    """Writes tensors and plain values to ``path``. A run killed at any moment leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")  # one name: the next save overwrites what a killed one left
    with temporary.open("wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())  # otherwise a power cut could leave an empty file under the name
    os.replace(temporary, path)


def load(path: Path) -> dict:
    """Reads what ``save`` wrote, to the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def rng_state() -> list[torch.Tensor]:
    """Returns the state of torch's generators: the CPU's, then each CUDA device's. Only dropout draws from them
    here.
    """
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_rng_state(states: list[torch.Tensor]) -> None:
    """Restores ``rng_state()``."""
    torch.set_rng_state(states[0])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states[1:])
