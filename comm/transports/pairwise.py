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

    Each rank begins with the one behind its own, so that they do not all begin with the same.
    """
    rank, world = group.rank(), group.size()
    arrived = torch.empty_like(sent)
    arrived[rank].copy_(sent[rank])
    if not sent.numel():
        return arrived, []
    before, behind = (*range(rank - 1, -1, -1), *range(world - 1, rank, -1)), (*range(rank + 1, world), *range(rank))
    works = [group.recv([arrived[source]], source, 0) for source in before]
    return arrived, works + [group.send([sent[peer]], peer, 0) for peer in behind]
