"""Whether a CUDA graph is being captured."""

import torch


def capturing(device: torch.device) -> bool:
    """Whether launches on the device are being recorded in a CUDA graph instead of run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
