"""What a compressor is: a pure pair of functions on rows, with its properties and its exact wire bytes declared."""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

from torch import Tensor

from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key


@runtime_checkable
class Compressor(Protocol):
    """Lossy or lossless coding of fp32 rows. Stateless: randomness comes from the key alone.

    Rows are independent: row ``j`` of what `encode` returns is all that is needed to decode row ``j``.
    """

    @property
    def unbiased(self) -> bool:
        """E decode(encode(x)) = x."""

    @property
    def delta(self) -> float:
        """Contraction: E |decode(encode(x)) - x|^2 <= (1 - delta) |x|^2 for every x; <= 0 guarantees nothing."""

    @property
    def homogeneous(self) -> bool:
        """decode(encode(a x)) = a decode(encode(x)) for every a > 0, up to round-off."""

    @property
    def linear(self) -> bool:
        """Payloads of several ranks may be summed before decoding, so a native all-reduce can carry them."""

    def encode(self, rows: Tensor, key: Key) -> Payload:
        """Code ``rows`` [m, width] fp32 as tensors ``[m, ...]`` whose shapes depend on ``m`` and ``width`` only."""

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        """``rows`` [m, width] fp32. ``key.shared`` equals the encoder's, wherever the payload came from."""

    def row_bytes(self, width: int) -> int:
        """Bytes of one encoded row of ``width`` elements."""


class OnePass(Protocol):
    """What a compressor may offer besides: two steps in one pass over memory, with the bits of two."""

    def encode_sum(self, rows: Tensor, others: Tensor) -> tuple[Payload, Tensor] | None:
        """``encode(rows + others)``, and ``rows + others`` less what it decodes to; None where it has to be two."""

    def encode_mean(self, payload: Payload, width: int, key: Key) -> tuple[Tensor, Payload]:
        """The mean [width] of the decoded rows, added up from the first to the last; and it encoded as one row."""


def one_pass(compressor: object) -> OnePass | None:
    """``compressor``, if it is a `OnePass`. (isinstance of a Protocol takes microseconds, for every parameter.)"""
    kind = type(compressor)
    if kind not in _KNOWN:
        _KNOWN[kind] = hasattr(kind, "encode_sum") and hasattr(kind, "encode_mean")
    return cast(OnePass, compressor) if _KNOWN[kind] else None


_KNOWN: dict[type, bool] = {}


class RowWise:
    """What most compressors declare: biased, homogeneous, not linear. Those that are otherwise say so."""

    @property
    def unbiased(self) -> bool:
        return False

    @property
    def homogeneous(self) -> bool:
        return True

    @property
    def linear(self) -> bool:
        return False
