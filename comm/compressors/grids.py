"""Grids around zero: each block has one scale, and each element the sign and the index of a level.

    symmetric   levels k / s, scale = max |x|                      s = 2^(bits - 1) - 1
    qsgd        levels k / s, scale = |x|_2                        Alistarh et al., arXiv:1610.02132
    e3m0        levels 0 and 2^-j, j = 0 ... 6, scale = max |x|    4 bits; Douillard et al., arXiv:2501.18512
    natural     levels 0 and 2^-j, j = 0 ... 126                   8 bits; Horvath et al., arXiv:1905.10988

    code = the nearest level of x / scale, or one of its two neighbours by chance, so that the mean is x (stochastic)

The last two of them are one family: a sign, some bits of exponent, no mantissa. (The natural compression of the paper
has no scale and sends 9 bits; with one, 7 bits of exponent reach from a block's largest element down to 2^-126 of it.)
Communication: the two-phase route. Bytes for a row of n elements: ceil(n * bits / 8) + 4 * ceil(n / block).
Keeps: nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.comm.compressors.base import RowWise
from dtrain.comm.compressors.blocks import pack_blocks, packed_bytes, scaled, to_blocks, unpack_blocks
from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key


@dataclass(frozen=True)
class _Grid(RowWise, ABC):
    bits: int
    block: int
    rounding: str

    @property
    def unbiased(self) -> bool:
        return self.rounding == "stochastic"

    @property
    @abstractmethod
    def delta(self) -> float: ...

    def encode(self, rows: Tensor, key: Key) -> Payload:
        width = rows.shape[1]
        blocks = to_blocks(rows, self.block)  # [m, blocks, block]
        scale = self._scale(blocks)
        chance = None
        if self.rounding == "stochastic":
            # Only real elements draw, so what they draw does not depend on the padding.
            noise = torch.rand(rows.shape, generator=key.generator(rows.device), device=rows.device)
            chance = to_blocks(noise, self.block)
        codes = self._codes(scaled(blocks, scale), chance).to(torch.uint8).flatten(1)[:, :width]
        return pack_blocks(codes.contiguous(), self.bits, self.block), scale.squeeze(-1)

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        packed, scale = payload  # [m, bytes], [m, blocks]
        codes = to_blocks(unpack_blocks(packed, self.bits, self.block, width), self.block)
        return self._levels(codes).mul_(scale.unsqueeze(-1)).flatten(1)[:, :width]

    def row_bytes(self, width: int) -> int:
        return packed_bytes(width, self.bits, self.block) + 4 * -(-width // self.block)

    @abstractmethod
    def _scale(self, blocks: Tensor) -> Tensor:
        """[m, blocks, 1]; at least the largest magnitude of each block."""

    @abstractmethod
    def _codes(self, values: Tensor, chance: Tensor | None) -> Tensor:
        """Codes below 2^bits of ``values`` in [-1, 1]; ``chance`` in [0, 1) decides between neighbours."""

    @abstractmethod
    def _levels(self, codes: Tensor) -> Tensor:
        """The levels of codes, fp32, a new tensor."""


@dataclass(frozen=True)
class Even(_Grid):
    """Levels at equal distances: the scale is each block's largest magnitude (symmetric) or its norm (qsgd)."""

    norm: bool

    @property
    def levels(self) -> int:
        """On each side of zero."""
        return (1 << (self.bits - 1)) - 1

    @property
    def delta(self) -> float:
        # Half a unit (nearest), or a variance of a quarter of its square, for each element; unit <= |x|_2 / levels.
        lost = self.block / (4 * self.levels**2)
        return 1.0 - (min(lost, self.block**0.5 / self.levels) if self.norm and self.unbiased else lost)

    def _scale(self, blocks: Tensor) -> Tensor:
        if not self.norm:
            return blocks.abs().amax(-1, keepdim=True)
        largest: Tensor = blocks.abs().amax(
            -1, keepdim=True
        )  # squares of fp32 overflow beyond 1e19 and vanish below 1e-23
        norm: Tensor = torch.linalg.vector_norm(scaled(blocks, largest), dim=-1, keepdim=True).clamp_(min=1.0)
        return norm * largest

    def _codes(self, values: Tensor, chance: Tensor | None) -> Tensor:
        grid = values * self.levels + (0.5 if chance is None else chance)
        codes: Tensor = grid.floor_().clamp_(-self.levels, self.levels) + self.levels
        return codes

    def _levels(self, codes: Tensor) -> Tensor:
        return (codes.to(torch.float32) - self.levels) / self.levels


@dataclass(frozen=True)
class Powers(_Grid):
    """Zero and the powers of two from 1 down to 2^-(levels - 1)."""

    @property
    def levels(self) -> int:
        """Without zero, on each side of it."""
        return (1 << (self.bits - 1)) - 1

    @property
    def smallest(self) -> float:
        return 2.0 ** (1 - self.levels)

    @property
    def delta(self) -> float:
        if self.unbiased:  # (x - a) (2 a - x) / x^2 is at most 1/8, between zero and the smallest level a^2 / 4
            return 1.0 - 1 / 8 - self.block * self.smallest**2 / 4
        return 1.0 - 1 / 9 - self.block * self.smallest**2 / 4

    def _scale(self, blocks: Tensor) -> Tensor:
        return blocks.abs().amax(-1, keepdim=True)

    def _codes(self, values: Tensor, chance: Tensor | None) -> Tensor:
        size = values.abs()
        mantissa, exponent = torch.frexp(size)  # size = mantissa * 2^exponent, mantissa in [0.5, 1)
        up = 2 * mantissa - 1 > (0.5 if chance is None else chance)
        code = exponent - 1 + up.to(exponent.dtype) + self.levels  # 1 for the smallest level
        lowest = (size / self.smallest > (0.5 if chance is None else chance)).to(exponent.dtype)
        code = torch.where(size < self.smallest, lowest, code).clamp_(0, self.levels)
        return torch.where(values < 0, code + (self.levels + 1), code)

    def _levels(self, codes: Tensor) -> Tensor:
        table = torch.tensor([0.0, *(2.0 ** (code - self.levels) for code in range(1, self.levels + 1))])
        both = torch.cat([table, -table]).to(codes.device)
        return both[codes.long()]
