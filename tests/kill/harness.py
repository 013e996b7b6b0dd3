"""Runs that are killed, stopped and started again at random must end as the run that nobody touched: bit by bit.

The ranks of a run are forked off this process, which has the imports behind it, and are treated as a launcher treats
them: when one fails the others are ended, and all start again in the same folder. What befalls them is drawn from a
seed: SIGKILL of one rank, of rank 0, of all; SIGKILL while a checkpoint is written; SIGTERM, at which they checkpoint
and end; SIGSTOP for a moment.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from tests.kill.slow_text import SECONDS

EVENTS = ("one", "one", "first", "all", "writing", "writing", "term", "stop")
SLOW = "0.04"
PATIENCE_SECONDS = 180.0
_SIGNALLED = 75
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Attempts:
    """What became of a run. ``history``: each disturbance, and the exit codes of each attempt."""

    ended: bool
    disturbances: int
    history: tuple[str, ...]


Rank = Callable[[int, int, int], int]
"""(rank, attempt, port) -> exit code, in a process of its own: 0 finished, 75 checkpointed after a signal."""


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def training_rank(overrides: Sequence[str]) -> Rank:
    """One rank of ``dtrain train`` with these overrides."""

    def rank_main(rank: int, attempt: int, port: int) -> int:
        import torch.distributed as dist

        from dtrain.train.config import compose
        from dtrain.train.signals import StopRequest
        from dtrain.train.trainer import train

        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        with StopRequest(grace_seconds=60) as stop:
            outcome = train(compose(overrides), requested=lambda: stop.requested, attempt=f"{attempt}-{port}")
        return _SIGNALLED if outcome.reason == "signal" else 0

    return rank_main


def start(rank_main: Rank, world: int, attempt: int, folder: Path, slow: str) -> list[int]:
    """Fork all ranks; returns their process ids."""
    port, pids = free_port(), []
    sys.stdout.flush()
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _become(rank_main, rank, world, attempt, port, folder, slow)
        pids.append(pid)
    return pids


def _become(rank_main: Rank, rank: int, world: int, attempt: int, port: int, folder: Path, slow: str) -> None:
    """Never returns."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        log = os.open(folder / f"rank-{rank}.out", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        os.environ[SECONDS] = slow
        code = rank_main(rank, attempt, port)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class _Disturbance:
    """One event that will befall the ranks of an attempt, once training has come far enough."""

    def __init__(self, rng: random.Random, folder: Path, *, early: bool) -> None:
        self.event = rng.choice(EVENTS)
        self._rng, self._folder = rng, folder
        self._target = newest_step(folder) + (1 if early else rng.choice((0, 1, 5, 10, 15)))
        self._began, self._at = time.monotonic(), 0.0

    def strike(self, pids: Sequence[int]) -> bool:
        """Do it if it is time; True once it is done."""
        now, step = time.monotonic(), newest_step(self._folder)
        if not self._at:
            if now - self._began < 0.5 or step < self._target:
                return False
            self._at = now + self._rng.uniform(0.0, 1.0)
        if now < self._at or (self.event == "term" and step < 0):
            return False
        if self.event == "writing" and not list((self._folder / "checkpoints").glob("step-*.tmp-*")):
            return False
        victim = 0 if self.event == "first" else self._rng.choice(pids)
        if self.event == "writing":
            time.sleep(self._rng.choice((0, 0.001, 0.003, 0.01)))
        if self.event in ("one", "writing"):
            os.kill(victim, signal.SIGKILL)
        elif self.event == "first":
            os.kill(pids[0], signal.SIGKILL)
        elif self.event == "stop":
            os.kill(victim, signal.SIGSTOP)
            time.sleep(self._rng.uniform(0.2, 2.0))
            os.kill(victim, signal.SIGCONT)
        else:
            for pid in pids:
                os.kill(pid, signal.SIGTERM if self.event == "term" else signal.SIGKILL)
        return True


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, -1 without one."""
    with suppress(OSError, ValueError, IndexError):
        return int((folder / "checkpoints" / "latest").read_text().strip().split("-")[1])
    return -1


def until_ended(
    rank_main: Rank, world: int, folder: Path, rng: random.Random, *, disturbances: int, slow: str = SLOW
) -> Attempts:
    """Start, disturb and start again, until an attempt ends by itself after the last disturbance."""
    folder.mkdir(parents=True, exist_ok=True)
    left, history, struck = disturbances, [], 0
    for attempt in range(2 * disturbances + 8):
        pids = start(rank_main, world, attempt, folder, slow if left else "0")
        disturbance = _Disturbance(rng, folder, early=not struck) if left else None
        codes, done = _attempt(pids, disturbance)
        if done and disturbance is not None:
            left, struck = left - 1, struck + 1
            history.append(f"{disturbance.event} at {newest_step(folder)}")
        history.append(f"attempt {attempt}: {codes}")
        if None in codes:
            return Attempts(False, struck, (*history, "hang"))
        if all(code == 0 for code in codes):
            return Attempts(True, struck, tuple(history))
    return Attempts(False, struck, (*history, "too many attempts"))


def _attempt(pids: Sequence[int], disturbance: _Disturbance | None) -> tuple[list[int | None], bool]:
    """Exit codes of all ranks, None for one that had to be ended after `PATIENCE_SECONDS`; whether it was disturbed."""
    codes: dict[int, int | None] = {}
    began, struck = time.monotonic(), False
    while len(codes) < len(pids):
        _reap(pids, codes)
        if any(code not in (0, _SIGNALLED) for code in codes.values()):
            time.sleep(0.3)  # the others write down what became of them
            _end(pids, codes)
        elif time.monotonic() - began > PATIENCE_SECONDS:
            hung = [pid for pid in pids if pid not in codes]
            _end(pids, codes)
            codes.update(dict.fromkeys(hung))
        elif disturbance is not None and not struck and not codes:
            with suppress(ProcessLookupError):
                struck = disturbance.strike(pids)
        time.sleep(0.001 if disturbance and disturbance.event == "writing" else 0.01)
    return [codes[pid] for pid in pids], struck


def _reap(pids: Sequence[int], codes: dict[int, int | None]) -> None:
    for pid in pids:
        if pid not in codes:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)


def _end(pids: Sequence[int], codes: dict[int, int | None]) -> None:
    _reap(pids, codes)
    for pid in pids:
        if pid not in codes:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            codes[pid] = os.waitstatus_to_exitcode(status)


def digest(folder: Path) -> str:
    """Of the parameters that the run in ``folder`` ended with."""
    found: str = json.loads((folder / "summary.json").read_text())["parameters_digest"]
    return found
