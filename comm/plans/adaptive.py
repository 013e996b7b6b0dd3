"""Adaptive plans: those that learn from what they compress.

A method begins such a plan once for each run, lets it measure the values of the exchanges in which it is due, and
reviews it between two steps. It decides from values that are reduced over all ranks, so that all make the same choice,
which is verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from dtrain.comm.layout import Matrix
from dtrain.comm.ops import Flow
from dtrain.comm.plans.plan import Plan
from dtrain.comm.seeds import Key
from dtrain.comm.state import Kind, Numbers, State


class Choosing(Plan, Protocol):
    """An adaptive plan at work on one rank. ``settled``: it never changes; nothing to measure or review."""

    settled: bool

    @property
    def changes(self) -> int:
        """How often its decisions have changed."""

    @property
    def kinds(self) -> dict[str, Kind]:
        """The names of the tensors that it keeps itself, beside those of its compressions."""

    def accumulate(self, fqn: str, value: Tensor, state: State) -> None:
        """Called with each ``value`` [n] of every exchange before it is sent; what the plan keeps of it is staged."""

    def due(self) -> bool:
        """Whether the values of the exchange under way are to be measured."""

    def measure(self, fqn: str, fresh: Tensor, corrected: Tensor, matrix: Matrix, world: int, key: Key) -> None:
        """Measure a value of the exchange: ``corrected`` [n] is compressed, ``fresh`` [n] lacks the residual."""

    def review(self, state: State, rate: float) -> Flow[None]:
        """Called after each exchange; if it was due, all ranks agree on what to use from now on.

        ``state``: without anything staged. ``rate``: the inner optimizer's learning rate on this rank.
        """

    def numbers(self) -> Numbers:
        """The numbers that a checkpoint keeps."""

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        """Undo `numbers`; there may be others among them. Raises ``KeyError`` for one that is missing."""

    def table(self) -> str:
        """A report of the compression of each parameter."""


@runtime_checkable
class Adaptive(Plan, Protocol):
    """The spec of an adaptive plan."""

    def begin(self, fqns: Sequence[str]) -> Choosing:
        """The plan at work on parameters ``fqns``: all of the model, in one order on every rank."""


class Settled:
    """A static plan behind the adaptive interface."""

    settled = True

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.compressions = plan.compressions
        self.of = plan.of
        self.changes = 0
        self.kinds: dict[str, Kind] = {}

    def accumulate(self, fqn: str, value: Tensor, state: State) -> None:
        """Nothing is kept."""

    def due(self) -> bool:
        return False

    def measure(self, fqn: str, fresh: Tensor, corrected: Tensor, matrix: Matrix, world: int, key: Key) -> None:
        """Nothing: never due."""

    def review(self, state: State, rate: float) -> Flow[None]:
        return
        yield  # a flow without ops

    def numbers(self) -> Numbers:
        return {}

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        """Nothing to load."""

    def table(self) -> str:
        return "\n".join(sorted({str(compression) for compression in self.compressions}))


def begun(plan: Plan, fqns: Sequence[str]) -> Choosing:
    """``plan`` at work on one rank."""
    return plan.begin(fqns) if isinstance(plan, Adaptive) else Settled(plan)
