"""Worker processes that stay: each job runs in a fresh gloo process group, without paying for imports again."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

R = TypeVar("R")


class WorkerPool:
    """Up to ``size`` processes on this machine. A context manager.

    Functions and arguments are pickled: functions must be importable in the workers under the name of their module.

    >>> from dtrain.testing import WorkerPool
    >>> import torch.distributed as dist
    >>> with WorkerPool(2) as pool:
    ...     pool.run(dist.get_rank)
    [0, 1]
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._jobs = 0

    def run(self, function: Callable[..., R], *arguments: object, world: int = 0, seconds: float = 120) -> list[R]:
        """Call ``function(*arguments)`` in ``world`` processes (all, by default) that form the default process group.

        Returns what each rank returned. Raises ``RuntimeError`` with the traceback of the rank that failed first, or
        ``TimeoutError`` naming the ranks that have not answered; all processes are then replaced before the next job.
        """
        import torch.distributed as dist

        world = world or self.size
        self._start()
        self._jobs += 1
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, (_, connection) in enumerate(self._workers[:world]):
            connection.send((function, arguments, rank, world, store.port))
        try:
            return self._collect(world, time.monotonic() + seconds)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all processes."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        while len(self._workers) < self.size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, world: int, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        ranks = {connection: rank for rank, (_, connection) in enumerate(self._workers[:world])}
        while len(results) < world:
            missing = [connection for connection, rank in ranks.items() if rank not in results]
            ready = wait(missing, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(ranks[connection] for connection in missing)
                raise TimeoutError(f"ranks {late} of {world} have not answered in time")
            for connection in cast("list[Connection]", ready):
                rank = ranks[connection]
                try:
                    ok, value = connection.recv()
                except EOFError as error:
                    raise RuntimeError(f"the process of rank {rank} has died") from error
                if not ok:
                    raise RuntimeError(f"rank {rank} of {world} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(world)]


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
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

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()
