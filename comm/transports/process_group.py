"""torch.distributed as a transport: NCCL moves ops on a side stream, gloo on threads of its own.

Each moves tensors of its own device (`served`); others are copied there and back: small numbers that a rank computes on
the CPU where the group is NCCL's, tensors of a GPU where it is gloo's, which has no sends and receives for them.

gloo's all-to-all sends to a peer and then receives from it, one peer after the other. A receiver signals that it
is ready over the connection that carries the data, so that signal waits behind the data, and the link carries one
direction at a time: over links of 100 Mbit/s a little more than half of what it can. So on CPU this module uses sends
and receives, with every receive posted before any send (`all_to_all`).

torch's flight recorder does not see gloo's sends and receives. They are noted in `NOTED`, in the recorder's format,
for a monitor within the rank (`dtrain.launchers.probe`).
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Op, Payload, Shift
from dtrain.comm.torch_private import backends_of
from dtrain.comm.transports.groups import free, own_group
from dtrain.comm.transports.transport import outgoing, reply

NOTED: collections.deque[dict[str, object]] = collections.deque(maxlen=256)
"""The last sends and receives, newest last."""


class TorchTransport:
    """A process group of its own: two threads that enqueue on one group would hang.

    ``owned``: the group belongs to this transport, and is freed at `close`.
    """

    def __init__(self, group: dist.ProcessGroup, *, owned: bool = False) -> None:
        self._group: dist.ProcessGroup | None = group
        self._owned, self._noted = owned, 0
        self.rank, self.size = group.rank(), group.size()
        self._served = served(group)
        self.in_stream_order = self._served != ["cpu"]

    @classmethod
    def between(cls, ranks: Sequence[int], backend: str | None = None) -> TorchTransport:
        """A transport with a new group of ``ranks``, which all of them call: see `own_group`."""
        return cls(own_group(ranks, backend), owned=True)

    @property
    def group(self) -> dist.ProcessGroup:
        if self._group is None:
            raise RuntimeError("this transport is closed")
        return self._group

    def issue(self, op: Op) -> Collective:
        """Pass ``op`` to torch.distributed, as one packed message."""
        packed = outgoing(op, self.size)
        sent = packed.to(near(packed.device, self._served))
        if not isinstance(op, AllToAll | Shift) or not sent.is_cpu:
            return Collective(op, sent, packed.device, self.group)
        self._noted += 1
        size = sum(tensor.numel() for tensor in op.payload)
        dtypes = " ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in op.payload}))
        over = note(self.group.group_name, type(op).__name__, self._noted, size, dtypes)
        return Collective(op, sent, packed.device, self.group, over)

    def clone(self) -> TorchTransport:
        return self.between(dist.get_process_group_ranks(self.group), dist.get_backend(self.group))

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None and self._owned:
            free(group)


def served(group: dist.ProcessGroup) -> list[str]:
    """Types of the devices whose tensors ``group`` moves; the CPU's first."""
    types = [device.type for device, its in backends_of(group) if device.type == "cpu" or its.name() != "gloo"]
    return sorted(types, key=lambda name: name != "cpu")


def near(device: torch.device, types: Sequence[str]) -> torch.device:
    """``device``, or where its tensors are copied to for a group that serves ``types``.

    >>> near(torch.device("cuda", 1), ["cpu"])
    device(type='cpu')
    """
    if device.type in types:
        return device
    return torch.device(types[0]) if types[0] == "cpu" else torch.device(types[0], torch.cuda.current_device())


class Collective:
    """An op under way in torch.distributed.

    ``sent``: as bytes, on a device that the group serves. ``home``: the device of the reply. ``over``: called at its
    end.
    """

    def __init__(
        self, op: Op, sent: Tensor, home: torch.device, group: dist.ProcessGroup,
        over: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._op, self._world, self._home, self._over = op, group.size(), home, over
        self._works: list[dist.Work] = []
        self._arrived = self._issue(sent, group)

    def __del__(self) -> None:
        self._over()  # also after another flow failed, when nobody waits for this op

    def poll(self) -> bool:
        """True: the threads or the stream of the backend move it."""
        return True

    def wait(self) -> Payload:
        """Block until the reply is there; with NCCL, until the stream of this thread will wait for it."""
        for work in self._works:
            work.wait()
        self._over()
        return reply(self._op, self._arrived.to(self._home), self._world)

    def _issue(self, sent: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The buffer of the reply."""
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
                    # The receive first: see above.
                    pair = [dist.P2POp(dist.irecv, arrived, origin, group), dist.P2POp(dist.isend, sent, to, group)]
                    self._works.extend(dist.batch_isend_irecv(pair))
        return arrived

    def _add(self, work: dist.Work | None) -> None:
        if work is not None:
            self._works.append(work)


def all_to_all(sent: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """Send row j of ``sent`` to rank j of ``group``; returns the buffer of the reply, and the works to wait for.

    Each rank begins with the next one, so that they do not all begin with the same.
    """
    rank, world = group.rank(), group.size()
    arrived = torch.empty_like(sent)
    arrived[rank].copy_(sent[rank])
    if not sent.numel():
        return arrived, []
    sources, peers = (*range(rank - 1, -1, -1), *range(world - 1, rank, -1)), (*range(rank + 1, world), *range(rank))
    works = [group.recv([arrived[source]], source, 0) for source in sources]
    return arrived, works + [group.send([sent[peer]], peer, 0) for peer in peers]


def note(group: str, name: str, number: int, size: int, dtype: str) -> Callable[[], None]:
    """Note the collective ``number`` of ``group``, of ``size`` elements; call the returned function at its end.

    >>> over = note("dtrain 1 of 0 1", "AllToAll", 4, 10, "uint8")
    >>> over()
    >>> NOTED.pop()["retired"]
    True
    """
    entry: dict[str, object] = {
        "record_id": f"{group} {name} {number}", "profiling_name": name, "collective_seq_id": number,
        "process_group": [group], "input_sizes": [[size]], "input_dtypes": [dtype], "time_created_ns": time.time_ns(),
        "retired": False,
    }  # fmt: skip
    NOTED.append(entry)
    return lambda: entry.update(retired=True)
