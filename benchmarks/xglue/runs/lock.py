"""Assigns runs when several processes or sweeps share a folder of results."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Says whether this process has ``path`` (a lock file, made for the purpose) for itself inside the context.

    The system releases it when the process ends, however it ends. Needs a file system with flock (NFS from version 4
    on).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        # The previous holder may have removed the file between our open and our lock. Then the lock is worthless.
        mine = path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino
        try:
            yield mine
        finally:
            if mine:
                path.unlink(missing_ok=True)
