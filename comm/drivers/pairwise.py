"""gloo's exchanges between pairs of ranks, with every receive posted before any send.

A receiver tells the sender that it is ready over the connection that the data travel on. Where a rank sends first and
posts its receive then, as gloo's own all-to-all does in turn with each peer, that word waits behind the data, and the
link carries one direction at a time: over links of 100 Mbit/s a little more than half of what it can.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all(sent: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """Row j of ``sent`` to rank j of ``group``: the rows that will have come from each, and what to wait for.

    Each rank begins with the rank behind its own, so that at first nobody gets from two.
    """
    rank, world = group.rank(), group.size()
    arrived = torch.empty_like(sent)
    arrived[rank].copy_(sent[rank])
    if not sent.numel():
        return arrived, []
    receives = [(arrived[source], source) for source in (*range(rank - 1, -1, -1), *range(world - 1, rank, -1))]
    sends = [(sent[peer], peer) for peer in (*range(rank + 1, world), *range(rank))]
    return arrived, posted(receives, sends, group)


def posted(
    receives: list[tuple[Tensor, int]], sends: list[tuple[Tensor, int]], group: dist.ProcessGroup
) -> list[dist.Work]:
    """Begin to receive tensors from ranks of ``group``, and to send tensors to some."""
    works = [group.recv([tensor], source, 0) for tensor, source in receives]
    return works + [group.send([tensor], destination, 0) for tensor, destination in sends]
