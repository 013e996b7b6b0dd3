"""What a local update keeps of a fragment: when it last set out, and what is on its way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dtrain.comm.channel import Handle
from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.feedback import Compression
from dtrain.comm.state import State

NEVER = -1


@dataclass
class Flight:
    """A fragment on its way. ``handles``: of its messages; none once it has ended, with ``values`` unless it failed.

    ``sent``: this replica's deltas, None after a resume; ``weight``: what they count. ``products``: the square of the
    deltas, then the products of each message, see `guard`.
    """

    captured: int
    branch: State
    handles: list[Handle[Combined]]
    values: dict[str, Tensor] | None = None
    sent: dict[str, Tensor] | None = None
    weight: float | None = None
    products: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Pinned:
    """A plan as it was when a fragment set out."""

    chosen: Mapping[str, Compression]

    @property
    def compressions(self) -> tuple[Compression, ...]:
        return tuple(self.chosen.values())

    def of(self, fqn: str, step: int) -> Compression:
        return self.chosen[fqn]


@dataclass
class Part:
    """A fragment at work. ``captured``, ``tokens``: the step, and the tokens seen, when it last was.

    ``scalar``: what a `Looking` outer optimizer chose for it. ``rates``: the mean inner learning rate since it set out,
    the number of steps since then, and that mean of the round that set out last and of one before, if it was not 0.
    """

    number: int
    fqns: list[str]
    captured: int = 0
    tokens: int = 0
    scalar: float = 0.0
    rates: tuple[float, int, float, float] = (0.0, 0, 0.0, 0.0)
    flights: list[Flight] = field(default_factory=list)

    def stepped(self, rate: float) -> None:
        """An inner step was made with learning rate ``rate``."""
        mean, steps, last, before = self.rates
        mean += (rate - mean) / (steps + 1)  # a constant rate stays so to the bit
        self.rates = (mean, steps + 1, last, before)

    def sets_out(self, step: int, tokens: int, rate: float) -> None:
        """A round begins; ``rate``: that of now, which is the last one's where it had no step."""
        self.captured, self.tokens = step, tokens
        mean, steps, last, before = self.rates
        self.rates = (0.0, 0, mean if steps else rate, last or before)
