"""How far replicas drift apart within a round: norms of their deltas, and the cosine between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dtrain.comm.layout import Named


def differences(anchor: Named, now: Named) -> tuple[dict[str, Tensor], Tensor]:
    """``anchor - now``, and the sum of its squares, 0-dim. NaN or infinite where any of it is, or it is too large.

    >>> differences({"w": torch.ones(2)}, {"w": torch.zeros(2)})
    ({'w': tensor([1., 1.])}, tensor(2.))
    """
    deltas, squares = {}, []
    for fqn, x in now.items():
        deltas[fqn] = delta = anchor[fqn] - x
        squares.append(torch.dot(delta, delta))  # while it is in the caches
    return deltas, torch.stack(squares).sum() if squares else torch.zeros(())


def products(deltas: Named, mean: Named) -> Tensor:
    """Dot products of ``mean`` with itself, and with this replica's ``deltas``: [2], of this rank's pieces.

    >>> products({"w": torch.ones(2)}, {"w": torch.tensor([1.0, -1.0])})
    tensor([2., 0.])
    """
    rows = [torch.stack([torch.dot(value, value), torch.dot(deltas[fqn], value)]) for fqn, value in mean.items()]
    return torch.stack(rows).sum(0) if rows else torch.zeros(2)


def gauges(sums: Tensor) -> dict[str, float]:
    """This replica's drift from the anchor, the norm of the mean delta, and the cosine between the two.

    ``sums`` [3]: over all pieces, the square of the replica's `differences`, then their `products`.
    """
    drift, moved, product = sums.tolist()
    cosine = product / math.sqrt(drift * moved) if drift * moved > 0 else 0.0
    return {"drift": math.sqrt(drift), "mean_delta": math.sqrt(moved), "delta_cosine": cosine}
