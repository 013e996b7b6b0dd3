"""What a plan needs that learns from what it compresses: a beginning for each run, measurements, reviews, and counters.

A sync begins such a plan once, lets it measure the values of the exchanges in which it is due, and reviews it between
two steps. What it decides is the same on every rank, since it decides from sums over all of them, and is compared.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from dtrain.comm.layout import Matrix
from dtrain.comm.ops import Flow
from dtrain.comm.plans.plan import Plan
from dtrain.comm.seeds import Key


class Choosing(Plan, Protocol):
    """A plan under way on one rank."""

    @property
    def changes(self) -> int:
        """How often it has decided anew."""

    def due(self) -> bool:
        """Whether the values of the exchange under way are to be measured."""

    def measure(self, fqn: str, fresh: Tensor, meant: Tensor, matrix: Matrix, world: int, key: Key) -> None:
        """Note what each choice would cost. ``meant`` [n] is compressed; ``fresh`` [n] is what of it is new."""

    def review(self) -> Flow[None]:
        """End an exchange; if values were measured, agree with all ranks on what to use from now on."""

    def integers(self) -> dict[str, int]:
        """What a checkpoint has to keep."""

    def load_integers(self, integers: Mapping[str, int]) -> None:
        """Undo `integers`."""

    def table(self) -> str:
        """What is used for each parameter, for people."""


@runtime_checkable
class Adaptive(Plan, Protocol):
    """A plan that has to be begun."""

    def begin(self, fqns: Sequence[str]) -> Choosing:
        """The plan at work on parameters ``fqns``: all of the model, in one order on every rank."""


class Settled:
    """A plan that never changes, in the words of one that may."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.compressions = plan.compressions
        self.of = plan.of
        self.changes = 0

    def due(self) -> bool:
        return False

    def measure(self, fqn: str, fresh: Tensor, meant: Tensor, matrix: Matrix, world: int, key: Key) -> None:
        """Nothing: never due."""

    def review(self) -> Flow[None]:
        return
        yield  # a flow without ops

    def integers(self) -> dict[str, int]:
        return {}

    def load_integers(self, integers: Mapping[str, int]) -> None:
        """Nothing to load."""

    def table(self) -> str:
        return "\n".join(sorted({str(compression) for compression in self.compressions}))


def begun(plan: Plan, fqns: Sequence[str]) -> Choosing:
    """``plan`` at work."""
    return plan.begin(fqns) if isinstance(plan, Adaptive) else Settled(plan)


def bits_of(number: float) -> int:
    """A float as the integer of its bits: checkpoints keep integers exactly."""
    return int.from_bytes(struct.pack("<d", number), "little", signed=True)


def number_of(bits: int) -> float:
    """Undo `bits_of`."""
    return float(struct.unpack("<d", bits.to_bytes(8, "little", signed=True))[0])
