"""Uses the public names as a user does, for mypy --strict in test_packaging.py. Not run.

Each ``type: ignore`` marks a mistake that must be found: strict mode refuses those that are not needed.
"""

from collections.abc import Callable

import torch
from typing_extensions import assert_type

from graddrop_kernels import (
    ExponentialAnneal,
    FixedMask,
    FusedGradDropAdamW,
    GaussianGradDrop,
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    attach_fsdp1,
    attach_mask,
    attach_zero,
    available_backends,
    describe,
    find_blocks,
    param_groups,
)

model = torch.nn.Linear(4, 2)
block: tuple[str, torch.nn.Module] = find_blocks(model, layers=["layer.*", model])[0]
optimizer = FusedGradDropAdamW(param_groups(model, exclude="*.bias", layers="layer.*"), lr=2e-5, mask=GradDrop(p=0.2))
FusedGradDropAdamW(model.parameters(), torch.tensor(1e-3), (0.9, 0.99), moment_dtype=torch.float32, mask=None)
FusedGradDropAdamW(model.named_parameters(), max_grad_norm=1.0, backend="reference")
FusedGradDropAdamW([{"params": model.parameters(), "mask": LayerGradDrop(0.5, layers=("layer.*",))}])

half: Callable[[int], float] = lambda epoch: 0.5 / (epoch + 1)
policies = [GradDrop(half), GradDrop(LinearAnneal(10), every="epoch"), GaussianGradDrop(ExponentialAnneal(0.5, 0.9))]
FusedGradDropAdamW(model.parameters(), mask=GradDropEpoch(epochs=4, toggle=True))
FusedGradDropAdamW(model.parameters(), mask=GradFreeze(4, direction="bottom_up"))
FusedGradDropAdamW(model.parameters(), mask=FixedMask({"weight": torch.ones(2, 4, dtype=torch.bool)}))
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, half)


def closure() -> torch.Tensor:
    return model(torch.ones(1, 4)).sum()  # type: ignore[no-any-return]  # a module's call is Any in torch


with optimizer.skip_dropped(model):
    closure().backward()  # type: ignore[no-untyped-call]  # torch's
assert_type(optimizer.step(), None)
assert_type(optimizer.step(closure), torch.Tensor)
assert_type(optimizer.step(lambda: 0.5), float)
optimizer.set_epoch(1)
assert_type(optimizer.mask("weight", step=0), torch.Tensor)
assert_type(optimizer.active_fraction(), list[float])
assert_type(optimizer.grad_norm, torch.Tensor | None)
assert_type(describe(optimizer), str)
assert_type(available_backends(), tuple[str, ...])
optimizer.load_state_dict(optimizer.state_dict(), strict=False)
handle = optimizer.step_in_backward()
handle.remove()
attach_fsdp1(optimizer, model)
masks = attach_mask(torch.optim.SGD(model.parameters()), GradDrop(p=0.2), model=model)
masks.set_epoch(1)
assert_type(masks.mask("weight"), torch.Tensor)
assert_type(masks.active_fraction(), list[float])

FusedGradDropAdamW(model.parameters(), mask=0.2)  # type: ignore[arg-type]
FusedGradDropAdamW(model.parameters(), moment_dtype="float32")  # type: ignore[arg-type]
GradDrop(p="0.2")  # type: ignore[arg-type]
LinearAnneal(epochs=1.5)  # type: ignore[arg-type]
optimizer.set_epoch("1")  # type: ignore[arg-type]
optimizer.mask(0)  # type: ignore[arg-type]
describe(torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]
attach_zero(optimizer, model)  # type: ignore[arg-type]
attach_mask(model, GradDrop(p=0.2))  # type: ignore[arg-type]
optimizer.no_such_method()  # type: ignore[attr-defined]
