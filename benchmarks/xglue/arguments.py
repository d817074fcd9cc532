"""The command line of `python -m benchmarks.xglue`."""

import argparse
from pathlib import Path

from .methods import METHODS, PAPERS
from .settings import LARGE, SELECTIONS, SMALL, TINY, Settings, settings_for
from .tasks import TASKS

DESCRIPTION = """\
The GradDrop paper's experiments: fine-tune a multilingual encoder on English with each of its methods, test it in every
language without further training, and make the paper's tables and figures. For XGLUE's nine tasks bring the data (its
licence forbids passing it on): --data xglue_full_dataset. The other tasks' data is in this folder."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the arguments; ``command`` names the command. Exits with a message on unusable ones, as argparse does."""
    parser = argparse.ArgumentParser("python -m benchmarks.xglue", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("run", help="train and test one method, with one seed or a few")
    one.add_argument("--method", default="graddrop", help=f"one of {', '.join(METHODS)} (default: %(default)s)")
    one.add_argument("--seeds", type=int, nargs="+", default=[0], help="of head, batches and masks (default: 0)")
    one.add_argument("--lr", type=float, help="peak learning rate of the body (default: the task's)")
    _settings(one)

    many = commands.add_parser("sweep", help="many methods and seeds, each method at its best learning rate")
    many.add_argument("--methods", nargs="+", default=["all"], help="some of them, or all of the paper (default: all)")
    _seeds(many, "--seeds", "0..4", "of the final runs, as 0 1 5 or 0..15 (default: %(default)s)")
    many.add_argument("--lrs", type=float, nargs="+", help="the grid (default: the task's rate alone)")
    _seeds(many, "--tuning-seeds", "0..1", "the seeds of the grid (default: %(default)s); the rate is that of the best "
           "mean English dev score")  # fmt: skip
    _workers(many)
    _settings(many)

    study = commands.add_parser("study", help="a sweep that a file describes, and its report")
    study.add_argument("file", help="a JSON file, or the name of one in benchmarks/xglue/studies")
    study.add_argument("--output", type=Path, help="of the report (default: RESULTS/report)")
    _workers(study)
    _running(study)

    report = commands.add_parser("report", help="tables and figures of all results in a folder")
    report.add_argument("results", type=Path)
    report.add_argument("--output", type=Path, required=True, help="folder for Markdown, CSV, PNG and HTML")

    other = commands.add_parser("compare", help="do two folders of results agree, run by run")
    other.add_argument("results", type=Path)
    other.add_argument("other", type=Path, nargs="?", help="(default: the committed ones, benchmarks/results/xglue)")

    packed = commands.add_parser("pack", help="a folder of results as one table file, which all commands here read")
    packed.add_argument("results", type=Path)
    packed.add_argument("table", type=Path, nargs="?", help="(default: RESULTS.jsonl.xz)")

    unpacked = commands.add_parser("unpack", help="a table as a folder with a JSON file per run, for a sweep to go on")
    unpacked.add_argument("table", type=Path)
    unpacked.add_argument("results", type=Path)

    score = commands.add_parser("score", help="official scores of a folder of prediction files")
    score.add_argument("predictions", type=Path, help="folder with {TASK}/{language}.prediction")
    score.add_argument("--tasks", nargs="+", help="(default: those that have a folder)")
    score.add_argument("--languages", nargs="+", help="of each task (default: all that it has, as the evaluator)")
    score.add_argument("--split", default="test", choices=("dev", "test"))
    _data(score)
    return parser.parse_args(argv)


def _seeds(parser, name: str, default: str, text: str) -> None:
    parser.add_argument(name, nargs="+", default=[default], help=text, metavar="SEED")


def _data(parser) -> None:
    parser.add_argument("--data", metavar="FOLDER", help="xglue_full_dataset, for XGLUE's tasks")


def _workers(parser) -> None:
    parser.add_argument("--workers", type=int, default=1, help="processes, also on one GPU (default: %(default)s)")


def _running(parser) -> None:
    add = parser.add_argument_group("running").add_argument
    add("--results", type=Path, default=Path("xglue-results"), help="folder of the JSON files (default: %(default)s)")
    add("--data", metavar="FOLDER", help="xglue_full_dataset, for XGLUE's tasks")
    add("--device", choices=("cpu",), help="(default: a GPU if there is one)")
    add("--threads", type=int, help="of PyTorch, in each process (default: the cores shared out)")
    add("--eval-batch-size", type=int, default=64, help="of a process (default: %(default)s)")
    add("--no-checkpoints", action="store_true", help="a killed run starts anew; less to write for short runs")
    add("--predictions", action="store_true", help="write official prediction files of the best epoch's test too")
    add("--deterministic", action="store_true", help="on a GPU: the same bits again, at some cost in time")


def _settings(parser) -> None:
    add = parser.add_argument_group("what is trained").add_argument
    add("--task", required=True, help=f"one of {', '.join(TASKS)}")
    add("--model", default=LARGE, help=f"name or folder for transformers, or {SMALL}, {TINY} (default: %(default)s)")
    add("--languages", nargs="+", help="to test in, en first (default: all of the task)")
    add("--epochs", type=int)
    add("--batch-size", type=int, help="examples per optimizer step, over processes and micro-batches")
    add("--gradient-accumulation", type=int, dest="accumulation", help="micro-batches per step (default: 1)")
    add("--max-length", type=int, help="sub-words of an input")
    add("--stride", type=int, help="sub-words that windows of a long context share")
    add("--head-lr-factor", type=float, help="the head's learning rate over the body's")
    add("--weight-decay", type=float, help="not for biases and norms")
    add("--warmup", type=float, help="share of the steps in which the learning rate rises; it falls linearly after")
    add("--max-grad-norm", type=float, help="0: no clipping")
    add("--adam-eps", type=float)
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--bf16", dest="precision", action="store_const", const="bf16", help="autocast (default)")
    precision.add_argument("--float32", dest="precision", action="store_const", const="float32")
    add("--prefix", help="put before every text (default: e5-small's 'query: ', else nothing)")
    add("--train-examples", type=int, metavar="N", help="only the first N")
    add("--eval-examples", type=int, metavar="N", help="only the first N of each language")

    add = parser.add_argument_group("methods").add_argument
    add("--p", type=float, help="drop probability where a method has a constant one (default: the paper's 0.2)")
    add("--anneal-start", type=float, help="of Anneal- methods (default: the paper's 0.9)")
    add("--anneal-end", choices=("paper", "zero"), help="max(0, start - e/T), or 0 in the last epoch (default: paper)")
    add("--blocks-per-epoch", type=int, help="of GradFreeze- methods (default: spread over the epochs)")
    add("--dropout", type=float, help="of activations, for sft only (default: 0)")

    add = parser.add_argument_group("best epoch").add_argument
    add("--select", choices=SELECTIONS, help="by English dev (default, zero-shot), or by dev of all languages")
    add("--dev-all", action="store_true", default=None, help="record dev scores of all languages")
    add("--test-every-epoch", action="store_true", default=None, help="not only after the best one (for figure 2)")
    _running(parser)


FIELDS = tuple(Settings.__dataclass_fields__)


def settings_of(options: argparse.Namespace, **more) -> Settings:
    """Returns the options' settings, with ``more`` in front. Raises ValueError, see ``settings_for``."""
    given = {name: getattr(options, name) for name in FIELDS if hasattr(options, name)}
    return settings_for(**{**given, **more})


def seeds_of(words: list[str]) -> tuple[int, ...]:
    """Converts ("0..3", "7") to 0 1 2 3 7. Raises ValueError."""
    found: list[int] = []
    for word in words:
        first, dots, last = str(word).partition("..")
        try:
            found += range(int(first), int(last) + 1) if dots else [int(first)]
        except ValueError:
            raise ValueError(f"seed {word}: must be a number, or two with .. between them") from None
    if not found or min(found) < 0:
        raise ValueError(f"seeds {' '.join(map(str, words))}: at least one, each 0 or more")
    return tuple(dict.fromkeys(found))


def methods_of(words: list[str]) -> tuple[str, ...]:
    """Returns the methods, or all of the paper for "all"."""
    return tuple(PAPERS) if words == ["all"] else tuple(dict.fromkeys(words))
