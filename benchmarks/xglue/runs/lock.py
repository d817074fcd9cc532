"""Who does which run, when several processes or sweeps share a folder of results."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process has ``path`` (a lock file, made for the purpose) for itself inside of the context.

    The system lets go of it when the process ends, however it ends. On a file system that knows flock (NFS from
    version 4 on).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        # The holder before us may have removed the file between our open and our lock: ours is then nobody's.
        mine = path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino
        try:
            yield mine
        finally:
            if mine:
                path.unlink(missing_ok=True)
