"""The measuring process of a run on a GPU: one stage after the other, as asked for by a line of JSON on stdin.

    {"call": "module:function", "seconds": 30, "arguments": {...}}

It imports and starts CUDA once. What a stage raises costs that stage only; where the GPU itself is lost the process
ends, and the run starts another. Each answer is a line on stdout that begins with ANSWER.
"""

import argparse
import gc
import importlib
import json
import sys
import traceback
from pathlib import Path

import torch

from ..common.results import describe
from ..common.rounds import message
from ..common.rows import Recorder
from ..common.timers import GpuTimer, RehearsalTimer, make_timer
from .processes import ANSWER


def answer(**told) -> None:
    print(f"\n{ANSWER}{json.dumps(told)}", flush=True)


def carry_out(request: dict, recorder: Recorder, timer: GpuTimer | RehearsalTimer) -> dict:
    module, name = request["call"].split(":")
    try:
        function = getattr(importlib.import_module(module), name)
        failed = function(recorder, timer, request["seconds"], **request["arguments"])
    except (Exception, SystemExit) as error:
        traceback.print_exc(file=sys.stdout)
        told = {"status": "failed", "why": message(error)}
    else:
        told = {"status": "failed", "why": f"{failed} rows"} if failed else {"status": "ok"}
    gc.collect()
    timer.synchronize()  # raises if the GPU is lost
    timer.release()
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where rows.jsonl lies")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    recorder, timer = Recorder(options.folder), None
    if not options.rehearse:
        torch.zeros(1, device="cuda")  # starts CUDA, beside the tests
    describe(recorder, options.rehearse)
    answer(status="ready")
    for line in sys.stdin:
        timer = timer or make_timer(options.rehearse)  # now that the GPU is its own, as it times a spin
        answer(**carry_out(json.loads(line), recorder, timer))


if __name__ == "__main__":
    main()
