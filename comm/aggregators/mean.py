"""The mean of the peers' rows, summed in rank order in fp32: bitwise the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from dtrain.comm.shadowed import on_shadows

Aggregator: TypeAlias = Callable[[Tensor], Tensor]
"""``rows`` [world, n] fp32 -> [n] fp32; the same function of the rows on every rank."""


def _at_once(rows: Tensor) -> Tensor:
    """A mean without values: one pass over the rows of all ranks."""
    return rows.mean(0)


@on_shadows(_at_once)
def rank_order_mean(rows: Tensor) -> Tensor:
    """Mean over the leading dim of ``rows`` [world, n], added up from rank 0 to the last.

    ``torch.sum`` chooses its order by shape and stride, and a ring by the bucket, so neither is reproducible.

    >>> import torch
    >>> rank_order_mean(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    tensor([2., 4.])
    """
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total / rows.shape[0]


@on_shadows(lambda rows, weights: _at_once(rows))
def weighted_mean(rows: Tensor, weights: Sequence[float]) -> Tensor:
    """The mean of ``rows`` [world, n] by ``weights``, which are not all zero, added up in rank order in fp32.

    >>> import torch
    >>> weighted_mean(torch.tensor([[1.0], [3.0]]), [3.0, 1.0])
    tensor([1.5000])
    """
    total = rows[0] * weights[0]
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        total += weight * row
    return total / sum(weights)


def among(rule: Aggregator, rows: Tensor, weights: Sequence[float]) -> Tensor:
    """``rule`` over the rows of positive weight. The weights themselves count in the mean only.

    >>> import torch
    >>> among(rank_order_mean, torch.tensor([[1.0], [7.0], [3.0]]), [2.0, 0.0, 2.0])
    tensor([2.])
    """
    counted = [rank for rank, weight in enumerate(weights) if weight > 0]
    counted_rows = rows if len(counted) == len(weights) else rows[counted]
    if rule is rank_order_mean and len({weights[rank] for rank in counted}) > 1:
        return weighted_mean(counted_rows, [weights[rank] for rank in counted])
    return rule(counted_rows)


def mean() -> Aggregator:
    """The plain mean: what data parallelism means by "all-reduce"."""
    return rank_order_mean
