"""The mean of the peers' rows, summed in rank order in fp32, so that its bits depend on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

Aggregator: TypeAlias = Callable[[Tensor], Tensor]
"""``rows`` [world, n] fp32 -> [n] fp32; the same function of the rows on every rank."""


def rank_order_mean(rows: Tensor) -> Tensor:
    """Mean over the leading dim of ``rows`` [world, n], added up from rank 0 to the last.

    ``torch.sum`` chooses its order by shape and stride, and a ring by the bucket, so neither is reproducible enough.

    >>> import torch
    >>> rank_order_mean(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    tensor([2., 4.])
    """
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total / rows.shape[0]


def mean() -> Aggregator:
    """The plain mean: what data parallelism means by "all-reduce"."""
    return rank_order_mean
