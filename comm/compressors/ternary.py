"""Ternary: -1, 0 or 1 for each element, and a scale for each block.

    terngrad   x is clipped at c standard deviations; s = max |x|; sends s sgn(x) with probability |x| / s, else 0.
               Unbiased but for the clipping; its variance is far too large for error feedback. arXiv:1705.07878
    compeft    keeps the signs of the largest magnitudes and gives all of them one magnitude: their mean, or
               alpha times the block's standard deviation as for parameter updates in arXiv:2311.13171

Communication: the two-phase route. Bytes for each block of n elements: terngrad ceil(n / 4) + 4; compeft, which keeps
k = ceil(density n), (`position_bits` of n and k, and k) / 8 rounded up, + 4. Keeps: nothing.
ComPEFT's paper keeps the largest of all elements instead of those of each block, takes the standard deviation over
n - 1 elements, and Golomb-codes the positions, in a length that depends on them: 6 to 11 % fewer bytes at densities of
5 to 20 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dtrain.comm.compressors.positions import position_bits, positions_of_bits, positions_to_bits
from dtrain.comm.kernels import (
    bytes_of,
    checked_block,
    pack_bits,
    pack_blocks,
    packed_bytes,
    scaled,
    to_blocks,
    unpack_bits,
    unpack_blocks,
)
from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key


@dataclass(frozen=True)
class TernGrad:
    """See `terngrad`."""

    block: int
    clip: float

    homogeneous: ClassVar[bool] = True
    linear: ClassVar[bool] = False

    @property
    def unbiased(self) -> bool:
        return math.isinf(self.clip)

    @property
    def delta(self) -> float:
        return 0.0  # the variance is |x|_inf |x|_1 - |x|_2^2: up to (sqrt(n) - 1) / 2 times |x|^2

    def encode(self, rows: Tensor, key: Key) -> Payload:
        width, blocks = rows.shape[1], to_blocks(rows, self.block)
        size = blocks.abs()
        if math.isfinite(self.clip):
            size = size.minimum(self.clip * _deviation(blocks, _counts(rows, self.block)))
        scale = size.amax(-1, keepdim=True)
        noise = torch.rand(rows.shape, generator=key.generator(rows.device), device=rows.device)
        drawn = scaled(size, scale) > to_blocks(noise, self.block)
        codes = torch.where(drawn, torch.where(blocks < 0, 2, 1), 0).to(torch.uint8).flatten(1)[:, :width]
        return pack_blocks(codes.contiguous(), 2, self.block), scale.squeeze(-1)

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        packed, scale = payload  # [m, bytes], [m, blocks]
        codes = to_blocks(unpack_blocks(packed, 2, self.block, width), self.block)
        levels = torch.tensor([0.0, 1.0, -1.0, 0.0], device=codes.device)
        return levels[codes.long()].mul_(scale.unsqueeze(-1)).flatten(1)[:, :width]

    def row_bytes(self, width: int) -> int:
        return packed_bytes(width, 2, self.block) + 4 * -(-width // self.block)


@dataclass(frozen=True)
class Compeft:
    """See `compeft`."""

    block: int
    density: float
    alpha: float | None

    unbiased: ClassVar[bool] = False
    homogeneous: ClassVar[bool] = True
    linear: ClassVar[bool] = False

    @property
    def delta(self) -> float:
        # |x_S|_1^2 / k >= |x_S|_2^2 / k >= |x|^2 / n, for the k = density n largest of a block of n.
        return 1.0 / self.block if self.alpha is None else 0.0

    def encode(self, rows: Tensor, key: Key) -> Payload:
        blocks, counts = to_blocks(rows, self.block), _counts(rows, self.block)
        size = blocks.abs()
        order = size.nan_to_num(nan=torch.inf).argsort(dim=-1, descending=True, stable=True)  # ties: by index
        kept = (self.density * counts).ceil_().clamp_(min=1.0)  # [blocks, 1]
        if self.alpha is None:
            ranks = torch.arange(self.block, device=rows.device).expand_as(order)
            keep = torch.empty_like(order).scatter_(-1, order, ranks) < kept
            scale = torch.where(keep, size, 0.0).sum(-1, keepdim=True) / kept
        else:
            scale = self.alpha * _deviation(blocks, counts)
        coded = []
        for begin, end, n, k in self._alike(rows.shape[1]):
            positions = order[:, begin:end, :k].sort(dim=-1).values
            negative = blocks[:, begin:end].gather(-1, positions) < 0
            bits = torch.cat([positions_to_bits(positions, n), negative.to(torch.uint8)], dim=-1)
            coded.append(pack_bits(bits, 1).flatten(1))
        return torch.cat(coded, dim=1) if coded else rows.new_zeros(rows.shape, dtype=torch.uint8), scale.squeeze(-1)

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        """Raises ``ValueError`` for a payload whose positions are none of such rows."""
        packed, scale = payload  # [m, bytes], [m, blocks]
        rows, offset, first = torch.zeros(packed.shape[0], width, device=packed.device), 0, 0
        for begin, end, n, k in self._alike(width):
            length = position_bits(n, k)
            size = (end - begin) * bytes_of(length + k, 1, 8)
            coded = packed[:, offset : offset + size].unflatten(1, (end - begin, -1))
            bits = unpack_bits(coded, 1, length + k)
            positions = positions_of_bits(bits[..., :length], n, k)
            signed = torch.where(bits[..., length:] > 0, -1.0, 1.0).mul_(scale[:, begin:end].unsqueeze(-1))
            rows[:, first : first + (end - begin) * n].view(-1, end - begin, n).scatter_(-1, positions, signed)
            offset, first = offset + size, first + (end - begin) * n
        return rows

    def row_bytes(self, width: int) -> int:
        sections = self._alike(width)
        return sum((end - begin) * (bytes_of(position_bits(n, k) + k, 1, 8) + 4) for begin, end, n, k in sections)

    def _alike(self, width: int) -> Iterator[tuple[int, int, int, int]]:
        """First and end of the blocks of n elements, n, and how many of these are kept; the last one may be shorter."""
        whole, rest = divmod(width, self.block)
        for begin, end, n in ((0, whole, self.block), (whole, whole + 1, rest)):
            if end > begin and n:
                yield begin, end, n, int((self.density * torch.tensor(float(n))).ceil().clamp(min=1.0))


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

    >>> compeft().row_bytes(4096), compeft(density=0.05).row_bytes(4096)
    (328, 196)

    Raises ``ValueError`` for values outside these ranges. Source: the module's docstring.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density!r}; give the fraction of the elements that is kept, in (0, 1]")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha is {alpha!r}; give a positive number of standard deviations, or None")
    return Compeft(checked_block(block), float(density), alpha)


def _counts(rows: Tensor, block: int) -> Tensor:
    """How many elements of each block are no padding, [blocks, 1] fp32."""
    starts = torch.arange(0, rows.shape[1], block, device=rows.device)
    return (rows.shape[1] - starts).clamp_(max=block).to(torch.float32).unsqueeze(-1)


def _deviation(blocks: Tensor, counts: Tensor) -> Tensor:
    """Standard deviation of the real elements of each block, [m, blocks, 1]; the padding is zeros."""
    mean = blocks.sum(-1, keepdim=True) / counts
    square = blocks.square().sum(-1, keepdim=True) / counts
    return (square - mean.square()).clamp_(min=0.0).sqrt()
