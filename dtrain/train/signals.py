"""Stop requests, noticed even while the main thread blocks in a collective.

A Python signal handler runs on the main thread, between two bytecodes: not while that thread waits inside C++ for a
peer. The C level of CPython notes the signal at once and writes its number to the wakeup file descriptor, from which a
thread reads it. The thread only notes the request. Acting on it is up to the training loop, at a step boundary on which
all ranks agree.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from dtrain.launchers.exit_codes import RUN_AGAIN
from dtrain.launchers.stop_signals import OF_A_RANK, STOP_SIGNALS

__all__ = ["StopRequest", "overheard"]


class StopRequest:
    """Context manager: watches for SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 while it is open.

    ``requested`` is 0, or the number of the first signal; repeats are ignored. If the main thread has not left the
    ``with`` block ``grace_seconds`` after the first signal, all stacks are written to stderr and the process ends with
    exit code 75. Raises RuntimeError outside the main thread or inside another open StopRequest.

        with StopRequest(grace_seconds=60) as stop:
            for step in steps:
                train(step)
                if agreed(stop.requested):
                    break
    """

    def __init__(self, *, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._requested = 0
        self._since = 0.0
        self._old: dict[int, object] = {}
        self._old_wakeup = -1

    @property
    def requested(self) -> int:
        """0, or the number of the first stop signal."""
        return self._requested

    @property
    def seconds_since(self) -> float:
        """Seconds since the first stop signal; 0 before it."""
        return time.monotonic() - self._since if self._requested else 0.0

    def __enter__(self) -> StopRequest:
        global _open
        if threading.current_thread() is not threading.main_thread() or _open is not None:
            raise RuntimeError("StopRequest owns the signal handlers: open one at a time, on the main thread")
        _open = self
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="dtrain-stop-request", daemon=True)
        self._thread.start()
        for number in OF_A_RANK:
            self._old[number] = signal.signal(number, _pass)
        return self

    def __exit__(self, *_: object) -> None:
        global _open
        self._restore()
        with contextlib.suppress(BlockingIOError):  # full of signals: then the thread wakes up anyway, and sees _open
            self._write.send(b"\0")
        _open = None
        self._thread.join()
        self._read.close()
        self._write.close()

    def _restore(self) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, old in self._old.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)  # type: ignore[arg-type]

    def _watch(self) -> None:
        while _open is self:
            left = self._grace_seconds - self.seconds_since if self._requested else None
            if left is not None and left <= 0:
                self._give_up()
            if select.select([self._read], [], [], left)[0]:
                received = self._read.recv(64)
                if 0 in received:
                    return
                first = next((number for number in received if number in OF_A_RANK), 0)
                if first and not self._requested:
                    self._since = time.monotonic()
                    self._requested = first
                    self._tell(first)

    def _tell(self, number: int) -> None:
        """At once, from this thread: the main one may block in a collective for minutes."""
        now = datetime.datetime.now().isoformat(sep=" ", timespec="milliseconds")
        text = f"{now} {signal.Signals(number).name}: stopping at the next agreed step\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())

    def _give_up(self) -> None:
        name = signal.Signals(self._requested).name
        text = f"{name} came {self._grace_seconds:g} s ago and the run has not ended: giving up. All stacks:\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
            faulthandler.dump_traceback(file=2, all_threads=True)
        os._exit(RUN_AGAIN)


@contextlib.contextmanager
def overheard(tell: Callable[[int], None]) -> Iterator[None]:
    """Within the block, call ``tell`` with the number of every stop signal, at once, on a thread of its own.

    What a signal does is left to the handlers that the code in the block installs (see
    `dtrain.launchers.elastic_agent`). Main thread only.
    """
    read, write = socket.socketpair()
    write.setblocking(False)

    def listen() -> None:
        while 0 not in (received := read.recv(64)):
            for number in received:
                if number in STOP_SIGNALS:
                    tell(number)

    old = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, name="dtrain-overheard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        write.send(b"\0")
        thread.join()
        read.close()
        write.close()


_open: StopRequest | None = None


def _pass(number: int, frame: FrameType | None) -> None:
    """Must be a Python function: for SIG_IGN and SIG_DFL nothing is written to the wakeup file descriptor."""


def _in_forked_child() -> None:
    """A forked child (a loader's worker) shares our socket: SIGTERM to the child would look like one to us.

    SIGTERM works on it as before, since loaders end their workers with it. It ignores the others: Slurm and the
    terminal send them to every process of a job, and a dead worker fails its loader and the step.
    """
    global _open
    if _open is None:
        return
    _open._restore()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    _open = None


os.register_at_fork(after_in_child=_in_forked_child)
