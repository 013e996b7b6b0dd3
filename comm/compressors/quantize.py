"""Quantization in blocks: each element in 1 to 8 bits, plus the numbers that its block shares.

    max_min          levels min + k unit, unit = (max - min) / (2^bits - 1)   QSGD's, by each block's range, as in CGX
    symmetric        levels k / s, scale = max |x|, s = 2^(bits - 1) - 1
    qsgd             levels k / s, scale = |x|_2                              Alistarh et al., arXiv:1610.02132
    e3m0             levels 0 and 2^-j, j = 0 ... 6, scale = max |x|          4 bits; Douillard et al., arXiv:2501.18512
    natural          levels 0 and 2^-j, j = 0 ... 126, scale = max |x|        8 bits; Horvath et al., arXiv:1905.10988
    least_squares    levels +-s / 2, +-3 s / 2, ..., 2^bits of them, s of least squared error     1 to 4 bits

    nearest       code = the nearest level of x (or of x / scale)
    stochastic    one of its two neighbours at random, so that the mean is x: unbiased

All but max_min are symmetric: a scale for each block, a sign and a level's index for each element. e3m0 and natural
are one family: a sign, some bits of exponent, no mantissa. (The natural compression of the paper has no scale and sends
9 bits; with one, 7 bits of exponent reach from a block's largest element down to 2^-126 of it.)
least_squares is mid-rise (Max, 1960): zero is no level, so that no code is wasted where there are two or four, and what
is larger than the outermost level is clipped to it. In one bit it is `sign`. `_least_squares` searches the scale.
Communication: the two-phase route. Keeps: nothing. Bytes for a row of n elements: ceil(n * bits / 8), and for each
block 8 (max_min), 2 (least_squares) or 4.

All of the arithmetic is in the kernels below. `encode_nearest`, `encode_stochastic` and `decode_blocks` are its
reference; those that do two steps in one pass are tested to be bitwise equal to the two, and compiled kernels to eager
ones (tests/comm/test_kernels.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from dtrain.comm.kernels import (
    Constant,
    Kernel,
    by_blocks,
    checked_block,
    kernel,
    pack_bits,
    packed_bytes,
    scaled,
    unpack_bits,
)
from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key

ROUNDINGS = ("nearest", "stochastic")
GRIDS = ("max_min", "symmetric", "qsgd", "e3m0", "natural", "least_squares")
FIXED_BITS = {"e3m0": 4, "natural": 8}
MOST_LEAST_SQUARES = 4
"""Bits: with more, the scale of least error is next to that of the largest element."""

# ---- compressors ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockQuantizer(ABC):
    """Payload: codes [m, bytes], and [m, blocks] or, with more than one number a block, [m, blocks, numbers].

    A `Compressor`, and a `OnePass`.
    """

    bits: int
    block: int
    rounding: str

    numbers: ClassVar[int] = 1
    """How many each block has, beside its codes."""
    dtype: ClassVar[torch.dtype] = torch.float32
    """Theirs."""
    homogeneous: ClassVar[bool] = True
    linear: ClassVar[bool] = False

    @property
    @abstractmethod
    def grid(self) -> str:
        """Which levels: "max_min", "even", "norm", "powers" or "least_squares"."""

    @property
    def unbiased(self) -> bool:
        return self.rounding == "stochastic"

    def encode(self, rows: Tensor, key: Key) -> Payload:
        packed, numbers = self._room(rows)
        payload = [(packed, self.bits, 8), (numbers, 0, self.numbers)]
        if self.rounding == "nearest":
            self._run(encode_nearest, [(rows, 1, 1), *payload], rows.shape[1])
        else:
            noise = torch.rand(rows.shape, generator=key.generator(rows.device), device=rows.device)
            self._run(encode_stochastic, [(rows, 1, 1), (noise, 1, 1), *payload], rows.shape[1])
        return packed, self._by_block(numbers)

    def encode_sum(self, rows: Tensor, others: Tensor) -> tuple[Payload, Tensor] | None:
        """``encode(rows + others)`` and its error, in one pass; None where rounding is random."""
        if self.rounding != "nearest":
            return None
        packed, numbers = self._room(rows)
        error = torch.empty_like(rows)
        payload = [(packed, self.bits, 8), (numbers, 0, self.numbers)]
        self._run(encode_sum_nearest, [(rows, 1, 1), (others, 1, 1), *payload, (error, 1, 1)], rows.shape[1])
        return (packed, self._by_block(numbers)), error

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        packed, numbers = payload
        rows = torch.empty(packed.shape[0], width, device=packed.device)
        received = [(packed, self.bits, 8), (numbers.flatten(1), 0, self.numbers)]
        self._run(decode_blocks, [*received, (rows, 1, 1)], width)
        return rows

    def decode_mean(self, payload: Payload, width: int) -> Tensor:
        """`rank_order_mean` of the decoded rows, [width], in one pass."""
        packed, numbers = payload
        mean = torch.empty(1, width, device=packed.device)
        received = [(packed, self.bits, 8), (numbers.flatten(1), 0, self.numbers)]
        self._run(mean_of_blocks, [*received, (mean, 1, 1)], width, world=packed.shape[0])
        return mean[0]

    def encode_mean(self, payload: Payload, width: int, key: Key) -> tuple[Tensor, Payload]:
        """`decode_mean`, and it encoded as one row; in one pass where rounding is not random."""
        if self.rounding != "nearest":
            decoded = self.decode_mean(payload, width)
            return decoded, self.encode(decoded.unsqueeze(0), key)
        packed, numbers = payload
        mean = torch.empty(1, width, device=packed.device)
        packed_mean, numbers_mean = self._room(mean)
        received = [(packed, self.bits, 8), (numbers.flatten(1), 0, self.numbers)]
        written = [(mean, 1, 1), (packed_mean, self.bits, 8), (numbers_mean, 0, self.numbers)]
        self._run(encode_mean_nearest, [*received, *written], width, world=packed.shape[0])
        return mean[0], (packed_mean, self._by_block(numbers_mean))

    def row_bytes(self, width: int) -> int:
        return packed_bytes(width, self.bits, self.block) + self.dtype.itemsize * self.numbers * -(-width // self.block)

    def _run(self, step: Kernel, laid: list[tuple[Tensor, int, int]], width: int, **constants: Constant) -> None:
        # Compiled, a norm sums in another order, with other bits.
        run = step.function if self.grid == "norm" else step

        def over(*views: Tensor) -> None:
            run(*views, grid=self.grid, bits=self.bits, **constants)

        by_blocks(over, laid, width, self.block)

    def _room(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Empty tensors for codes [m, bytes] and numbers [m, numbers * blocks]."""
        m, width = rows.shape
        packed = torch.empty(m, packed_bytes(width, self.bits, self.block), dtype=torch.uint8, device=rows.device)
        return packed, rows.new_empty(m, self.numbers * -(-width // self.block), dtype=self.dtype)

    def _by_block(self, numbers: Tensor) -> Tensor:
        return numbers if self.numbers == 1 else numbers.unflatten(1, (-1, self.numbers))


@dataclass(frozen=True)
class Quantize(BlockQuantizer):
    """max_min. The numbers of a block: its least value, and the unit."""

    numbers: ClassVar[int] = 2
    grid: ClassVar[str] = "max_min"

    @property
    def levels(self) -> int:
        return (1 << self.bits) - 1

    @property
    def delta(self) -> float:
        # An element errs by at most unit / 2 (nearest), or by a variance of at most unit^2 / 4 (stochastic), and
        # (max - min)^2 <= 2 |x|^2 in every block. A block of small values between two large ones reaches the bound.
        return 1.0 - self.block / (2.0 * self.levels**2)

    @property
    def setting(self) -> str:
        return f"{self.bits} bits"

    def alternatives(self) -> list[Quantize]:
        return [replace(self, bits=bits) for bits in range(2, 9)]


@dataclass(frozen=True)
class Even(BlockQuantizer):
    """symmetric and qsgd: levels at equal distances around zero; ``norm``: the scale is a block's norm."""

    norm: bool

    @property
    def grid(self) -> str:
        return "norm" if self.norm else "even"

    @property
    def levels(self) -> int:
        """On each side of zero, without it."""
        return (1 << (self.bits - 1)) - 1

    @property
    def delta(self) -> float:
        # Half a unit (nearest), or a variance of a quarter of its square, for each element; unit <= |x|_2 / levels.
        lost = self.block / (4 * self.levels**2)
        return 1.0 - (min(lost, self.block**0.5 / self.levels) if self.norm and self.unbiased else lost)

    @property
    def setting(self) -> str:
        return f"{self.bits} bits"

    def alternatives(self) -> list[Even]:
        return [replace(self, bits=bits) for bits in range(2, 9)]


@dataclass(frozen=True)
class Powers(BlockQuantizer):
    """e3m0 and natural: zero and the powers of two from 1 down to 2^-(levels - 1), on each side of it."""

    grid: ClassVar[str] = "powers"

    @property
    def levels(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def delta(self) -> float:
        smallest = 2.0 ** (1 - self.levels)
        if self.unbiased:  # (x - a) (2 a - x) / x^2 is at most 1/8, between zero and the smallest level a^2 / 4
            return 1.0 - 1 / 8 - self.block * smallest**2 / 4
        return 1.0 - 1 / 9 - self.block * smallest**2 / 4


@dataclass(frozen=True)
class LeastSquares(BlockQuantizer):
    """least_squares. The number of a block: the scale, in bf16."""

    grid: ClassVar[str] = "least_squares"
    dtype: ClassVar[torch.dtype] = torch.bfloat16
    homogeneous: ClassVar[bool] = False
    """But for powers of two: bf16 rounds other scales another way."""

    @property
    def levels(self) -> int:
        """On each side of zero."""
        return 1 << (self.bits - 1)

    @property
    def delta(self) -> float:
        # Let s put the outermost level L at a block's largest element, and q be the levels nearest to y = x / s: there
        # q = y = L, elsewhere |q - y| <= 1/2 <= |q|. The best scale for q leaves sin^2(x, q) of |x|^2, which is at most
        # |q - y|^2 / |q|^2 <= (n - 1) / (4 L^2 + n - 1). The search begins there, and accepts what leaves less. An x
        # with one element that is not zero reaches the bound.
        # bf16 is off by up to 2^-8 of the scale, which costs the square of that; as much again is round-off of fp32.
        return (1.0 - 2.0**-15) / (1.0 + (self.block - 1) / (4 * _outermost(self.bits) ** 2))

    @property
    def setting(self) -> str:
        return f"{self.bits} bits"

    def alternatives(self) -> list[LeastSquares]:
        return [replace(self, bits=bits) for bits in range(1, MOST_LEAST_SQUARES + 1)]


# ---- kernels -------------------------------------------------------------------------------------------------------
#
# Of blocks [m, n, block] fp32, noise of that shape in [0, 1), packed [m, n, bytes of a block], numbers [m, n, 1 or 2].
# Each writes into its last arguments: ``packed`` and ``numbers``, ``error``, ``blocks`` or ``mean``.


@kernel
def encode_nearest(blocks: Tensor, packed: Tensor, numbers: Tensor, *, grid: str, bits: int) -> None:
    """Codes of ``blocks``, rounded to the nearest."""
    _store(_coded(blocks, 0.5, grid, bits), packed, numbers, bits)


@kernel
def encode_stochastic(blocks: Tensor, noise: Tensor, packed: Tensor, numbers: Tensor, *, grid: str, bits: int) -> None:
    """Codes of ``blocks``, rounded to either neighbour at random."""
    _store(_coded(blocks, noise, grid, bits), packed, numbers, bits)


@kernel
def encode_sum_nearest(
    blocks: Tensor, others: Tensor, packed: Tensor, numbers: Tensor, error: Tensor, *, grid: str, bits: int
) -> None:
    """Codes of ``blocks + others``, and in ``error`` what they lose of it."""
    total = blocks + others
    coded = _coded(total, 0.5, grid, bits)
    _store(coded, packed, numbers, bits)
    error.copy_(total - _decoded(*coded, grid, bits))


@kernel
def decode_blocks(packed: Tensor, numbers: Tensor, blocks: Tensor, *, grid: str, bits: int) -> None:
    """The decoded ``blocks``."""
    blocks.copy_(_unpacked(packed, numbers, blocks.shape[-1], grid, bits))


@kernel
def mean_of_blocks(packed: Tensor, numbers: Tensor, mean: Tensor, *, grid: str, bits: int, world: int) -> None:
    """The mean of ``world`` coded rows of blocks, added up in their order; [1, n, block]."""
    mean.copy_(_mean(packed, numbers, mean.shape[-1], grid, bits, world))


@kernel
def encode_mean_nearest(
    packed: Tensor, numbers: Tensor, mean: Tensor, packed_mean: Tensor, numbers_mean: Tensor,
    *, grid: str, bits: int, world: int,
) -> None:  # fmt: skip
    """`mean_of_blocks`, and the codes of it, rounded to the nearest."""
    total = _mean(packed, numbers, mean.shape[-1], grid, bits, world).unsqueeze(0)
    _store(_coded(total, 0.5, grid, bits), packed_mean, numbers_mean, bits)
    mean.copy_(total)


Coded: TypeAlias = tuple[Tensor, tuple[Tensor, ...]]
"""Codes [m, n, block], uint8 or fp32 before they are rounded down, and the numbers of each block, [m, n, 1] each."""


def _coded(blocks: Tensor, offset: Tensor | float, grid: str, bits: int) -> Coded:
    """``offset`` in [0, 1) decides between two neighbours."""
    if grid == "max_min":
        levels = (1 << bits) - 1
        low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
        unit = high * (1 / levels) - low * (1 / levels)  # a range beyond fp32 still decodes to Inf: the step is skipped
        return ((blocks - low) / torch.where(unit > 0, unit, 1.0) + offset).clamp(max=levels), (low, unit)
    if grid == "least_squares":
        scale = _least_squares(blocks, bits)
        return _mid_rise_codes(scaled(blocks, scale), bits), (scale,)
    scale = _scale(blocks, grid)
    codes = _powers_codes if grid == "powers" else _even_codes
    return codes(scaled(blocks, scale), offset, (1 << (bits - 1)) - 1), (scale,)


def _decoded(codes: Tensor, numbers: tuple[Tensor, ...], grid: str, bits: int) -> Tensor:
    if grid == "max_min":
        low, unit = numbers
        # Two roundings, not one fused multiply-add: compiled and vectorized forms then give the same bits.
        return (codes.floor() if codes.is_floating_point() else codes.to(torch.float32)) * unit + low
    if grid == "least_squares":
        return _mid_rise_levels(codes.to(torch.float32), bits) * numbers[0].to(torch.float32)
    levels = (1 << (bits - 1)) - 1
    return (_power_levels(codes, levels) if grid == "powers" else _even_levels(codes, levels)) * numbers[0]


def _store(coded: Coded, packed: Tensor, numbers: Tensor, bits: int) -> None:
    codes, of_block = coded
    packed.copy_(pack_bits(codes.to(torch.uint8), bits))  # which rounds down
    for index, number in enumerate(of_block):
        numbers[..., index : index + 1].copy_(number)


def _unpacked(packed: Tensor, numbers: Tensor, size: int, grid: str, bits: int) -> Tensor:
    return _decoded(unpack_bits(packed, bits, size), numbers.split(1, dim=-1), grid, bits)


def _mean(packed: Tensor, numbers: Tensor, size: int, grid: str, bits: int, world: int) -> Tensor:
    total = _unpacked(packed[0], numbers[0], size, grid, bits)
    for rank in range(1, world):
        total = total + _unpacked(packed[rank], numbers[rank], size, grid, bits)
    return total / world


def _scale(blocks: Tensor, grid: str) -> Tensor:
    """[m, n, 1]; at least the largest magnitude of each block."""
    largest: Tensor = blocks.abs().amax(-1, keepdim=True)
    if grid != "norm":
        return largest
    # Squares of fp32 overflow beyond 1e19 and vanish below 1e-23.
    length: Tensor = torch.linalg.vector_norm(scaled(blocks, largest), dim=-1, keepdim=True).clamp_(min=1.0)
    return length * largest


def _even_codes(values: Tensor, offset: Tensor | float, levels: int) -> Tensor:
    """Codes of ``values`` in [-1, 1], uint8."""
    return ((values * levels + offset).floor().clamp(-levels, levels) + levels).to(torch.uint8)


def _even_levels(codes: Tensor, levels: int) -> Tensor:
    return (codes.to(torch.float32) - levels) / levels


def _powers_codes(values: Tensor, offset: Tensor | float, levels: int) -> Tensor:
    """Codes of ``values`` in [-1, 1], uint8."""
    size, smallest = values.abs(), 2.0 ** (1 - levels)
    mantissa, exponent = torch.frexp(size)  # size = mantissa * 2^exponent, mantissa in [0.5, 1)
    up = 2 * mantissa - 1 > offset
    code = exponent - 1 + up.to(torch.int32) + levels  # 1 for the smallest level
    lowest = (size / smallest > offset).to(torch.int32)
    code = torch.where(size < smallest, lowest, code).clamp(0, levels)
    return torch.where(values < 0, code + (levels + 1), code).to(torch.uint8)


def _power_levels(codes: Tensor, levels: int) -> Tensor:
    number = codes.to(torch.int32)
    negative = number > levels
    index = torch.where(negative, number - (levels + 1), number)
    size = ((index - levels + 127) << 23).view(torch.float32)  # the bits of 2^(index - levels)
    size = torch.where(index == 0, 0.0, size)
    return torch.where(negative, -size, size)


WHOLE = 2.0**24
"""Of the largest magnitude of a block: the search sees values as whole multiples of 1 / WHOLE of it."""
STARTS = {1: (1.0,), 2: (1.0, 0.7, 0.5, 0.35), 3: (1.0, 0.8, 0.64, 0.5), 4: (1.0, 0.85, 0.72, 0.6)}
"""By bits, where the search begins: the outermost level as a part of the largest magnitude; signs need no search."""


def _least_squares(blocks: Tensor, bits: int) -> Tensor:
    """The scale of least squared error of each block, [m, n, 1] fp32, rounded to bf16.

    For given levels q the best scale is <x, q> / <q, q>, and leaves |x|^2 - <x, q>^2 / <q, q>; for a given scale the
    best levels are the nearest ones (Lloyd's two steps). From each start one of either, then both once more from the
    best of them: on normal and Laplace values what is left is within 3 % of the least there is.
    """
    largest = blocks.abs().amax(-1, keepdim=True)
    whole = (scaled(blocks, largest) * WHOLE).round()
    scale = torch.zeros_like(largest)  # in units of ``whole``; it stays 0 for a block that is 0 or not finite
    explained = scale.to(torch.float64)
    for clip in STARTS[bits]:
        # Not divided by a constant, for which an eager GPU multiplies by its rounded reciprocal.
        product, square = _products(whole, whole * (_outermost(bits) / (clip * WHOLE)), bits)
        better = product * product / square > explained
        scale = torch.where(better, (product / square).to(torch.float32), scale)
        explained = torch.where(better, product * product / square, explained)
    product, square = _products(whole, scaled(whole, scale), bits)
    return _to_bf16((product / square).to(torch.float32) * (1 / WHOLE) * largest)


def _products(whole: Tensor, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """<whole, q> and <q, q> [m, n, 1] fp64, q the levels nearest to ``values``.

    All terms are whole numbers, or halves or quarters, and all sums below 2^51 for blocks of up to 2^24 elements, so
    they are exact: compiled or not, on any device, they have the same bits, though they are summed in another order.
    """
    levels = _mid_rise_levels(_mid_rise_codes(values, bits), bits)
    product = (whole * levels).sum(-1, keepdim=True, dtype=torch.float64)
    return product, (levels * levels).sum(-1, keepdim=True, dtype=torch.float64)


def _mid_rise_codes(values: Tensor, bits: int) -> Tensor:
    """Codes 0 to 2^bits - 1 of the levels nearest to ``values``, fp32."""
    return (values.floor() + (1 << (bits - 1))).clamp(0, (1 << bits) - 1)


def _mid_rise_levels(codes: Tensor, bits: int) -> Tensor:
    return codes - _outermost(bits)


def _outermost(bits: int) -> float:
    """The largest mid-rise level; the least is its negative."""
    return ((1 << bits) - 1) / 2


def _to_bf16(numbers: Tensor) -> Tensor:
    """``numbers`` fp32, rounded to the nearest bf16, ties to even. (The compiler drops a cast to bf16 and back.)"""
    bits = numbers.view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return torch.where(numbers.isfinite(), rounded.view(torch.float32), numbers)


# ---- what users call -----------------------------------------------------------------------------------------------


def quantize(
    grid: str = "max_min", *, bits: int | None = None, block: int = 512, rounding: str = "nearest"
) -> Quantize | Even | Powers | LeastSquares:
    """Quantization of blocks to a few bits.

    Args:
        grid: "max_min" (uniform between a block's extremes), "symmetric" (uniform between plus and minus its largest
            magnitude), "qsgd" (the same with its norm), "e3m0" or "natural" (powers of two), "least_squares" (uniform
            without zero, the scale that loses least; for 1 to 4 bits).
        bits: of a code, 2 to 8, sign included; 8 by default. e3m0 has 4, natural 8, least_squares 1 to 4 (2 by
            default).
        block: elements that share one scale: 8 bytes on the wire for max_min, 2 for least_squares, 4 for the others.
        rounding: "nearest" (biased, least error) or "stochastic" (unbiased; not for least_squares, which clips).

    >>> quantize(bits=4, block=256).row_bytes(1000), quantize("e3m0", block=256).row_bytes(1000)
    (532, 516)
    >>> quantize("least_squares", bits=2, block=256).row_bytes(1024)
    264

    Raises ``ValueError`` for values outside these ranges. Source: the module's docstring.
    """
    if grid not in GRIDS:
        hint = f", or write quantize(bits={grid})" if isinstance(grid, int) else ""
        raise ValueError(f"grid is {grid!r}; choose one of {', '.join(GRIDS)}{hint}")
    bits = _checked_bits(grid, bits)
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}; choose one of {', '.join(ROUNDINGS)}")
    checked_block(block)
    if grid == "max_min":
        return Quantize(bits, block, rounding)
    if grid in FIXED_BITS:
        return Powers(bits, block, rounding)
    if grid == "least_squares":
        if rounding != "nearest":
            raise ValueError(
                f"rounding is {rounding!r}; least_squares clips its largest values, so that no rounding makes it "
                "unbiased: take rounding='nearest' with feedback, or another grid"
            )
        return LeastSquares(bits, block, rounding)
    return Even(bits, block, rounding, norm=grid == "qsgd")


def _checked_bits(grid: str, bits: int | None) -> int:
    """``bits``, or those that ``grid`` has by default."""
    if grid in FIXED_BITS:
        if bits not in (None, FIXED_BITS[grid]):
            raise ValueError(f"bits is {bits!r}; {grid} has {FIXED_BITS[grid]} bits, so leave it out")
        return FIXED_BITS[grid]
    if grid == "least_squares":
        bits = 2 if bits is None else bits
        if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= MOST_LEAST_SQUARES:
            raise ValueError(
                f"bits is {bits!r}; a least_squares code has 1 to {MOST_LEAST_SQUARES} bits (for more use symmetric)"
            )
        return bits
    bits = 8 if bits is None else bits
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(
            f"bits is {bits!r}; a code has 2 to 8 bits (for 1 bit use sign(), or quantize('least_squares', bits=1))"
        )
    return bits
