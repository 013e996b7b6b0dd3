"""A fragment of a local update at work: its current round, and its reductions under way."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dtrain.comm.channel import Handle
from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.feedback import Compression
from dtrain.comm.state import Numbers, State

NEVER = -1
RATES = ("rate", "rate_steps", "round_rate", "last_rate")
"""What a checkpoint calls `Fragment.rates`."""


@dataclass
class Reduction:
    """One replica's pseudo-gradient of a fragment, while it is reduced.

    ``captured``: the step at which it was taken. ``branch``: the state that its exchange stages. ``handles`` of its
    messages, empty once they have arrived, with ``values`` set unless the exchange failed. ``sent``: this replica's
    deltas, None after a resume. ``weight``: of this replica in the mean. ``products``: the square of the deltas, then
    the products of each message, see `gauges`.
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
    """A plan as it was when a fragment was captured."""

    chosen: Mapping[str, Compression]

    @property
    def compressions(self) -> tuple[Compression, ...]:
        return tuple(self.chosen.values())

    def of(self, fqn: str, step: int) -> Compression:
        return self.chosen[fqn]


@dataclass
class Fragment:
    """One fragment's rounds. ``begun``, ``tokens``: the step, and the tokens seen, when its present round began.

    ``steps``: the length of the round before it; until there is one, that of a full round.
    ``scalar``: what a `Looking` outer optimizer chose for it. ``rates``: the mean inner learning rate of the
    current round, its number of steps, the mean of the round before, and the last non-zero mean before that.
    """

    number: int
    fqns: list[str]
    begun: int = 0
    tokens: int = 0
    scalar: float = 0.0
    rates: tuple[float, int, float, float] = (0.0, 0, 0.0, 0.0)
    reductions: list[Reduction] = field(default_factory=list)
    steps: int = field(default=1, init=False)

    def stepped(self, rate: float) -> None:
        """An inner step was made with learning rate ``rate``."""
        mean, steps, last, before = self.rates
        mean += (rate - mean) / (steps + 1)  # a constant rate stays so to the bit
        self.rates = (mean, steps + 1, last, before)

    def begin_round(self, step: int, tokens: int, rate: float) -> None:
        """Begin a round. ``rate``: the present one, taken as the last round's mean if that had no step."""
        self.begun, self.tokens, self.steps = step, tokens, step - self.begun
        mean, steps, last, before = self.rates
        self.rates = (0.0, 0, mean if steps else rate, last or before)

    def numbers(self) -> Numbers:
        """What a checkpoint keeps of this fragment."""
        reduction = self.reductions[0] if self.reductions else None
        values: Numbers = {"captured": self.begun, "tokens": self.tokens, "scalar": float(self.scalar)}
        values["steps"] = self.steps
        mean, made, last, before = self.rates
        values |= zip(RATES, (float(mean), made, float(last), float(before)), strict=True)
        values["flight"] = reduction.captured if reduction else NEVER
        values["arrived"] = int(reduction is not None and reduction.values is not None)
        return {f"part.{self.number}.{name}": value for name, value in values.items()}

    def load_numbers(self, numbers: Mapping[str, float], state: State, held: Collection[str]) -> None:
        """Undo `numbers`. ``state``: has the results that had arrived. ``held``: FQNs of this rank's pieces."""
        prefix = f"part.{self.number}."
        begun, tokens, flight, arrived = (
            int(numbers[prefix + name]) for name in ("captured", "tokens", "flight", "arrived")
        )
        self.begun, self.tokens, self.scalar = begun, tokens, float(numbers[prefix + "scalar"])
        # Older checkpoints have none of these.
        self.steps = int(numbers.get(prefix + "steps", self.steps))
        mean, made, last, before = (numbers.get(prefix + name, 0.0) for name in RATES)
        self.rates = (mean, int(made), last, before)
        self.reductions, values = [], None
        if arrived:
            values = {fqn: state.tensors[fqn]["arrived"] for fqn in self.fqns if fqn in held}
        if flight != NEVER:
            self.reductions = [Reduction(flight, state.branch(), [], values)]
