"""Low rank: PowerSGD (Vogels et al., arXiv:1905.13727), one step of power iteration, begun where the last one ended.

    P = mean_i M_i Q;   P^ = orthonormal(P);   Q = mean_i M_i^T P^;   result P^ Q^T        M_i [rows, columns]

It is linear in the M_i, so only the two factors are combined: r (rows + columns) numbers, however many peers.
Under feedback a replica keeps M_i - P^ Q_i^T, the error of its own share. (PyTorch's hook keeps M_i - P^ Q^T, which
grows without bound where replicas' data differ. This form grows too, but slower: P^ follows the mean alone. What
matters is the mean residual, which both keep bounded; `Attached.consolidate` gives every replica that mean.)

M_i is this rank's piece of a parameter in rows of its last dims; a row that a shard boundary cuts is filled with zeros.
A parameter whose factors would not be smaller by ``min_rate`` is sent whole, in fp32, as are all vectors.
Keeps: Q [columns, r], the same on all peers, besides what the feedback keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtrain.comm.layout import Matrix, is_finite
from dtrain.comm.seeds import Key
from dtrain.comm.state import Kind, State

UNUSUAL = 2.0**32
"""A kept Q whose largest magnitude exceeds this, or is below 1 over it, is rescaled."""


@dataclass(frozen=True)
class LowRank:
    """See `powersgd`. A `TwoRoundCompressor`."""

    rank: int
    min_rate: float

    @property
    def kinds(self) -> dict[str, Kind]:
        return {"q": "opaque"}

    @property
    def setting(self) -> str:
        return f"rank {self.rank}"

    def alternatives(self) -> list[LowRank]:
        return [replace(self, rank=rank) for rank in range(max(1, self.rank // 2), 2 * self.rank + 1)]

    def pays(self, matrix: Matrix) -> bool:
        """Whether the factors of this piece are smaller than the piece by ``min_rate``."""
        factors = self.rank * (matrix.rows + matrix.columns)
        return min(matrix.rows, matrix.columns) > 1 and factors * self.min_rate < matrix.numel

    def start(self, matrix: Matrix, key: Key, state: State, like: Tensor) -> Tensor:
        """Q [columns, rank] of the last step, or a random one, the same on all peers, in the dtype of ``like``.

        If the last step had another rank, the columns that both have are kept.
        """
        last = state.find(key.fqn, "q")
        if last is not None:
            size = float(last.abs().amax())
            if size > 0 and not 1 / UNUSUAL < size < UNUSUAL:  # only the span counts, and products must not overflow
                last = last * 2.0 ** -max(math.frexp(size)[1], -120)  # no bit of that span changes
        if last is not None and last.shape == (matrix.columns, self.rank):
            return last
        generator = replace(key.shared, step=0, again=0, phase="powersgd").generator(torch.device("cpu"))
        fresh = torch.randn(matrix.columns, self.rank, generator=generator).to(like)
        if last is not None and last.shape[0] == matrix.columns:
            shared = min(self.rank, last.shape[1])
            fresh[:, :shared] = last[:, :shared]
        return fresh

    def basis(self, mean: Tensor) -> Tensor:
        return orthonormal(mean)

    def keep(self, fqn: str, factor: Tensor, start: Tensor, state: State) -> None:
        # Power iteration never leaves zeros.
        state.stage(fqn, "q", factor.T.contiguous() if bool(factor.any()) else start)


def powersgd(rank: int = 4, *, min_rate: float = 2.0) -> LowRank:
    """PowerSGD.

    Args:
        rank: of the approximation, for each rank's piece of each matrix.
        min_rate: how many times smaller the factors must be than the piece; otherwise it is sent in fp32.

    >>> from dtrain.comm.layout import Matrix
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
