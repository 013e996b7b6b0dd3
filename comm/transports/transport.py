"""What carries the ops of one axis, and the one message that all tensors of an op travel as.

A `Channel` takes one transport for each axis. There are two: process groups of torch.distributed, and MPI.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Op, Payload, Shift, one_dtype


class Work(Protocol):
    """An op under way."""

    def poll(self) -> bool:
        """Move the op on, without waiting; True once it needs no more of that, here at once if others move it."""
        ...

    def wait(self) -> Payload:
        """Block until the reply is there, and return it. All ranks wait for the same ops in the same order."""
        ...


class Transport(Protocol):
    """One axis: who is on it, and how an op gets from each rank to the others. Used by one thread at a time."""

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
        """Another one between the same ranks, so that ops on both travel at once. Called by all of them alike."""
        ...

    def close(self) -> None:
        """Free what was made for this transport alone. Nothing is under way; called by all ranks, in one order."""
        ...


class SelfTransport:
    """An axis of one rank: the reply is what was sent, at once and without a copy."""

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
    """An op that needed no link."""

    reply: Payload

    def poll(self) -> bool:
        return True

    def wait(self) -> Payload:
        return self.reply


class Pauses:
    """How long a thread sleeps between two polls of what moves only while it is polled.

    Short messages arrive within the first polls, which follow each other at once. Later the pauses grow in proportion
    to the time that has passed, up to a limit: a thread that polls without pause takes a core away from training, and
    one that sleeps too long leaves the link idle, since large messages move a piece at each poll.
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
    """The reply to ``op``, from what arrived: the sum, everybody's bytes ``[world, bytes]``, or ``[1, bytes]``."""
    match op:
        case AllReduce(payload=payload, reduction=reduction):
            total = arrived / world if reduction == "mean" else arrived
            parts = total.split([tensor.numel() for tensor in payload])
            return tuple(part.view(tensor.shape) for part, tensor in zip(parts, payload, strict=True))
        case AllGather(payload=payload):
            return unpack(arrived, payload, leading=(world,))
        case AllToAll(payload=payload) | Broadcast(payload=payload) | Shift(payload=payload):
            return unpack(arrived, payload, leading=())


def pack(payload: Payload, *, rows: int) -> Tensor:
    """All tensors of a payload as bytes, ``[rows, bytes]`` uint8; unless it is 1, ``rows`` is their leading dim."""
    if not payload:
        return torch.empty(rows, 0, dtype=torch.uint8)
    parts = [
        _dense(tensor).view(torch.uint8).view(rows, tensor.numel() * tensor.element_size() // rows)
        for tensor in payload
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


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
        part = buffer[:, start : start + width].contiguous().view(-1)
        # A slice may begin at any byte, and a view as a wider dtype wants it aligned.
        aligned = part if part.storage_offset() % tensor.element_size() == 0 else part.clone()
        out.append(aligned.view(tensor.dtype).view(shape))
        start += width
    return tuple(out)
