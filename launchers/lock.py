"""The lock of a run folder, so that only one run trains in it: held by the process that may write there.

    dtrain train, on this machine     the command itself, which no rank outlives
    Slurm, MPI, dtrain launch         rank 0, from before its program starts until after it has ended
    while a job is being submitted    the command that does it; rank 0 waits for it

It is flock on FOLDER/.lock, so it ends with its process however that ends, and holds on all nodes of a shared file
system that carries locks: NFS since version 4 or with lockd, Lustre mounted with ``flock``, GPFS, BeeGFS with locks on.
NFS with ``nolock`` or ``local_lock``, and Lustre with ``localflock``, know the locks of one machine only; on Lustre
without either there are none. There only job.json shows that a folder is in use, as far as its scheduler can be asked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["HELD", "LOCK", "InUse", "held"]

LOCK = ".lock"
HELD = "DTRAIN_LOCKED"
"""Environment of the ranks: the folder whose lock is held for them."""
POLL_SECONDS = 0.1


class InUse(RuntimeError):
    """Another process holds the lock of ``folder``; ``holder`` says which, in words."""

    def __init__(self, folder: Path, holder: str) -> None:
        super().__init__(f"{folder} is in use by {holder}")
        self.folder, self.holder = folder, holder


@contextlib.contextmanager
def held(folder: Path, what: str, *, seconds: float = 0.0) -> Iterator[bool]:
    """Hold the lock of ``folder``, which exists, within the block; False where its file system has no locks.

    ``what``: the holder, for the error messages of others. ``seconds``: how long to wait for it. Raises ``InUse``.
    """
    deadline = time.monotonic() + seconds
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        locks = _taken(file)
        while locks is None:
            if time.monotonic() >= deadline:
                holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
                raise InUse(folder, holder)
            time.sleep(POLL_SECONDS)
            locks = _taken(file)
        _note(file, f"{what}, process {os.getpid()} on {socket.gethostname()}\n")
        yield locks
        _note(file, "")
    finally:
        os.close(file)


def _taken(file: int) -> bool | None:
    """Whether the lock is ours now; None while it is another's, False where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:
        return False
    return True


def _note(file: int, who: str) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock holds without it
        os.ftruncate(file, 0)
        os.pwrite(file, who.encode(), 0)
