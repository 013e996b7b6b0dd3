"""A row of `dtrain bench train`: one sync beside training without communication, and what its figures say."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from dtrain.report.figures import in_bytes, in_time

__all__ = ["HEAD", "TrainRow", "at_time", "interval", "line", "summary", "tied", "time_to"]

HEAD = (
    f"{'sync':<28} {'steps':>5} {'ms/step':>9} {'alone':>9} {'times':>7} {'between':>13} {'noise':>6} "
    f"{'of time':>7} {'exposed':>7} {'sent/step':>9} {'less':>7} {'loss':>8}"
)
LEAST_NOISE = 0.005
"""What two blocks of the same training differ by on a quiet machine: less is not told apart."""

Curve = Sequence[tuple[int, float]]
"""Validation losses by step, in the order of steps."""


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """Times of whole steps, in seconds, of the slowest rank.

    Each round is a block of ``block_steps`` without communication between replicas, one with the sync, and one without
    again. ``seconds``, ``alone_seconds``: of a step, each round's. ``again_seconds``: of the second block without.
    ``exposed_seconds``: of a step, in which training stood still for communication, the median. ``sent_bytes``: of the
    busiest rank per step, payload on the replicate axis; ``dense_bytes``: what fp32 gradients would have taken.
    ``losses``: validation losses of a run of its own from the same seed, after as many steps as ``evaluated_at`` says;
    empty where none was trained.
    ``invalid``: why the times say nothing about the sync, empty if they do.
    """

    sync: str
    engine: str
    replicas: int
    shards: int
    block_steps: int
    seconds: list[float]
    alone_seconds: list[float]
    again_seconds: list[float]
    exposed_seconds: float
    sent_bytes: int
    dense_bytes: int
    cpu_busy: float
    cpu_foreign: float
    invalid: str = ""
    evaluated_at: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """A row of this kind checks no values; that the run went through is what it says."""
        return 0

    @property
    def curve(self) -> Curve:
        return list(zip(self.evaluated_at, self.losses, strict=True))

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def times(self) -> list[float]:
        """Of each round: a step over one without communication, as it was before and after."""
        rounds = zip(self.seconds, self.alone_seconds, self.again_seconds, strict=True)
        return [seconds / ((before + after) / 2) for seconds, before, after in rounds]

    @property
    def noise(self) -> float:
        """By how much the two blocks of a round without communication differ: the median, as a share."""
        pairs = zip(self.alone_seconds, self.again_seconds, strict=True)
        return max(LEAST_NOISE, statistics.median(abs(after / before - 1) for before, after in pairs))

    @property
    def utilization(self) -> float:
        """The share of a step that one without communication takes; the median."""
        return 1 / statistics.median(self.times)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Order statistics between which the median lies with at least 95 %, whatever the distribution; else all values.

    The k-th smallest and the k-th largest of n miss the median with 2 P(Binomial(n, 1/2) < k).

    >>> interval([5.0, 1.0, 2.0]), interval([float(number) for number in range(9)])
    ((1.0, 5.0), (1.0, 7.0))
    """
    ordered, number = sorted(values), len(values)
    missed, term, skipped = 0.0, 0.5**number, 0  # term: of exactly `skipped` values below the median
    while skipped < (number - 1) // 2 and 2 * (missed + term) <= 0.05:
        missed += term
        term *= (number - skipped) / (skipped + 1)
        skipped += 1
    skipped = max(0, skipped - 1)
    return ordered[skipped], ordered[-1 - skipped]


def tied(rows: Sequence[TrainRow]) -> list[TrainRow]:
    """The fastest, and all that cannot be told from it: their intervals overlap, or they differ by no more than noise.

    >>> tied([])
    []
    """
    if not rows:
        return []
    best = min(rows, key=lambda row: statistics.median(row.times))
    fastest, top = statistics.median(best.times), interval(best.times)[1]
    return [
        row
        for row in sorted(rows, key=lambda row: statistics.median(row.times))
        if interval(row.times)[0] <= top or statistics.median(row.times) / fastest - 1 <= max(row.noise, best.noise)
    ]


def at_time(curve: Curve, step_seconds: float, seconds: float) -> float:
    """The loss after ``seconds`` of steps, between two evaluations on the line through them; that of the last at most.

    >>> at_time([(0, 4.0), (10, 2.0)], 0.5, 2.5)
    3.0
    """
    step = seconds / step_seconds
    for (first, before), (last, after) in itertools.pairwise(curve):
        if step <= last:
            return before + (after - before) * (step - first) / (last - first)
    return curve[-1][1]


def time_to(curve: Curve, step_seconds: float, loss: float) -> float | None:
    """Seconds of steps until the loss is first at most ``loss``; None where it never is.

    >>> time_to([(0, 4.0), (10, 2.0)], 0.5, 3.0), time_to([(0, 4.0), (10, 2.0)], 0.5, 1.0)
    (2.5, None)
    """
    if curve and curve[0][1] <= loss:
        return curve[0][0] * step_seconds
    for (first, before), (last, after) in itertools.pairwise(curve):
        if after <= loss:
            return step_seconds * (first + (last - first) * (before - loss) / (before - after))
    return None


def line(row: TrainRow, others: Sequence[TrainRow]) -> str:
    """One row under ``HEAD``."""
    low, high = interval(row.times)
    less = f"{row.dense_bytes / row.sent_bytes:,.1f}x" if row.sent_bytes else "-"
    loss = f"{row.losses[-1]:.4f}" if row.losses else "-"
    invalid = f"  INVALID: {row.invalid}" if row.invalid else ""
    return (
        f"{row.sync:<28} {row.block_steps:>5} {1e3 * row.step_seconds:>9.2f} "
        f"{1e3 * statistics.median(row.alone_seconds):>9.2f} {statistics.median(row.times):>7.3f} "
        f"{f'{low:.3f}-{high:.3f}':>13} {row.noise:>6.1%} {row.utilization:>7.1%} "
        f"{row.exposed_seconds / row.step_seconds:>7.1%} {in_bytes(row.sent_bytes):>9} {less:>7} {loss:>8}{invalid}"
    )


def summary(rows: Sequence[TrainRow], loss: float = 0.0) -> list[str]:
    """The lines below the table: which is fastest, as far as that can be told; losses at equal tokens and equal time.

    ``loss``: the one to be reached; 0: that of the first row's end.
    """
    if not rows:
        return ["no row was finished"]
    out = [
        "times: a step over one without communication, timed in turn, the median of the rounds; between: its interval "
        "of 95 %; noise: what two blocks without communication differ by; of time: what computing takes of a step",
    ]
    first, *ties = tied(rows)
    if ties:
        out.append(f"no winner inside the noise: {', '.join(row.sync for row in (first, *ties))}")
    else:
        out.append(f"fastest: {first.sync}")
    out += _losses([row for row in rows if row.losses], loss)
    if invalid := [row for row in rows if row.invalid]:
        out.append(f"{len(invalid)} of {len(rows)} rows are INVALID; free the machine and repeat")
    return out


def _losses(rows: Sequence[TrainRow], loss: float) -> list[str]:
    if not rows:
        return []
    steps = rows[0].evaluated_at[-1]
    seconds = min(row.evaluated_at[-1] * row.step_seconds for row in rows)
    wanted = loss or rows[0].losses[-1]
    out = [
        "",
        f"validation loss after {steps:,} steps, after {in_time(seconds)} of steps, and time to {wanted:.4f}; one "
        f"seed, whose schedule is that of {steps:,} steps",
    ]
    for row in rows:
        reached = time_to(row.curve, row.step_seconds, wanted)
        out.append(
            f"{row.sync:<28} {row.losses[-1]:>9.4f} {at_time(row.curve, row.step_seconds, seconds):>9.4f} "
            f"{'never' if reached is None else in_time(reached):>10}"
        )
    return out
