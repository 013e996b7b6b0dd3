"""Persistent worker processes: each job runs in a fresh gloo process group, without paying for imports again."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

from dtrain.launchers import rendezvous as meeting

R = TypeVar("R")

CONSEQUENCES = ("Connection closed by peer", "Connection reset by peer", "its process has died")
SECONDS_FOR_THE_CAUSE = 3.0


class WorkerPool:
    """A team of processes on this machine for each world size that is asked for. A context manager.

    Members of a team have run the same jobs, so what a library counts in a process (DeepSpeed numbers all parameters
    that it has ever seen, and compares the numbers across ranks) stays equal among them.

    Functions and arguments are pickled: functions must be importable in the workers under the name of their module.
    Processes are forked off a server that the first of them starts: they see the environment variables of that moment.

    >>> from dtrain.testing import WorkerPool
    >>> import torch.distributed as dist
    >>> with WorkerPool(2) as pool:
    ...     pool.run(dist.get_rank)
    [0, 1]
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._teams: dict[int, list[tuple[BaseProcess, Connection]]] = {}

    def run(self, function: Callable[..., R], *arguments: object, world: int = 0, seconds: float = 120) -> list[R]:
        """Call ``function(*arguments)`` in ``world`` processes (all, by default) that form the default process group.

        Returns what each rank returned. Raises ``RuntimeError`` with the traceback of the rank that caused it, or
        ``TimeoutError`` naming the ranks that have not answered; all processes are then replaced before the next job.
        """
        world = world or self.size
        team = self._team(world)
        store = meeting.listening(meeting.LOOPBACK)
        for rank, (_, connection) in enumerate(team):
            connection.send((function, arguments, rank, world, store.port))
        try:
            return _collect([connection for _, connection in team], time.monotonic() + seconds)
        except BaseException:
            self._end(world)
            raise

    def close(self) -> None:
        """End all processes."""
        for world in list(self._teams):
            self._end(world)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _team(self, world: int) -> list[tuple[BaseProcess, Connection]]:
        team = self._teams.setdefault(world, [])
        while len(team) < world:
            ours, theirs = multiprocessing.Pipe()
            process = _context().Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            team.append((process, ours))
        return team

    def _end(self, world: int) -> None:
        for process, connection in self._teams.pop(world):
            connection.close()
            process.kill()
            process.join()


class Forked:
    """``function(*arguments)`` in a process of its own, which may be killed; see `WorkerPool` for what is pickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._process = _context().Process(target=function, args=arguments, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait(self, seconds: float) -> int:
        """Its exit code, -N where signal N ended it. Raises ``TimeoutError``."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} has not ended after {seconds:g} s")
        return self._process.exitcode

    def kill(self) -> None:
        """End it now, if it has not ended."""
        self._process.kill()
        self._process.join()


def _context() -> ForkServerContext:
    """Processes are forked off one that has done nothing but imports, which take seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dtrain.testing._loaded"])
    return context


def _collect(connections: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    ranks = {connection: rank for rank, connection in enumerate(connections)}
    while ranks:
        ready = wait(list(ranks), timeout=max(0.0, deadline - time.monotonic()))
        for connection in cast("list[Connection]", ready):
            rank = ranks.pop(connection)
            try:
                ok, value = connection.recv()
            except EOFError:
                ok, value = False, "its process has died"
            if ok:
                results[rank] = value
                continue
            # The ranks that waited for this one fail too, perhaps first: give the cause a moment to arrive.
            deadline = min(deadline, time.monotonic() + SECONDS_FOR_THE_CAUSE)
            failures.append(f"rank {rank} of {len(connections)} failed:\n{value}")
        if not ready:
            break
    if failures:
        raise RuntimeError(min(failures, key=lambda text: any(sign in text for sign in CONSEQUENCES)))
    if ranks:
        raise TimeoutError(f"ranks {sorted(ranks.values())} of {len(connections)} have not answered in time")
    return [results[rank] for rank in range(len(connections))]


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    frozen = 0
    while True:
        if len(sys.modules) > frozen:  # modules stay, so collections, a fifth of all time, need not scan them
            gc.collect()
            gc.freeze()
            frozen = len(sys.modules)
        try:
            function, arguments, rank, world, port = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, _job(function, arguments, rank, world, port)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def _job(function: Callable[..., object], arguments: tuple[object, ...], rank: int, world: int, port: int) -> object:
    import torch.distributed as dist

    from dtrain.comm.torch_private import TCPStore, forget_meshes

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    store = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        return function(*arguments)
    finally:
        _close_what_was_left_open()
        gc.collect()
        dist.destroy_process_group()
        forget_meshes()


def _close_what_was_left_open() -> None:
    """A channel that nobody closed keeps its groups, and each of them a thread that wakes a hundred times a second."""
    drivers = sys.modules.get("dtrain.comm.channel")
    if drivers is not None:
        drivers.close_all(timeout_seconds=1.0)
