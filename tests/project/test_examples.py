"""Each of examples/ runs as its README says, learns something, and has the masks and losses of the plain loop."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from graddrop_kernels.masks.philox import DOMAIN_ELEMENT, stream_key, uniform16

ROOT = Path(__file__).resolve().parents[2]
SAME = ("plain_loop", "trainer", "accelerate_loop", "lightning_loop")
FROZEN = ("sampled_blocks", "sparse_finetune", "new_tokens")
OTHERS = ("peft_lora", "causal_lm", "any_optimizer", *FROZEN)
FASTER = ("--lr=3e-3",)
# Its blocks take turns: in eight steps the loss rose with a seed.
LONGER = ("--lr=1e-3", "--sentences=96")
REPORT = re.compile(
    r"loss (\d+\.\d+) in the first quarter of (\d+) steps, (\d+\.\d+) in the last\n"
    r"next mask of (\S+): (\d+\.\d) % kept, crc32 ([0-9a-f]{8})\n"
)


@functools.cache
def text_of(script, seed, *arguments):
    command = [sys.executable, str(ROOT / "examples" / f"{script}.py"), "--layers=2", "--sentences=32"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, f"--seed={seed}", *arguments], capture_output=True, text=True, timeout=300, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert "100%" in result.stderr or "4/4" in result.stdout, "no progress shown"
    return result.stdout


def printed(script, seed, *arguments):
    """(loss at first, steps, loss at last, parameter, share kept, checksum), as text"""
    return REPORT.search(text_of(script, seed, *arguments)).groups()


def numbers(pattern, text):
    return [int(number.replace(",", "")) for number in re.search(pattern, text).groups()]


@pytest.mark.parametrize("script", SAME)
def test_the_same_training_in_every_loop(script, seed):
    found = printed(script, seed, *FASTER)
    assert found == printed("plain_loop", seed, *FASTER)
    first, steps, last, name, kept, _ = found
    assert float(last) < float(first) - 0.05 and steps == "8"
    # p is 0.9 - 1/2 in the second epoch.
    draws = uniform16(stream_key(name, seed), 8, DOMAIN_ELEMENT, 0, 384 * 384)
    assert kept == f"{100 * (draws >= round(0.4 * 65536)).float().mean():.1f}"


@pytest.mark.parametrize("script", OTHERS)
def test_other_models(script, seed):
    how = LONGER if script == "sampled_blocks" else FASTER if script in FROZEN else ()
    first, _, last, name, kept, _ = printed(script, seed, *how)
    assert float(last) < float(first)
    if script == "any_optimizer":
        assert abs(float(kept) - 60) < 1  # p is 0.9 - 1/2 in the second epoch
    elif script == "peft_lora":
        assert ".lora_A." in name and abs(float(kept) - 80) < 3
    elif script in ("sparse_finetune", "new_tokens"):
        assert 0 < float(kept) < 40
    else:
        assert kept in ("0.0", "100.0")  # a block


def test_only_the_masked_weights_move(seed):
    text = text_of("sparse_finetune", seed, *FASTER)
    moved, count, outside = numbers(r"moved: ([\d,]+) of ([\d,]+) weights, (\d+) ", text)
    assert 0.04 * count < moved <= round(0.05 * count) and outside == 0


def test_only_the_new_rows_move(seed):
    text = text_of("new_tokens", seed, *FASTER)
    assert numbers(r"moved: (\d+) of (\d+) new rows, (\d+) ", text) == [200, 200, 0]
    now, dense = numbers(r"moments: ([\d,]+) bytes; of all parameters ([\d,]+)", text)
    assert 2 * 4 * 200 * 384 < now < 2 * 4 * 200 * 384 + 4 * 100 < dense  # and a step count for each tensor


def test_moments_of_one_block_only(seed):
    now, dense = numbers(r"moments: ([\d,]+) bytes; of all blocks ([\d,]+)", text_of("sampled_blocks", seed, *LONGER))
    assert dense - now == 2 * 4 * (12 * 384**2 + 13 * 384)  # of a block: weights, biases and norms


def test_the_readme_has_every_example():
    text = (ROOT / "examples" / "README.md").read_text()
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"topics"}
    assert scripts == {*SAME, *OTHERS}
    for script in scripts:
        assert f"`.venv/bin/python examples/{script}.py`" in text
        assert len((ROOT / "examples" / f"{script}.py").read_text().splitlines()) <= 75
