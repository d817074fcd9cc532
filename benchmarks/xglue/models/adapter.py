"""LoRA in an encoder, by peft."""

import torch
from torch import nn

from graddrop_kernels.demo.methods import is_head

RANK, ALPHA = 8, 16


def add_lora(model: nn.Module, seed: int) -> None:
    """Adds LoRA to the layers that peft chooses for the model (BERT's queries and values). It and the head are trained,
    nothing else. Draws nothing from torch's own generator.
    """
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA), model)
    for name, param in model.named_parameters():
        if is_head(model, name):
            param.requires_grad_(True)
