"""run_ranks(): runs a function in several processes of one process group (gloo), for tests of distributed code.

    def ranks_agree(value):  # of a module, not nested, no lambda; runs in every rank
        import torch.distributed as dist
        total = torch.tensor([value + dist.get_rank()])
        dist.all_reduce(total)
        return total  # numbers, lists, plain tensors: what pickle takes

    def test_ranks_agree():
        assert run_ranks(2, ranks_agree, 5) == [torch.tensor([11])] * 2

Each call has new processes, so nothing is left from one call to the next. They are forked from one server, which is
started at the first call and has imported torch. So the first call takes seconds, the others some tenths of one. Still,
a function that runs several cases one after the other is cheaper than several calls.

pytest does not rewrite the asserts in ranks: give them a message, or return values and compare them in the test. A
rank's output is shown only if a rank fails.
"""

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

# Without the tested package: the server may find another copy of it than the test has.
_PRELOADED = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch._dynamo", "pytest", "numpy"]
_GRACE = 0.5  # seconds that the other ranks have, after a failure, to report theirs


class RankFailure(AssertionError):
    """A rank raised, died or did not end. The message has its traceback and what it printed."""


def run_ranks(world: int, function, *args, timeout: float = 120) -> list:
    """Runs ``function(*args)`` in ``world`` processes of one gloo group. Returns the result of each, by rank.

    RANK, LOCAL_RANK, WORLD_SIZE, ... are in the environment, as torchrun sets them. Each rank has one thread.

    Args:
        function: of a module that can be imported, as must be its arguments and results.
        timeout: seconds from the start of all ranks to the end of the last.

    Raises:
        RankFailure: a rank raised, was killed, or is not done in time. No rank is left then.
    """
    call = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        context = _server()
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            context.Process(target=_rank, args=(rank, world, folder, call, timeout, dict(os.environ), sender))
            for rank, (_, sender) in enumerate(pipes)
        ]
        try:
            for rank, (_, sender) in zip(ranks, pipes):
                rank.start()
                sender.close()
            return _results(ranks, [receiver for receiver, _ in pipes], folder, time.monotonic() + timeout)
        finally:
            for rank in ranks:
                if rank.pid is not None:
                    _kill(rank)


def _kill(rank) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)  # with everything it has started, such as a compiler
    rank.kill()  # in case it has no group yet
    rank.join()


@functools.cache
def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _results(ranks: list, receivers: list, folder: str, deadline: float) -> list:
    waiting, results, failures = dict(zip(receivers, range(len(ranks)))), [None] * len(ranks), {}
    while waiting and (ready := wait(waiting, max(deadline - time.monotonic(), 0))):
        for receiver in ready:
            number = waiting.pop(receiver)
            try:
                done, answer = pickle.loads(receiver.recv_bytes())
            except EOFError:
                ranks[number].join()
                done, answer = False, _cause_of_death(ranks[number].exitcode)
            if done:
                results[number] = answer
            else:
                failures[number] = answer
                deadline = min(deadline, time.monotonic() + _GRACE)
    if waiting and not failures:
        failures = {number: f"is not done in time. It is here:\n{_stack(ranks[number], number, folder)}"
                    for number in waiting.values()}  # fmt: skip
    if failures:
        # A rank that died is the cause of what the others report about their connections.
        order = sorted(failures, key=lambda number: (not failures[number].startswith("was killed"), number))
        raise RankFailure("\n".join(_report(number, failures[number], folder) for number in order))
    return results


def _cause_of_death(exitcode: int) -> str:
    return f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exited with code {exitcode}"


def _stack(rank, number: int, folder: str) -> str:
    os.kill(rank.pid, signal.SIGUSR1)
    stack = Path(folder, f"stack{number}")
    for _ in range(20):
        time.sleep(0.05)
        if stack.exists() and (text := stack.read_text()):
            return text
    return "(it does not say where)"


def _report(number: int, failure: str, folder: str) -> str:
    printed = Path(folder, f"printed{number}")
    tail = printed.read_text(errors="replace").strip().splitlines()[-30:] if printed.exists() else []
    return "\n".join([f"rank {number} {failure}", *(["It had printed:", *tail] if tail else [])])


def _rank(rank: int, world: int, folder: str, call: bytes, timeout: float, environment: dict, sender) -> None:
    """Runs in each process."""
    os.setpgid(0, 0)
    with open(Path(folder, f"printed{rank}"), "wb", buffering=0) as printed:
        for stream in (1, 2):
            os.dup2(printed.fileno(), stream)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=open(Path(folder, f"stack{rank}"), "w"))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment, **_torchrun(rank, world))
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        # A file of this call, as another run could have taken a port.
        store, limit = f"file://{folder}/store", timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
        function, args = pickle.loads(call)
        answer = pickle.dumps((True, function(*args)))
        dist.barrier()  # no rank leaves while another still waits for what it sends
        dist.destroy_process_group()
    except BaseException:
        answer = pickle.dumps((False, f"raised\n{traceback.format_exc()}"))
    sys.stdout.flush()
    sender.send_bytes(answer)


def _torchrun(rank: int, world: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "OMP_NUM_THREADS": 1}
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if any(name == "lo" for _, name in socket.if_nameindex()) else {}
    return {**{name: str(value) for name, value in numbers.items()}, **loopback, "MASTER_ADDR": "127.0.0.1"}
