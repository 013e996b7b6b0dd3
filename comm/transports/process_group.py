"""torch.distributed as a transport: NCCL moves ops on a side stream, gloo on threads of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Op, Payload, Shift
from dtrain.comm.transports.flight_recorder import note
from dtrain.comm.transports.groups import free, own_group
from dtrain.comm.transports.pairwise import all_to_all
from dtrain.comm.transports.transport import outgoing, reply


class TorchTransport:
    """A process group that is used by nothing else: two threads that enqueue on one group would hang.

    ``own``: it goes with this transport, and is freed at `close`.
    """

    def __init__(self, group: dist.ProcessGroup, *, own: bool = False) -> None:
        self._group: dist.ProcessGroup | None = group
        self._own, self._pairwise = own, 0
        self.rank, self.size = group.rank(), group.size()
        self.in_stream_order = dist.get_backend(group) == "nccl"

    @classmethod
    def between(cls, ranks: Sequence[int], backend: str | None = None) -> TorchTransport:
        """One with a group of its own, made by ``ranks`` alike: see `own_group`."""
        return cls(own_group(ranks, backend), own=True)

    @property
    def group(self) -> dist.ProcessGroup:
        if self._group is None:
            raise RuntimeError("this transport is closed")
        return self._group

    def issue(self, op: Op) -> Collective:
        """Hand ``op`` to torch.distributed, as one packed message."""
        if not isinstance(op, AllToAll | Shift) or not all(tensor.is_cpu for tensor in op.payload):
            return Collective(op, self.group)
        self._pairwise += 1
        size = sum(tensor.numel() for tensor in op.payload)
        dtypes = " ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in op.payload}))
        over = note(self.group.group_name, type(op).__name__, self._pairwise, size, dtypes)
        return Collective(op, self.group, over)

    def clone(self) -> TorchTransport:
        return self.between(dist.get_process_group_ranks(self.group), dist.get_backend(self.group))

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None and self._own:
            free(group)


class Collective:
    """An op that was handed to torch.distributed. ``over``: to be called at its end."""

    def __init__(self, op: Op, group: dist.ProcessGroup, over: Callable[[], None] = lambda: None) -> None:
        self._op, self._world, self._over = op, group.size(), over
        self._works: list[dist.Work] = []
        self._arrived = self._issue(outgoing(op, self._world), group)

    def __del__(self) -> None:
        self._over()  # also where another flow has failed, and nobody waits for this op any more

    def poll(self) -> bool:
        """True: the threads or the stream of the backend move it."""
        return True

    def wait(self) -> Payload:
        """Block until the reply is there; with NCCL, until the stream of this thread will wait for it."""
        for work in self._works:
            work.wait()
        self._over()
        return reply(self._op, self._arrived, self._world)

    def _issue(self, sent: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Where the reply will be."""
        match self._op:
            case AllReduce():
                arrived = sent
                if sent.numel():
                    self._add(dist.all_reduce(sent, group=group, async_op=True))
            case AllGather():
                arrived = sent.new_empty(self._world, sent.shape[1])
                if sent.numel():
                    self._add(dist.all_gather(list(arrived.unbind()), sent[0], group=group, async_op=True))
            case AllToAll():
                if sent.is_cpu:
                    arrived, self._works = all_to_all(sent, group)
                    return arrived
                arrived = torch.empty_like(sent)
                if sent.numel():
                    self._add(dist.all_to_all_single(arrived, sent, group=group, async_op=True))
            case Broadcast(source=source):
                arrived = sent.clone()
                if sent.numel():
                    root = dist.get_global_rank(group, source)
                    self._add(dist.broadcast(arrived, src=root, group=group, async_op=True))
            case Shift(destination=destination, source=source):
                arrived = torch.empty_like(sent)
                if destination == source == group.rank():
                    arrived.copy_(sent)
                elif sent.numel():
                    to, origin = dist.get_global_rank(group, destination), dist.get_global_rank(group, source)
                    # The receive first: `pairwise`.
                    pair = [dist.P2POp(dist.irecv, arrived, origin, group), dist.P2POp(dist.isend, sent, to, group)]
                    self._works.extend(dist.batch_isend_irecv(pair))
        return arrived

    def _add(self, work: dist.Work | None) -> None:
        if work is not None:
            self._works.append(work)
