"""Whether a CUDA graph is being captured."""

import torch

UNPREPARED = (
    "a step can be captured in a CUDA graph after one that was like it: call step() once before, outside of the graph, "
    "with the gradients, options and epoch of the step to capture; once before each capture, if there are several"
)


def capturing(device: torch.device) -> bool:
    """Whether launches on the device are being recorded in a CUDA graph instead of run. Each device has a current
    stream of its own.
    """
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
