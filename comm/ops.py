"""Collectives as values: an algorithm yields them, and a driver performs, simulates, times or counts them.

An algorithm is a generator, a `Flow`. It yields an `Op`, receives that op's reply, and finally returns its result:

>>> import torch
>>> def average(x):
...     (total,) = yield AllReduce((x,), "sum")
...     (world,) = yield AllReduce((torch.ones(()),), "sum")
...     return total / world
>>> from dtrain.comm.transports.simulate import simulate
>>> simulate([average(torch.tensor([1.0])), average(torch.tensor([3.0]))])
[tensor([2.]), tensor([2.])]

Every payload is a tuple of tensors, sent as one message. Shapes and dtypes are the same on every rank, and every op
spans all ranks of its axis: there is none for a part of them.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from torch import Tensor

Payload: TypeAlias = tuple[Tensor, ...]
Axis: TypeAlias = Literal["replicate", "shard"]
"""The mesh axis of an op: "replicate" across replicas, "shard" within one."""


@dataclass(frozen=True)
class Place:
    """A rank's position on an axis: ``rank`` of ``size``."""

    rank: int
    size: int


@dataclass(frozen=True, eq=False)
class AllReduce:
    """Elementwise sum or mean over the ranks. Reply: the shapes that were sent. All tensors share one dtype.

    The transport chooses the order of summation, so the result is reproducible only for the same layout.
    """

    payload: Payload
    reduction: Literal["sum", "mean"] = "sum"
    axis: Axis = "replicate"


@dataclass(frozen=True, eq=False)
class AllGather:
    """The payloads of all ranks. Reply: each tensor with a new leading dim ``[world, ...]``, in rank order."""

    payload: Payload
    axis: Axis = "replicate"


@dataclass(frozen=True, eq=False)
class AllToAll:
    """Row ``j`` of each tensor ``[world, ...]`` goes to rank ``j``. Reply: row ``j`` comes from rank ``j``."""

    payload: Payload
    axis: Axis = "replicate"


@dataclass(frozen=True, eq=False)
class Broadcast:
    """Rank ``source``'s payload, on every rank. Reply: the shapes that were sent."""

    payload: Payload
    source: int = 0
    axis: Axis = "replicate"


@dataclass(frozen=True, eq=False)
class Shift:
    """Send to rank ``destination`` and receive from rank ``source``. Reply: the shapes that were sent."""

    payload: Payload
    destination: int
    source: int
    axis: Axis = "replicate"


Op: TypeAlias = AllReduce | AllGather | AllToAll | Broadcast | Shift

R = TypeVar("R")
Flow: TypeAlias = Generator[Op, Payload, R]


def payload_bytes(payload: Payload) -> int:
    """Bytes of all tensors of a payload.

    >>> import torch
    >>> payload_bytes((torch.zeros(3), torch.zeros(5, dtype=torch.uint8)))
    17
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in payload)


def one_dtype(op: AllReduce) -> None:
    """Raise ``ValueError`` unless all tensors of an all-reduce have one dtype."""
    dtypes = {tensor.dtype for tensor in op.payload}
    if len(dtypes) > 1:
        raise ValueError(
            f"an AllReduce sums one dtype, this payload has {sorted(map(str, dtypes))}; yield one for each"
        )


def sent_bytes(op: Op, *, rank: int, world: int) -> int:
    """Payload bytes that ``rank`` puts on its link for ``op``, by the usual algorithms for large ones.

    All-reduce: a ring, 2 (world - 1) / world of the payload. All-gather: a ring, (world - 1) payloads.
    All-to-all: every row but this rank's. Broadcast: charged to the source alone.

    >>> import torch
    >>> sent_bytes(AllReduce((torch.zeros(100),)), rank=0, world=4)
    600
    """
    total = payload_bytes(op.payload)
    match op:
        case AllReduce():
            return 2 * (world - 1) * total // world
        case AllGather():
            return (world - 1) * total
        case AllToAll():
            return (world - 1) * total // world
        case Broadcast():
            return (world - 1) * total if rank == op.source else 0
        case Shift():
            return total if op.destination != rank else 0
