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

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dtrain.comm.compressors.blocks import pack_bits, scaled, unpack_bits
from dtrain.comm.compressors.coded import Coded, Kernels
from dtrain.comm.kernels import kernel


class _Grid(Coded):
    """The number of a block: its scale."""

    @property
    def levels(self) -> int:
        """On each side of zero, without it."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class Even(_Grid):
    """Levels at equal distances: the scale is each block's largest magnitude (symmetric) or its norm (qsgd)."""

    norm: bool

    @property
    def delta(self) -> float:
        # Half a unit (nearest), or a variance of a quarter of its square, for each element; unit <= |x|_2 / levels.
        lost = self.block / (4 * self.levels**2)
        return 1.0 - (min(lost, self.block**0.5 / self.levels) if self.norm and self.unbiased else lost)

    @property
    def kernels(self) -> Kernels:
        # The sum in a norm is taken in another order when compiled, which would be another norm.
        each = (kernel.function if self.norm else kernel for kernel in KERNELS)
        return Kernels(*(partial(one, bits=self.bits, powers=False, norm=self.norm) for one in each))


@dataclass(frozen=True)
class Powers(_Grid):
    """Zero and the powers of two from 1 down to 2^-(levels - 1)."""

    @property
    def delta(self) -> float:
        smallest = 2.0 ** (1 - self.levels)
        if self.unbiased:  # (x - a) (2 a - x) / x^2 is at most 1/8, between zero and the smallest level a^2 / 4
            return 1.0 - 1 / 8 - self.block * smallest**2 / 4
        return 1.0 - 1 / 9 - self.block * smallest**2 / 4

    @property
    def kernels(self) -> Kernels:
        return Kernels(*(partial(one, bits=self.bits, powers=True, norm=False) for one in KERNELS))


# Kernels: blocks [m, n, block] fp32, noise alike in [0, 1), packed [m, n, bytes of a block], scale [m, n, 1].


@kernel
def encode_nearest(blocks: Tensor, packed: Tensor, scale: Tensor, *, bits: int, powers: bool, norm: bool) -> None:
    """Codes of ``blocks``, rounded to the nearest."""
    own = _scale(blocks, norm)
    packed.copy_(pack_bits(_codes(blocks, own, 0.5, bits, powers), bits))
    scale.copy_(own)


@kernel
def encode_stochastic(
    blocks: Tensor, noise: Tensor, packed: Tensor, scale: Tensor, *, bits: int, powers: bool, norm: bool
) -> None:
    """Codes of ``blocks``, rounded away from zero by chance."""
    own = _scale(blocks, norm)
    packed.copy_(pack_bits(_codes(blocks, own, noise, bits, powers), bits))
    scale.copy_(own)


@kernel
def encode_sum_nearest(
    blocks: Tensor, others: Tensor, packed: Tensor, scale: Tensor, left: Tensor, *, bits: int, powers: bool, norm: bool
) -> None:
    """Codes of ``blocks + others``, and what they do not say of it."""
    total = blocks + others
    own = _scale(total, norm)
    codes = _codes(total, own, 0.5, bits, powers)
    packed.copy_(pack_bits(codes, bits))
    scale.copy_(own)
    left.copy_(total - _levels(codes, bits, powers) * own)


@kernel
def decode_blocks(packed: Tensor, scale: Tensor, blocks: Tensor, *, bits: int, powers: bool, norm: bool) -> None:
    """``blocks`` of what was coded."""
    blocks.copy_(_levels(unpack_bits(packed, bits, blocks.shape[-1]), bits, powers) * scale)


@kernel
def mean_of_blocks(
    packed: Tensor, scale: Tensor, mean: Tensor, *, bits: int, powers: bool, norm: bool, world: int
) -> None:
    """The mean of ``world`` coded rows of blocks, added up in their order; [1, n, block]."""
    mean.copy_(_mean(packed, scale, mean.shape[-1], bits, powers, world))


@kernel
def encode_mean(
    packed: Tensor, scale: Tensor, mean: Tensor, answer: Tensor, own: Tensor,
    *, bits: int, powers: bool, norm: bool, world: int,
) -> None:  # fmt: skip
    """`mean_of_blocks`, and the codes of it, rounded to the nearest."""
    total = _mean(packed, scale, mean.shape[-1], bits, powers, world).unsqueeze(0)
    largest = _scale(total, norm)
    answer.copy_(pack_bits(_codes(total, largest, 0.5, bits, powers), bits))
    own.copy_(largest)
    mean.copy_(total)


KERNELS = (encode_nearest, encode_stochastic, encode_sum_nearest, decode_blocks, mean_of_blocks, encode_mean)


def _mean(packed: Tensor, scale: Tensor, size: int, bits: int, powers: bool, world: int) -> Tensor:
    total = _levels(unpack_bits(packed[0], bits, size), bits, powers) * scale[0]
    for rank in range(1, world):
        total = total + _levels(unpack_bits(packed[rank], bits, size), bits, powers) * scale[rank]
    return total / world


def _scale(blocks: Tensor, norm: bool) -> Tensor:
    """[m, n, 1]; at least the largest magnitude of each block."""
    largest: Tensor = blocks.abs().amax(-1, keepdim=True)
    if not norm:
        return largest
    # Squares of fp32 overflow beyond 1e19 and vanish below 1e-23.
    length: Tensor = torch.linalg.vector_norm(scaled(blocks, largest), dim=-1, keepdim=True).clamp_(min=1.0)
    return length * largest


def _codes(blocks: Tensor, scale: Tensor, offset: Tensor | float, bits: int, powers: bool) -> Tensor:
    """Codes below 2^bits, uint8; ``offset`` in [0, 1) decides between two neighbours."""
    values, levels = scaled(blocks, scale), (1 << (bits - 1)) - 1
    if not powers:
        return ((values * levels + offset).floor().clamp(-levels, levels) + levels).to(torch.uint8)
    size, smallest = values.abs(), 2.0 ** (1 - levels)
    mantissa, exponent = torch.frexp(size)  # size = mantissa * 2^exponent, mantissa in [0.5, 1)
    up = 2 * mantissa - 1 > offset
    code = exponent - 1 + up.to(torch.int32) + levels  # 1 for the smallest level
    lowest = (size / smallest > offset).to(torch.int32)
    code = torch.where(size < smallest, lowest, code).clamp(0, levels)
    return torch.where(values < 0, code + (levels + 1), code).to(torch.uint8)


def _levels(codes: Tensor, bits: int, powers: bool) -> Tensor:
    """The levels of codes, fp32."""
    levels = (1 << (bits - 1)) - 1
    if not powers:
        return (codes.to(torch.float32) - levels) / levels
    number = codes.to(torch.int32)
    negative = number > levels
    place = torch.where(negative, number - (levels + 1), number)
    size = ((place - levels + 127) << 23).view(torch.float32)  # the bits of 2^(place - levels)
    size = torch.where(place == 0, 0.0, size)
    return torch.where(negative, -size, size)
