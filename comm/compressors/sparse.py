"""Sparse: send a few elements of each row, the largest (top-k) or some that a shared seed draws (random-k).

    top-k      k = ceil(density * width) of the largest magnitudes, with their indices        arXiv:1809.07599;
               their values in fp32, or coded by another compressor as rows of k elements
    random-k   k elements drawn from (seed, step, FQN), the same on all ranks, so without indices; unscaled it is a
               contraction, scaled by width / k it is unbiased

Ascending indices are coded in a length that depends on k and width only, see `positions`.

Random-k keeps the same indices in all rows and in both phases of the two-phase route: the second one loses nothing.
Communication: top-k an all-gather, or two phases of which the second sends more, see `routes`; random-k any route.
Keeps: nothing.
Bytes for k of n elements: top-k 4 k, or what values take, and up to (2 + log2(n / k)) k / 8; random-k 4 k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtrain.comm.compressors.cast import Cast
from dtrain.comm.compressors.compressor import Compressor, RowWise, is_sparse
from dtrain.comm.compressors.positions import position_bits, positions_of_bits, positions_to_bits
from dtrain.comm.kernels import bytes_of, pack_bits, unpack_bits
from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key
from dtrain.comm.shadowed import on_shadows

FP32 = Cast("fp32")
SAMPLED_FROM = 1 << 16
"""Rows at least this long are searched above a threshold estimated from a sample; the result is the same set."""


@dataclass(frozen=True, repr=False)
class TopK(RowWise):
    """See `topk`. ``ranks``: room for what so many ranks send, see `union`."""

    density: float
    values: Compressor = FP32
    ranks: int = 1

    def __repr__(self) -> str:
        values = f", values={self.values}" if self.values != FP32 else ""
        ranks = f", ranks={self.ranks}" if self.ranks > 1 else ""
        return f"TopK(density={self.density}{values}{ranks})"

    @property
    def delta(self) -> float:
        return min(1.0, self.ranks * self.density) * self.values.delta  # of the part of |x|^2 that k elements have

    @property
    def homogeneous(self) -> bool:
        return self.values.homogeneous

    @property
    def setting(self) -> str:
        return f"density {self.density:.3g}"

    def alternatives(self) -> list[TopK]:
        return [replace(self, density=density) for density in _densities(self.density)]

    def union(self, ranks: int) -> TopK:
        """See `Sparse`."""
        return replace(self, ranks=self.ranks * ranks)

    def _kept(self, width: int) -> int:
        return min(width, self.ranks * kept(self.density, width))

    def encode(self, rows: Tensor, key: Key) -> Payload:
        width = rows.shape[1]
        k = self._kept(width)
        if width < SAMPLED_FROM:
            indices = rows.abs().nan_to_num_(nan=torch.inf).topk(k, dim=1, sorted=False).indices
        else:
            indices = torch.stack([largest(row, k) for row in rows]) if len(rows) else rows.new_zeros((0, k)).long()
        indices = indices.sort(dim=1).values  # the order carries no information; sorted, they take few bits
        return *self.values.encode(rows.gather(1, indices), key), packed_indices(indices, width)

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        """Raises ``ValueError`` for indices that such rows do not have."""
        *coded, packed = payload
        k = self._kept(width)
        values, indices = self.values.decode(tuple(coded), k, key), unpacked_indices(packed, k, width)
        return torch.zeros(values.shape[0], width, device=values.device).scatter_(1, indices, values)

    def row_bytes(self, width: int) -> int:
        k = self._kept(width)
        return self.values.row_bytes(k) + bytes_of(position_bits(width, k), 1, 8)


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


def topk(density: float = 0.01, *, values: Compressor = FP32) -> TopK:
    """Send the largest magnitudes.

    Args:
        density: the fraction of the elements that is sent, in (0, 1]; at least one element of each row is.
        values: how the elements that are sent are coded, for example ``quantize(bits=4, block=64)``; fp32 by default.

    >>> topk(0.01).row_bytes(1000)
    51

    Raises ``ValueError`` for another density, ``TypeError`` for values that are no compressor of rows. Source: the
    module's docstring.
    """
    if not isinstance(values, Compressor) or is_sparse(values):
        raise TypeError(f"values is {values!r}; give a compressor of all elements, such as quantize(bits=4, block=64)")
    return TopK(_checked(density), values)


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


def _search(row: Tensor, k: int) -> Tensor:
    """`largest` without values."""
    return row.abs().topk(k, sorted=False).indices


@on_shadows(_search)
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


# ---- indices ---------------------------------------------------------------------------------------------------------


def packed_indices(indices: Tensor, width: int) -> Tensor:
    """Ascending ``indices`` [m, k] of rows of ``width`` elements as bytes, [m, bytes] uint8; see `positions`.

    >>> packed_indices(torch.tensor([[3, 500, 900]]), 1000).shape
    torch.Size([1, 4])
    """
    return pack_bits(positions_to_bits(indices, width), 1)


def unpacked_indices(packed: Tensor, k: int, width: int) -> Tensor:
    """Undo `packed_indices`: [m, k] int64.

    Raises ``ValueError`` for bytes that are not those of ``k`` ascending indices below ``width``.
    """
    return positions_of_bits(unpack_bits(packed, 1, position_bits(width, k)), width, k)
