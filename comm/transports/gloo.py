"""A gloo group outside of torch's registry, which can be aborted at any moment and replaced by another one.

For elastic runs. Tensors on a GPU go through the CPU: on slow links that costs little.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllreduceOptions, BroadcastOptions, ProcessGroupGloo

from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Op, Payload, Shift
from dtrain.comm.transports.transport import outgoing, reply


class PeersLost(RuntimeError):
    """A peer is gone or silent, or has left this group."""


def is_loss(error: BaseException | None) -> bool:
    """Whether ``error`` was caused by a `PeersLost`."""
    while error is not None and not isinstance(error, PeersLost):
        error = error.__cause__
    return error is not None


_ABANDONED: list[tuple[dist.ProcessGroup, list[_GlooWork]]] = []
"""Groups that were aborted with ops under way: destroying one would wait for peers that may be silent."""


class GlooTransport:
    """An axis on a gloo group of its own. Any failure of it is raised as `PeersLost`."""

    in_stream_order = False

    def __init__(self, group: ProcessGroupGloo, store: object = None) -> None:
        self._group: dist.ProcessGroup | None = cast(dist.ProcessGroup, group)  # a backend has its methods, untyped
        self.rank, self.size = group.rank(), group.size()
        self._store = store  # keeps a store that is a Python object alive, which torch does not
        self._under_way: list[_GlooWork] = []
        self._lock = threading.Lock()  # another thread may abort it

    def issue(self, op: Op) -> _GlooWork:
        with self._lock:
            self._under_way = [work for work in self._under_way if not work.ended]
            if self._group is None:
                raise PeersLost("this group was aborted")
            work = _GlooWork(op, self._group)
            self._under_way.append(work)
        return work

    def clone(self) -> GlooTransport:
        raise RuntimeError("a group of members is cloned by the members that made it")

    def close(self) -> None:
        """Nothing: the creator of this group aborts it."""

    def abort(self) -> None:
        """Fail all ops under way; peers detect it, at once where their connections close."""
        with self._lock:
            group, self._group = self._group, None
            _ABANDONED[:] = [(old, works) for old, works in _ABANDONED if not all(work.ended for work in works)]
            if group is not None and not all(work.ended for work in self._under_way):
                _ABANDONED.append((group, self._under_way))
            for work in self._under_way:
                work.abort()


class _GlooWork:
    """An op under way, on the CPU. A `Work`."""

    def __init__(self, op: Op, group: dist.ProcessGroup) -> None:
        self._op, self._world = op, group.size()
        sent = outgoing(op, self._world)
        self._device = sent.device
        self._woken, self._aborted = threading.Semaphore(0), False
        try:
            self._arrived, self._works = _issued(op, sent.cpu(), group)
        except RuntimeError as error:
            raise PeersLost(f"{error}") from error
        for work in self._works:
            work.get_future().add_done_callback(lambda _: self._woken.release())

    @property
    def ended(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def abort(self) -> None:
        """Wake waiting threads: gloo itself would wait for its peers until its timeout."""
        self._aborted = True
        self._woken.release(len(self._works) + 1)

    def poll(self) -> bool:
        return True

    def wait(self) -> Payload:
        for _ in self._works:
            self._woken.acquire()
        if self._aborted:
            raise PeersLost("this group was aborted")
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            raise PeersLost(f"{error}") from error
        return reply(self._op, self._arrived.to(self._device), self._world)


@atexit.register
def _leave_behind() -> None:
    """Leak them: their destructors would wait for peers, and the process ends anyway."""
    for group, _ in _ABANDONED:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _issued(op: Op, sent: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """The buffer of the reply, and the works to wait for."""
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
