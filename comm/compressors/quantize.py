"""Max-min uniform quantization, 2 to 8 bits, in blocks.

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

from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key

ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class Quantize:
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

    @property
    def linear(self) -> bool:
        return False

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
        return pack_bits(codes, self.bits), torch.cat([low, unit], dim=-1)

    def decode(self, payload: Payload, width: int) -> Tensor:
        packed, scales = payload  # [m, bytes], [m, blocks, 2]
        codes = F.pad(unpack_bits(packed, self.bits, width), (0, scales.shape[1] * self.block - width))
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


def quantize(*, bits: int = 8, block: int = 512, rounding: str = "nearest") -> Quantize:
    """Max-min uniform quantization.

    Args:
        bits: of a code, 2 to 8.
        block: elements that share one minimum and one unit (two fp32 numbers on the wire).
        rounding: "nearest" (biased, least error) or "stochastic" (unbiased).

    >>> quantize(bits=4, block=256).row_bytes(1000)
    532

    Raises ``ValueError`` for values outside these ranges. Source: see the module's docstring.
    """
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits!r}; a code has 2 to 8 bits (for 1 bit use a sign compressor)")
    if not isinstance(block, int) or block < 1:
        raise ValueError(f"block is {block!r}; give a positive number of elements, for example 512")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}; choose one of {', '.join(ROUNDINGS)}")
    return Quantize(bits, block, rounding)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """``codes`` [m, width] uint8 below 2^bits as [m, ceil(width * bits / 8)] bytes, the first code lowest."""
    if bits == 8:
        return codes
    width = codes.shape[1]
    groups = F.pad(codes, (0, -width % 8)).view(codes.shape[0], -(-width // 8), 8)  # 8 codes fill `bits` bytes
    shifts = torch.arange(0, 8 * bits, bits, device=codes.device)
    words = (groups.to(torch.int64) << shifts).sum(-1)
    octets: Tensor = (words.unsqueeze(-1) >> torch.arange(0, 8 * bits, 8, device=codes.device)) & 0xFF
    return octets.to(torch.uint8).flatten(1)[:, : -(-width * bits // 8)]


def unpack_bits(packed: Tensor, bits: int, width: int) -> Tensor:
    """Undo `pack_bits`: ``codes`` [m, width] uint8."""
    if bits == 8:
        return packed
    groups = -(-width // 8)
    octets = F.pad(packed, (0, groups * bits - packed.shape[1])).view(packed.shape[0], groups, bits)
    shifts = torch.arange(0, 8 * bits, 8, device=packed.device)
    words = (octets.to(torch.int64) << shifts).sum(-1)
    codes: Tensor = (words.unsqueeze(-1) >> torch.arange(0, 8 * bits, bits, device=packed.device)) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1)[:, :width]
