"""Following a job to its end from a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from dtrain.launchers.exit_codes import CHECKPOINTED, FAILED, INTERRUPTED

if TYPE_CHECKING:
    from dtrain.launchers.job import Job

LOOK_SECONDS = 0.5


def follow(job: Job, start: int = 0) -> int:
    """Show what rank 0 prints, from this byte of its log on, until the job has ended; returns its exit code.

    Ctrl-C, SIGTERM, and SIGHUP without nohup, cancel a job of this machine, and wait until its ranks have left.
    """
    from dtrain.cli.submit import sigterm_interrupts
    from dtrain.launchers.job import ENDED

    shown = start
    try:
        with sigterm_interrupts():
            while True:
                ended = job.state() in ENDED
                shown = _show(job, shown)
                if ended:
                    break
                time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        if job.facts.launcher == "slurm":
            _say(f"\njob {job.id} goes on; dtrain jobs cancel {job.id} ends it")
        else:
            _say(f"\nstopping job {job.id}; Ctrl-C again leaves it to end by itself")
            job.cancel()
            job.wait()
        return INTERRUPTED
    return exit_code(job)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(text, file=sys.stderr, flush=True)


def exit_code(job: Job) -> int:
    """The exit code of a job that has ended; what went wrong is told on standard error, the root cause first."""
    state, end = job.state(), job.end()
    if state == "finished":
        return 0
    print(f"dtrain: error: job {job.id} {state}\n{job.why()}", file=sys.stderr)
    code = end["code"] if end else FAILED
    return code if isinstance(code, int) and code in (2, INTERRUPTED, CHECKPOINTED) else FAILED


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
