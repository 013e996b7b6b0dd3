"""Error feedback: what a compressor left out of a step is kept and added to the next one.

EF14, the classic form (Seide et al. 2014; Karimireddy et al., arXiv:1901.09847):

    p = g + e;   send C(p);   e = p - C(p)                                     (per worker, fp32, keyed by FQN)

so that what was applied up to step T is the sum of all mean gradients, less the mean residual: nothing is ever lost.
On the two-phase route the owner of a chunk compresses the mean once more. Its error s goes into the owner's residual,
times the number of ranks: in the next mean it counts s, so the identity holds across both phases, with no further
state. Communication and bytes: those of the compressor. Keeps: one fp32 residual for each element, two while a step
is under way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dtrain.comm.compressors.base import Compressor
from dtrain.comm.compressors.cast import cast
from dtrain.comm.state import Kind, State


class Feedback(Protocol):
    """What happens around a compressor. ``state`` belongs to the sync; new values are staged, never written."""

    @property
    def kinds(self) -> dict[str, Kind]:
        """The names that it keeps."""

    def correct(self, fqn: str, value: Tensor, state: State) -> Tensor:
        """What to compress instead of ``value`` [n]."""

    def retain(self, fqn: str, corrected: Tensor, sent: Tensor, state: State) -> None:
        """The peers will decode ``sent`` [n] where ``corrected`` [n] was meant."""

    def retain_owned(self, fqn: str, error: Tensor, start: int, world: int, state: State) -> None:
        """The mean of the chunk that begins at element ``start`` lost ``error`` [m] in the second phase."""


@dataclass(frozen=True)
class NoFeedback:
    """What a compressor leaves out is lost."""

    @property
    def kinds(self) -> dict[str, Kind]:
        return {}

    def correct(self, fqn: str, value: Tensor, state: State) -> Tensor:
        return value

    def retain(self, fqn: str, corrected: Tensor, sent: Tensor, state: State) -> None:
        pass

    def retain_owned(self, fqn: str, error: Tensor, start: int, world: int, state: State) -> None:
        pass


@dataclass(frozen=True)
class EF14:
    """See the module's docstring."""

    @property
    def kinds(self) -> dict[str, Kind]:
        return {"residual": "per_worker"}

    def correct(self, fqn: str, value: Tensor, state: State) -> Tensor:
        return value + state.get(fqn, "residual", value)

    def retain(self, fqn: str, corrected: Tensor, sent: Tensor, state: State) -> None:
        state.stage(fqn, "residual", corrected - sent)

    def retain_owned(self, fqn: str, error: Tensor, start: int, world: int, state: State) -> None:
        state.staged(fqn, "residual")[start : start + error.numel()] += world * error


@dataclass(frozen=True)
class Compression:
    """A compressor and the feedback around it."""

    compressor: Compressor
    feedback: Feedback


def error_feedback(compressor: Compressor) -> Compression:
    """EF14 around ``compressor``.

    >>> from dtrain import error_feedback, quantize
    >>> error_feedback(quantize(bits=8)).feedback.kinds
    {'residual': 'per_worker'}

    Raises ``ValueError`` for a compressor that is no contraction: with it the residual can grow without bound.
    """
    if isinstance(compressor, Compression):
        raise ValueError("error_feedback around error_feedback would send every error twice; use it once")
    if not compressor.delta > 0:
        raise ValueError(
            f"{compressor} guarantees no contraction (delta = {compressor.delta:.3g}), so its residual may grow "
            "without bound; use smaller blocks or more bits (quantize), another dtype (cast), or no error_feedback"
        )
    return Compression(compressor, EF14())


def as_compression(compress: Compressor | Compression | None) -> Compression:
    """What users may pass as ``compress``: nothing, a compressor, or a compressor with feedback."""
    if compress is None:
        return Compression(cast("fp32"), NoFeedback())
    if isinstance(compress, Compression):
        return compress
    if isinstance(compress, Compressor):
        return Compression(compress, NoFeedback())
    raise TypeError(f"compress is {compress!r}; give a compressor, as quantize(bits=8), or error_feedback(...) of one")
