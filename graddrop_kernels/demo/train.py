"""Fine-tunes, so that a run killed at any moment resumes to the same bits; evaluates."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from . import checkpoint
from .methods import Settings, active_share, is_head

MAX_NORM = 1.0  # gradient clipping of the pretrained body
WARMUP = 0.1  # share of the steps in which the learning rate rises; it falls linearly to 0 afterwards
BUCKET = 8  # batches whose sentences are sorted by length together, for little padding


@dataclass
class Examples:
    """Token ids and label indices of sentences, as parallel lists."""

    ids: list[list[int]]
    labels: list[int]


@dataclass
class Progress:
    """Progress of the training: the epoch, the batches done in it, and one value per step of what was recorded.

    active is the share of the blocks' elements that the step did not drop.
    """

    epoch: int = 0
    position: int = 0
    losses: list[float] = field(default_factory=list)
    active: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return len(self.losses)


def epoch_batches(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Returns the batches of an epoch, lists of sentence indices. Saves no state: they are a pure function of the
    arguments.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths)).tolist()
    bucket = BUCKET * batch_size
    for start in range(0, len(order), bucket):
        order[start : start + bucket] = sorted(order[start : start + bucket], key=lengths.__getitem__)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def collate(ids: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Pads to int64 ``input_ids`` and ``attention_mask`` of shape (sentences, longest)."""
    rows = [torch.tensor(row) for row in ids]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in ids])
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    return {"input_ids": padded.to(device), "attention_mask": mask.to(device)}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Casts to bfloat16 where the operators allow it; does nothing unless ``precision`` is bf16."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def linear_schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Makes learning rates that rise over the first WARMUP of the steps, then fall linearly to 0 after the last."""
    warmup = max(1, round(WARMUP * steps))

    def factor(step: int) -> float:
        return (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: Examples,
    pad: int,
    settings: Settings,
    file: Path,
    *,
    resume: bool = False,
    save_every: int = 0,
    max_steps: int | None = None,
) -> Progress:
    """Trains in place. ``file`` gets a checkpoint after every epoch, every ``save_every`` steps, and at ``max_steps``.

    Args:
        pad: token id to pad sentences with.
        resume: continue from ``file``, if there is one, to the bits of a run that was never interrupted (on the same
            machine, with the same number of threads). Otherwise an old file is removed.
        save_every: 0 for no checkpoints within epochs.
        max_steps: stop when this many steps are done in all. The learning rates stay those of the whole run.

    Raises:
        ValueError: the checkpoint was made with other settings.
    """
    if not resume:
        file.unlink(missing_ok=True)
    device = next(model.parameters()).device
    lengths = [len(ids) for ids in examples.ids]
    steps_per_epoch = -(-len(lengths) // settings.batch_size)
    total = steps_per_epoch * settings.epochs
    stop = total if max_steps is None else min(total, max_steps)
    body = [param for name, param in model.named_parameters() if not is_head(model, name)]
    schedule = linear_schedule(optimizer, total)
    progress = _restore(file, settings, model, optimizer, schedule) if file.exists() else Progress()

    model.train()
    started = time.perf_counter() - progress.seconds
    with tqdm(total=total, initial=progress.step, desc=settings.method, unit="step", mininterval=0.5) as bar:
        while progress.step < stop:
            optimizer.set_epoch(progress.epoch)
            batches = epoch_batches(lengths, settings.batch_size, settings.seed, progress.epoch)
            for indices in batches[progress.position :]:
                batch = collate([examples.ids[i] for i in indices], pad, device)
                labels = torch.tensor([examples.labels[i] for i in indices], device=device)
                with autocast(device, settings.precision):
                    logits = model(**batch).logits
                loss = nn.functional.cross_entropy(logits.float(), labels)
                loss.backward()
                nn.utils.clip_grad_norm_(body, MAX_NORM)
                progress.active.append(active_share(optimizer))
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()

                progress.losses.append(loss.item())
                progress.position += 1
                progress.seconds = time.perf_counter() - started
                shown = {"loss": f"{loss.item():.3f}", "kept": f"{progress.active[-1]:.2f}"}
                bar.set_postfix(epoch=progress.epoch + 1, refresh=False, **shown)
                bar.update()
                if progress.position == len(batches):
                    progress.epoch, progress.position = progress.epoch + 1, 0
                due = save_every and progress.step % save_every == 0
                if progress.position == 0 or progress.step == stop or due:
                    _save(file, settings, progress, model, optimizer, schedule)
                if progress.step == stop:
                    break
    return progress


def _save(file: Path, settings: Settings, progress: Progress, model: nn.Module, optimizer, schedule) -> None:
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    contents = {name: part.state_dict() for name, part in parts.items()}
    contents |= {"settings": asdict(settings), "progress": asdict(progress), "rng": checkpoint.rng_state()}
    checkpoint.save(file, contents)


def _restore(file: Path, settings: Settings, model: nn.Module, optimizer, schedule) -> Progress:
    contents = checkpoint.load(file)
    old = contents["settings"]
    differing = [(name, value) for name, value in asdict(settings).items() if old.get(name) != value]
    if differing:
        changes = "; ".join(f"--{name.replace('_', '-')} was {old.get(name)}, is {value}" for name, value in differing)
        raise ValueError(f"cannot go on from {file}: {changes}. Take the old values, or leave --resume out")
    model.load_state_dict(contents["model"])
    optimizer.load_state_dict(contents["optimizer"])
    schedule.load_state_dict(contents["schedule"])
    checkpoint.set_rng_state(contents["rng"])
    return Progress(**contents["progress"])


@torch.inference_mode()
def accuracy(model: nn.Module, examples: Examples, pad: int, precision: str, batch_size: int = 64) -> float:
    """Returns the percentage of sentences whose label the model finds."""
    device = next(model.parameters()).device
    model.eval()
    order = sorted(range(len(examples.ids)), key=lambda i: len(examples.ids[i]))  # for little padding
    right = 0
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        with autocast(device, precision):
            logits = model(**collate([examples.ids[i] for i in indices], pad, device)).logits
        labels = torch.tensor([examples.labels[i] for i in indices], device=device)
        right += (logits.argmax(-1) == labels).sum().item()
    return 100 * right / len(order)
