"""Cast: send a narrower floating-point type.

fp16 and bf16 are plain casts. fp8 has so few exponents that each block is first scaled to the type's largest value:

    scale = max |x| / largest;   code = round(x / scale) to nearest even;   x' = scale * code

Formats: e4m3 (3 bits of mantissa, finite only) and e5m2 (2 bits), Micikevicius et al., arXiv:2209.05433.
Communication: any route for fp32, fp16 and bf16; the two-phase route for fp8. Keeps: nothing.
Bytes: the type's size for each element, for fp8 also 4 for each block.
``cast("fp32")`` is the identity: what "no compression" means on the two-phase route.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.comm.compressors.compressor import RowWise
from dtrain.comm.kernels import checked_block, scaled, to_blocks
from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RELATIVE_ERROR = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8}
FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
FP8_ERROR = {"fp8_e4m3": (2.0**-4, 2.0**-10), "fp8_e5m2": (2.0**-3, 2.0**-17)}
"""Half a unit in the last place: relative, for normal numbers, and absolute, below them."""


@dataclass(frozen=True)
class Cast:
    """See `cast`."""

    dtype: str

    @property
    def unbiased(self) -> bool:
        return self.dtype == "fp32"

    @property
    def delta(self) -> float:
        # fp16 loses what lies outside its range: below 2^-24 everything, so nothing is guaranteed for every x.
        return 0.0 if self.dtype == "fp16" else 1.0 - RELATIVE_ERROR[self.dtype] ** 2

    @property
    def homogeneous(self) -> bool:
        return self.dtype == "fp32"

    @property
    def linear(self) -> bool:
        return True

    def encode(self, rows: Tensor, key: Key) -> Payload:
        return (rows.to(DTYPES[self.dtype]),)

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        return payload[0].to(torch.float32)

    def row_bytes(self, width: int) -> int:
        return width * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Float8(RowWise):
    """See `cast`."""

    dtype: str
    block: int

    @property
    def delta(self) -> float:
        relative, absolute = FP8_ERROR[self.dtype]
        return 1.0 - relative**2 - self.block * (absolute / torch.finfo(FP8[self.dtype]).max) ** 2

    def encode(self, rows: Tensor, key: Key) -> Payload:
        blocks = to_blocks(rows, self.block)
        largest = torch.finfo(FP8[self.dtype]).max
        scale = blocks.abs().amax(-1, keepdim=True) / largest
        # A denormal scale is so coarse that quotients may exceed the largest number.
        codes = scaled(blocks, scale).clamp_(-largest, largest).to(FP8[self.dtype]).view(torch.uint8)
        return codes.flatten(1)[:, : rows.shape[1]].contiguous(), scale.squeeze(-1)

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        codes, scale = payload
        values = to_blocks(codes, self.block).view(FP8[self.dtype]).to(torch.float32)
        return values.mul_(scale.unsqueeze(-1)).flatten(1)[:, :width]

    def row_bytes(self, width: int) -> int:
        return width + 4 * -(-width // self.block)


def cast(dtype: str = "bf16", *, block: int = 512) -> Cast | Float8:
    """Send ``dtype``.

    Args:
        dtype: "fp32" (the identity), "bf16", "fp16" (overflows beyond 65504: the step is then skipped), "fp8_e4m3" or
            "fp8_e5m2".
        block: elements that share a scale; fp8 only.

    >>> cast("bf16").row_bytes(10), cast("fp8_e4m3").row_bytes(10)
    (20, 14)

    Raises ``ValueError`` for another dtype or a block that is not a positive number. Source: the module's docstring.
    """
    if dtype in FP8:
        if not isinstance(block, int) or block < 1:
            raise ValueError(f"block is {block!r}; give a positive number of elements, for example 512")
        return Float8(dtype, checked_block(block))
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; cast knows {', '.join([*DTYPES, *FP8])}")
    return Cast(dtype)
