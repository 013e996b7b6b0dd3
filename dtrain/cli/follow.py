"""Following a job to its end from a terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from dtrain.launchers.exit_codes import BAD_CONFIG, FAILED, INTERRUPTED, RUN_AGAIN
from dtrain.launchers.job import ENDED

if TYPE_CHECKING:
    from dtrain.launchers.job import Job

LOOK_SECONDS = 0.5


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Within the block SIGTERM acts as Ctrl-C does, so that ending the command ends its job, too.

    So does SIGHUP, by which a terminal that is closed ends what it has started, unless nohup keeps it away.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]
    old = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


def watched(
    job: Job,
    look: Callable[[], None],
    stopping: Callable[[], None],
    *,
    display: contextlib.AbstractContextManager[object] | None = None,
) -> bool:
    """Wait until the job has ended, and call ``look`` meanwhile and once after; False where that was interrupted.

    Ctrl-C, SIGTERM, and SIGHUP without nohup, leave a scheduler's job running; any other is cancelled (``stopping``
    reports it), and waited for until its ranks have left. ``display`` is open as long as nothing comes.
    """
    try:
        with sigterm_interrupts(), display or contextlib.nullcontext():
            while True:
                ended = job.state() in ENDED
                look()
                if ended:
                    return True
                time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        if job.scheduled:
            _say(f"job {job.id} goes on; dtrain jobs cancel {job.id} ends it")
        else:
            stopping()
            job.cancel()
            job.wait()
        return False


def follow(job: Job, start: int = 0) -> int:
    """Show what rank 0 prints, from this byte of its log on, until the job has ended; returns its exit code.

    When it is interrupted it does as `watched` says.
    """
    shown = start

    def look() -> None:
        nonlocal shown
        shown = _show(job, shown)

    def stopping() -> None:
        _say(f"stopping job {job.id}; Ctrl-C again leaves it to end by itself")

    return exit_code(job) if watched(job, look, stopping) else INTERRUPTED


def exit_code(job: Job) -> int:
    """The exit code of a job that has ended; what went wrong is printed to standard error, the root cause first."""
    state, end = job.state(), job.end()
    if state == "finished":
        return 0
    print(f"dtrain: error: job {job.id} {state}\n{job.why()}", file=sys.stderr)
    code = end["code"] if end else FAILED
    return code if isinstance(code, int) and code in (BAD_CONFIG, INTERRUPTED, RUN_AGAIN) else FAILED


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"\n{text}", file=sys.stderr, flush=True)


def _show(job: Job, start: int) -> int:
    """Print what rank 0 has written since ``start``; returns where it ends."""
    log = next((path for path in job.logs() if path.name == "rank-0.log"), None)
    if log is None:
        return start
    with log.open("rb") as file:
        file.seek(start)
        text = file.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return start + len(text)
