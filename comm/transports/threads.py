"""Ranks as threads of one process: whole methods at work, background flows included, without processes or links.

What `simulate` is for flows, this is for everything that has a `Channel`. Ranks that disagree about the next op raise
here, where real processes would hang.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from dtrain.comm.ops import Op, Payload
from dtrain.comm.transports.simulate import replies_of
from dtrain.comm.transports.transport import CompletedWork

PATIENCE_SECONDS = 60.0


class Meeting:
    """Performs the ops of ``world`` threads, one after the other."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._ops: dict[int, Op] = {}
        self._replies: list[Payload] = []
        self._failure: Exception | None = None
        self._number = 0
        self._barrier = threading.Barrier(world, action=self._meet, timeout=PATIENCE_SECONDS)
        self._clones: list[Meeting] = []
        self._lock = threading.Lock()

    def transport(self, rank: int) -> Seat:
        """The transport of ``rank``."""
        return Seat(self, rank, self.world)

    def exchange(self, rank: int, op: Op) -> Payload:
        """Wait for all ranks' ops; returns this rank's reply. Raises ``RuntimeError`` if the ranks diverge."""
        self._ops[rank] = op
        _await_device(op)  # of a rank's stream, which another one's does not wait for
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError as error:
            raise RuntimeError(f"rank {rank} yields {op!r}, and not all of the others came") from error
        if self._failure is not None:
            raise self._failure
        return self._replies[rank]

    def clone(self, number: int) -> Meeting:
        """The ``number``-th clone, for the same ranks."""
        with self._lock:
            while len(self._clones) <= number:
                self._clones.append(Meeting(self.world))
            return self._clones[number]

    def _meet(self) -> None:
        try:
            self._replies = replies_of([self._ops[rank] for rank in range(self.world)], self._number)
            _await_device(self._ops[0])
        except Exception as error:  # raised on every rank: a barrier whose action fails raises on one
            self._failure = error
        self._number += 1


@dataclass
class Seat:
    """One rank's transport."""

    meeting: Meeting
    rank: int
    size: int
    clones: int = 0

    @property
    def in_stream_order(self) -> bool:
        return False

    def issue(self, op: Op) -> CompletedWork:
        return CompletedWork(self.meeting.exchange(self.rank, op))

    def clone(self) -> Seat:
        self.clones += 1
        return self.meeting.clone(self.clones - 1).transport(self.rank)

    def close(self) -> None:
        pass


def _await_device(op: Op) -> None:
    """Block until the current stream is done, if the tensors of ``op`` are on a GPU."""
    if any(tensor.is_cuda for tensor in op.payload):
        torch.cuda.current_stream().synchronize()
