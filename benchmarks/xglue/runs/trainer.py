"""transformers' Trainer for a run: batches by length, the official score of every dev language after every epoch, and
checkpoints that a killed run can trust.
"""

import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from graddrop_kernels.demo import checkpoint
from graddrop_kernels.integrations.transformers import GradDropCallback

from ..methods import ADAPTED
from ..models import features, weights
from ..models.adapter import add_lora
from ..scores import metrics, predictions
from ..settings import Settings
from .batches import LengthBuckets
from .methods import policy_of
from .optimizer import optimizer_of
from .prepare import Prepared, Split

COMPLETE = "complete"  # empty file: everything else of the checkpoint is on the disk
BEST = "best.pt"  # weights of the best epoch so far
LOSSES = 200  # approximate number of values kept of a run's training loss


class XglueTrainer(Trainer):
    """Used by ``run.run_one``. Dev scores (and with ``test_every_epoch`` test scores) go to the log.

    skip_dropped: leave out the weight gradients of dropped blocks; default: where blocks take turns, to save memory.
    """

    def __init__(
        self, settings: Settings, prepared: Prepared, folder: Path, *, checkpoints: bool, eval_batch_size: int,
        device: str | None, deterministic: bool, progress: bool, predictions: Path | None = None,
        skip_dropped: bool | None = None,
    ):  # fmt: skip
        self.settings, self.prepared, self.checkpoints = settings, prepared, checkpoints
        self.predictions = predictions  # folder for the best epoch's test predictions
        self.best: tuple[int, dict] | None = None  # epoch and weights, if no file keeps them
        if skip_dropped is None:
            skip_dropped = getattr(policy_of(settings), "takes_turns", False)
        # transformers allows bf16 on a CPU only with use_cpu.
        on_cpu = device == "cpu" or not torch.accelerator.is_available()
        args = TrainingArguments(
            output_dir=str(folder), num_train_epochs=settings.epochs,
            per_device_train_batch_size=per_device(settings), gradient_accumulation_steps=settings.accumulation,
            per_device_eval_batch_size=eval_batch_size, learning_rate=settings.lr, adam_epsilon=settings.adam_eps,
            weight_decay=settings.weight_decay, max_grad_norm=0 if skip_dropped else settings.max_grad_norm,
            lr_scheduler_type="linear", warmup_steps=settings.warmup, logging_strategy="no",
            logging_nan_inf_filter=False, eval_strategy="epoch", save_strategy="epoch" if checkpoints else "no",
            seed=settings.seed, bf16=settings.precision == "bf16", use_cpu=on_cpu, full_determinism=deterministic,
            ddp_find_unused_parameters=False, remove_unused_columns=False, dataloader_pin_memory=False, report_to=[],
            disable_tqdm=True,
        )  # fmt: skip
        model = prepared.source.model(settings.seed, settings.dropout)
        if settings.method in ADAPTED:
            add_lora(model, settings.seed)
        if args.device.type == "cpu" and settings.precision == "bf16":
            # torch 2.13's fused attention in bf16 takes 0.75 s per step of e5-small, its parts only 0.6 s.
            model.set_attn_implementation("eager")
        logging.disable_progress_bar()  # of files that are read and written
        super().__init__(
            model=model, args=args, data_collator=features.collator(prepared.task, prepared.source.tokenizer),
            train_dataset=prepared.train.features, eval_dataset=prepared.dev["en"].features,
            optimizer_cls_and_kwargs=optimizer_of(settings, args, skip_dropped),
            callbacks=[GradDropCallback(skip_dropped)],
        )  # fmt: skip
        # Trainer leaves the mean over micro-batches to models that take any keyword, even if they do not compute it.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        # After GradDropCallback, so that the end of a step is shown when everything is done.
        self.add_callback(_Log(settings, progress and self.is_world_process_zero()))
        if checkpoints:
            self.add_callback(_Complete())

    def _get_train_sampler(self, train_dataset=None) -> LengthBuckets:
        lengths = [len(feature["input_ids"]) for feature in self.train_dataset]
        epoch = lambda: int(self.state.epoch or 0)
        return LengthBuckets(lengths, self.settings.batch_size, self.settings.seed, epoch)

    def scores(self, splits: dict[str, Split], predictions_to: Path | None = None) -> dict[str, dict[str, float]]:
        """Returns {language: ``metrics.score(...)``}. Writes official prediction files too, if there is a folder for
        them.
        """
        task, found = self.prepared.task, {}
        for language, split in splits.items():
            predicted = self._predicted(split)
            if predictions_to is not None and self.is_world_process_zero():
                predictions.write(predictions_to, task, language, predicted)
            values = metrics.score(task, language, split.examples, predicted)
            found[language] = {name: float(value) for name, value in values.items()}
        return found

    def test_scores(self) -> dict[str, dict[str, float]]:
        """Returns the scores of the current weights. Writes prediction files if they were asked for."""
        return self.scores(self.prepared.test, self.predictions)

    def _predicted(self, split: Split):
        """Returns ``features.decode`` of the model's outputs, in the order of the examples."""
        order = sorted(range(len(split.features)), key=lambda i: len(split.features[i]["input_ids"]))  # to pad less
        logits = self.predict([split.features[i] for i in order]).predictions
        place = np.argsort(order)
        logits = tuple(part[place] for part in logits) if isinstance(logits, tuple) else logits[place]
        return features.decode(self.prepared.task, split.examples, split.features, logits)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Scores an epoch. Trainer calls it after each one."""
        found = {"dev": self.scores(self.prepared.dev)}
        epochs = [*self.dev_scores(), found["dev"]]
        best = best_epoch(epochs) == len(epochs)
        if self.settings.test_every_epoch:
            # Keeps the files of the best epoch so far.
            found["test"] = self.scores(self.prepared.test, self.predictions if best else None)
        self.log(found)
        if best and not self.settings.test_every_epoch and len(epochs) < self.settings.epochs:
            self._keep(len(epochs))
        return {}

    def dev_scores(self) -> list[dict[str, dict[str, float]]]:
        """Returns ``scores`` of the dev sets, after each epoch so far."""
        return [entry["dev"] for entry in self.state.log_history if "dev" in entry]

    def _keep(self, epoch: int) -> None:
        state = weights.whole(self.model)
        if not self.is_world_process_zero():
            state = {}
        self.best = (epoch, state)
        if self.checkpoints and self.is_world_process_zero():
            checkpoint.save(Path(self.args.output_dir, BEST), {"epoch": epoch, "weights": state})
            self.best = None

    def restore(self, epoch: int) -> None:
        """Puts the weights of ``epoch`` (the best one) into the model, if they are not there."""
        if epoch == self.settings.epochs:
            return
        best = self.best
        if best is None and self.is_world_process_zero():
            found = checkpoint.load(Path(self.args.output_dir, BEST))
            best = (found["epoch"], found["weights"])
        state = best[1] if best else {}
        if best and best[0] != epoch:
            raise RuntimeError(f"{self.args.output_dir}/{BEST} is of epoch {best[0]}, the best one was {epoch}")
        weights.restore(self.model, state)


def best_epoch(dev: list[dict[str, dict[str, float]]]) -> int:
    """Returns the epoch (1, 2, ...) of the best mean official dev score over the languages that it was computed for,
    and the first of equal ones.
    """
    means = [math.fsum(score["official"] for score in scores.values()) / len(scores) for scores in dev]
    return 1 + means.index(max(means))


def per_device(settings: Settings) -> int:
    """Returns the examples per process and micro-batch. ValueError if the batch cannot be shared out."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if settings.batch_size % (settings.accumulation * processes):
        raise ValueError(
            f"--batch-size {settings.batch_size}: must be a multiple of {processes} processes x "
            f"--gradient-accumulation {settings.accumulation}"
        )
    return settings.batch_size // (settings.accumulation * processes)


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint in ``folder``; None if there is none."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=_step, default=None)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


class _Complete(TrainerCallback):
    """Marks a checkpoint as complete when all of it is on the disk, then removes the older ones. So a run that is
    killed at any moment leaves one to continue from.
    """

    def on_save(self, args, state, control, **kwargs):
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        if parallel:
            torch.distributed.barrier()  # every process has written its part
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            for path in [path for path in folder.rglob("*") if path.is_file()]:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            (folder / COMPLETE).touch()
            for path in Path(args.output_dir).glob("checkpoint-*"):
                if path != folder:
                    (path / COMPLETE).unlink(missing_ok=True)
                    shutil.rmtree(path, ignore_errors=True)
        if parallel:
            torch.distributed.barrier()


class _Log(TrainerCallback):
    """Has the loss logged about LOSSES times and at every epoch's end, so that a resume changes none of the means."""

    def __init__(self, settings: Settings, progress: bool):
        self.every, self.bar = 1, None
        self.settings, self.progress = settings, progress

    def on_train_begin(self, args, state, control, **kwargs):
        self.every = max(1, state.max_steps // LOSSES)
        if self.progress:
            name = f"{self.settings.method} seed {self.settings.seed} lr {self.settings.lr:g}"
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=name, unit="step", mininterval=0.5)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = state.global_step % self.every == 0 or state.epoch == int(state.epoch)
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        if self.bar is not None and "dev" in logs:
            shown = {language: f"{100 * score['official']:.1f}" for language, score in logs["dev"].items()}
            self.bar.write(f"epoch {round(state.epoch)}, dev: {' '.join(f'{k} {v}' for k, v in shown.items())}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
