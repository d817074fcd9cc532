"""A real fine-tune in which a few blocks are trained at a time: SampleBlocks beside LISA's own code, CycleBlocks beside
BAdam's, and full fine-tuning with torch's fused AdamW.

The demo's model (12 blocks) on English SIB-200, in float32, without activation dropout: the same weights, batches,
learning rate and constant rest for all, no weight decay; embeddings and head are trained in every step. Each way to
train has a process of its own, whose peak of resident memory is that of the training. The processes take turns, in a
random order for every batch. A ratio is the median over batches of a way's time over that of full fine-tuning.

Then each run is resumed: in the middle of the second period every process saves what transformers' Trainer saves
(weights, the optimizer's state_dict(), the states of the random generators, the number of steps). Another process loads
it, goes on into the third period, and has to have the bits of the run that was not interrupted.

BAdam is the package from PyPI; where it is not installed its row says so. LISA is not on PyPI: --lmflow takes a
checkout of github.com/OptimalScale/LMFlow, from which its callback is loaded. Without one the blocks are frozen as the
callback freezes them. Exits with 1 when ours keep other moments than those of k blocks and of what is outside.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import multiprocessing
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

import graddrop_kernels as gk
from graddrop_kernels.demo import sib200
from graddrop_kernels.demo.classifier import BUNDLED, ModelSource
from graddrop_kernels.demo.train import collate, epoch_batches

from ..common.machine import Load
from ..common.peers import Peer, unavailable
from ..common.process_memory import kept_bytes, peak, start_peak
from ..common.results import arguments, write
from ..common.rounds import FIFTHS, Variant, summarize
from ..common.timers import HostTimer, Sample

SAMPLED = 2  # blocks that SampleBlocks and LISA train at a time
HYPERS = {"lr": 3e-4, "weight_decay": 0.0}
BATCH, TOKENS = 16, 64
LAYERS = "bert.encoder.layer"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["transformers.models.bert.modeling_bert", "graddrop_kernels.demo.train"])
OUTSIDE = ["bert.embeddings.", "classifier."]
CALLBACK = "src/lmflow/pipeline/utils/lisa_trainer.py"  # in a checkout of LMFlow


@dataclass(frozen=True)
class Plan:
    """What all processes have in common. ``work``: the file of (model, batches)."""

    work: Path
    every: int
    seed: int
    threads: int
    lmflow: Path | None


@dataclass
class Way:
    """A way to train. ``begin`` is called with the number of a step, ``passes`` around its forward and backward."""

    optimizer: Any
    begin: Callable[[int], object] = lambda number: None
    passes: Callable[[], AbstractContextManager] = contextlib.nullcontext


# The ways ------------------------------------------------------------------------------------------------------------


def torch_adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), fused=True, **HYPERS)


def full(model: nn.Module, plan: Plan) -> Way:
    return Way(torch_adamw(model))


def in_turns(policy: Callable[[int], Any], model: nn.Module, plan: Plan) -> Way:
    groups = gk.param_groups(model, HYPERS["weight_decay"])
    optimizer = gk.FusedGradDropAdamW(groups, mask=policy(plan.every), seed=plan.seed, **HYPERS)
    return Way(optimizer, passes=optimizer.skip_dropped)


class LisaStyle:
    """Freezes as LMFlow's DynamicLayerActivationCallback does: with its arguments and its draws."""

    def __init__(self, n_layers: int, interval_steps: int, model: nn.Module, lisa_layers_attribute: str):
        self.count, self.every = n_layers, interval_steps
        self.layers = model.get_submodule(lisa_layers_attribute.removeprefix("model."))

    def on_step_begin(self, args: Any, state: Any, control: Any) -> None:
        if state.global_step % self.every == 0:
            active = np.random.choice(range(len(self.layers)), self.count, replace=False)
            for index, layer in enumerate(self.layers):
                layer.requires_grad_(index in active)


def lisa_callback(checkout: Path | None) -> type:
    if checkout is None:
        return LisaStyle
    spec = importlib.util.spec_from_file_location("lisa_trainer", checkout / CALLBACK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DynamicLayerActivationCallback


def lisa(model: nn.Module, plan: Plan) -> Way:
    callback = lisa_callback(plan.lmflow)(SAMPLED, plan.every, model, lisa_layers_attribute=f"model.{LAYERS}")
    begin = lambda number: callback.on_step_begin(None, SimpleNamespace(global_step=number), None)
    return Way(torch_adamw(model), begin)


def badam(model: nn.Module, plan: Plan) -> Way:
    blocks = [[f"{LAYERS}.{index}."] for index in range(len(model.get_submodule(LAYERS)))]
    optimizer = importlib.import_module("badam").BlockOptimizer(
        torch_adamw(model), list(model.named_parameters()), blocks, switch_block_every=plan.every,
        switch_mode="ascending", active_modules=OUTSIDE, verbose=0,
    )  # fmt: skip
    return Way(optimizer)


def _peer(name: str, module: str | None, make: Callable) -> Peer:
    return Peer(name, module, module, make, (), "")


SAMPLE = functools.partial(gk.SampleBlocks, SAMPLED, idle_state="drop")
CYCLE = functools.partial(gk.CycleBlocks, idle_state="drop")
# (way, kind, blocks trained at a time; None: all)
WAYS: dict[str, tuple[Peer, str, int | None]] = {
    peer.name: (peer, kind, count)
    for peer, kind, count in (
        (_peer("full fine-tuning", None, full), "peer", None),
        (_peer(f"SampleBlocks({SAMPLED})", None, functools.partial(in_turns, SAMPLE)), "ours", SAMPLED),
        (_peer("LISA", "transformers", lisa), "peer", SAMPLED),
        (_peer("CycleBlocks", None, functools.partial(in_turns, CYCLE)), "ours", 1),
        (_peer("BAdam", "badam", badam), "peer", 1),
        (_peer("full fine-tuning, again", None, full), "check", None),
    )
}


# One process ---------------------------------------------------------------------------------------------------------


class Run:
    """A way in its own process. Goes on from a checkout's file, if one is given, as transformers' Trainer would."""

    def __init__(self, name: str, plan: Plan, saved: Path | None):
        torch.set_num_threads(plan.threads)
        warnings.simplefilter("ignore")  # BAdam's, of weights in float32
        import_what_steps_import()
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

        inputs, labels = self.batches[self.number]
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
        self._pool.shutdown()


# All of them ---------------------------------------------------------------------------------------------------------


def prepare(path: Path, steps: int, quick: bool) -> nn.Module:
    """Writes the model and the batches. Returns the model."""
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
    torch.save((model, batches), path)
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
            found[name]["peak"] = worker.do("peak_bytes")
            worker.begin(folder / name)
            for _ in range(plan.every):
                worker.do("step")
            found[name]["resumed"] = worker.do("digest")
    return variants, found


def sources(options: argparse.Namespace) -> dict[str, str]:
    """Says whose code the peers' rows are. A file is named as git names its contents."""
    own = f"LISA-style: frozen as by LMFlow's callback ({CALLBACK})"
    if options.lmflow:
        text = (options.lmflow / CALLBACK).read_bytes()
        own = f"LMFlow's DynamicLayerActivationCallback ({CALLBACK}, git blob {git_blob(text)})"
    version = importlib.metadata.version("badam") if importlib.util.find_spec("badam") else None
    return {"LISA": own, "BAdam": f"badam {version}, BlockOptimizer"}


def git_blob(text: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()[:12]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--lmflow", type=Path, metavar="FOLDER", help="checkout of LMFlow, to measure LISA's own code")
    parser.add_argument("--steps", type=int, default=60, help="of each way; the default is a round of CycleBlocks")
    parser.add_argument("--every", type=int, default=5, help="steps of a period (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    every, steps = (2, 6) if options.quick else (options.every, options.steps)
    saved_at = every + every // 2
    if steps < saved_at + every:
        parser.error(f"--steps must be at least {saved_at + every}, two and a half periods of {every}")
    load = Load()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = Plan(folder / "work", every, random.randrange(2**31), options.threads, options.lmflow)
        model = prepare(plan.work, steps, options.quick)
        variants, found = train(plan, steps, saved_at, folder)

    def figures(variant: Variant, row: dict) -> dict:
        own, count = found[variant.name], WAYS[variant.name][2]
        return {
            "repetitions": len(variant.samples), "blocks": count, "peak_bytes": own["peak"],
            "kept_bytes": max(own["kept"]), "computed_bytes": computed_bytes(model, count),
            "same_bits": own["digest"] == own["resumed"], "kept": own["kept"], "losses": own["losses"],
        }  # fmt: skip

    rows = summarize(variants, FIFTHS, figures)
    for row in rows:
        print({key: value for key, value in row.items() if key not in ("kept", "losses")}, flush=True)
    facts = {"threads": options.threads, "seed": plan.seed, "every": every, "steps": steps, "saved_at": saved_at}
    facts |= {"layers": len(model.get_submodule(LAYERS)), "sources": sources(options), "load": load.report()}
    print(write("sampled_blocks", options, facts | {"rows": rows}))
    ours = [row for row in rows if row["kind"] == "ours"]
    wrong = [row["name"] for row in ours if row["kept_bytes"] != row["computed_bytes"]]
    if wrong:
        print(f"other moments are kept than are computed: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
