"""What a compressor is: a pure pair of functions on rows, with its properties and its exact wire bytes declared.

Five Protocols. Every compressor is a `Compressor`, which codes rows, or a `TwoRoundCompressor`, whose two factors are
means over all peers. It may also be `OnePass`, with two steps in one pass over memory, `Sparse`, whose ranks send
different elements, and `Adjustable`, with a setting that a plan may choose for each parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias, cast, runtime_checkable

from torch import Tensor

from dtrain.comm.layout import Matrix
from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key
from dtrain.comm.state import Kind, State


@runtime_checkable
class Compressor(Protocol):
    """Lossy or lossless coding of fp32 rows. Stateless: randomness comes from the key alone.

    Rows are independent: row ``j`` of what `encode` returns is all that is needed to decode row ``j``.

    On the two-phase route it codes twice: in the first phase each rank's own rows, one for each destination; in the
    second (``key.second_phase``) one row, the mean of the decoded ones, which every rank decodes. The form of
    that mean is known, so `encode` may treat it differently: unbiased random-k scales in the first phase only.
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
    """Optional methods of a compressor: two steps in one pass over memory, bitwise equal to two passes."""

    def encode_sum(self, rows: Tensor, others: Tensor) -> tuple[Payload, Tensor] | None:
        """``encode(rows + others)``, and ``rows + others`` less what it decodes to; None if that takes two passes."""

    def encode_mean(self, payload: Payload, width: int, key: Key) -> tuple[Tensor, Payload]:
        """The mean [width] of the decoded rows, added up from the first to the last; and it encoded as one row."""


class Sparse(Protocol):
    """Optional method of a compressor that sends a few elements, others on each rank; see `routes`."""

    def union(self, ranks: int) -> Compressor | None:
        """The compressor of a mean of rows from ``ranks`` ranks, with room for all elements that they have sent.

        None for one around another that is not sparse.
        """


@runtime_checkable
class TwoRoundCompressor(Protocol):
    """Codes a matrix as the product of two factors of ``rank`` columns and rows, each the mean over all peers.

        first round     P = mean_i M_i Q        M_i [rows, columns] of peer i, Q = `start`, alike on all peers
        second round    R = mean_i B^T M_i      B = `basis` (P), orthonormal
        result          B R                     and `keep` stages the next `start`

    Both means are linear in M_i, so only factors are sent and summed, never matrices. No contraction is promised for a
    single step. The collective is `dtrain.comm.collectives.low_rank`.
    """

    @property
    def rank(self) -> int:
        """Columns of P and rows of R."""

    @property
    def kinds(self) -> dict[str, Kind]:
        """The names that it keeps, beside those of the feedback."""

    def pays(self, matrix: Matrix) -> bool:
        """Whether the factors of this piece are small enough; otherwise it is sent whole, in fp32."""

    def start(self, matrix: Matrix, key: Key, state: State, like: Tensor) -> Tensor:
        """Q [columns, rank], the same on all peers, in the dtype of ``like``."""

    def basis(self, mean: Tensor) -> Tensor:
        """B [rows, rank] from P [rows, rank]; not finite where P is not."""

    def keep(self, fqn: str, factor: Tensor, start: Tensor, state: State) -> None:
        """Stage the next step's `start`; ``factor`` is R [rank, columns], ``start`` is Q."""


AnyCompressor: TypeAlias = Compressor | TwoRoundCompressor


class Adjustable(Protocol):
    """A compressor with one setting, by which it sends more and loses less."""

    @property
    def setting(self) -> str:
        """For reports, such as "4 bits"."""

    def alternatives(self) -> Sequence[AnyCompressor]:
        """The same compressor at each setting that a plan may choose, this one included."""


def two_rounds(compressor: object) -> TwoRoundCompressor | None:
    """``compressor``, if it is a `TwoRoundCompressor`. (isinstance of a Protocol takes ten times as long.)"""
    return cast(TwoRoundCompressor, compressor) if hasattr(compressor, "basis") else None


def union(compressor: object, ranks: int) -> Compressor | None:
    """The union of ``compressor`` over ``ranks`` ranks, if it is `Sparse`."""
    return cast(Sparse, compressor).union(ranks) if hasattr(compressor, "union") else None


def is_sparse(compressor: object) -> bool:
    """Whether ``compressor`` is `Sparse`."""
    return union(compressor, 1) is not None


def adjustable(compressor: object) -> Adjustable | None:
    """``compressor``, if it is `Adjustable`."""
    return cast(Adjustable, compressor) if hasattr(compressor, "alternatives") else None


class RowWise:
    """What most compressors declare: biased, homogeneous, not linear. Others override it."""

    @property
    def unbiased(self) -> bool:
        return False

    @property
    def homogeneous(self) -> bool:
        return True

    @property
    def linear(self) -> bool:
        return False
