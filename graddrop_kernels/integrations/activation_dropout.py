"""Warns of dropout on activations, which the paper turns off where gradients are masked."""

import warnings

from torch import nn

from .optimizer_of import Masked

_RATES = ("hidden_dropout_prob", "dropout", "resid_pdrop")  # of BERT and its relatives, BART and T5, GPT-2


def warn_of_activation_dropout(model: nn.Module | None, optimizer: Masked) -> None:
    """Warns if gradients are masked and the config of the model, or of a module in it, drops out hidden activations."""
    configs = [getattr(module, "config", None) for module in model.modules()] if model is not None else []
    rates = [(name, getattr(config, name, 0)) for config in configs for name in _RATES]
    on = {name: rate for name, rate in rates if isinstance(rate, float) and rate > 0}
    if on and any(group["mask"] is not None for group in optimizer.param_groups):
        warnings.warn(
            f"the model drops out activations ({on}) beside masked gradients; the paper turns it off: set it to 0 in "
            "the model's config",
            stacklevel=3,
        )
