"""Quantization in blocks: max-min uniform, 2 to 8 bits, and the grids around zero of `grids`.

    unit = (max - min) / (2^bits - 1);   code = floor((x - min) / unit + u);   x' = min + code * unit

with u = 1/2 (nearest) or u uniform in [0, 1) (stochastic, unbiased). The grid is QSGD's (Alistarh et al.,
arXiv:1610.02132) with the range of each block instead of its norm, as L-GreCo and CGX use it.
Communication: the two-phase route. Bytes for a row of n elements: ceil(n * bits / 8) + 8 * ceil(n / block).
Keeps: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from dtrain.comm.compressors.blocks import checked_block, pack_bits, unpack_bits
from dtrain.comm.compressors.coded import Coded, Kernels
from dtrain.comm.compressors.grids import Even, Powers
from dtrain.comm.kernels import kernel

ROUNDINGS = ("nearest", "stochastic")
GRIDS = ("max_min", "symmetric", "qsgd", "e3m0", "natural")
FIXED_BITS = {"e3m0": 4, "natural": 8}


@dataclass(frozen=True)
class Quantize(Coded):
    """See `quantize`. The numbers of a block: its least value, and the unit."""

    numbers: ClassVar[int] = 2

    @property
    def levels(self) -> int:
        return (1 << self.bits) - 1

    @property
    def delta(self) -> float:
        # An element errs by at most unit / 2 (nearest), or by a variance of at most unit^2 / 4 (stochastic), and
        # (max - min)^2 <= 2 |x|^2 in every block. A block of small values between two large ones reaches the bound.
        return 1.0 - self.block / (2.0 * self.levels**2)

    @property
    def kernels(self) -> Kernels:
        each = (encode_nearest, encode_stochastic, encode_sum_nearest, decode_blocks, mean_of_blocks, encode_mean)
        return Kernels(*(partial(kernel, bits=self.bits) for kernel in each))


# Kernels: blocks [m, n, block] fp32, noise alike in [0, 1), packed [m, n, bytes of a block], scales [m, n, 2].


@kernel
def encode_nearest(blocks: Tensor, packed: Tensor, scales: Tensor, *, bits: int) -> None:
    """Codes of ``blocks``, rounded to the nearest."""
    _store(_grid(blocks, 0.5, bits), packed, scales, bits)


@kernel
def encode_stochastic(blocks: Tensor, noise: Tensor, packed: Tensor, scales: Tensor, *, bits: int) -> None:
    """Codes of ``blocks``, rounded up by chance."""
    _store(_grid(blocks, noise, bits), packed, scales, bits)


@kernel
def encode_sum_nearest(
    blocks: Tensor, others: Tensor, packed: Tensor, scales: Tensor, left: Tensor, *, bits: int
) -> None:
    """Codes of ``blocks + others``, and what they do not say of it."""
    total = blocks + others
    grid, low, unit = _grid(total, 0.5, bits)
    _store((grid, low, unit), packed, scales, bits)
    left.copy_(total - (grid.floor() * unit + low))


@kernel
def decode_blocks(packed: Tensor, scales: Tensor, blocks: Tensor, *, bits: int) -> None:
    """``blocks`` of what was coded."""
    blocks.copy_(_values(packed, scales, blocks.shape[-1], bits))


@kernel
def mean_of_blocks(packed: Tensor, scales: Tensor, mean: Tensor, *, bits: int, world: int) -> None:
    """The mean of ``world`` coded rows of blocks, added up in their order; [1, n, block]."""
    mean.copy_(_mean(packed, scales, mean.shape[-1], bits, world))


@kernel
def encode_mean(
    packed: Tensor, scales: Tensor, mean: Tensor, answer: Tensor, own: Tensor, *, bits: int, world: int
) -> None:
    """`mean_of_blocks`, and the codes of it, rounded to the nearest."""
    total = _mean(packed, scales, mean.shape[-1], bits, world).unsqueeze(0)
    _store(_grid(total, 0.5, bits), answer, own, bits)
    mean.copy_(total)


def _mean(packed: Tensor, scales: Tensor, size: int, bits: int, world: int) -> Tensor:
    total = _values(packed[0], scales[0], size, bits)
    for rank in range(1, world):
        total = total + _values(packed[rank], scales[rank], size, bits)
    return total / world


def _values(packed: Tensor, scales: Tensor, size: int, bits: int) -> Tensor:
    # Two roundings, not one fused multiply-add: compiled and vectorized forms then give the same bits.
    return unpack_bits(packed, bits, size).to(torch.float32) * scales[..., 1:] + scales[..., :1]


def _grid(blocks: Tensor, offset: Tensor | float, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes before they are rounded down, fp32 [m, n, block], the least value and the unit [m, n, 1]."""
    levels = (1 << bits) - 1
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    unit = high * (1 / levels) - low * (1 / levels)  # a range beyond fp32 still decodes to Inf: the step is skipped
    return ((blocks - low) / torch.where(unit > 0, unit, 1.0) + offset).clamp(max=levels), low, unit


def _store(grid: tuple[Tensor, Tensor, Tensor], packed: Tensor, scales: Tensor, bits: int) -> None:
    codes, low, unit = grid
    packed.copy_(pack_bits(codes.to(torch.uint8), bits))  # which rounds down
    scales[..., :1].copy_(low)
    scales[..., 1:].copy_(unit)


def quantize(
    grid: str = "max_min", *, bits: int | None = None, block: int = 512, rounding: str = "nearest"
) -> Quantize | Even | Powers:
    """Quantization of blocks to a few bits.

    Args:
        grid: "max_min" (uniform between a block's extremes), "symmetric" (uniform between plus and minus its largest
            magnitude), "qsgd" (the same with its norm), "e3m0" or "natural" (powers of two); see the modules.
        bits: of a code, 2 to 8, sign included; 8 by default. Powers of two have theirs: 4 and 8.
        block: elements that share one scale: 8 bytes on the wire for max_min, 4 for the others.
        rounding: "nearest" (biased, least error) or "stochastic" (unbiased).

    >>> quantize(bits=4, block=256).row_bytes(1000), quantize("e3m0", block=256).row_bytes(1000)
    (532, 516)

    Raises ``ValueError`` for values outside these ranges. Source: `quantize` and `grids`, the modules' docstrings.
    """
    if grid not in GRIDS:
        meant = f", or write quantize(bits={grid})" if isinstance(grid, int) else ""
        raise ValueError(f"grid is {grid!r}; choose one of {', '.join(GRIDS)}{meant}")
    if grid in FIXED_BITS:
        if bits not in (None, FIXED_BITS[grid]):
            raise ValueError(f"bits is {bits!r}; {grid} has {FIXED_BITS[grid]} bits, so leave it out")
        bits = FIXED_BITS[grid]
    bits = 8 if bits is None else bits
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits!r}; a code has 2 to 8 bits (for 1 bit use sign())")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}; choose one of {', '.join(ROUNDINGS)}")
    checked_block(block)
    if grid == "max_min":
        return Quantize(bits, block, rounding)
    if grid in FIXED_BITS:
        return Powers(bits, block, rounding)
    return Even(bits, block, rounding, norm=grid == "qsgd")
