"""ranks.py itself: results by rank; a rank that raises, dies or hangs is reported, and ends the others."""

import os
import signal
import subprocess
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailure, run_ranks


def gather(value):
    total = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), total, os.environ["LOCAL_RANK"], os.environ["GREETING"], torch.get_num_threads()


def go_wrong(how, folder):
    child = subprocess.Popen(["sleep", "600"])
    for pid in (os.getpid(), child.pid):
        (folder / str(pid)).touch()
    dist.barrier()
    if dist.get_rank() == 1:
        print("on my way")
        if how == "raises":
            raise KeyError("planted")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exits":
            os._exit(7)
        nobody_comes()
    dist.all_reduce(torch.zeros(1))


def nobody_comes():
    time.sleep(600)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_come_by_rank(monkeypatch):
    monkeypatch.setenv("GREETING", "hello")
    for world in (3, 1):
        total = torch.tensor([5 * world + sum(range(world))])
        assert run_ranks(world, gather, 5) == [(rank, total, str(rank), "hello", 1) for rank in range(world)]


@pytest.mark.parametrize(
    "how, timeout, message",
    [
        ("raises", 60, "rank 1 raised\n.*go_wrong.*KeyError: 'planted'.*on my way"),
        ("killed", 60, "^rank 1 was killed by SIGKILL"),
        ("exits", 60, "rank 1 exited with code 7"),
        ("hangs", 4, "rank 1 is not done in time.*nobody_comes.*on my way"),
    ],
)
def test_a_rank_that_fails_ends_all(how, timeout, message, tmp_path):
    begin = time.monotonic()
    with pytest.raises(RankFailure, match=f"(?s){message}"):
        run_ranks(2, go_wrong, how, tmp_path, timeout=timeout)
    assert time.monotonic() - begin < 30
    pids = [int(path.name) for path in tmp_path.iterdir()]
    for _ in range(100):  # nobody waits for the children of a killed process but init
        if not any(map(alive, pids)):
            break
        time.sleep(0.05)
    assert len(pids) == 4 and not any(map(alive, pids))


def test_the_function_must_be_of_a_module():
    with pytest.raises(Exception, match="lambda"):
        run_ranks(2, lambda: None)
