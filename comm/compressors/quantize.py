"""Quantization in blocks: max-min uniform, 2 to 8 bits, and the grids around zero of `grids`.

    unit = (max - min) / (2^bits - 1);   code = floor((x - min) / unit + u);   x' = min + code * unit

with u = 1/2 (nearest) or u uniform in [0, 1) (stochastic, unbiased). The grid is QSGD's (Alistarh et al.,
arXiv:1610.02132) with the range of each block instead of its norm, as L-GreCo and CGX use it.
Communication: the two-phase route. Bytes for a row of n elements: ceil(n * bits / 8) + 8 * ceil(n / block).
Keeps: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.comm.compressors.base import RowWise
from dtrain.comm.compressors.blocks import checked_block, pack_blocks, unpack_blocks
from dtrain.comm.compressors.grids import Even, Powers
from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key

ROUNDINGS = ("nearest", "stochastic")
GRIDS = ("max_min", "symmetric", "qsgd", "e3m0", "natural")
FIXED_BITS = {"e3m0": 4, "natural": 8}


@dataclass(frozen=True)
class Quantize(RowWise):
    """See `quantize`."""

    bits: int
    block: int
    rounding: str

    @property
    def levels(self) -> int:
        return (1 << self.bits) - 1

    @property
    def unbiased(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def delta(self) -> float:
        # An element errs by at most unit / 2 (nearest), or by a variance of at most unit^2 / 4 (stochastic), and
        # (max - min)^2 <= 2 |x|^2 in every block. A block of small values between two large ones reaches the bound.
        return 1.0 - self.block / (2.0 * self.levels**2)

    def encode(self, rows: Tensor, key: Key) -> Payload:
        width = rows.shape[1]
        blocks = self._blocks(rows)  # [m, blocks, block]
        low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
        unit = high / self.levels - low / self.levels  # a range beyond fp32 still decodes to Inf: the step is skipped
        grid = (blocks - low) / torch.where(unit > 0, unit, 1.0)
        if self.rounding == "stochastic":
            # Only real elements draw, so what they draw does not depend on the padding.
            noise = torch.rand(rows.shape, generator=key.generator(rows.device), device=rows.device)
            grid += self._blocks(noise)
        else:
            grid += 0.5
        codes = grid.floor_().clamp_(0, self.levels).to(torch.uint8).flatten(1)[:, :width]
        return pack_blocks(codes, self.bits, self.block), torch.cat([low, unit], dim=-1)

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        packed, scales = payload  # [m, bytes], [m, blocks, 2]
        codes = F.pad(unpack_blocks(packed, self.bits, self.block, width), (0, scales.shape[1] * self.block - width))
        values = codes.view(*scales.shape[:2], self.block).to(torch.float32)
        # Two roundings, not one fused multiply-add: compiled and vectorized forms then give the same bits.
        return values.mul_(scales[..., 1:]).add_(scales[..., :1]).flatten(1)[:, :width]

    def row_bytes(self, width: int) -> int:
        return -(-width * self.bits // 8) + 8 * -(-width // self.block)

    def _blocks(self, rows: Tensor) -> Tensor:
        """``rows`` [m, width] as [m, blocks, block]; the last block repeats its last element, which moves no range."""
        missing = -rows.shape[1] % self.block
        if missing:
            rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], dim=1)
        return rows.reshape(rows.shape[0], rows.shape[1] // self.block, self.block)


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
        raise ValueError(f"grid is {grid!r}; choose one of {', '.join(GRIDS)}")
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
