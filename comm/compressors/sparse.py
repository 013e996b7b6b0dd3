"""Sparse: send a few elements of each row, the largest (top-k) or some that a shared seed draws (random-k).

    top-k      k = ceil(density * width) of the largest magnitudes, with their indices        arXiv:1809.07599
    random-k   k elements drawn from (seed, step, FQN), the same on all ranks, so without indices; unscaled it is a
               contraction, scaled by width / k it is unbiased

On the two-phase route each row goes to one rank, so every rank's chunk has a k of its own. Random-k keeps the same
indices in all rows and both phases, so that the second one loses nothing.
Communication: the two-phase route; random-k any. Keeps: nothing.
Bytes for k elements: top-k 4 + 2 (rows up to 65536 elements) or 4 + 4, random-k 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtrain.comm.compressors.compressor import RowWise
from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key

SAMPLED_FROM = 1 << 16
"""Rows at least this long are searched above a threshold estimated from a sample; the result is the same set."""


@dataclass(frozen=True)
class TopK(RowWise):
    """See `topk`."""

    density: float

    @property
    def delta(self) -> float:
        return self.density

    @property
    def setting(self) -> str:
        return f"density {self.density:.3g}"

    def alternatives(self) -> list[TopK]:
        return [replace(self, density=density) for density in _densities(self.density)]

    def encode(self, rows: Tensor, key: Key) -> Payload:
        width = rows.shape[1]
        k = kept(self.density, width)
        if width < SAMPLED_FROM:
            indices = rows.abs().nan_to_num_(nan=torch.inf).topk(k, dim=1, sorted=False).indices
        else:
            indices = torch.stack([largest(row, k) for row in rows]) if len(rows) else rows.new_zeros((0, k)).long()
        indices = indices.sort(dim=1).values  # the order carries no information; sorted, neighbours stay neighbours
        return rows.gather(1, indices), _narrow(indices, width)

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        """Raises ``ValueError`` for indices that such rows do not have."""
        values, narrow = payload
        indices = _wide(narrow)
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < width:
            raise ValueError(
                f"a top-k payload holds indices from {int(indices.min())} to {int(indices.max())} of rows of {width}: "
                "it was damaged on its way, or the ranks were given different models or densities"
            )
        rows = torch.zeros(values.shape[0], width, device=values.device)
        return rows.scatter_(1, indices, values)

    def row_bytes(self, width: int) -> int:
        return kept(self.density, width) * (4 + _index_dtype(width).itemsize)


@dataclass(frozen=True)
class RandomK(RowWise):
    """See `randk`."""

    density: float
    scaled: bool

    @property
    def unbiased(self) -> bool:
        return self.scaled

    @property
    def delta(self) -> float:
        return 2.0 - 1.0 / self.density if self.scaled else self.density  # 1 - (width / k - 1), or k / width

    @property
    def linear(self) -> bool:
        return True

    @property
    def setting(self) -> str:
        return f"density {self.density:.3g}"

    def alternatives(self) -> list[RandomK]:
        return [replace(self, density=density) for density in _densities(self.density)]

    def encode(self, rows: Tensor, key: Key) -> Payload:
        values = rows.index_select(1, self._indices(rows.shape[1], key, rows.device))
        return (values * self._factor(rows.shape[1]) if self.scaled and not key.second_phase else values,)

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        (values,) = payload
        rows = torch.zeros(values.shape[0], width, device=values.device)
        return rows.index_copy_(1, self._indices(width, key, values.device), values)

    def row_bytes(self, width: int) -> int:
        return 4 * kept(self.density, width)

    def _indices(self, width: int, key: Key, device: torch.device) -> Tensor:
        generator = replace(key.shared, phase="places").generator(torch.device("cpu"))
        chosen = torch.randperm(width, generator=generator)[: kept(self.density, width)]
        return chosen.sort().values.to(device)

    def _factor(self, width: int) -> float:
        return width / max(1, kept(self.density, width))


def topk(density: float = 0.01) -> TopK:
    """Send the largest magnitudes.

    Args:
        density: the fraction of the elements that is sent, in (0, 1]; at least one element of each row is.

    >>> topk(0.01).row_bytes(1000)
    60

    Raises ``ValueError`` for another density. Source: the module's docstring.
    """
    return TopK(_checked(density))


def randk(density: float = 0.01, *, scaled: bool = False) -> RandomK:
    """Send random elements, redrawn from a shared seed in each step, without indices.

    Args:
        density: the fraction of the elements that is sent, in (0, 1]; at least one element of each row is.
        scaled: multiply by 1 / density: unbiased, of large variance. Under error feedback it must not be.

    >>> randk(0.01).row_bytes(1000)
    40

    Raises ``ValueError`` for another density.
    """
    return RandomK(_checked(density), scaled)


def kept(density: float, width: int) -> int:
    """How many elements of a row of ``width`` are sent.

    >>> [kept(0.01, width) for width in (0, 1, 99, 101)]
    [0, 1, 1, 2]
    """
    return min(width, max(1, math.ceil(density * width)))


def largest(row: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest magnitudes of ``row`` [width], in any order.

    A sample gives a threshold that somewhat more than k elements should reach; those are searched. If fewer than k do,
    all are searched, so a misleading sample only costs time.
    """
    size = row.abs().nan_to_num_(nan=torch.inf)
    sample = size[:: max(1, row.numel() // 8192)]
    above = min(sample.numel(), math.ceil(1.25 * k / row.numel() * sample.numel()) + 8)
    candidates = (size >= sample.topk(above).values[-1]).nonzero().squeeze(1)
    if candidates.numel() < k:
        return size.topk(k, sorted=False).indices
    return candidates[size[candidates].topk(k, sorted=False).indices]


def _densities(density: float) -> list[float]:
    """From a quarter of ``density`` to four times as much."""
    return [min(1.0, density * factor) for factor in (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)]


def _checked(density: float) -> float:
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"density is {density!r}; give the fraction of the elements that is sent, in (0, 1]")
    return float(density)


def _index_dtype(width: int) -> torch.dtype:
    return torch.int16 if width <= 1 << 16 else torch.int32


def _narrow(indices: Tensor, width: int) -> Tensor:
    """Indices in as few bytes as ``width`` allows; 16 bits hold them unsigned."""
    return indices.to(torch.int32).to(_index_dtype(width))


def _wide(indices: Tensor) -> Tensor:
    return indices.long() & 0xFFFF if indices.dtype == torch.int16 else indices.long()
