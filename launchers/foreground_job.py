"""Runs in the foreground of a terminal: jobs whose launcher is the command itself, for every verb of `dtrain jobs`.

The command writes job.json when it begins and end.json when it ends, as other launchers do. A folder that has neither,
of an older version or of a copy, is still a run: its lock and its summary show its state.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dtrain.launchers import job_list, probe, registry
from dtrain.launchers.exit_codes import ENDINGS, INTERRUPTED, RUN_AGAIN
from dtrain.launchers.job import Facts, Job, State
from dtrain.launchers.lock import HELD, LOCK
from dtrain.launchers.records import RankRecord, rank_files, write_end
from dtrain.launchers.strict_json import json_in, tail

__all__ = ["ForegroundJob", "began", "ended", "variables"]

REASONS = {**ENDINGS, RUN_AGAIN: "cancelled", INTERRUPTED: "cancelled"}


def began(folder: Path, program: Sequence[str], workers: int) -> None:
    """Record that this command runs the job of ``folder``, whose lock it holds."""
    (folder / "end.json").unlink(missing_ok=True)
    shutil.rmtree(rank_files(folder), ignore_errors=True)  # another job's
    facts = Facts(
        id=str(os.getpid()), launcher=registry.FOREGROUND, name=folder.name, folder=str(folder), program=tuple(program),
        workers=workers, submitted=time.time(),
    )  # fmt: skip
    facts.write()
    try:
        job_list.add(facts)
    except OSError as error:
        where = f"{error.filename or job_list.folder()}: {error.strerror}"
        print(f"dtrain: warning: `dtrain jobs` knows this run by its folder alone ({where})", file=sys.stderr)


def variables(folder: Path, hang_seconds: float) -> dict[str, str]:
    """For the environment of its ranks: that the folder's lock is held for them, and what their probe needs."""
    return {HELD: str(folder), probe.FOLDER: str(rank_files(folder)), probe.HANG_SECONDS: f"{hang_seconds:g}"}


def ended(folder: Path, code: int, cause: str) -> None:
    """Record how it ended; ``cause``: what went wrong, in words, if anything did."""
    try:
        write_end(folder, code, REASONS.get(code, "failed"), job=str(os.getpid()), cause=cause)
    except OSError as error:  # a full disk or a deleted folder: how it ended has been printed
        print(f"dtrain: warning: {folder}/end.json cannot be written: {error.strerror}", file=sys.stderr)


class ForegroundJob(Job):
    """A run of a command in the foreground; its id is that of the process, 0 if unknown."""

    def ask(self) -> State:
        """Whether that process lives and holds the folder's lock: process ids are reused."""
        if self._holds_lock():
            return "running"
        summed_up = (self.folder / "summary.json").is_file() and json_in(self.folder / "job.json") is None
        return "finished" if summed_up else "lost"

    def cancel(self) -> None:
        """SIGTERM: the run checkpoints. Nothing is sent to a process that does not hold the folder's lock."""
        if not self._holds_lock():
            return
        try:
            process = os.pidfd_open(int(self.id))  # keeps its id from being reused
        except OSError:
            return
        try:
            if self._holds_lock():
                signal.pidfd_send_signal(process, signal.SIGTERM)
        except ProcessLookupError:
            pass
        finally:
            os.close(process)

    def why(self) -> str:
        """How it ended, the root cause first."""
        state, end = self.state(), json_in(self.folder / "end.json")
        cause = end.get("cause") if isinstance(end, dict) and state in ("failed", "cancelled") else None
        if state == "failed" and isinstance(cause, str) and cause:
            return cause
        if RankRecord.all(self.folder):
            return super().why()
        log = self.folder / "logs" / "launcher.log"
        words = {
            "running": "the run goes on; nothing has failed",
            "finished": "the run has finished",
            "cancelled": "the run was stopped by a signal; the same command goes on from its last checkpoint",
            "failed": f"the run failed; what its ranks said: {self.folder}/logs",
        }
        killed = f"the command has ended without a record (was it killed?); the logs: {self.folder}/logs"
        last_lines = [line for line in tail(log, 4096).splitlines() if line.strip()][-3:] if state == "lost" else []
        return "\n".join([words.get(state, killed), *(f"  {line}" for line in last_lines)])

    def _holds_lock(self) -> bool:
        if self.id in ("0", str(os.getpid())):  # the process that asks does not run it
            return False
        # A link in place of the lock could name any file, and any process that has that open.
        lock = os.path.join(os.path.realpath(self.folder), LOCK)
        try:
            owner = Path(f"/proc/{self.id}").stat().st_uid
            held = any(os.path.realpath(link) == lock for link in Path(f"/proc/{self.id}/fd").iterdir())
            return held and owner == os.geteuid() and not os.path.islink(lock)
        except OSError:  # it has ended, or is another user's
            return False
