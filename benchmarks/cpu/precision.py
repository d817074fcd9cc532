"""A real fine-tune, the demo's, with the weights kept in float32, bfloat16, bfloat16 beside float32 masters, and
bfloat16 rounded stochastically: the loss by step and the accuracy at the end, over several seeds.

The same seeds, batches and masks for all, and matrices multiplied in bfloat16 (autocast): only how weights are kept
differs. Two epochs. What was measured is kept after every run: --resume goes on.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from graddrop_kernels.demo import arguments as command_line
from graddrop_kernels.demo import report, sib200
from graddrop_kernels.demo.classifier import ModelSource
from graddrop_kernels.demo.methods import WEIGHTS
from graddrop_kernels.demo.run import run_method
from graddrop_kernels.demo.train import Examples

from ..common.machine import Load, facts, slug
from ..common.results import RESULTS, arguments, write

LANGUAGES = ("en", "de", "sw")


def demo_arguments(options: argparse.Namespace, weights: str, seed: int, folder: Path) -> argparse.Namespace:
    """Makes the demo's arguments."""
    argv = ["--method", "graddrop", "--weights", weights, "--seed", str(seed), "--precision", "bf16", "--epochs", "2"]
    argv += ["--languages", *LANGUAGES[: 1 if options.quick else None], "--output", str(folder)]
    return command_line.parse([*argv, *(("--max-steps", "2") if options.quick else ())])


def load_examples(asked: argparse.Namespace, most: int | None) -> tuple[ModelSource, dict[str, Examples]]:
    """Loads the model, and ``most`` (None: all) sentences of each split."""
    splits = {language: sib200.load(language, "test") for language in asked.languages}
    splits["train"] = sib200.load("en", "train")
    source = ModelSource(asked.model, [text for split in splits.values() for text in split.texts], len(sib200.LABELS))
    return source, {
        name: Examples(source.encode(split.texts[:most], asked.max_length), split.labels[:most])
        for name, split in splits.items()
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the results hold already")
    options = parser.parse_args()
    load, rows, path = Load(), [], None
    written = (options.out or RESULTS / slug(facts())) / "precision.json"
    if options.resume and written.exists():
        rows = json.loads(written.read_text())["rows"]
    with tempfile.TemporaryDirectory() as folder:
        asked = demo_arguments(options, "float32", 0, Path(folder))
        source, examples = load_examples(asked, 32 if options.quick else None)
        for seed in range(1 if options.quick else options.seeds):
            for weights in WEIGHTS:
                if any((row["weights"], row["seed"]) == (weights, seed) for row in rows):
                    continue
                asked = demo_arguments(options, weights, seed, Path(folder))
                found = run_method("graddrop", asked, torch.device("cpu"), source, examples)
                rows.append({
                    "weights": weights, "seed": seed, "steps": found["steps"], "losses": found["losses"],
                    "accuracy": found["accuracy"], "zero_shot_mean": report.zero_shot_mean(found["accuracy"]),
                })  # fmt: skip
                results = {"model": source.description, "method": "GradDrop", "load": load.report(), "rows": rows}
                print(f"seed {seed}, {weights}: {found['accuracy']}", file=sys.stderr, flush=True)
                path = write("precision", options, results)
    print(path or f"nothing is left to do: {written}")


if __name__ == "__main__":
    main()
