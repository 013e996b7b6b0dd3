"""What is measured: torch's own collectives and the ops of `comm`, each with its optimum and a check of every value.

S is the size of the whole buffer in bytes, n the number of ranks; the factors are those of nccl-tests' PERFORMANCE.md:
bus bandwidth = factor x S / time is what the busiest link carries if the algorithm is optimal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.comm.channel import Channel
from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Flow, Op, Payload, Shift

__all__ = ["COMM", "GROUPS", "NATIVE", "OPS", "Case", "bus_factor", "prepare"]

FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
    "shift": lambda n: 1.0,
}
NATIVE = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
COMM = ("comm.all_reduce", "comm.all_gather", "comm.all_to_all", "comm.broadcast", "comm.shift")
OPS = (*NATIVE, *COMM)
GROUPS: Mapping[str, tuple[str, ...]] = {"all": OPS, "native": NATIVE, "comm": COMM}

SENTINEL = 101  # fills a buffer before its op; no op results in it
VALUES = 97
LARGEST_SUM = 100


def bus_factor(op: str, world: int) -> float:
    """Bus bandwidth over algorithm bandwidth; also the optimal bytes sent per rank, over S.

    >>> bus_factor("all_reduce", 4), bus_factor("comm.all_gather", 4)
    (1.5, 0.75)
    """
    return FACTORS[op.removeprefix("comm.")](world) if world > 1 else 0.0


@dataclass(frozen=True)
class Case:
    """One op at one size.

    ``bytes``: of the whole buffer, after it was cut to equal shares. ``reset`` makes the buffers as they were before,
    ``run`` performs the op, and ``wrong`` counts the wrong values after it.
    """

    bytes: int
    reset: Callable[[], None]
    run: Callable[[], None]
    wrong: Callable[[], int]


@dataclass(frozen=True)
class Values:
    """What ranks send and must receive: whole numbers that depend on rank and position, exact in every dtype.

    What is moved is ``position + 7 rank`` modulo 97, from 1 on. What is summed is 1 at every ``period``-th position,
    beginning elsewhere on each rank: a period that grows with the ranks keeps sums where bfloat16 and uint8 are exact.
    """

    world: int
    dtype: torch.dtype
    device: torch.device

    def moved(self, rank: int, count: int, start: int = 0) -> Tensor:
        """``[count]``: what ``rank`` sends to be moved, from position ``start`` on."""
        return self._repeat((torch.arange(VALUES) + start + 7 * rank) % VALUES + 1, count)

    def addend(self, rank: int, count: int) -> Tensor:
        """``[count]``: what ``rank`` sends to be summed."""
        return self._repeat((torch.arange(self._period) + rank) % self._period == 0, count)

    def total(self, count: int, start: int = 0) -> Tensor:
        """``[count]``: the sum of what all ranks sent, from position ``start`` on."""
        positions = (torch.arange(self._period) + start)[:, None] + torch.arange(self.world)
        return self._repeat((positions % self._period == 0).sum(1), count)

    @property
    def _period(self) -> int:
        return max(3, -(-self.world // LARGEST_SUM))

    def _repeat(self, pattern: Tensor, count: int) -> Tensor:
        return pattern.to(self.device, self.dtype).repeat(-(-count // pattern.numel()))[:count]


def prepare(op: str, size: int, dtype: torch.dtype, channel: Channel, device: torch.device) -> Case:
    """Buffers and the call, on every rank alike. ``size``: bytes of the whole buffer, cut down to equal shares."""
    rank, world = channel.places["replicate"].rank, channel.places["replicate"].size
    share = max(1, size // dtype.itemsize // world)
    values = Values(world, dtype, device)
    summed = op.removeprefix("comm.") in ("all_reduce", "reduce_scatter")
    sent = values.addend(rank, share * world) if summed else values.moved(rank, share * world)
    case = _of_comm if op.startswith("comm.") else _native
    return case(op, sent, channel, lambda: _wanted(op, values, rank, share))


def _wanted(op: str, values: Values, rank: int, share: int) -> Tensor:
    """What ``rank`` must have received."""
    world = values.world
    match op.removeprefix("comm."):
        case "all_reduce":
            return values.total(share * world)
        case "reduce_scatter":
            return values.total(share, start=rank * share)
        case "all_gather":
            return torch.cat([values.moved(peer, share) for peer in range(world)])
        case "all_to_all":
            return torch.cat([values.moved(peer, share, start=rank * share) for peer in range(world)])
        case "broadcast":
            return values.moved(0, share * world)
        case _:
            return values.moved((rank - 1) % world, share * world)


def _native(op: str, sent: Tensor, channel: Channel, wanted: Callable[[], Tensor]) -> Case:
    """An op of torch.distributed, over the default group."""
    rank, world = channel.places["replicate"].rank, channel.places["replicate"].size
    share = sent.numel() // world
    received = torch.empty_like(sent[:share] if op == "reduce_scatter" else sent)
    in_place = op == "all_reduce" or (op == "broadcast" and rank == 0)
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(received),
        "all_gather": lambda: dist.all_gather_into_tensor(received, sent[:share]),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(received, sent),
        "all_to_all": lambda: dist.all_to_all_single(received, sent),
        "broadcast": lambda: dist.broadcast(received, src=0),
    }

    def reset() -> None:
        if in_place:
            received.copy_(sent)
        else:
            received.fill_(SENTINEL)

    def run() -> None:
        calls[op]()

    return Case(sent.nbytes, reset, run, lambda: int((received != wanted()).sum()))


def _of_comm(op: str, sent: Tensor, channel: Channel, wanted: Callable[[], Tensor]) -> Case:
    """An op of `comm`, through the channel."""
    rank, world = channel.places["replicate"].rank, channel.places["replicate"].size
    share = sent.numel() // world
    ops: dict[str, Op] = {
        "comm.all_reduce": AllReduce((sent,), "sum"),
        "comm.all_gather": AllGather((sent[:share],)),
        "comm.all_to_all": AllToAll((sent.view(world, share),)),
        "comm.broadcast": Broadcast((sent,), source=0),
        "comm.shift": Shift((sent,), destination=(rank + 1) % world, source=(rank - 1) % world),
    }
    received: list[Tensor] = []

    def run() -> None:
        received[:] = channel.run(_one(ops[op]), "bench")

    return Case(sent.nbytes, received.clear, run, lambda: int((received[0].reshape(-1) != wanted()).sum()))


def _one(op: Op) -> Flow[Payload]:
    return (yield op)
