"""What is declared replicated is the same on all replicas, or is made so: hashes now and then, repair by broadcast.

All that is applied is decoded from the same bytes, so replicas cannot drift apart by rounding. They can by a bit that
flips in memory, by hardware that computes something else, and by a bug; without a word, until the loss shows it.
Communication: 16 bytes of each replica; a broadcast of what is replicated, from the first replica of the largest group
that agrees, where they differ.

And what tells that replicas drift apart where nothing is wrong: norms of their deltas, and the cosine between them.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import torch
from torch import Tensor

from dtrain.comm.layout import Named
from dtrain.comm.ops import AllGather, Broadcast, Flow, Place
from dtrain.comm.state import State


def repaired(state: State, place: Place) -> Flow[list[int]]:
    """Make what ``state`` declares replicated equal on all peers; returns the ranks that differed."""
    names = sorted(name for name, kind in state.kinds.items() if kind == "replicated")
    kept = [(fqn, name) for fqn in sorted(state.tensors) for name in names if name in state.tensors[fqn]]
    mine = _digest([state.tensors[fqn][name] for fqn, name in kept])
    (gathered,) = yield AllGather((mine,))
    digests = [bytes(row) for row in gathered.tolist()]
    (most, _), *_ = Counter(digests).most_common(1)
    wrong = [rank for rank, digest in enumerate(digests) if digest != most]
    if wrong:
        right = yield Broadcast(tuple(state.tensors[fqn][name] for fqn, name in kept), source=digests.index(most))
        if place.rank in wrong:
            for (fqn, name), value in zip(kept, right, strict=True):
                state.tensors[fqn][name] = value.clone()
    return wrong


def differences(anchor: Named, now: Named) -> tuple[dict[str, Tensor], Tensor]:
    """``anchor - now``, and the sum of its squares, 0-dim. NaN or infinite where any of it is, or it is too large.

    >>> differences({"w": torch.ones(2)}, {"w": torch.zeros(2)})
    ({'w': tensor([1., 1.])}, tensor(2.))
    """
    deltas, squares = {}, []
    for fqn, x in now.items():
        deltas[fqn] = delta = anchor[fqn] - x
        squares.append(torch.dot(delta, delta))  # here, where it is in the caches
    return deltas, torch.stack(squares).sum() if squares else torch.zeros(())


def products(own: Named, mean: Named) -> Tensor:
    """Of the mean deltas with themselves, and with a replica's own: [2], of this rank's pieces.

    >>> products({"w": torch.ones(2)}, {"w": torch.tensor([1.0, -1.0])})
    tensor([2., 0.])
    """
    rows = [torch.stack([torch.dot(value, value), torch.dot(own[fqn], value)]) for fqn, value in mean.items()]
    return torch.stack(rows).sum(0) if rows else torch.zeros(2)


def gauges(sums: Tensor) -> dict[str, float]:
    """How far this replica had drifted from the anchor, and how well replicas agree.

    ``sums`` [3]: over all pieces, the square of the replica's `differences`, then their `products`.
    """
    drift, moved, product = sums.tolist()
    cosine = product / math.sqrt(drift * moved) if drift * moved > 0 else 0.0
    return {"drift": math.sqrt(drift), "mean_delta": math.sqrt(moved), "delta_cosine": cosine}


def _digest(tensors: list[Tensor]) -> Tensor:
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return torch.tensor(list(found.digest()), dtype=torch.uint8)
