"""A real fine-tune in which a few blocks are trained at a time: SampleBlocks beside LISA's own code, CycleBlocks beside
BAdam's, and full fine-tuning with torch's fused AdamW.

The demo's model (12 blocks) on English SIB-200, in float32, without activation dropout: the same weights, batches,
learning rate for all, no weight decay; embeddings and head are trained in every step. Each way to train has a process
of its own. The processes take turns, in a random order for every batch. A ratio is the median over batches of a way's
time over that of full fine-tuning. Peaks of resident memory are those of other processes, with periods of two steps, as
many periods as there are blocks, all with the longest batch. There freed memory goes back at once.

Then each run is resumed: in the middle of the second period every process saves what transformers' Trainer saves
(weights, the optimizer's state_dict(), the states of the random generators, the number of steps). A run that is begun
anew loads it and goes on into the third period. Its weights are compared with those of the uninterrupted run.

BAdam is the package from PyPI; where it is not installed its row says so. LISA is not on PyPI: --lmflow takes a
checkout of github.com/OptimalScale/LMFlow, from which its callback is loaded. Without one the blocks are frozen as the
callback freezes them. Exits with 1 when ours keep other moments than those of k blocks and of what is outside.
"""

import contextlib
import functools
import hashlib
import io
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

import graddrop_kernels as gk
from graddrop_kernels.demo import sib200
from graddrop_kernels.demo.classifier import BUNDLED, ModelSource
from graddrop_kernels.demo.train import collate, epoch_batches

from ..common.kept import kept_bytes
from ..common.machine import Load
from ..common.peers import unavailable
from ..common.resident import peak, return_at_once, start_peak
from ..common.results import arguments, write
from ..common.rounds import FIFTHS, Variant, summarize
from ..common.timers import HostTimer, Sample
from ..common.turns import LAYERS, WAYS, Plan, sources

BATCH, TOKENS = 16, 64
# Its server imports what takes long once, and starts no threads before it forks.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["transformers.models.bert.modeling_bert", "graddrop_kernels.demo.train"])


class Run:
    """A way in its own process. ``saved``: the file of a run to go on from, as transformers' Trainer would."""

    def __init__(self, name: str, plan: Plan, saved: Path | None):
        torch.set_num_threads(plan.threads)
        warnings.simplefilter("ignore")  # BAdam's, of weights in float32
        import_what_steps_import()
        if plan.exact_memory:
            return_at_once()
        self.model, self.batches = torch.load(plan.work, weights_only=False)
        self.model.train()
        self.number, self.timer = 0, HostTimer()
        for seed_generator in (torch.manual_seed, np.random.seed, random.seed):
            seed_generator(plan.seed)
        file = torch.load(saved, weights_only=False) if saved else None
        if file:
            self.model.load_state_dict(file["model"])
        self.loaded = start_peak()
        with contextlib.redirect_stdout(io.StringIO()):
            self.way = WAYS[name][0].make(self.model, plan)
        if file:
            self.number = file["number"]
            self.way.optimizer.load_state_dict(file["optimizer"])
            torch.set_rng_state(file["torch"])
            np.random.set_state(file["numpy"])
            random.setstate(file["python"])

    def step(self) -> dict:
        """Returns the step's Sample and loss, and the bytes that the optimizer keeps after it."""
        loss = torch.zeros(())

        def train() -> None:
            nonlocal loss
            self.way.begin(self.number)
            with self.way.passes():
                loss = nn.functional.cross_entropy(self.model(**inputs).logits, labels)
                loss.backward()
            self.way.optimizer.step()
            self.way.optimizer.zero_grad()

        inputs, labels = self.batches[self.number % len(self.batches)]
        with contextlib.redirect_stdout(io.StringIO()):  # peers tell of every change of blocks
            sample = self.timer.time(train)
        self.number += 1
        kept, _ = kept_bytes(self.way.optimizer, self.model.parameters())
        return {"sample": sample, "loss": loss.item(), "kept": kept}

    def save(self, path: Path) -> None:
        torch.save({
            "model": self.model.state_dict(), "optimizer": self.way.optimizer.state_dict(), "number": self.number,
            "torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate(),
        }, path)  # fmt: skip

    def digest(self) -> str:
        found = hashlib.sha256()
        for param in self.model.parameters():
            found.update(param.detach().numpy().tobytes())
        return found.hexdigest()

    def peak_bytes(self) -> int | None:
        """Returns the peak of the resident memory over what it was with the loaded model."""
        return None if self.loaded is None else peak() - self.loaded


def import_what_steps_import() -> None:
    """Steps a toy with each optimizer, so that no way's memory counts the modules that a first step imports."""
    for make in (functools.partial(torch.optim.AdamW, fused=True), functools.partial(gk.FusedGradDropAdamW, mask=None)):
        toy = nn.Linear(2, 2)
        optimizer = make(toy.parameters())
        toy(torch.ones(1, 2)).sum().backward()
        optimizer.step()


_run: Run  # of this process


def start(name: str, plan: Plan, saved: Path | None = None) -> None:
    global _run
    _run = Run(name, plan, saved)


def call(method: str, *given: Any) -> Any:
    return getattr(_run, method)(*given)


class Worker:
    """A process with a run. ``do`` calls a method of it."""

    cpu_seconds: ClassVar[list[float]] = []  # of those that have ended

    def __init__(self, name: str, plan: Plan):
        self._name, self._plan = name, plan
        self._pool = ProcessPoolExecutor(1, CONTEXT)
        self.begin()

    def begin(self, saved: Path | None = None) -> None:
        """Begins a run, from what was saved if that is given."""
        self._begun = self._pool.submit(start, self._name, self._plan, saved)

    def do(self, method: str, *given: Any) -> Any:
        self._begun.result()
        return self._pool.submit(call, method, *given).result()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        if error == (None, None, None):
            self.cpu_seconds.append(self._pool.submit(time.process_time).result())
        self._pool.shutdown()


def prepare(folder: Path, steps: int, quick: bool) -> nn.Module:
    """Writes the files of two plans: of so many batches, and of the longest one of them alone. Returns the model."""
    split = sib200.load("en", "train")
    source = ModelSource(BUNDLED, split.texts, len(sib200.LABELS))
    model, ids = source.model(0, 0.0), source.encode(split.texts, 6 if quick else TOKENS)
    if quick:
        model.bert.encoder.layer = model.bert.encoder.layer[:4]
    order: list[list[int]] = []
    while len(order) < steps:
        order += epoch_batches(list(map(len, ids)), 2 if quick else BATCH, 0, len(order))
    batches = []
    for chosen in order[:steps]:
        inputs = collate([ids[i] for i in chosen], source.tokenizer.pad_token_id, torch.device("cpu"))
        batches.append((inputs, torch.tensor([split.labels[i] for i in chosen])))
    longest = max(batches, key=lambda batch: batch[0]["input_ids"].shape[1])
    torch.save((model, batches), folder / "batches")
    torch.save((model, [longest]), folder / "longest")
    return model


def computed_bytes(model: nn.Module, count: int | None) -> int:
    """Computes the bytes of two moments of so many blocks and of all that is outside of them, and a step count of each
    tensor.
    """
    params, blocks = list(model.parameters()), model.get_submodule(LAYERS)
    of_block = sum(param.numel() for param in blocks[0].parameters())
    idle = 0 if count is None else (len(blocks) - count) * of_block
    return 2 * 4 * (sum(param.numel() for param in params) - idle) + 4 * len(params)


def train(plan: Plan, steps: int, saved_at: int, folder: Path) -> tuple[list[Variant], dict[str, dict]]:
    """Trains every way that there is. Returns their times, and what else was found, by name."""
    variants = [Variant(name, kind, error=unavailable(peer)) for name, (peer, kind, _) in WAYS.items()]
    alive = [variant for variant in variants if variant.error is None]
    found: dict[str, dict] = {variant.name: {"losses": [], "kept": []} for variant in alive}
    with contextlib.ExitStack() as stack:
        workers = {variant.name: stack.enter_context(Worker(variant.name, plan)) for variant in alive}
        for number in range(steps):
            for variant in random.sample(alive, len(alive)):
                worker, own = workers[variant.name], found[variant.name]
                done = worker.do("step")
                variant.samples[number] = Sample(*done["sample"])
                own["losses"].append(done["loss"])
                own["kept"].append(done["kept"])
                if number + 1 == saved_at:
                    worker.do("save", folder / variant.name)
                if number + 1 == saved_at + plan.every:
                    own["digest"] = worker.do("digest")
            if number % 10 == 9:
                print(f"{number + 1} of {steps} steps", file=sys.stderr)
        for name, worker in workers.items():
            worker.begin(folder / name)
            for _ in range(plan.every):
                worker.do("step")
            found[name]["resumed"] = worker.do("digest")
    return variants, found


def peak_of(name: str, plan: Plan, steps: int) -> int | None:
    with Worker(name, plan) as worker:
        for _ in range(steps):
            worker.do("step")
        return worker.do("peak_bytes")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--lmflow", type=Path, metavar="FOLDER", help="checkout of LMFlow, to measure LISA's own code")
    parser.add_argument("--steps", type=int, default=48, help="of each way; the default is a round of CycleBlocks")
    parser.add_argument("--every", type=int, default=4, help="steps of a period (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    every, steps = (2, 6) if options.quick else (options.every, options.steps)
    saved_at = every + every // 2
    if steps < saved_at + every:
        parser.error(f"--steps must be at least {saved_at + every}, two and a half periods of {every}")
    load = Load()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = Plan(folder / "batches", every, random.randrange(2**31), options.threads, options.lmflow)
        model = prepare(folder, steps, options.quick)
        layers = len(model.get_submodule(LAYERS))
        variants, found = train(plan, steps, saved_at, folder)
        in_memory = replace(plan, work=folder / "longest", every=2, exact_memory=True)
        unlike = [name for name, (_, kind, _) in WAYS.items() if name in found and kind != "check"]
        with ThreadPoolExecutor(max(1, os.cpu_count() // options.threads)) as pool:
            peaks = dict(zip(unlike, pool.map(lambda name: peak_of(name, in_memory, 2 * layers), unlike)))

    def figures(variant: Variant, row: dict) -> dict:
        own, count = found[variant.name], WAYS[variant.name][2]
        return {
            "repetitions": len(variant.samples), "blocks": count, "peak_bytes": peaks.get(variant.name),
            "kept_bytes": max(own["kept"]), "computed_bytes": computed_bytes(model, count),
            "same_bits": own["digest"] == own["resumed"], "kept": own["kept"], "losses": own["losses"],
        }  # fmt: skip

    rows = summarize(variants, FIFTHS, figures)
    for row in rows:
        print({key: value for key, value in row.items() if key not in ("kept", "losses")}, flush=True)
    facts = {"threads": options.threads, "seed": plan.seed, "every": every, "steps": steps, "saved_at": saved_at}
    facts |= {"layers": layers, "sources": sources(options.lmflow), "load": load.report(sum(Worker.cpu_seconds))}
    print(write("sampled_blocks", options, facts | {"rows": rows}))
    ours = [row for row in rows if row["kind"] == "ours"]
    wrong = [row["name"] for row in ours if row["kept_bytes"] != row["computed_bytes"]]
    if wrong:
        print(f"other moments are kept than are computed: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
