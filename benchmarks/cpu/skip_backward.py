"""Time and FLOPs of a whole training step when the weight gradients of dropped blocks are not computed, beside two
methods that freeze all but some blocks.

A 12-layer XLM-R-like encoder of width 192 with random weights, 8 x 64 tokens, no dropout; attention by matrix products,
which torch's FLOP counter sees. The vocabulary is such that the embeddings hold as large a share of the parameters as
in XLM-R-large. All variants train the same model in turn, in a random order each round; a ratio is the median over
rounds of a variant's time over that of the dense step in the same round. Every variant draws its blocks anew each step;
LISA and BAdam, as published, keep theirs for many steps, which changes neither time nor FLOPs of one.
"""

import contextlib
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode

import graddrop_kernels as gk

from ..common.cases import HYPERS
from ..common.machine import Load
from ..common.results import arguments, write
from ..common.rounds import FIFTHS, Variant, interleave, nothing, spread, summarize
from ..common.timers import HostTimer, Timer

LAYERS, WIDTH, BATCH, TOKENS, VOCABULARY = 12, 192, 8, 64, 24_000
DROPS = (0.2, 0.5, 0.9)
LISA = (6, 2)  # numbers of trained blocks


class Work:
    """The model and its batch. ``flops`` are counted once for each kind of step."""

    def __init__(self, layers: int):
        import transformers

        config = transformers.XLMRobertaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=WIDTH // 32,
            intermediate_size=4 * WIDTH, max_position_embeddings=TOKENS + 2, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, num_labels=3, attn_implementation="eager",
        )  # fmt: skip
        self.model = transformers.XLMRobertaForSequenceClassification(config)
        self.blocks = self.model.roberta.encoder.layer
        ids = torch.randint(5, VOCABULARY, (BATCH, TOKENS))
        self.batch = {"input_ids": ids, "labels": torch.randint(3, (BATCH,))}
        self._flops: dict[tuple, int] = {}

    def forward_backward(self) -> None:
        self.model(**self.batch).loss.backward()

    def trained(self) -> list[int]:
        """Returns the blocks whose parameters require gradients now."""
        return [i for i, block in enumerate(self.blocks) if block.attention.self.query.weight.requires_grad]

    def flops(self, context: AbstractContextManager) -> int:
        """Counts the FLOPs of the matrix products of a forward and backward pass. They depend on the number of trained
        blocks and, if the embeddings are not trained, on the lowest of them.
        """
        with context:
            trained, whole = self.trained(), self.model.roberta.embeddings.word_embeddings.weight.requires_grad
            key = (len(trained), None if whole else min(trained))
            if key not in self._flops:
                with FlopCounterMode(display=False) as counter:
                    self.forward_backward()
                self._flops[key] = counter.get_total_flops()
                self.model.zero_grad()
        return self._flops[key]


@dataclass
class TrainingStep(Variant):
    """A variant with the FLOPs of each of its steps. ``draw`` begins a step, untimed."""

    flops: Callable[[], int] = lambda: 0
    draw: Callable[[], object] = nothing
    flops_of: dict[int, int] = field(default_factory=dict)  # by round

    def run(self, timer: Timer, number: int) -> None:
        self.draw()
        self.flops_of[number] = self.flops()
        super().run(timer, number)


def variant(
    name: str, kind: str, work: Work, optimizer: torch.optim.Optimizer, context: Callable, draw=nothing
) -> TrainingStep:
    def step() -> None:
        with context():
            work.forward_backward()
        optimizer.step()
        optimizer.zero_grad()

    return TrainingStep(name, kind, step, flops=lambda: work.flops(context()), draw=draw)


def layer_graddrop(work: Work, p: float) -> gk.FusedGradDropAdamW:
    return gk.FusedGradDropAdamW(
        gk.param_groups(work.model), lr=HYPERS["lr"], mask=gk.LayerGradDrop(p), seed=random.randrange(2**31)
    )


class Frozen:
    """Freezes all but ``count`` blocks, drawn anew each step; the embeddings and the head too, unless ``dense``."""

    def __init__(self, work: Work, count: int, dense: bool):
        self.work, self.count, self.dense = work, min(count, len(work.blocks)), dense
        self.in_blocks = {param for block in work.blocks for param in block.parameters()}
        self.draw()

    def draw(self) -> None:
        chosen = random.sample(list(self.work.blocks), self.count)
        kept = {param for block in chosen for param in block.parameters()}
        others = [param for param in self.work.model.parameters() if param not in kept]
        self.frozen = [param for param in others if param in self.in_blocks or not self.dense]

    @contextlib.contextmanager
    def __call__(self):
        for param in self.frozen:
            param.requires_grad_(False)
        try:
            yield
        finally:
            for param in self.frozen:
                param.requires_grad_(True)


def variants_of(work: Work) -> list[TrainingStep]:
    """Makes the variants, the dense step first. The peers' optimizer is torch's, which skips parameters without
    gradient.
    """
    dense = lambda name, kind: variant(name, kind, work, layer_graddrop(work, 0.5), contextlib.nullcontext)
    found = [dense("LayerGradDrop, nothing skipped", "ours")]
    for p in DROPS:
        optimizer = layer_graddrop(work, p)
        found.append(variant(f"LayerGradDrop({p}), skip_dropped()", "ours", work, optimizer, optimizer.skip_dropped))
    frozen = [(f"LISA-style: {count} blocks, embeddings and head", Frozen(work, count, True)) for count in LISA]
    for name, chosen in [*frozen, ("BAdam-style: one block, nothing else", Frozen(work, 1, False))]:
        peer = torch.optim.AdamW(work.model.parameters(), **HYPERS, fused=True)
        found.append(variant(name, "peer", work, peer, chosen, chosen.draw))
    return [*found, dense("LayerGradDrop, nothing skipped, again", "check")]


def rows_of(variants: list[TrainingStep]) -> list[dict]:
    """Returns a row per variant: medians, 20th and 80th percentiles."""
    flops_in_rounds = lambda variant: [variant.flops_of[number] for number in variant.samples]
    dense = statistics.median(flops_in_rounds(variants[0]))

    def figures(variant: TrainingStep, row: dict) -> dict:
        flops = spread("flops", flops_in_rounds(variant), FIFTHS)
        return {"repetitions": len(variant.samples), **flops, "flops_ratio": flops["flops"] / dense}

    return summarize(variants, FIFTHS, figures)


def measure(threads: int, layers: int, seconds: float, quick: bool) -> dict:
    """Measures one thread count, in a process of its own."""
    torch.set_num_threads(threads)
    deadline = time.monotonic() + seconds
    torch.manual_seed(time.time_ns() % 2**31)
    work = Work(layers)
    load, variants = Load(), variants_of(work)
    interleave(variants, HostTimer(), deadline, *((2, 2) if quick else (8, 1000)), 5, f"{threads} threads")
    rows = rows_of(variants)
    for row in rows:
        print(
            f"{threads} threads  {row['name']:<48}{row['seconds'] * 1e3:9.1f} ms   time {row['ratio']:5.2f}   "
            f"FLOPs {row['flops_ratio']:5.2f}",
            flush=True,
        )
    numel = sum(param.numel() for param in work.model.parameters())
    return {"threads": threads, "numel": numel, "layers": layers, "load": load.report(), "rows": rows}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--budget", type=float, default=160, metavar="SECONDS", help="of all, setup included")
    options = parser.parse_args()
    load, tables = Load(), []
    seconds = 0 if options.quick else options.budget / len(options.threads)
    for threads in options.threads:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            layers = 2 if options.quick else LAYERS
            tables.append(pool.submit(measure, threads, layers, seconds, options.quick).result())
    print(write("skip_backward", options, {"load": load.report(), "tables": tables}))


if __name__ == "__main__":
    main()
