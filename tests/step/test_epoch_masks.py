"""GradDrop-Epoch and other policies of epochs: what is trained when, how old it is, how far its first step goes."""

import warnings

import pytest
import torch
from cases import (
    ENGINES,
    EXACT,
    F32,
    FUSED,
    Training,
    assert_same_bits,
    assert_same_tensors,
    fused_engines,
)

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradDropEpoch, GradFreeze, LayerGradDrop, LinearAnneal
from graddrop_kernels.backends import cpu
from graddrop_kernels.masks.bitmask import element_buckets
from graddrop_kernels.masks.philox import stream_key

STORAGES = pytest.mark.parametrize("storage", ["bitpacked", "recompute"])
EPOCHS = pytest.mark.parametrize("epochs", [2, 3, 5, 12, 20, 70])
NUMEL = 4099


def random_values(seed: int, *sizes: int):
    generator = torch.Generator().manual_seed(seed)
    return [(f"layers.{i}.weight", torch.randn(size, generator=generator)) for i, size in enumerate(sizes)], generator


def masks_by_epoch(policy, epochs: int, seed: int, backend: str) -> list[torch.Tensor]:
    param = torch.nn.Parameter(torch.zeros(NUMEL))
    optimizer = FusedGradDropAdamW([("w", param)], mask=policy, seed=seed, backend=backend)
    masks = []
    for epoch in range(epochs):
        optimizer.set_epoch(epoch)
        masks.append(optimizer.mask(param))
    return masks


@STORAGES
@EPOCHS
def test_buckets_accumulate_until_everything_is_trained(epochs, storage, seed, backend):
    masks = masks_by_epoch(GradDropEpoch(epochs, storage=storage), epochs, seed, backend)
    for before, after in zip(masks, masks[1:]):
        assert (before <= after).all() and (before < after).any()  # what is trained stays trained, and more comes to it
    assert masks[-1].all() and not masks[0].all() and masks[0].any()
    bucket = element_buckets(stream_key("w", seed), epochs, 0, NUMEL)
    for epoch, mask in enumerate(masks):
        assert_same_bits(mask, bucket <= epoch, f"epoch {epoch}")


@STORAGES
@EPOCHS
def test_toggled_epochs_are_disjoint_and_complete(epochs, storage, seed, backend):
    masks = masks_by_epoch(GradDropEpoch(epochs, toggle=True, storage=storage), epochs, seed, backend)
    assert (torch.stack(masks).sum(0) == 1).all()
    bucket = element_buckets(stream_key("w", seed), epochs, 0, NUMEL)
    for epoch, mask in enumerate(masks):
        assert mask.any()
        assert_same_bits(mask, bucket == epoch, f"epoch {epoch}")


@pytest.mark.parametrize("epochs", [3, 12, 64])
def test_bucket_sizes_are_binomial(epochs, seed):
    count = 1 << 20
    sizes = element_buckets(stream_key("w", seed), epochs, 0, count).bincount(minlength=epochs).double()
    share = torch.tensor(
        [(-(-65536 * (b + 1) // epochs) - -(-65536 * b // epochs)) / 65536 for b in range(epochs)]
    ).double()
    assert share.sum() == 1 and sizes.sum() == count
    deviation = (sizes - count * share) / (count * share * (1 - share)).sqrt()
    assert deviation.abs().max() < 7, f"{deviation.abs().max():.2f} standard deviations"  # 2.6e-12 each
    policy = GradDropEpoch(epochs)
    optimizer = FusedGradDropAdamW([("w", torch.nn.Parameter(torch.zeros(count)))], mask=policy, seed=seed)
    optimizer.set_epoch(epochs // 2)
    assert optimizer.active_fraction()[0] == pytest.approx(share[: epochs // 2 + 1].sum().item(), abs=1e-12)


# Epochs of different lengths; one visited twice, one left out, and on past the last. Numbers of steps in them.
VISITS = [(0, 3), (1, 2), (2, 4), (1, 2), (3, 1), (0, 2), (4, 3), (6, 2), (9, 2)]


def visits(training: Training, values, generator: torch.Generator):
    """Steps a training through VISITS; yields (epoch, gradients) after each step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # past the last epoch
        for epoch, steps in VISITS:
            for _ in range(steps):
                grads = [torch.randn(value.shape, generator=generator) for _, value in values]
                training.step(grads, epoch)
                yield epoch, grads


@pytest.mark.parametrize("toggle", [False, True])
@pytest.mark.parametrize("epochs", [3, 5, 12])
def test_bitpacked_and_recomputed_training_are_the_same_bits(epochs, toggle, seed):
    for engine in [*fused_engines((F32, F32)), EXACT]:
        results = []
        for storage in ("bitpacked", "recompute"):
            values, generator = random_values(seed, 1, 33, NUMEL, 0, 70)
            training = Training(
                values, engine, seed, lr=1e-2, amsgrad=True, mask=GradDropEpoch(epochs, toggle, storage)
            )
            results.append([training.tensors() for _ in visits(training, values, generator)])
        for step, (packed, drawn) in enumerate(zip(*results)):
            assert_same_tensors(packed, drawn, f"{engine} after step {step}")


class PlainByUnit:
    """One plain AdamW for each unit of a training, which steps only when the unit is active: what frozen masks mean."""

    def __init__(self, values, engine, units: int, **arguments):
        self.trainings = [Training(values, engine, mask=None, **arguments) for _ in range(units)]

    def step(self, grads, active: list[bool]) -> None:
        for training, is_active in zip(self.trainings, active):
            if is_active:
                training.step(grads)

    def tensors(self, unit_of: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each element of a tensor from the training of its unit."""
        every = [training.tensors() for training in self.trainings]
        names = {name for tensors in every for name in tensors if not name.startswith("step of")}
        together = {}
        for name in names:
            unit = unit_of[name.split(" ")[-1]]
            known = next(tensors[name] for tensors in every if name in tensors)
            rows = torch.stack([tensors.get(name, torch.zeros_like(known)) for tensors in every])
            together[name] = rows.gather(0, unit.unsqueeze(0)).squeeze(0)
        return together


def assert_equals_plain_by_unit(training, plain, unit_of, what):
    ours = training.tensors()
    for name, expected in plain.tensors(unit_of).items():
        assert_same_bits(ours[name], expected, f"{what}: {name}")


@pytest.mark.parametrize("toggle", [False, True])
@pytest.mark.parametrize("epochs", [2, 5, 9])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_every_bucket_trains_as_plain_adamw_over_its_own_active_steps(epochs, toggle, amsgrad, seed):
    """What bias_correction="active" means: bucket b is AdamW that saw only the steps in which b was active.

    Bit for bit, so a bucket's age counts its own active steps, over epochs visited again, left out, and past the last.
    """
    hyper = {"lr": 3e-3, "betas": (0.85, 0.97), "weight_decay": 0.05, "amsgrad": amsgrad}
    for engine in [*fused_engines((F32, F32)), EXACT]:
        values, generator = random_values(seed, 5, 601, 64)
        training = Training(values, engine, seed, mask=GradDropEpoch(epochs, toggle), **hyper)
        plain = PlainByUnit(values, engine, epochs, **hyper)
        unit_of = {name: element_buckets(stream_key(name, seed), epochs, 0, value.numel()) for name, value in values}
        for epoch, grads in visits(training, values, generator):
            last = min(epoch, epochs - 1)
            plain.step(grads, [bucket == last if toggle else bucket <= last for bucket in range(epochs)])
            assert_equals_plain_by_unit(training, plain, unit_of, f"{engine} in epoch {epoch}")


@pytest.mark.parametrize(
    "policy",
    [
        GradFreeze(epochs=4, direction="top_down", layers="layers.*"),
        GradFreeze(epochs=7, direction="bottom_up", layers="layers.*"),
        GradFreeze(epochs=9, direction="top_down", blocks_per_epoch=2, layers="layers.*"),
    ],
    ids=lambda policy: f"{policy.direction}-{policy.epochs}-{policy.blocks_per_epoch}",
)
def test_every_frozen_block_trains_as_plain_adamw_over_its_own_active_steps(policy, seed):
    hyper = {"lr": 3e-3, "betas": (0.85, 0.97), "weight_decay": 0.05}
    blocks = 6

    def active(block: int, epoch: int) -> bool:
        count = (
            policy.blocks_per_epoch * (epoch + 1)
            if policy.blocks_per_epoch
            else -(-blocks * (epoch + 1) // policy.epochs)
        )
        return block >= blocks - count if policy.direction == "top_down" else block < count

    for engine in [*fused_engines((F32, F32))[:1], EXACT]:
        values, generator = random_values(seed, *[40] * blocks)
        training = Training(values, engine, seed, mask=policy, **hyper)
        plain = PlainByUnit(values, engine, blocks, **hyper)
        unit_of = {name: torch.full((40,), block) for block, (name, _) in enumerate(values)}
        trained = torch.zeros(blocks)
        for epoch, grads in visits(training, values, generator):
            plain.step(grads, [active(block, epoch) for block in range(blocks)])
            assert_equals_plain_by_unit(training, plain, unit_of, f"{engine} in epoch {epoch}")
            trained += torch.tensor([float(active(block, epoch)) for block in range(blocks)])
            assert [training.optimizer.state[param]["step"].item() for param in training.params] == trained.tolist()


def test_randomly_frozen_blocks_train_as_plain_adamw_over_their_own_active_steps(seed):
    """LayerGradDrop(masked="frozen"), a new draw every step."""
    values, generator = random_values(seed, *[40] * 5)
    for engine in [*fused_engines((F32, F32))[:1], EXACT]:
        training = Training(
            values, engine, seed, mask=LayerGradDrop(p=0.5, layers="layers.*"), masked="frozen", lr=1e-2
        )
        plain = PlainByUnit(values, engine, 5, lr=1e-2)
        unit_of = {name: torch.full((40,), block) for block, (name, _) in enumerate(values)}
        for step in range(25):
            masks = training.masks()
            assert all(mask.all() or not mask.any() for mask in masks)
            grads = [torch.randn(40, generator=generator) for _ in range(5)]
            training.step(grads)
            plain.step(grads, [bool(mask.all()) for mask in masks])
            assert_equals_plain_by_unit(training, plain, unit_of, f"{engine}, step {step}")


def first_active_steps(bias_correction: str, seed: int, steps: int) -> tuple[float, float, float]:
    """(largest |update| / lr of any element in its first active step; in epoch 0; ever) under a constant gradient,
    ``steps`` steps an epoch.
    """
    lr, epochs = 1e-3, 3
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(600, generator=generator)
    grad = grad.sign() * grad.abs().clamp(min=1e-3)
    training = Training(
        [("w", torch.zeros(600))],
        ENGINES[0],
        seed,
        lr=lr,
        weight_decay=0.0,
        mask=GradDropEpoch(epochs),
        bias_correction=bias_correction,
    )
    bucket = element_buckets(stream_key("w", seed), epochs, 0, 600)
    first, ever = [], 0.0
    for epoch in range(epochs):
        for step in range(steps):
            before = training.params[0].detach().clone()
            training.step([grad], epoch)
            update = ((training.params[0].detach() - before).abs() / lr).cpu()
            ever = max(ever, update.max().item())
            if step == 0:
                first.append(update[bucket == epoch].max().item())
    return max(first), first[0], ever


def test_unfreezing_takes_no_jump(seed):
    """A late element's first steps are lr-sized, as those of any AdamW; counting all steps instead makes them more
    than twice as long.
    """
    first, at_start, ever = first_active_steps("active", seed, 700)
    assert at_start <= 1.0001 and first <= 1.0001 and ever <= 1.01, (first, at_start, ever)
    first, at_start, ever = first_active_steps("global", seed, 700)
    assert at_start <= 1.0001 and first > 2 and ever > 3, (first, at_start, ever)


def test_epochs_past_the_last_stay_there(seed, backend):
    """GradDropEpoch trains everything; Toggle goes on with its last bucket and says so, once."""
    param = torch.nn.Parameter(torch.zeros(NUMEL))
    optimizer = FusedGradDropAdamW([("w", param)], mask=GradDropEpoch(4), seed=seed, backend=backend)
    for epoch in (3, 4, 100):
        optimizer.set_epoch(epoch)
        assert optimizer.mask(param).all()
    optimizer = FusedGradDropAdamW([("w", param)], mask=GradDropEpoch(4, toggle=True), seed=seed, backend=backend)
    optimizer.set_epoch(3)
    last = optimizer.mask(param)
    with pytest.warns(UserWarning, match="GradDropEpoch"):
        optimizer.set_epoch(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.set_epoch(100)
    assert_same_bits(optimizer.mask(param), last)
    freeze = FusedGradDropAdamW(
        [("layers.0.w", param)], mask=GradFreeze(3, layers="layers.*"), seed=seed, backend=backend
    )
    freeze.set_epoch(50)
    assert freeze.mask(param).all()


def test_masks_of_an_epoch_hold_all_through_it_and_change_with_the_next(seed, backend):
    """every="epoch": redrawn at every epoch, with replacement, and the same again when an epoch is visited again."""
    param = torch.nn.Parameter(torch.zeros(NUMEL))
    optimizer = FusedGradDropAdamW([("w", param)], mask=GradDrop(p=0.5, every="epoch"), seed=seed, backend=backend)
    masks = {}
    for epoch in (0, 1, 2, 1, 0):
        optimizer.set_epoch(epoch)
        for _ in range(2):
            mask = optimizer.mask(param)
            assert_same_bits(mask, masks.setdefault(epoch, mask), f"epoch {epoch}")
            param.grad = torch.ones(NUMEL)
            optimizer.step()
    for a, b in ((0, 1), (1, 2), (0, 2)):  # agree in half of the elements: 2050 +- 32
        assert abs((masks[a] == masks[b]).sum().item() - NUMEL / 2) < 7 * NUMEL**0.5 / 2


def test_annealed_masks_follow_the_schedule(seed, backend):
    """p by epoch, the draws by step: as p falls, an element's draw of that step is compared with a lower threshold."""
    schedule = LinearAnneal(epochs=4, start=0.8, end="zero")
    param = torch.nn.Parameter(torch.zeros(1 << 16))
    optimizer = FusedGradDropAdamW([("w", param)], mask=GradDrop(p=schedule), seed=seed, backend=backend)
    before = torch.zeros(1 << 16, dtype=torch.bool)
    for epoch, p in enumerate((0.8, 0.8 * 2 / 3, 0.8 / 3, 0.0)):
        optimizer.set_epoch(epoch)
        mask = optimizer.mask(param, step=0)
        share = mask.double().mean().item()
        assert abs(share - (1 - p)) < 7 * (max(p * (1 - p), 1e-9) / (1 << 16)) ** 0.5 + 2.0**-16, (
            f"epoch {epoch} keeps {share}"
        )
        assert (before <= mask).all()  # one draw, falling thresholds
        before = mask
    assert mask.all()


def test_planes_do_not_depend_on_the_instruction_set(seed):
    """The stored planes of an optimizer, made under one instruction set, mean the same under another in the middle
    of a training.
    """
    engines = [engine for engine in FUSED if engine.isa]
    values, _ = random_values(seed, NUMEL, 31)
    trainings = [
        Training(values, EXACT, seed, mask=GradDropEpoch(5)),
        Training(values, engines[0], seed, mask=GradDropEpoch(5)),
    ]
    generator = torch.Generator().manual_seed(seed + 1)
    for step in range(2 * len(engines)):
        grads = [torch.randn(value.shape, generator=generator) for _, value in values]
        trainings[0].step(grads, 2)
        with cpu.using_isa(engines[step % len(engines)].isa):
            trainings[1].engine = engines[step % len(engines)]
            trainings[1].step(grads, 2)
        assert_same_tensors(
            trainings[1].tensors(), trainings[0].tensors(), f"{engines[step % len(engines)]}, step {step}"
        )
