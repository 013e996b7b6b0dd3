"""Low rank: PowerSGD (Vogels et al., arXiv:1905.13727), one step of power iteration from where the last one ended.

    P = mean_i M_i Q;   P^ = orthonormal(P);   Q = mean_i M_i^T P^;   result P^ Q^T        M_i [rows, columns]

It is linear in the M_i, so all that is combined are the two factors: r (rows + columns) numbers, however many peers.
Under feedback a worker keeps M_i - P^ Q_i^T, what it failed to say itself. (PyTorch's hook keeps M_i - P^ Q^T, which
grows without end where workers' data differ. This form grows too, but slower: P^ follows the mean alone. What counts is
the mean residual, which both keep bounded; `Attached.consolidate` gives every worker that mean.)

M_i is this rank's piece of a parameter in rows of its last dims; a row that a shard boundary cuts is filled with zeros.
A parameter whose factors would not be smaller by ``min_rate`` is sent as it is, in fp32, as are all vectors.
Keeps: Q [columns, r], the same on all peers, besides what the feedback keeps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.comm.layout import Segment, is_finite
from dtrain.comm.seeds import Key
from dtrain.comm.state import Kind, State

UNUSUAL = 2.0**32
"""Of a basis, by amount."""


@dataclass(frozen=True)
class Matrix:
    """How a flat piece of ``numel`` elements lies in rows of ``columns``, the first row short of ``lead`` elements."""

    numel: int
    columns: int
    lead: int

    @property
    def rows(self) -> int:
        return -(-(self.lead + self.numel) // self.columns)

    def view(self, flat: Tensor) -> Tensor:
        """``flat`` [numel] as [rows, columns]; a view where no row is cut."""
        missing = self.rows * self.columns - self.lead - self.numel
        padded = F.pad(flat, (self.lead, missing)) if self.lead or missing else flat
        return padded.view(self.rows, self.columns)

    def flat(self, matrix: Tensor) -> Tensor:
        """Undo `view`."""
        return matrix.reshape(-1)[self.lead : self.lead + self.numel]


def matrices(segments: Mapping[str, Segment], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Matrix]:
    """How each piece that is held lies in its parameter; vectors and numbers have rows of one element.

    >>> matrices({"w": Segment("w", offset=6, numel=9)}, {"w": (5, 2, 2)})
    {'w': Matrix(numel=9, columns=4, lead=2)}
    """
    found = {}
    for fqn, segment in segments.items():
        columns = max(1, math.prod(shapes[fqn][1:]))
        found[fqn] = Matrix(segment.numel, columns, segment.offset % columns)
    return found


@dataclass(frozen=True)
class LowRank:
    """See `powersgd`. Not a `Compressor`: both its phases need all peers."""

    rank: int
    min_rate: float

    @property
    def kinds(self) -> dict[str, Kind]:
        return {"q": "opaque"}

    def pays(self, matrix: Matrix) -> bool:
        """Whether the factors of this piece are smaller than the piece by ``min_rate``."""
        factors = self.rank * (matrix.rows + matrix.columns)
        return min(matrix.rows, matrix.columns) > 1 and factors * self.min_rate < matrix.numel

    def start(self, matrix: Matrix, key: Key, state: State, like: Tensor) -> Tensor:
        """Q [columns, rank] of the last step, or a random one that all peers draw alike, in the dtype of ``like``.

        Where the last step had another rank, its columns are kept as far as they go.
        """
        known = state.find(key.fqn, "q")
        if known is not None:
            size = float(known.abs().amax())
            if size > 0 and not 1 / UNUSUAL < size < UNUSUAL:  # only the span counts, and products must not overflow
                known = known * 2.0 ** -max(math.frexp(size)[1], -120)  # no bit of that span changes
        if known is not None and known.shape == (matrix.columns, self.rank):
            return known
        generator = replace(key.shared, step=0, again=0, phase="powersgd").generator(torch.device("cpu"))
        fresh = torch.randn(matrix.columns, self.rank, generator=generator).to(like)
        if known is not None and known.shape[0] == matrix.columns:
            shared = min(self.rank, known.shape[1])
            fresh[:, :shared] = known[:, :shared]
        return fresh


def powersgd(rank: int = 4, *, min_rate: float = 2.0) -> LowRank:
    """PowerSGD.

    Args:
        rank: of the approximation, for each rank's piece of each matrix.
        min_rate: how many times smaller the factors must be than the piece; otherwise it is sent in fp32.

    >>> powersgd(4).pays(Matrix(numel=512 * 128, columns=128, lead=0))
    True

    Raises ``ValueError`` for a rank below 1 or a rate below 1. Source: the module's docstring.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank is {rank!r}; give a positive whole number, for example 4")
    if not min_rate >= 1:
        raise ValueError(f"min_rate is {min_rate!r}; factors that are not smaller are never worth sending: at least 1")
    return LowRank(rank, float(min_rate))


def orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis [n, r] of the columns of ``matrix`` [n, r] fp32; of zero columns, anything orthonormal.

    Not finite where ``matrix`` is not: LAPACK would raise.
    """
    if not is_finite(matrix):
        return torch.full_like(matrix, torch.nan)
    scale = matrix.abs().amax()  # so that squares neither overflow nor vanish
    basis: Tensor = torch.linalg.qr(matrix / torch.where(scale > 0, scale, 1.0)).Q
    return basis
