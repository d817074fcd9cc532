"""Counts what the compiled Triton kernels execute an element, without a GPU: results/compile_contract.json, for the
roofline plot. The ceilings are in tests/backends/test_triton_contract.py.
"""

import argparse
import re
import subprocess
from collections import Counter
from datetime import datetime, timezone
from itertools import product
from pathlib import Path

import torch
import triton

from ..common.results import CONTRACT, RESULTS, text_of
from .triton_targets import MODES, TOOLS, Variant, compile_update, machine_code

NAMES = {"fff": "float32", "bbf": "bfloat16, float32 moments", "bbb": "bfloat16"}  # as the benchmarks call them
CASES = {
    "mask=None": {"kind": "keep"},
    "GradDrop": {"kind": "bernoulli"},
    "GaussianGradDrop": {"kind": "gaussian"},
    "GradDropEpoch, recompute": {"kind": "bucket", "frozen": True, "ages": True},
    "GradDropEpoch, bitpacked": {"kind": "bucket", "planes": 3, "frozen": True, "ages": True},
    "FixedMask": {"kind": "fixed", "frozen": True},
}
TURNS, ELEMENTS = 4, 8  # of a program's loop; of a thread in a turn


def row(case: str, mode: str) -> dict:
    """Counts one kernel. ``body_...`` is the loop over whole blocks; ``instructions_per_element`` adds its share of the
    code before the loop.
    """
    code = machine_code(compile_update(Variant(mode, **CASES[case])))
    widths = {name: Counter(8 * i.bytes for i in code.body if i.name == name) for name in ("LDG", "STG")}
    accesses = {name: {f"{bits} bit": found[bits] for bits in sorted(found)} for name, found in widths.items()}
    return {
        "backend": "triton",
        "case": case,
        "mode": NAMES[mode],
        "registers": code.registers,
        "body_instructions_per_element": len(code.body) / ELEMENTS,
        "instructions_per_element": (len(code.body) + len(code.prologue) / TURNS) / ELEMENTS,
        "prologue_instructions": len(code.prologue),
        "loads_of_a_thread": accesses["LDG"],
        "stores_of_a_thread": accesses["STG"],
        "pipes_of_a_thread": dict(sorted(code.pipes().items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / CONTRACT)
    options = parser.parse_args()
    version = subprocess.run([TOOLS / "ptxas", "--version"], capture_output=True, text=True, check=True).stdout
    rows = [row(*each) for each in product(CASES, (mode for mode in MODES if mode in NAMES))]
    result = {
        "benchmark": "compile_contract",
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "target": "sm_90",
        "triton": triton.__version__,
        "ptxas": re.search(r"V([\d.]+)", version)[1],
        "torch": torch.__version__,
        "rows": rows,
    }
    options.output.write_text(text_of(result))
    for entry in rows:
        print(f"{entry['mode']:26} {entry['case']:25} {entry['backend']:12} {entry['registers']:4} registers "
              f"{entry['body_instructions_per_element']:7.2f} {entry['instructions_per_element']:7.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
