"""A gloo group that nobody has registered: it can be broken off at any moment, and another one made in its place.

On the CPU, also for tensors on a GPU: on slow links, which is what such groups are for, that costs little.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllreduceOptions, BroadcastOptions, ProcessGroupGloo

from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Op, Payload, Shift
from dtrain.comm.transports.transport import outgoing, reply


class PeersLost(RuntimeError):
    """A peer is gone or silent, or has left this group."""


def is_loss(error: BaseException | None) -> bool:
    """Whether ``error`` came of a `PeersLost`."""
    while error is not None and not isinstance(error, PeersLost):
        error = error.__cause__
    return error is not None


_ABANDONED: list[tuple[dist.ProcessGroup, list[_Moving]]] = []
"""Groups that were broken off while something was under way: to end one waits for its peers, who may be silent."""


class GlooTransport:
    """An axis on a group of its own. Any failure of it is a lost peer."""

    in_stream_order = False

    def __init__(self, group: ProcessGroupGloo, store: object = None) -> None:
        self._group: dist.ProcessGroup | None = cast(dist.ProcessGroup, group)  # whose methods a backend has, untyped
        self.rank, self.size = group.rank(), group.size()
        self._store = store  # one of Python is gone when nobody here holds it, whatever torch does
        self._moving: list[_Moving] = []
        self._lock = threading.Lock()  # another thread may break it off

    def issue(self, op: Op) -> _Moving:
        with self._lock:
            self._moving = [moving for moving in self._moving if not moving.ended]
            if self._group is None:
                raise PeersLost("this group was broken off")
            moving = _Moving(op, self._group)
            self._moving.append(moving)
        return moving

    def clone(self) -> GlooTransport:
        raise RuntimeError("whoever made this group makes its clones")

    def close(self) -> None:
        """Whoever made this group breaks it off."""

    def abort(self) -> None:
        """Break off what is under way here; peers notice by themselves, those at once whose connections close."""
        with self._lock:
            group, self._group = self._group, None
            _ABANDONED[:] = [(old, left) for old, left in _ABANDONED if not all(moving.ended for moving in left)]
            if group is not None and not all(moving.ended for moving in self._moving):
                _ABANDONED.append((group, self._moving))
            for moving in self._moving:
                moving.break_off()


class _Moving:
    """An op under way, on the CPU."""

    def __init__(self, op: Op, group: dist.ProcessGroup) -> None:
        self._op, self._world = op, group.size()
        sent = outgoing(op, self._world)
        self._device = sent.device
        self._woken, self._broken_off = threading.Semaphore(0), False
        try:
            self._arrived, self._works = _issued(op, sent.cpu(), group)
        except RuntimeError as error:
            raise PeersLost(f"{error}") from error
        for work in self._works:
            work.get_future().add_done_callback(lambda _: self._woken.release())

    @property
    def ended(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def break_off(self) -> None:
        """Wake who waits: gloo itself waits for its peers until its timeout."""
        self._broken_off = True
        self._woken.release(len(self._works) + 1)

    def poll(self) -> bool:
        return True

    def wait(self) -> Payload:
        for _ in self._works:
            self._woken.acquire()
        if self._broken_off:
            raise PeersLost("this group was broken off")
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            raise PeersLost(f"{error}") from error
        return reply(self._op, self._arrived.to(self._device), self._world)


@atexit.register
def _leave_behind() -> None:
    """To destruct a group would wait for its peers; nothing is lost with it but memory of a process that ends."""
    for group, _ in _ABANDONED:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _issued(op: Op, sent: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """Where the reply will be, and what is to be waited for."""
    empty, world = sent.numel() == 0, group.size()
    match op:
        case AllReduce():
            return sent, [] if empty else [group.allreduce([sent], AllreduceOptions())]
        case AllGather():
            arrived = sent.new_empty(world, sent.shape[1])
            return arrived, [] if empty else [group.allgather([list(arrived.unbind())], [sent[0]])]
        case AllToAll():
            arrived = torch.empty_like(sent)
            return arrived, [] if empty else [group.alltoall_base(arrived, sent, [], [])]
        case Broadcast(source=source):
            arrived, options = sent.clone(), BroadcastOptions()
            options.rootRank = source
            return arrived, [] if empty else [group.broadcast([arrived], options)]
        case Shift():
            raise TypeError("there is no Shift here: gloo does not tell when a send or a receive has ended")
