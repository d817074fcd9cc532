"""Runs one measurement by itself, into the folder of the GPU's results. All of them: `python -m benchmarks.gpu`."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..common.results import RESULTS, describe, gpu_folder, write_assembled
from ..common.rows import Recorder
from ..common.timers import make_timer


def run_alone(run: Callable[..., int], options: argparse.Namespace, **arguments) -> int:
    """Runs ``run(recorder, timer, seconds, **arguments)``, which returns the number of failures. Returns the exit code.

    The files go to ``options.out``, by default to results/<GPU>, of a rehearsal to a temporary folder.
    """
    timer = make_timer(options.rehearse)
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder))
        machine = describe(recorder, options.rehearse)
        failed = 1
        try:
            failed = run(recorder, timer, options.budget, **arguments)
        finally:
            out = options.out or gpu_folder(machine, Path(tempfile.mkdtemp()) if options.rehearse else RESULTS)
            for path in write_assembled(recorder.path.read_text().splitlines(), out):
                print(path, flush=True)
    return 1 if failed else 0
