"""The command line: python -m graddrop_kernels info | verify | bench."""

import argparse
import math

import torch

from .. import backends
from .info import info


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns its exit code. A command that does not exist exits with 2 and the usage."""
    parser = argparse.ArgumentParser(
        prog="python -m graddrop_kernels", description="GradDrop inside one fused AdamW step."
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    commands.add_parser("info", help="versions, compilers, backends, and which one is picked").set_defaults(run=info)

    command = commands.add_parser("verify", help="every backend of this machine against the reference, bit by bit")
    command.set_defaults(run=_verify)
    command.add_argument("--device", type=_device, help="cpu, cuda, cuda:1, ...; default: the CPU and the GPU")
    names = [backend.name for backend in backends.BACKENDS]
    command.add_argument("--backend", choices=names, help="this one only; default: all that run")
    command.add_argument("--seed", type=int, help="repeats a run; default: a fresh one")
    command.add_argument("--quick", action="store_true", help="one case of each policy and dtypes instead of many")
    command.add_argument("--seconds", type=_seconds, help="no case begins later; the table comes in any case")

    command = commands.add_parser("bench", help="the time of a step against torch's own")
    command.set_defaults(run=_bench)
    command.add_argument("--device", type=_device, help="default: the GPU where torch sees one, else the CPU")
    command.add_argument("--quick", action="store_true", help="smaller tensors, fewer rounds")
    arguments = vars(parser.parse_args(argv))
    status: int = arguments.pop("run")(**arguments)
    return status


def _device(text: str) -> str:
    """Parses a device that torch can use, for argparse: ArgumentTypeError with torch's reason otherwise."""
    try:
        torch.empty(1, device=torch.device(text))
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {str(error).splitlines()[0]}") from error
    return text


def _seconds(text: str) -> float:
    """Parses a positive number of seconds, for argparse."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


# Imported when asked for: `info` has to work where something of these is broken.


def _verify(device: str | None, backend: str | None, seed: int | None, quick: bool, seconds: float | None) -> int:
    from .verify.command import verify

    return verify(device, backend, seed, quick, seconds)


def _bench(device: str | None, quick: bool) -> int:
    from .bench import bench

    return bench(device, quick)
