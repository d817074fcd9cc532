"""Peak memory and time of whole training runs of the study's methods that save memory, beside full fine-tuning.

Every method trains the embedded model as benchmarks/xglue/studies/memory.json has it (Trainer, SIB-200, bf16 autocast),
in a process of its own, for all steps of its schedule; it is not tested. The weight gradients of blocks that a step
drops are left out. Memory is the growth of the resident memory at its peak over the loaded model: gradients, moments,
activations. The processes take turns, step by step, in a random order each: step n of all has the same sentences.
"""

import argparse
import multiprocessing
import random
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

from ..common.machine import Load
from ..common.resident import peak_growth
from ..common.results import arguments, write
from ..common.rounds import FIFTHS, spread
from ..xglue.methods import SAVING
from ..xglue.report.beyond import BESIDE_SAVING, FULL
from ..xglue.runs.methods import policy_of
from ..xglue.runs.prepare import prepare
from ..xglue.runs.study import plans
from ..xglue.runs.trainer import XglueTrainer
from ..xglue.settings import TINY, Settings

STUDY = "memory"
RATE = 2e-4
TINY_RUN = {"model": TINY, "train_examples": 24, "languages": ("en",)}


def settings_of(quick: bool) -> dict[str, Settings]:
    """Returns a method's settings by its name, full fine-tuning first and last."""
    base = replace(plans(STUDY)[0].base, lr=RATE, **(TINY_RUN if quick else {}))
    found = {name: replace(base, method=name) for name in (FULL, *SAVING, BESIDE_SAVING)}
    return {**found, f"{FULL}, again": found[FULL]}


class InTurns(TrainerCallback):
    """Waits for a word before each step, and answers with the step's seconds."""

    def __init__(self, turns: Connection):
        self.turns, self.began = turns, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.turns.recv()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.turns.send(time.perf_counter() - self.began)


class Training(XglueTrainer):
    """The study's training without its tests, which take memory of their own."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        return {}


def train(settings: Settings, threads: int, turns: Connection) -> None:
    """Trains by turns. The answer to the word after the last step is what was measured."""
    torch.set_num_threads(threads)
    prepared = prepare(settings)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Training(
            settings, prepared, Path(folder), checkpoints=False, eval_batch_size=1, device="cpu", deterministic=False,
            progress=False, skip_dropped=getattr(policy_of(settings), "needs_blocks", False),
        )  # fmt: skip
        trainer.add_callback(InTurns(turns))
        batch = trainer.data_collator(prepared.train.features[: settings.batch_size])
        with torch.autocast("cpu", torch.bfloat16):
            trainer.model(**batch).loss.backward()  # loads code, which is no memory of the training
        trainer.model.zero_grad()
        grown = peak_growth(trainer.train)
    params = list(trainer.model.parameters())
    turns.recv()
    turns.send({
        "peak_bytes": grown, "parameters": sum(param.numel() for param in params),
        "trained": sum(param.numel() for param in params if param.requires_grad),
    })  # fmt: skip


def take_turns(turns: dict[str, Connection]) -> tuple[dict[str, list[float]], dict[str, dict]]:
    """Returns the seconds of every step and what was measured, by name."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    measured: dict[str, dict] = {}
    while not measured:
        for name in random.sample(list(turns), len(turns)):
            turns[name].send("your turn")
            answer = turns[name].recv()
            if isinstance(answer, dict):
                measured[name] = answer
            else:
                seconds[name].append(answer)
    return seconds, measured


def rows_of(seconds: dict[str, list[float]], measured: dict[str, dict]) -> list[dict]:
    """Returns a row per method. ``ratio`` is of the time of all steps; its percentiles are of steps."""
    first = next(iter(seconds))
    rows = []
    for name, own in seconds.items():
        of_steps = spread("ratio", [mine / other for mine, other in zip(own, seconds[first])], FIFTHS)
        peak, beside = measured[name]["peak_bytes"], measured[first]["peak_bytes"]
        rows.append({
            "method": name, **measured[name], "peak_ratio": peak and peak / beside, "steps": len(own),
            "seconds": float(np.mean(own)), **of_steps, "ratio": sum(own) / sum(seconds[first]),
        })  # fmt: skip
    return rows


def measure(options: argparse.Namespace) -> list[dict]:
    """Starts a process per method and lets them take turns."""
    context, turns, processes = multiprocessing.get_context("spawn"), {}, []
    for name, settings in settings_of(options.quick).items():
        turns[name], theirs = context.Pipe()
        processes.append(context.Process(target=train, args=(settings, options.threads, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that a process that ends is noticed
    rows = rows_of(*take_turns(turns))
    for process in processes:
        process.join()
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    load, rows = Load(), measure(options)
    for row in rows:
        peak = "unknown" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:8.0f} MiB"
        print(f"{row['method']:<20} peak {peak}, step {row['seconds']:.3f} s, time {row['ratio']:.2f}", flush=True)
    print(write("training", options, {"load": load.report(), "threads": options.threads, "rows": rows}))


if __name__ == "__main__":
    main()
