"""What the drivers are tried on: each op, with payloads of mixed dtypes and shapes, and flows of several ops."""

from __future__ import annotations

import torch
from torch import Tensor

from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Flow, Op, Payload, Shift

Layout = list[tuple[tuple[int, ...], torch.dtype]]

LAYOUTS: list[Layout] = [
    [((3,), torch.uint8), ((5,), torch.float32), ((2, 3), torch.bfloat16), ((), torch.int64)],
    [((1,), torch.uint8), ((4,), torch.int64), ((1,), torch.bool), ((3, 3), torch.float64), ((), torch.float16)],
    [((0,), torch.float32), ((7,), torch.uint8), ((4, 0), torch.int64), ((1,), torch.bfloat16)],
    [((0,), torch.float32)],
    [((0,), torch.int64), ((2, 0), torch.uint8)],
    [((), torch.float32)],
    [((70_001,), torch.uint8), ((70_001,), torch.float32)],
]


def payload(seed: int, layout: Layout) -> Payload:
    """Any bits but those of a NaN, as tensors that are contiguous or not."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for number, (shape, dtype) in enumerate(layout):
        tensor = (100 * torch.randn(tuple(reversed(shape)), generator=generator)).abs().to(dtype)
        flipped = tensor.permute(tuple(reversed(range(tensor.dim()))))
        out.append(flipped if number % 2 else flipped.contiguous())
    return tuple(out)


def ops_for(rank: int, world: int, seed: int, layout: Layout) -> list[Op]:
    """Each op once, the sums with one dtype."""
    mine = payload(seed + rank, layout)
    rows = payload(seed + rank, [((world, *shape), dtype) for shape, dtype in layout])
    singles = [payload(seed + rank, [(shape, dtype) for shape, _ in layout]) for dtype in (torch.float32, torch.int64)]
    after, before = (rank + 1) % world, (rank - 1) % world
    return [
        AllGather(mine),
        AllToAll(rows),
        *(AllReduce(single, "sum") for single in singles),
        *(AllReduce(single, "mean") for single in singles),
        *(Broadcast(mine, source=source) for source in range(world)),
        Shift(mine, destination=after, source=before),
        Shift(mine, destination=rank, source=rank),
    ]


ROUNDS = [1, 2, 3, 3, 1, 0, 2]


def chained(name: int, rounds: int, rank: int) -> Flow[Tensor]:
    """Each op's payload depends on the last reply, and its size on the flow, so mixed-up messages cannot fit."""
    x = torch.arange(3 + name, dtype=torch.float32) * (rank + 1)
    for number in range(rounds):
        if (name + number) % 2:
            (x,) = yield AllReduce((x,), "mean")
        else:
            rows, flags = yield AllGather((x, torch.ones(1, dtype=torch.uint8)))
            x = rows[0] * 0.5 + rows[1] * float(flags.sum())
        x = x + rank
    return x
