"""Projection: of each block of b elements, K numbers along random directions of 1 and -1, the same on all ranks.

    V: b x K signs, drawn from (seed, step, FQN);   gamma = a / K V^T x;   x' = V gamma
    a = K / (K + b - 1): the contraction of least error;   a = 1: unbiased, of K + b - 1 over K times the square of x

All blocks of a row share V, so drawing it costs little. A mean of decoded rows lies in the span of V again, so
the second phase fits gamma to it (least squares) and loses nothing. Decoding adds direction by direction: a sign
times a number is exact, so every rank has the same bits, on any hardware. Blocks of up to 2 K elements are sent in
fp32.
Communication: the two-phase route, or any: payloads may be summed. Keeps: nothing.
Bytes: 4 K for each block. Source: Ferret (Shu et al., arXiv:2409.06277), equations 6 to 8, with signs for numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.comm.compressors.compressor import RowWise
from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key
from dtrain.comm.shared_seed.philox import Address, SharedRandom


@dataclass(frozen=True)
class Projection(RowWise):
    """See `projection`."""

    directions: int
    block: int
    scaled: bool

    @property
    def unbiased(self) -> bool:
        return self.scaled

    @property
    def delta(self) -> float:
        # Of the longest block; shorter ones lose less.
        return 1.0 - (self.block - 1) / self.directions if self.scaled else shrinkage(self.directions, self.block)

    @property
    def linear(self) -> bool:
        return True

    def encode(self, rows: Tensor, key: Key) -> Payload:
        width = rows.shape[1]
        if self._whole(width):
            return (rows,)
        blocks = self._blocks(rows)
        size = blocks.shape[-1]
        along = self._drawn(size, key, rows.device)
        products = blocks @ along.T
        if key.second_phase:
            fitted = _fitted((along @ along.T).double(), products.double().flatten(0, 1).T).T
            return (fitted.float().view_as(products),)
        factor = 1.0 if self.scaled else shrinkage(self.directions, size)
        return (products.mul_(factor / self.directions),)

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        (numbers,) = payload
        if self._whole(width):
            return numbers
        count, size = numbers.shape[1], self._size(width)
        along = self._drawn(size, key, numbers.device)
        blocks = numbers.new_zeros(numbers.shape[0], count, size)
        for k in range(self.directions):
            blocks.addcmul_(numbers[:, :, k : k + 1], along[k])
        return blocks.flatten(1)[:, :width]

    def row_bytes(self, width: int) -> int:
        return 4 * (width if self._whole(width) else self.directions * self._count(width))

    def _count(self, width: int) -> int:
        return -(-width // self.block)

    def _size(self, width: int) -> int:
        """Elements of each block of a row: at most ``block``, and the same for all."""
        return -(-width // max(1, self._count(width)))

    def _whole(self, width: int) -> bool:
        return self._size(width) <= 2 * self.directions

    def _blocks(self, rows: Tensor) -> Tensor:
        """[m, count, size], padded with zeros."""
        count, size = self._count(rows.shape[1]), self._size(rows.shape[1])
        missing = count * size - rows.shape[1]
        padded = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
        return padded.reshape(rows.shape[0], count, size)

    def _drawn(self, size: int, key: Key, device: torch.device) -> Tensor:
        """V^T, [directions, size]."""
        purpose = "projection" if not key.again else f"projection {key.again}"
        random, at = SharedRandom(key.seed % 2**64), Address(purpose, key.step)
        return random.signs(at, key.fqn, self.directions * size).view(self.directions, size).to(device)


def _fitted(gram: Tensor, products: Tensor) -> Tensor:
    """The solution x of ``gram`` x = ``products``; the least-norm one where some directions are linearly dependent."""
    factors, pivots, _ = torch.linalg.lu_factor_ex(gram)
    if float(factors.diagonal().abs().amin()) > 1e-9 * float(gram[0, 0]):
        solution: Tensor = torch.linalg.lu_solve(factors, pivots, products)
        return solution
    inverse: Tensor = torch.linalg.pinv(gram, rtol=1e-9, hermitian=True)
    return inverse @ products


def shrinkage(directions: float, size: int) -> float:
    """The factor of least error for a projection of ``size`` elements on random ``directions``.

    >>> shrinkage(32, 1025)
    0.030303030303030304
    """
    return directions / (directions + size - 1)


def projection(directions: int = 32, *, block: int = 1024, scaled: bool = False) -> Projection:
    """Send a few numbers of each block, along random directions that are redrawn from a shared seed in each step.

    Args:
        directions: K, numbers of each block.
        block: elements of a block, more than 2 K.
        scaled: unbiased, of large variance. Under error feedback it must not be.

    >>> projection(32).row_bytes(2048)
    256

    Raises ``ValueError`` for numbers outside their range, or that would not compress.
    """
    for name, value in (("directions", directions), ("block", block)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; give a positive whole number")
    if block <= 2 * directions:
        raise ValueError(f"block is {block} with {directions} directions; give more than twice as many")
    return Projection(directions, block, scaled)
