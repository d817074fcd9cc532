"""The XGLUE benchmark in two processes: what torchrun and accelerate launch start trains as one process does, and goes
on after kill -9 to the same bits."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from lazy import Lazy

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks.xglue.settings import settings_for  # noqa: E402

running, training = Lazy("benchmarks.xglue.runs.run"), Lazy("benchmarks.xglue.runs.trainer")
GIVEN = {
    "task": "sib200", "model": "tiny", "languages": ("en", "de"), "train_examples": 40, "eval_examples": 8,
    "epochs": 8, "batch_size": 16, "max_length": 96, "lr": 3e-3,
}  # fmt: skip
TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]  # fmt: skip


def start(launcher, seed, results):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = ["--module"] if launcher is ACCELERATE else ["-m"]
    port_flag = "--main_process_port" if launcher is ACCELERATE else "--master-port"
    words = [sys.executable, "-m", *launcher, port_flag, port, *module, "benchmarks.xglue", "run"]
    for name, value in GIVEN.items():
        words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else [value])]
    words += ["--method", "graddrop-epoch", "--seeds", seed, "--float32", "--device", "cpu", "--threads", 1,
              "--results", results]  # fmt: skip
    return subprocess.Popen(
        [str(word) for word in words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process, path):
    error = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 0, error
    return json.loads(path.read_text())


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_after_a_kill(seed, tmp_path, one_thread):
    seed %= 1000
    settings = settings_for(**GIVEN, method="graddrop-epoch", seed=seed, precision="float32")
    whole = finish(start(TORCHRUN, seed, tmp_path / "whole"), tmp_path / "whole" / settings.file)
    assert whole["machine"]["processes"] == 2 and not whole["resumed"]

    process = start(TORCHRUN, seed, tmp_path / "killed")
    folder = (tmp_path / "killed" / settings.file).with_suffix(".checkpoints")
    deadline = time.monotonic() + 300
    while training.last_checkpoint(folder) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:  # torchrun's are not in its group
        one.kill()
    error = process.communicate()[1].decode()
    assert training.last_checkpoint(folder) is not None and not (tmp_path / "killed" / settings.file).exists(), error
    resumed = finish(start(ACCELERATE, seed, tmp_path / "killed"), tmp_path / "killed" / settings.file)
    assert resumed["resumed"] and resumed["weights_sha256"] == whole["weights_sha256"]
    for key in whole.keys() - {"resumed", "seconds"}:
        assert resumed[key] == whole[key], key

    # The third batch is not full: Accelerate fills it with examples of the first.
    alone = running.run_one(settings, tmp_path / "alone", device="cpu", progress=False)
    assert alone["machine"]["processes"] == 1
    for (step, one), (same, two) in zip(alone["losses"][:2], whole["losses"]):
        assert step == same and one == pytest.approx(two, rel=1e-3)  # the same batch, in halves
