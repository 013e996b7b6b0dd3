"""Sign: one bit for each element, and for each block the mean magnitude.

    C(x) = (|x|_1 / n) sgn(x)        per block of n elements; the sign of zero is +

The mean magnitude is the best factor: the error is |x|_2^2 - |x|_1^2 / n, never more than (1 - 1/n) |x|^2. A norm in
its place, |x|_2 / sqrt(n), is no contraction: an x with one large element comes back with up to twice its square as
error. Needs error feedback. Source: Karimireddy et al., arXiv:1901.09847.
Communication: the two-phase route. Bytes for a row of n elements: ceil(n / 8) + 4 * ceil(n / block). Keeps: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.comm.compressors.compressor import RowWise
from dtrain.comm.kernels import checked_block, pack_blocks, packed_bytes, to_blocks, unpack_blocks
from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key


@dataclass(frozen=True)
class Sign(RowWise):
    """See `sign`."""

    block: int

    @property
    def delta(self) -> float:
        return 1.0 / self.block  # reached by an x with one element that is not zero

    def encode(self, rows: Tensor, key: Key) -> Payload:
        width = rows.shape[1]
        # Sums of fp32 magnitudes overflow only where the mean times n would; then the step is skipped.
        scale = to_blocks(rows.abs(), self.block).sum(-1) / self._counts(width, rows.device)
        return pack_blocks((rows >= 0).to(torch.uint8), 1, self.block), scale

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        packed, scale = payload  # [m, bytes], [m, blocks]
        signs = to_blocks(unpack_blocks(packed, 1, self.block, width), self.block).to(torch.float32).mul_(2).sub_(1)
        return signs.mul_(scale.unsqueeze(-1)).flatten(1)[:, :width]

    def row_bytes(self, width: int) -> int:
        return packed_bytes(width, 1, self.block) + 4 * -(-width // self.block)

    def _counts(self, width: int, device: torch.device) -> Tensor:
        """Elements in each block; the last may have fewer."""
        starts = torch.arange(0, width, self.block, device=device)
        return (width - starts).clamp_(max=self.block).to(torch.float32)


def sign(*, block: int = 1024) -> Sign:
    """One bit per element and one scale per block.

    Args:
        block: elements that share a scale (4 bytes).

    >>> sign().row_bytes(8192)
    1056

    Raises ``ValueError`` for a block that is not a positive number. Source: the module's docstring.
    """
    return Sign(checked_block(block))
