"""What carries the ops of one axis (`Transport`), and the one message that all tensors of an op are packed into.

A `Channel` takes one transport for each axis: torch.distributed (`process_group`), gloo groups that can be aborted
(`gloo`), MPI (`mpi`), threads of one process (`threads`), or nothing (`SelfTransport`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Op, Payload, Shift, one_dtype


class Work(Protocol):
    """An op that was issued."""

    def poll(self) -> bool:
        """Make progress without blocking; True once no polling is needed, at once where the backend has threads."""
        ...

    def wait(self) -> Payload:
        """Block until the reply is there, and return it. All ranks wait for the same ops in the same order."""
        ...


class Transport(Protocol):
    """One axis: this rank's place on it, and how ops are performed across it. Used by one thread at a time."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def in_stream_order(self) -> bool:
        """Whether ops wait, on the GPU, for all that was enqueued before them; the same on all ranks."""
        ...

    def issue(self, op: Op) -> Work:
        """Put ``op`` on the wire. All ranks issue the same ops in the same order."""
        ...

    def clone(self) -> Transport:
        """Another transport between the same ranks, whose ops do not wait for this one's. Called by all ranks alike."""
        ...

    def close(self) -> None:
        """Free what belongs to this transport. No op is under way; called by all ranks, in one order."""
        ...


class SelfTransport:
    """An axis of one rank: the reply is the payload, without a copy."""

    rank, size, in_stream_order = 0, 1, False

    def issue(self, op: Op) -> CompletedWork:
        match op:
            case AllGather(payload=payload):
                return CompletedWork(tuple(tensor.unsqueeze(0) for tensor in payload))
            case _:
                return CompletedWork(op.payload)

    def clone(self) -> SelfTransport:
        return self

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class CompletedWork:
    """An op whose reply is there."""

    reply: Payload

    def poll(self) -> bool:
        return True

    def wait(self) -> Payload:
        return self.reply


class Pauses:
    """How long a thread sleeps between two polls of an op that makes progress only while it is polled.

    At first it does not sleep, for short messages. Later the pauses grow in proportion to the time that has passed, up
    to a limit: polling without pause takes a core away from training, and sleeping too long leaves the link idle, since
    a large message moves a piece at each poll.
    """

    SPIN_SECONDS, SHARE, LONGEST_SECONDS = 50e-6, 0.1, 500e-6

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def next(self) -> float:
        """Seconds to sleep now."""
        passed = time.perf_counter() - self._started
        return 0.0 if passed < self.SPIN_SECONDS else min(self.SHARE * passed, self.LONGEST_SECONDS)


def outgoing(op: Op, world: int) -> Tensor:
    """What a rank sends for ``op``: bytes, ``[rows, bytes]`` uint8; for an all-reduce a flat copy in its own dtype."""
    match op:
        case AllReduce(payload=payload):
            one_dtype(op)
            flat = [tensor.reshape(-1) for tensor in payload]
            return torch.cat(flat) if flat else torch.empty(0)
        case AllToAll(payload=payload):
            return pack(payload, rows=world)
        case AllGather(payload=payload) | Broadcast(payload=payload) | Shift(payload=payload):
            return pack(payload, rows=1)


def reply(op: Op, arrived: Tensor, world: int) -> Payload:
    """The reply to ``op``, from what arrived: the sum, all ranks' bytes ``[world, bytes]``, or ``[1, bytes]``."""
    match op:
        case AllReduce(payload=payload, reduction=reduction):
            total = arrived / world if reduction == "mean" else arrived
            flat = total.split([tensor.numel() for tensor in payload])
            return tuple(values.view(tensor.shape) for values, tensor in zip(flat, payload, strict=True))
        case AllGather(payload=payload):
            return unpack(arrived, payload, leading=(world,))
        case AllToAll(payload=payload) | Broadcast(payload=payload) | Shift(payload=payload):
            return unpack(arrived, payload, leading=())


def pack(payload: Payload, *, rows: int) -> Tensor:
    """All tensors of a payload as bytes, ``[rows, bytes]`` uint8; unless it is 1, ``rows`` is their leading dim."""
    if not payload:
        return torch.empty(rows, 0, dtype=torch.uint8)
    columns = [
        _dense(tensor).view(torch.uint8).view(rows, tensor.numel() * tensor.element_size() // rows)
        for tensor in payload
    ]
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


def _dense(tensor: Tensor) -> Tensor:
    """Flat with stride 1. One element counts as contiguous whatever its stride, and then cannot be viewed as bytes."""
    flat = tensor.contiguous().reshape(-1)
    return flat if flat.stride(0) == 1 else flat.new_empty(flat.shape).copy_(flat)


def unpack(buffer: Tensor, payload: Payload, *, leading: tuple[int, ...]) -> Payload:
    """Undo `pack`: tensors like those of ``payload``, their shapes preceded by ``leading``."""
    rows = buffer.shape[0]
    out, start = [], 0
    for tensor in payload:
        shape = (*leading, *tensor.shape)
        width = tensor.numel() * tensor.element_size() // (1 if leading else rows)
        data = buffer[:, start : start + width].contiguous().view(-1)
        # A slice may begin at any byte, and a view as a wider dtype wants it aligned.
        aligned = data if data.storage_offset() % tensor.element_size() == 0 else data.clone()
        out.append(aligned.view(tensor.dtype).view(shape))
        start += width
    return tuple(out)
