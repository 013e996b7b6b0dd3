"""N ranks in one process, in lockstep: the same algorithms, no processes, no network.

Ranks that disagree about the next op (its kind, axis, shapes or dtypes) are an error here. Real processes would hang.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch

from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Flow, Op, Payload, Shift, one_dtype

R = TypeVar("R")


def simulate(flows: Sequence[Flow[R]], *, shards: int = 1) -> list[R]:
    """Run one flow per rank to its end and return their results, in rank order.

    ``shards``: the size of the shard axis; rank = replica * shards + shard. `AllReduce` sums in rank order (real
    transports use their own). Raises ``RuntimeError`` where the ranks diverge.

    >>> from dtrain.comm.ops import AllGather
    >>> import torch
    >>> def gathered(x):
    ...     (rows,) = yield AllGather((x,))
    ...     return rows.tolist()
    >>> simulate([gathered(torch.tensor(1)), gathered(torch.tensor(2))])
    [[1, 2], [1, 2]]
    """
    results: list[R | None] = [None] * len(flows)
    ops: list[Op | None] = [_advance(flow, None, results, rank) for rank, flow in enumerate(flows)]
    round_number = 0
    while any(op is not None for op in ops):
        pending = [op for op in ops if op is not None]
        if len(pending) < len(flows):
            finished = [rank for rank, op in enumerate(ops) if op is None]
            raise RuntimeError(f"ranks {finished} have finished while others still yield {pending[0]!r}")
        replies = _exchange(pending, shards, round_number)
        ops = [_advance(flow, replies[rank], results, rank) for rank, flow in enumerate(flows)]
        round_number += 1
    return cast(list[R], results)


def _advance(flow: Flow[R], reply: Payload | None, results: list[R | None], rank: int) -> Op | None:
    try:
        return next(flow) if reply is None else flow.send(reply)
    except StopIteration as done:
        results[rank] = done.value
        return None


def _signature(op: Op) -> tuple[object, ...]:
    shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in op.payload)
    root = op.source if isinstance(op, Broadcast) else None
    return type(op).__name__, op.axis, shapes, getattr(op, "reduction", None), root


def _exchange(ops: Sequence[Op], shards: int, round_number: int) -> list[Payload]:
    """All ranks' replies, group by group of the axis of their ops."""
    axis = ops[0].axis
    for rank, op in enumerate(ops):
        if op.axis != axis:
            raise RuntimeError(f"op {round_number} differs: rank 0 goes across the {axis} axis, rank {rank} does not")
    ranks = range(len(ops))
    groups = [[r for r in ranks if r % shards == shard] for shard in range(shards)]
    if axis == "shard":
        groups = [list(ranks[start : start + shards]) for start in range(0, len(ops), shards)]
    replies: dict[int, Payload] = {}
    for group in groups:
        replies.update(zip(group, replies_of([ops[rank] for rank in group], round_number), strict=True))
    return [replies[rank] for rank in ranks]


def replies_of(ops: Sequence[Op], number: int) -> list[Payload]:
    """All ranks' replies to the op with this ``number``, in rank order. Raises ``RuntimeError`` where ranks diverge."""
    _check_agreement(ops, number)
    return _replies(ops)


def _check_agreement(ops: Sequence[Op], round_number: int) -> None:
    expected = _signature(ops[0])
    world = len(ops)
    for rank, op in enumerate(ops):
        if _signature(op) != expected:
            raise RuntimeError(
                f"op {round_number} differs: rank 0 yields {expected}, rank {rank} yields {_signature(op)}"
            )
        if isinstance(op, AllReduce):
            one_dtype(op)
        if isinstance(op, AllToAll) and any(tensor.shape[:1] != (world,) for tensor in op.payload):
            leading = [tuple(tensor.shape[:1]) for tensor in op.payload]
            raise RuntimeError(
                f"op {round_number}: an all-to-all of {world} ranks needs {world} rows, it has {leading}"
            )
        if isinstance(op, Shift):
            sender = ops[op.source]
            if not isinstance(sender, Shift) or sender.destination != rank:
                raise RuntimeError(f"op {round_number}: rank {rank} waits for rank {op.source}, which sends elsewhere")


def _replies(ops: Sequence[Op]) -> list[Payload]:
    world = len(ops)
    payloads = [op.payload for op in ops]
    columns = list(zip(*payloads, strict=True))  # one tuple of [world] tensors for each tensor of the payload
    match ops[0]:
        case AllReduce(reduction=reduction):
            return [tuple(_sum(column, reduction) for column in columns) for _ in range(world)]
        case AllGather():
            return [tuple(torch.stack(list(column)) for column in columns) for _ in range(world)]
        case AllToAll():
            return [tuple(torch.stack([sent[rank] for sent in column]) for column in columns) for rank in range(world)]
        case Broadcast(source=source):
            return [tuple(tensor.clone() for tensor in payloads[source]) for _ in range(world)]
        case Shift():
            shifts = [op for op in ops if isinstance(op, Shift)]
            return [tuple(tensor.clone() for tensor in payloads[op.source]) for op in shifts]


def _sum(column: Sequence[torch.Tensor], reduction: str) -> torch.Tensor:
    total = column[0].clone()
    for tensor in column[1:]:
        total += tensor
    return total / len(column) if reduction == "mean" else total
