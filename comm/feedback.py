"""Feedback: what a compressor leaves out in one step is sent in later ones.

With g a replica's value, C the compressor, c the mean of what the replicas sent; state is fp32, keyed by FQN:

    EF14       p = g + e;            send C(p);  e = p - C(p);                   result c           arXiv:1901.09847
    EF21       d = v - h;            send C(d);  h += C(d);          H += c;     result H           arXiv:2106.05203
               v = g, or with momentum v = (1 - eta) v + eta g       (EF21-SGDM)                    arXiv:2305.15155
    EControl   d = eta e + g - h;    send C(d);  e += g - h - C(d);  h += C(d);  H += c;  result H  arXiv:2311.05645

EF14: the sum of all results is the sum of all mean values less the mean residual. EF21: H is the mean of all h.
EControl with eta = 0 is EF21, and with h = 0 and eta = 1 EF14. All start from zeros (v from the first g).

On the two-phase route the owner of a chunk compresses the mean once more. The error s of that is added to the owner's
own state, times the number of ranks: the next mean divides by it again, so these identities hold across both phases
without further state. Communication and bytes: those of the compressor. Keeps: EF14 one fp32 number for each element,
EF21 two, EF21-SGDM and EControl three; twice that while a step is under way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeAlias
from typing import cast as cast_

from torch import Tensor

from dtrain.comm.compressors.cast import cast
from dtrain.comm.compressors.compressor import (
    AnyCompressor,
    Compressor,
    OnePass,
    TwoRoundCompressor,
    two_rounds,
)
from dtrain.comm.layout import Matrix, chunk_width, from_rows, to_rows
from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key
from dtrain.comm.state import Kind, State

Factors: TypeAlias = tuple[Tensor, Tensor]


class Coder(Protocol):
    """What feedback uses of a `Compressor`."""

    def encode(self, rows: Tensor, key: Key) -> Payload: ...

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor: ...


class Feedback(ABC):
    """What is done around a compressor. ``state`` belongs to the sync; new values are staged, never written in place.

    ``value`` may be a view of the model's gradients: it is neither kept nor written to.

    All state is linear in the values, so a change of their scale multiplies it.
    """

    feeds_back: ClassVar[bool] = True
    """Whether what a compressor leaves out in a step is sent in later ones."""

    @property
    @abstractmethod
    def kinds(self) -> dict[str, Kind]:
        """The names of its state."""

    @abstractmethod
    def correct(self, fqn: str, value: Tensor, state: State) -> Tensor:
        """What to compress in place of ``value`` [n]."""

    def fresh(self, fqn: str, value: Tensor, state: State) -> Tensor:
        """`correct` without the residual of earlier steps, which depends on how they were compressed."""
        return self.correct(fqn, value, state)

    @abstractmethod
    def retain(self, fqn: str, value: Tensor, corrected: Tensor, sent: Tensor, state: State) -> None:
        """Stage the state after peers decode ``sent`` [n] in place of ``corrected`` [n]. Called after `correct`."""

    def retain_product(
        self, fqn: str, value: Tensor, corrected: Tensor, matrix: Matrix, factors: Factors, state: State
    ) -> None:
        """`retain` where what is sent is the product of two ``factors``, [rows, r] and [r, columns]."""
        left, right = factors
        self.retain(fqn, value, corrected, matrix.flat(left @ right), state)

    @abstractmethod
    def retain_owned(self, fqn: str, error: Tensor, start: int, divisor: float, state: State) -> None:
        """Retain the ``error`` [m] of the second phase in the mean of the chunk that begins at element ``start``.

        ``divisor``: of this replica's value in the mean, which is the number of peers if all weigh the same.
        """

    def carry_over(self, fqn: str, like: Tensor, state: State) -> None:
        """Keep the residual as it is: this replica's weight is 0 in the exchange."""
        for name, kind in self.kinds.items():
            if kind == "per_worker":
                state.stage(fqn, name, state.get(fqn, name, like).clone())

    def encode(self, fqn: str, value: Tensor, compressor: Coder, world: int, key: Key, state: State) -> Payload:
        """The payload for ``value`` [n], in ``world`` rows; its error is retained."""
        corrected = self.correct(fqn, value, state)
        payload = compressor.encode(to_rows(corrected, world), key)
        if self.kinds:
            decoded = compressor.decode(payload, chunk_width(value.numel(), world), key.shared)
            self.retain(fqn, value, corrected, from_rows(decoded, value.numel()), state)
        return payload

    def result(self, fqn: str, combined: Tensor, state: State) -> Tensor:
        """What the optimizer steps with after the peers' combined value ``combined`` [n]; equal on all of them."""
        return combined


@dataclass(frozen=True)
class NoFeedback(Feedback):
    """What a compressor leaves out is lost."""

    feeds_back: ClassVar[bool] = False

    @property
    def kinds(self) -> dict[str, Kind]:
        return {}

    def correct(self, fqn: str, value: Tensor, state: State) -> Tensor:
        return value

    def retain(self, fqn: str, value: Tensor, corrected: Tensor, sent: Tensor, state: State) -> None:
        pass

    def retain_owned(self, fqn: str, error: Tensor, start: int, divisor: float, state: State) -> None:
        pass


@dataclass(frozen=True)
class EF14(Feedback):
    """See `error_feedback`."""

    @property
    def kinds(self) -> dict[str, Kind]:
        return {"residual": "per_worker"}

    def encode(self, fqn: str, value: Tensor, compressor: Coder, world: int, key: Key, state: State) -> Payload:
        if hasattr(compressor, "encode_sum"):
            residual = state.get(fqn, "residual", value)
            coded = cast_(OnePass, compressor).encode_sum(to_rows(value, world), to_rows(residual, world))
            if coded is not None:
                payload, left = coded
                state.stage(fqn, "residual", from_rows(left, value.numel()))
                return payload
        return super().encode(fqn, value, compressor, world, key, state)

    def correct(self, fqn: str, value: Tensor, state: State) -> Tensor:
        return value + state.get(fqn, "residual", value)

    def fresh(self, fqn: str, value: Tensor, state: State) -> Tensor:
        return value

    def retain_product(
        self, fqn: str, value: Tensor, corrected: Tensor, matrix: Matrix, factors: Factors, state: State
    ) -> None:
        left, right = factors  # the product is not stored, and ``corrected`` may be written to: `correct` made it
        residual = matrix.view(corrected).addmm_(left, right, alpha=-1)
        state.stage(fqn, "residual", matrix.flat(residual))

    def retain(self, fqn: str, value: Tensor, corrected: Tensor, sent: Tensor, state: State) -> None:
        state.stage(fqn, "residual", corrected - sent)

    def retain_owned(self, fqn: str, error: Tensor, start: int, divisor: float, state: State) -> None:
        state.staged(fqn, "residual")[start : start + error.numel()] += divisor * error


@dataclass(frozen=True)
class EF21(Feedback):
    """See `ef21`."""

    eta: float

    @property
    def kinds(self) -> dict[str, Kind]:
        estimates: dict[str, Kind] = {"estimate": "per_worker", "mean_estimate": "replicated"}
        return estimates if self.eta == 1 else {**estimates, "momentum": "per_worker"}

    def correct(self, fqn: str, value: Tensor, state: State) -> Tensor:
        if self.eta != 1:
            last = state.find(fqn, "momentum")
            value = value.clone() if last is None else (1 - self.eta) * last + self.eta * value
            state.stage(fqn, "momentum", value)
        return value - state.get(fqn, "estimate", value)

    def retain(self, fqn: str, value: Tensor, corrected: Tensor, sent: Tensor, state: State) -> None:
        state.stage(fqn, "estimate", state.get(fqn, "estimate", value) + sent)

    def retain_owned(self, fqn: str, error: Tensor, start: int, divisor: float, state: State) -> None:
        state.staged(fqn, "estimate")[start : start + error.numel()] -= divisor * error

    def result(self, fqn: str, combined: Tensor, state: State) -> Tensor:
        total = state.get(fqn, "mean_estimate", combined) + combined
        state.stage(fqn, "mean_estimate", total)
        return total


@dataclass(frozen=True)
class EControl(Feedback):
    """See `econtrol`."""

    eta: float

    @property
    def kinds(self) -> dict[str, Kind]:
        return {"residual": "per_worker", "estimate": "per_worker", "mean_estimate": "replicated"}

    def correct(self, fqn: str, value: Tensor, state: State) -> Tensor:
        return self.eta * state.get(fqn, "residual", value) + value - state.get(fqn, "estimate", value)

    def fresh(self, fqn: str, value: Tensor, state: State) -> Tensor:
        return value - state.get(fqn, "estimate", value)

    def retain(self, fqn: str, value: Tensor, corrected: Tensor, sent: Tensor, state: State) -> None:
        old = state.get(fqn, "estimate", value)  # the residual takes the estimate from before the update
        state.stage(fqn, "residual", state.get(fqn, "residual", value) + value - old - sent)
        state.stage(fqn, "estimate", old + sent)

    def retain_owned(self, fqn: str, error: Tensor, start: int, divisor: float, state: State) -> None:
        chunk = slice(start, start + error.numel())
        state.staged(fqn, "residual")[chunk] += divisor * error
        state.staged(fqn, "estimate")[chunk] -= divisor * error

    def result(self, fqn: str, combined: Tensor, state: State) -> Tensor:
        total = state.get(fqn, "mean_estimate", combined) + combined
        state.stage(fqn, "mean_estimate", total)
        return total


@dataclass(frozen=True)
class Compression:
    """A compressor and the feedback around it; as a plan, the same for every parameter."""

    compressor: AnyCompressor
    feedback: Feedback

    @cached_property
    def by_row(self) -> Compressor | None:
        """The compressor, where it codes rows; else None."""
        return cast_(Compressor, self.compressor) if self.two_rounds is None else None

    @cached_property
    def two_rounds(self) -> TwoRoundCompressor | None:
        """The compressor, where it takes two rounds of means over all peers; else None."""
        return two_rounds(self.compressor)

    @property
    def compressions(self) -> tuple[Compression, ...]:
        return (self,)

    @property
    def kinds(self) -> dict[str, Kind]:
        """The names of its state."""
        return {**self.feedback.kinds, **({} if self.two_rounds is None else self.two_rounds.kinds)}

    def of(self, fqn: str, step: int) -> Compression:
        return self


def error_feedback(compressor: AnyCompressor) -> Compression:
    """EF14 around ``compressor``: what it leaves out is added to the next step's value.

    >>> from dtrain.compress import error_feedback, quantize
    >>> error_feedback(quantize(bits=8)).feedback.kinds
    {'residual': 'per_worker'}

    Raises ``ValueError`` for a compressor that is no contraction: with it the residual can grow without bound.
    """
    return _around(compressor, EF14(), "error_feedback")


def ef21(compressor: AnyCompressor, *, eta: float = 0.1) -> Compression:
    """EF21 around ``compressor``: differences from a running estimate of the value are sent.

    Args:
        compressor: a contraction.
        eta: of the momentum before the compressor, in (0, 1]. 0.1 is EF21-SGDM; then give the inner optimizer no
            momentum. 1 is EF21, for large batches: with small ones a noise floor remains.

    >>> from dtrain.compress import ef21, topk
    >>> sorted(ef21(topk(0.01)).feedback.kinds)
    ['estimate', 'mean_estimate', 'momentum']

    Raises ``ValueError`` for a compressor that is no contraction, or another eta. Source: the module's docstring.
    """
    if not 0 < eta <= 1:
        raise ValueError(f"eta is {eta!r}; the momentum's share of a new value lies in (0, 1]")
    return _around(compressor, EF21(float(eta)), "ef21")


def econtrol(compressor: AnyCompressor, *, eta: float = 0.001) -> Compression:
    """EControl around ``compressor``: EF21 that also feeds a fraction of the residual back.

    Args:
        compressor: a contraction.
        eta: that fraction, in [0, 1]; 0 is EF21. Theory requires the compressor's delta / 400; tune it.

    Raises ``ValueError`` for a compressor that is no contraction, or another eta. Source: the module's docstring.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta!r}; the part of the residual that is fed back lies in [0, 1]")
    return _around(compressor, EControl(float(eta)), "econtrol")


def _around(compressor: AnyCompressor, feedback: Feedback, name: str) -> Compression:
    if hasattr(compressor, "feedback"):
        raise ValueError(f"{name} around {compressor} would feed every error back twice; give it the compressor alone")
    if not isinstance(compressor, Compressor | TwoRoundCompressor):
        raise TypeError(f"{name} got {compressor!r}; give it a compressor, for example quantize(bits=8)")
    if isinstance(compressor, Compressor) and not compressor.delta > 0:
        raise ValueError(
            f"{compressor} guarantees no contraction (delta = {compressor.delta:.3g}), so its residual may grow "
            f"without bound; {_way_out(compressor, name)}"
        )
    return Compression(compressor, feedback)


def _way_out(compressor: Compressor, name: str) -> str:
    if compressor.unbiased:
        return f"it is unbiased, and goes without {name}"
    if hasattr(compressor, "block"):
        blocks = (2**power for power in range(10, 2, -1))
        fits = next((b for b in blocks if replace(cast_(Any, compressor), block=b).delta > 0), None)
        if fits is not None:
            return f"give it blocks of at most {fits} elements: block={fits}"
    return f"use more bits (quantize), another dtype (cast), or no {name}"


def as_compression(compress: AnyCompressor | Compression | None) -> Compression:
    """What users may pass as ``compress``: nothing, a compressor, or a compressor with feedback."""
    if compress is None:
        return Compression(cast("fp32"), NoFeedback())
    if hasattr(compress, "feedback"):
        return cast_(Compression, compress)
    if isinstance(compress, Compressor | TwoRoundCompressor):
        return Compression(compress, NoFeedback())
    typed = f"; on the command line compress@sync.compress={compress}" if isinstance(compress, str) else ""
    name = getattr(compress, "__name__", "") if callable(compress) else ""
    raise TypeError(
        f"compress is {name or repr(compress)}{', which was not called' if name else ''}; give a compressor, as "
        f"quantize(bits=8), or error_feedback(...) of one{typed}"
    )
