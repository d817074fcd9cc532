"""Processes of a run, each with what it starts in a group of its own, so that it can be killed whole. Imports no torch.
"""

import json
import os
import queue
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

ANSWER = "\x1eanswer: "  # begins a line on stdout that is for the run and not for the log
TAIL = 60  # lines kept of what a process printed


class Process:
    """A process whose lines are logged as they come."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], folder: Path, log: Callable[[str], None]):
        """``log`` is called with each line, by another thread."""
        self.tail: deque[str] = deque(maxlen=TAIL)
        self._answers: queue.Queue[dict | None] = queue.Queue()
        self._log = log
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, errors="replace", process_group=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                self._answers.put(json.loads(line.removeprefix(ANSWER)))
            elif line.strip() and "USDT:" not in line:  # noise of torch's profiler
                self.tail.append(line.rstrip())
                self._log(line.rstrip())
        self._process.wait()
        self._answers.put(None)

    def ask(self, request: dict) -> None:
        """Sends a line of JSON. A process that has ended does not get it, and ``answer`` tells."""
        with suppress(OSError):
            self._process.stdin.write(f"{json.dumps(request)}\n")
            self._process.stdin.flush()

    def answer(self, seconds: float) -> dict | None:
        """Returns the next answer, or None if the process has ended. Raises queue.Empty after the seconds."""
        return self._answers.get(timeout=max(0.0, seconds))

    def ended(self) -> str:
        """Says how it has ended; "" for well."""
        code = self._process.returncode
        return "" if code == 0 else f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"

    def kill(self) -> None:
        """Kills it and everything that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
