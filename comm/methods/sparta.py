"""SPARTA: at every step, or every few, a small fraction of the parameters is averaged over the replicas.

Beton et al., 2025, openreview.net/forum?id=stFPf3gzq1.

    k of n coordinates by the shared seed;   parameters_i[k] <- mean_j parameters_j[k]

The coordinates: an affine walk through each parameter, redrawn for each period of 1 / density exchanges, in which each
coordinate has its turn once (by default the authors' code draws each anew in every exchange). Only values are sent.
With density 1 it is Local SGD of one step.
There is no anchor: replicas differ, and each evaluates its own parameters; at the end of training all parameters are
averaged.
Communication: one `two_phase` flow. Bytes: density x 4 x 2 (M - 1) / M of each parameter. Keeps: nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.collectives.two_phase import all_finite, two_phase
from dtrain.comm.feedback import as_compression
from dtrain.comm.layout import chunk_width
from dtrain.comm.methods.every_step import VERIFY_STEPS
from dtrain.comm.pieces import Pieces
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.consistency import PARAMETER, Held, Tie, require_guard
from dtrain.comm.runtime.context import Context, description
from dtrain.comm.runtime.gradient_steps import GradientSteps
from dtrain.comm.runtime.guard import Guard, parameters_held
from dtrain.comm.runtime.method import Sync
from dtrain.comm.seeds import Key
from dtrain.comm.state import Numbers


@dataclass(frozen=True)
class Sparta(Sync):
    """See `sparta`."""

    density: float
    every_steps: int
    verify_every: int = VERIFY_STEPS
    tie: Tie = "stop"

    def bind(self, pieces: Pieces, seed: int) -> Attached:
        settings = ("density", "every_steps")
        plain = as_compression(None)
        context = Context(
            pieces, seed, description("sparta", plain, self, settings), plan=plain, kinds={},
            parameters_kind="per_worker",
        )  # fmt: skip
        context.begin(f"{self}")
        return Attached(context, AveragedCoordinates(self, context))


class AveragedCoordinates(GradientSteps):
    """A `Sparta` at work on one rank. ``left_out``: averages without this replica, as its values were not finite."""

    counters = ("left_out",)

    def __init__(self, spec: Sparta, context: Context) -> None:
        super().__init__(context)
        self.spec = spec
        self.left_out = 0
        self._closed_at = 0  # the step of the last `close_round`
        self._averaged: dict[str, Tensor] = {}  # coordinates that the last exchange has made equal
        self._guard = Guard(
            context, spec.tie, "coordinates that were just averaged", self._held, replace=self._take_over
        )

    def close_round(self) -> bool:
        """Average all parameters, for the end of training; may be repeated."""
        self._average(1.0, 0)
        self._closed_at = self.context.steps
        return True

    @property
    def in_round(self) -> bool:
        return self.context.steps != self._closed_at

    def verify(self) -> bool:
        return self._guard.verify()

    def after_step(self) -> None:
        self._averaged = {}
        if self.context.steps % self.spec.every_steps == 0:
            number = self.context.steps // self.spec.every_steps
            self._average(self.spec.density, number - 1)
            if self.spec.verify_every and number % self.spec.verify_every == 0:
                self.verify()

    def numbers(self) -> Numbers:
        return {"left_out": self.left_out}

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        self.left_out = int(numbers["left_out"])

    def _average(self, density: float, number: int) -> None:
        context, place = self.context, self.context.place
        key, now = context.key(), context.pieces.read()
        turns = {fqn: turn(value, density, number, replace(key, fqn=fqn)) for fqn, value in now.items()}
        chosen = {fqn: value[turns[fqn]] for fqn, value in now.items()}
        finite = context.agree_in_replica(all_finite(chosen))
        if not finite:
            self.left_out += 1
            chosen = {fqn: torch.zeros_like(value) for fqn, value in chosen.items()}
        plain = as_compression(None)
        flow = two_phase(chosen, plain, rank_order_mean, place, key, context.state, weight=float(finite))
        combined = context.pieces.channel.run(flow, "coordinates")
        if context.agree_in_replica(combined.finite):
            context.pieces.write(_replaced(now, turns, combined.values))
            self._averaged = turns

    def _held(self) -> Held:
        for name, value in parameters_held(self.context):
            fqn = name.removeprefix(PARAMETER)
            if fqn in self._averaged:
                yield f"coordinates of {fqn}", value[self._averaged[fqn]]

    def _take_over(self, values: Mapping[str, Tensor]) -> None:
        now = self.context.pieces.read()
        repaired = {fqn: values.get(f"coordinates of {fqn}", now[fqn][at]) for fqn, at in self._averaged.items()}
        self.context.pieces.write({**now, **_replaced({fqn: now[fqn] for fqn in repaired}, self._averaged, repaired)})


def turn(value: Tensor, density: float, number: int, key: Key) -> Tensor:
    """The coordinates of flat ``value`` [n] whose turn it is in exchange ``number``: int64, the same on all ranks."""
    n = value.numel()
    turns = max(1, round(1 / density))
    period, place = divmod(number, turns)
    begin, end = (min(bound * chunk_width(n, turns), n) for bound in (place, place + 1))
    walk = torch.arange(begin, end, device=value.device)
    if not len(walk):
        return walk
    generator = replace(key, step=period).shared.generator(torch.device("cpu"))
    start, stride = (int(drawn) for drawn in torch.randint(1, 2**31, (2,), generator=generator))
    while math.gcd(stride, n) != 1:
        stride += 1
    return (walk * (stride % n) + start) % n


def _replaced(
    now: Mapping[str, Tensor], turns: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return {fqn: value.index_copy(0, turns[fqn], values[fqn]) for fqn, value in now.items()}


def sparta(
    *, density: float = 0.005, every_steps: int = 1, verify_every: int = VERIFY_STEPS, tie: Tie = "stop"
) -> Sparta:
    """Average a fraction of the parameters in each exchange.

    Args:
        density: the fraction, in (0, 1].
        every_steps: inner steps between two exchanges.
        verify_every: exchanges between two comparisons of what was averaged last, which is all that must be equal on
            all replicas; 0 for none.
        tie: see `every_step`.

    >>> sparta().density
    0.005

    Raises ``ValueError`` for numbers outside their range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density!r}; the fraction that is averaged lies in (0, 1], for example 0.005")
    if not isinstance(every_steps, int) or isinstance(every_steps, bool) or every_steps < 1:
        raise ValueError(f"every_steps is {every_steps!r}; give a positive whole number of inner steps")
    require_guard(verify_every, tie, "exchanges")
    return Sparta(float(density), every_steps, verify_every, tie)
