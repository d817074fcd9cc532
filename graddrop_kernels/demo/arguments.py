"""The demo's command line."""

import argparse
from pathlib import Path

from .. import backends
from . import sib200
from .classifier import BUNDLED
from .methods import METHODS, WEIGHTS

DESCRIPTION = """\
Fine-tune a multilingual transformer on 701 English sentences (SIB-200: which of seven topics?) with a method of the
paper, and test it on 204 sentences each in English and in languages it was not trained on. The bundled model is
multilingual-e5-small with 4-bit weights: a small relative of the paper's XLM-R-Large, not that model. The numbers show
that training works, not which method is best: one sentence is half a point. Takes a few minutes on two cores and writes
OUTPUT/demo.png, OUTPUT/demo.json and, for --resume, OUTPUT/METHOD.checkpoint (0.36 GB)."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the arguments, ``method`` as a list. Exits with a message on unusable ones, as argparse does."""
    parser = argparse.ArgumentParser("python -m graddrop_kernels.demo", description=DESCRIPTION)
    add = parser.add_argument
    several = f"one of {', '.join(METHODS)}; several with commas between them; or all (default: %(default)s)"
    add("--method", default="graddrop", help=several)
    add("--model", default=BUNDLED, help="%(default)s (default), or folder or hub name of a Hugging Face classifier")
    tested = "to test in, of %(choices)s (default: all)"
    languages = sib200.LANGUAGES
    add("--languages", nargs="+", default=list(languages), choices=languages, metavar="LANGUAGE", help=tested)
    add("--output", type=Path, default=Path("demo-output"), help="folder for what is written (default: %(default)s)")
    add("--resume", action="store_true", help="go on from OUTPUT's checkpoints, to the bits of an uninterrupted run")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=_positive, default=3, help="(default: %(default)s)")
    add("--batch-size", type=_positive, default=16, help="(default: %(default)s)")
    add("--max-length", type=_positive, default=64, help="tokens a sentence at most (default: %(default)s)")
    add("--lr", type=float, default=1e-4, help="learning rate of the pretrained body (default: %(default)s)")
    add("--head-lr", type=float, default=1e-3, help="learning rate of the new head (default: %(default)s)")
    add("--weight-decay", type=float, default=0.01, help="not for biases and norms (default: %(default)s)")
    add("--p", type=float, default=0.2, help="drop probability, where the method has a constant one (default: 0.2)")
    add("--dropout", type=float, default=0.0, help="activation dropout of sft (the paper's is p); others have none")
    add("--seed", type=int, default=0, help="of head, batches and masks (default: %(default)s)")

    add = parser.add_argument_group("running").add_argument
    add("--backend", default="auto", help="the optimizer's (default: %(default)s)")
    add("--device", help="(default: cuda if there is one, else cpu)")
    chosen = "bf16 is autocast; auto (default) takes it where the processor computes in it"
    add("--precision", default="auto", choices=("auto", "bf16", "float32"), help=chosen)
    stored = "dtype of the body's weights; bf16 with float32 masters, or rounded stochastically (default: %(default)s)"
    add("--weights", default="float32", choices=WEIGHTS, help=stored)
    add("--threads", type=_positive, help="of PyTorch (default: its own choice)")
    add("--save-every", type=_positive, metavar="N", help="checkpoint every N steps, not only after every epoch")
    add("--max-steps", type=_positive, metavar="N", help="stop after N steps; learning rates as in the whole run")

    arguments = parser.parse_args(argv)
    methods = METHODS if arguments.method == "all" else dict.fromkeys(arguments.method.split(","))
    arguments.method = list(methods)
    unknown = ", ".join(repr(name) for name in methods if name not in METHODS)
    if unknown:
        parser.error(f"argument --method: unknown {unknown}; choose from {', '.join(METHODS)}, or all")
    if not 0 <= arguments.dropout < 1:
        parser.error(f"argument --dropout: must be in [0, 1), got {arguments.dropout}")
    if arguments.max_length < 3:
        parser.error(f"argument --max-length: must be 3 or more (beginning, token, end), got {arguments.max_length}")
    if arguments.seed < 0:
        parser.error(f"argument --seed: must be 0 or more, got {arguments.seed}")
    try:
        backends.check_name(arguments.backend)
    except (ValueError, RuntimeError) as error:
        parser.error(f"argument --backend: {error}")
    return arguments


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value
