"""The tensors to step: one set, shared by all variants of a measurement."""

import functools
from dataclasses import dataclass

import torch

from .shapes import Named

MODES = {  # dtypes of parameters and gradients, of moments
    "float32": (torch.float32, torch.float32),
    "bfloat16, float32 moments": (torch.bfloat16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
}
STEPS_BEFORE = 1000.0


@dataclass
class Tensors:
    """Parameters with gradients and warm moments, shared by all variants: one set for each would not fit into
    memory.
    """

    named: list[tuple[str, torch.nn.Parameter]]
    blocks: list[str | None]
    moments: list[tuple[torch.Tensor, torch.Tensor]]
    kept_grads: list[torch.Tensor] | None = None

    @property
    def params(self) -> list[torch.nn.Parameter]:
        return [param for _, param in self.named]

    @property
    def device(self) -> torch.device:
        return self.named[0][1].device

    @property
    def numel(self) -> int:
        return sum(param.numel() for _, param in self.named)

    @functools.cached_property
    def torchs_moments(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Moments in the parameters' dtype, as torch keeps them."""
        return [tuple(moment.to(param.dtype) for moment in pair) for param, pair in zip(self.params, self.moments)]

    def twin(self) -> "Tensors":
        """Returns the same values in new tensors."""
        named = []
        for name, param in self.named:
            copy = torch.nn.Parameter(param.detach().clone())
            copy.grad = param.grad.clone()
            named.append((name, copy))
        return Tensors(named, self.blocks, [tuple(moment.clone() for moment in pair) for pair in self.moments])

    def keep_grads(self) -> None:
        """Remembers the gradients for ``restore_grads``."""
        self.kept_grads = self.kept_grads or [param.grad.clone() for param in self.params]

    def restore_grads(self) -> None:
        """Undoes the changes that a masking peer made to the gradients."""
        torch._foreach_copy_([param.grad for param in self.params], self.kept_grads)

    def attach(self, optimizer, dtype: torch.dtype, step_device: torch.device) -> torch.optim.Optimizer:
        """Gives the optimizer the shared moments of that dtype and step counts of its own."""
        pairs = self.moments if dtype == self.moments[0][0].dtype else self.torchs_moments
        for param, (exp_avg, exp_avg_sq) in zip(self.params, pairs):
            step = torch.tensor(STEPS_BEFORE, device=step_device)
            optimizer.state[param] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return optimizer


def make_tensors(shapes: list[Named], mode: str, device: torch.device | str = "cpu") -> Tensors:
    """Makes random parameters, gradients and moments, never the zeros of a fresh optimizer."""
    dtype, moment_dtype = MODES[mode]

    def draw(shape, scale: float, of: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=of, device=device).mul_(scale)

    tensors = Tensors([], [block for _, block, _ in shapes], [])
    for name, _, shape in shapes:
        param = torch.nn.Parameter(draw(shape, 0.02, dtype))
        param.grad = draw(shape, 1e-3, dtype)
        tensors.named.append((name, param))
        tensors.moments.append((draw(shape, 1e-3, moment_dtype), draw(shape, 1e-3, moment_dtype).square_()))
    return tensors


def bytes_per_param(mode: str) -> int:
    """Returns 28, 22 or 14: read p, g, m, v; write p, m, v."""
    dtype, moment_dtype = MODES[mode]
    return 3 * dtype.itemsize + 4 * moment_dtype.itemsize
