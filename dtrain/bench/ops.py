"""What is measured: torch's own collectives and the ops of `comm`, each with its optimum and a check of every value.

S is the size of the whole buffer in bytes, n the number of ranks; the factors are those of nccl-tests' PERFORMANCE.md:
bus bandwidth = factor x S / time is what the busiest link carries if the algorithm is optimal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.comm.drivers.run import Channel
from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Flow, Op, Payload, Shift

__all__ = ["OPS", "Case", "bus_factor", "prepare"]

FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
    "shift": lambda n: 1.0,
}
OPS = (
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "comm.all_reduce", "comm.all_gather",
    "comm.all_to_all", "comm.broadcast", "comm.shift",
)  # fmt: skip


def bus_factor(op: str, world: int) -> float:
    """Of algorithm bandwidth, to bus bandwidth: also the optimum of bytes sent per rank, over S.

    >>> bus_factor("all_reduce", 4), bus_factor("comm.all_gather", 4)
    (1.5, 0.75)
    """
    return FACTORS[op.removeprefix("comm.")](world) if world > 1 else 0.0


@dataclass
class Case:
    """One op at one size. ``run`` performs it; ``wrong`` counts values that are not what they must be, after a run."""

    run: Callable[[], None]
    wrong: Callable[[], int]


def prepare(op: str, size: int, dtype: torch.dtype, channel: Channel) -> Case:
    """Buffers and the call, on every rank alike. ``size``: bytes of the whole buffer, cut down to equal shares."""
    rank, world = channel.places["replicate"].rank, channel.places["replicate"].size
    share = max(1, size // dtype.itemsize // world)
    # Small whole numbers: exact in every dtype, also as sums.
    mine = torch.full((share * world,), rank % 7 + 1, dtype=dtype)
    if op.startswith("comm."):
        return _of_comm(op, mine, rank, world, channel)
    return _native(op, mine, rank, world)


def _sum(world: int) -> int:
    return sum(rank % 7 + 1 for rank in range(world))


def _by_rank(share: int, world: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(world).remainder(7).add(1).to(dtype).repeat_interleave(share)


def _native(op: str, mine: Tensor, rank: int, world: int) -> Case:
    share = mine.numel() // world
    parts = mine[:share].clone()
    out = torch.empty_like(mine)
    small = torch.empty_like(parts)
    match op:
        case "all_reduce":

            def run() -> None:
                out.copy_(mine)
                dist.all_reduce(out)

            return Case(run, lambda: int((out != _sum(world)).sum()))
        case "all_gather":
            rows = list(out.view(world, share).unbind())
            return Case(
                lambda: _ignore(dist.all_gather(rows, parts)),
                lambda: int((out != _by_rank(share, world, out.dtype)).sum()),
            )
        case "reduce_scatter":
            pieces = list(mine.view(world, share).unbind())
            return Case(lambda: _ignore(dist.reduce_scatter(small, pieces)), lambda: int((small != _sum(world)).sum()))
        case "all_to_all":
            return Case(
                lambda: _ignore(dist.all_to_all_single(out, mine)),
                lambda: int((out != _by_rank(share, world, out.dtype)).sum()),
            )
        case _:

            def send() -> None:
                out.copy_(mine)
                dist.broadcast(out, src=0)

            return Case(send, lambda: int((out != 1).sum()))


def _of_comm(op: str, mine: Tensor, rank: int, world: int, channel: Channel) -> Case:
    share = mine.numel() // world
    after, before = (rank + 1) % world, (rank - 1) % world
    asked: dict[str, Op] = {
        "comm.all_reduce": AllReduce((mine,), "sum"),
        "comm.all_gather": AllGather((mine[:share],)),
        "comm.all_to_all": AllToAll((mine.view(world, share),)),
        "comm.broadcast": Broadcast((mine,), source=0),
        "comm.shift": Shift((mine,), destination=after, source=before),
    }
    wanted: dict[str, Tensor] = {
        "comm.all_reduce": torch.full_like(mine, _sum(world)),
        "comm.all_gather": _by_rank(share, world, mine.dtype),
        "comm.all_to_all": _by_rank(share, world, mine.dtype),
        "comm.broadcast": torch.full_like(mine, 1),
        "comm.shift": torch.full_like(mine, before % 7 + 1),
    }
    got: list[Tensor] = []

    def run() -> None:
        got[:] = channel.run(_one(asked[op]), "bench")

    return Case(run, lambda: int((got[0].reshape(-1) != wanted[op]).sum()))


def _one(op: Op) -> Flow[Payload]:
    return (yield op)


def _ignore(_: object) -> None:
    """The handle of a call that has already ended."""
