"""Ternary: -1, 0 or 1 for each element, in 2 bits, and a scale for each block.

    terngrad   x is clipped at c standard deviations; s = max |x|; sends s sgn(x) with probability |x| / s, else 0.
               Unbiased but for the clipping; its variance is far too large for error feedback. arXiv:1705.07878
    compeft    keeps the signs of the largest magnitudes and gives all of them one magnitude: their mean, or
               alpha times the block's standard deviation as for parameter updates in arXiv:2311.13171

Communication: the two-phase route. Bytes for a row of n elements: ceil(n / 4) + 4 * ceil(n / block). Keeps: nothing.
ComPEFT's paper Golomb-codes the indices of kept elements instead, which gains with sparsity: 5.9 times smaller at 5 %.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dtrain.comm.kernels import checked_block, pack_blocks, packed_bytes, scaled, to_blocks, unpack_blocks
from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key


@dataclass(frozen=True)
class _Ternary(ABC):
    """A `Compressor`."""

    block: int

    homogeneous: ClassVar[bool] = True
    linear: ClassVar[bool] = False

    def encode(self, rows: Tensor, key: Key) -> Payload:
        width = rows.shape[1]
        starts = torch.arange(0, width, self.block, device=rows.device)
        counts = (width - starts).clamp_(max=self.block).to(torch.float32).unsqueeze(-1)  # [blocks, 1]
        blocks = to_blocks(rows, self.block)
        scale, keep = self._choose(blocks, counts, rows, key)
        codes = torch.where(keep, torch.where(blocks < 0, 2, 1), 0).to(torch.uint8).flatten(1)[:, :width]
        return pack_blocks(codes.contiguous(), 2, self.block), scale.squeeze(-1)

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        packed, scale = payload  # [m, bytes], [m, blocks]
        codes = to_blocks(unpack_blocks(packed, 2, self.block, width), self.block)
        levels = torch.tensor([0.0, 1.0, -1.0, 0.0], device=codes.device)
        return levels[codes.long()].mul_(scale.unsqueeze(-1)).flatten(1)[:, :width]

    def row_bytes(self, width: int) -> int:
        return packed_bytes(width, 2, self.block) + 4 * -(-width // self.block)

    @abstractmethod
    def _choose(self, blocks: Tensor, counts: Tensor, rows: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        """The scale [m, blocks, 1] and which elements are not zero [m, blocks, block]; ``counts``: real elements."""


@dataclass(frozen=True)
class TernGrad(_Ternary):
    """See `terngrad`."""

    clip: float

    @property
    def unbiased(self) -> bool:
        return math.isinf(self.clip)

    @property
    def delta(self) -> float:
        return 0.0  # the variance is |x|_inf |x|_1 - |x|_2^2: up to (sqrt(n) - 1) / 2 times |x|^2

    def _choose(self, blocks: Tensor, counts: Tensor, rows: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        size = blocks.abs()
        if math.isfinite(self.clip):
            size = size.minimum(self.clip * _deviation(blocks, counts))
        scale = size.amax(-1, keepdim=True)
        noise = torch.rand(rows.shape, generator=key.generator(rows.device), device=rows.device)
        return scale, scaled(size, scale) > to_blocks(noise, self.block)


@dataclass(frozen=True)
class Compeft(_Ternary):
    """See `compeft`."""

    density: float
    alpha: float | None

    unbiased: ClassVar[bool] = False

    @property
    def delta(self) -> float:
        # |x_S|_1^2 / k >= |x_S|_2^2 / k >= |x|^2 / n, for the k = density n largest of a block of n.
        return 1.0 / self.block if self.alpha is None else 0.0

    def _choose(self, blocks: Tensor, counts: Tensor, rows: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        size = blocks.abs()
        kept_counts = (self.density * counts).ceil_().clamp_(min=1.0)  # [blocks, 1]
        order = size.nan_to_num(nan=torch.inf).argsort(dim=-1, descending=True, stable=True)  # ties: by index
        positions = torch.arange(self.block, device=rows.device).expand_as(order)
        keep = torch.empty_like(order).scatter_(-1, order, positions) < kept_counts
        if self.alpha is None:
            return torch.where(keep, size, 0.0).sum(-1, keepdim=True) / kept_counts, keep
        return self.alpha * _deviation(blocks, counts), keep


def terngrad(*, block: int = 2048, clip: float = 2.5) -> TernGrad:
    """TernGrad.

    Args:
        block: elements that share a scale.
        clip: in standard deviations of the block; ``inf`` for none, which alone is unbiased.

    >>> terngrad().row_bytes(4096)
    1032

    Raises ``ValueError`` for values outside these ranges. Source: the module's docstring.
    """
    if not clip > 0:
        raise ValueError(f"clip is {clip!r}; give a positive number of standard deviations, or inf")
    return TernGrad(checked_block(block), float(clip))


def compeft(*, density: float = 0.1, alpha: float | None = None, block: int = 2048) -> Compeft:
    """ComPEFT's sparse signs.

    Args:
        density: the fraction of each block that is kept, in (0, 1].
        alpha: the common magnitude in standard deviations; None for the mean magnitude of what is kept, which is a
            contraction and may go under error feedback.
        block: elements that share a scale.

    >>> compeft().row_bytes(4096)
    1032

    Raises ``ValueError`` for values outside these ranges. Source: the module's docstring.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density!r}; give the fraction of the elements that is kept, in (0, 1]")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha is {alpha!r}; give a positive number of standard deviations, or None")
    return Compeft(checked_block(block), float(density), alpha)


def _deviation(blocks: Tensor, counts: Tensor) -> Tensor:
    """Standard deviation of the real elements of each block, [m, blocks, 1]; the padding is zeros."""
    mean = blocks.sum(-1, keepdim=True) / counts
    square = blocks.square().sum(-1, keepdim=True) / counts
    return (square - mean.square()).clamp_(min=0.0).sqrt()
