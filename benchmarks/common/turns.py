"""Ways to train a few blocks at a time: ours, LISA's and BAdam's own code, and all blocks with torch's fused AdamW."""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

import graddrop_kernels as gk

from .peers import Peer

SAMPLED = 2  # blocks that SampleBlocks and LISA train at a time
HYPERS = {"lr": 3e-4, "weight_decay": 0.0}
LAYERS = "bert.encoder.layer"
OUTSIDE = ["bert.embeddings.", "classifier."]
CALLBACK = "src/lmflow/pipeline/utils/lisa_trainer.py"  # in a checkout of LMFlow


@dataclass(frozen=True)
class Plan:
    """What all processes have in common. ``work``: the file of (model, batches). ``exact_memory``: whether freed
    memory goes back at once, which is slow.
    """

    work: Path
    every: int
    seed: int
    threads: int
    lmflow: Path | None
    exact_memory: bool = False


@dataclass
class Way:
    """A way to train. ``begin`` is called with the number of a step, ``passes`` around its forward and backward."""

    optimizer: Any
    begin: Callable[[int], object] = lambda number: None
    passes: Callable[[], AbstractContextManager] = contextlib.nullcontext


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
    """Returns LMFlow's class, which imports numpy and transformers only, or LisaStyle without a checkout."""
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


def sources(lmflow: Path | None) -> dict[str, str]:
    """Says whose code the peers' rows are. A file is named as git names its contents."""
    found = {"LISA": f"LISA-style, frozen as LMFlow's callback freezes ({CALLBACK})"}
    if lmflow:
        blob = git_blob((lmflow / CALLBACK).read_bytes())
        found["LISA"] = f"LMFlow's DynamicLayerActivationCallback ({CALLBACK}, git blob {blob})"
    if importlib.util.find_spec("badam"):
        found["BAdam"] = f"badam {importlib.metadata.version('badam')}'s BlockOptimizer"
    return found


def git_blob(text: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()[:12]
