"""Cast: send a narrower floating-point type.

Communication: any route. Bytes: the type's size for each element. Keeps: nothing.
``cast("fp32")`` is the identity: what "no compression" means on the two-phase route.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RELATIVE_ERROR = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8}


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
    def linear(self) -> bool:
        return True

    def encode(self, rows: Tensor, key: Key) -> Payload:
        return (rows.to(DTYPES[self.dtype]),)

    def decode(self, payload: Payload, width: int) -> Tensor:
        return payload[0].to(torch.float32)

    def row_bytes(self, width: int) -> int:
        return width * DTYPES[self.dtype].itemsize


def cast(dtype: str = "bf16") -> Cast:
    """Send ``dtype``: "fp32" (the identity), "bf16" or "fp16" (overflows beyond 65504: the step is then skipped).

    >>> cast("bf16").row_bytes(10)
    20

    Raises ``ValueError`` for another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; cast knows {', '.join(DTYPES)}")
    return Cast(dtype)
