"""A gloo group that nobody has registered: it can be broken off at any moment, and another one made in its place.

On the CPU, also for tensors on a GPU: on slow links, which is what such groups are for, that costs little.
"""

from __future__ import annotations

import contextlib
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllreduceOptions, BroadcastOptions, ProcessGroupGloo

from dtrain.comm.drivers.transport import outgoing, reply
from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Op, Payload, Shift


class PeersLost(RuntimeError):
    """A peer is gone or silent, or has left this group."""


class GlooTransport:
    """An axis on a group of its own. Any failure of it is a lost peer."""

    def __init__(self, group: ProcessGroupGloo) -> None:
        self._group = cast(dist.ProcessGroup, group)  # whose methods a backend has too, untyped
        self.rank, self.size = group.rank(), group.size()

    def issue(self, op: Op) -> _Moving:
        return _Moving(op, self._group)

    def twin(self) -> GlooTransport:
        raise RuntimeError("whoever made this group makes its twins")

    def abort(self) -> None:
        """Break off what is under way, here and, as they notice, at the peers."""
        with contextlib.suppress(RuntimeError):
            self._group.abort()


class _Moving:
    """An op under way, on the CPU."""

    def __init__(self, op: Op, group: dist.ProcessGroup) -> None:
        self._op, self._world = op, group.size()
        sent = outgoing(op, self._world)
        self._device = sent.device
        try:
            self._arrived, self._works = _issued(op, sent.cpu(), group)
        except RuntimeError as error:
            raise PeersLost(f"{error}") from error

    def poll(self) -> bool:
        return True

    def wait(self) -> Payload:
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            raise PeersLost(f"{error}") from error
        return reply(self._op, self._arrived.to(self._device), self._world)


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
        case Shift(destination=destination, source=source):
            arrived = torch.empty_like(sent)
            if destination == source == group.rank():
                return arrived.copy_(sent), []
            return arrived, [] if empty else [group.send([sent], destination, 0), group.recv([arrived], source, 0)]
