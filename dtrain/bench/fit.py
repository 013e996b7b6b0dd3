"""The alpha-beta model of a link, from a sweep: alpha from the smallest messages, beta from the slope of the largest.

    seconds = k(n) alpha + v(n) S beta          k: one-way delays in a row, v: times that the buffer crosses a link

One line through the whole sweep is wrong: messages below a shaper's burst travel faster than the line, and a fit of
least squares hides that in both constants. gloo pays two one-way delays for each step of a ring, so k is 4 (n - 1) for
its all-reduce (measured here with latency on the links; benchmarks in docs/evidence).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dtrain.bench.ops import bus_factor

__all__ = ["HOPS", "LARGEST_RESIDUAL", "Fit", "errors", "fit", "hops", "predict"]

HOPS: dict[str, Callable[[int], int]] = {
    "all_reduce": lambda n: 4 * (n - 1),
    "all_gather": lambda n: 2 * (n - 1),
}
"""One-way delays in a row, of gloo's algorithms."""

LARGEST_RESIDUAL = 0.15
LARGEST_SIZES = 16
"""Beta is the slope of sizes from the largest / this on: with 16 MB, 8 times a shaper's usual burst of 128 KB."""


@dataclass(frozen=True)
class Fit:
    """``alpha`` in seconds, ``beta`` in seconds per byte. ``residuals``: predicted / measured - 1, by size in bytes."""

    op: str
    world: int
    alpha: float
    beta: float
    residuals: Mapping[int, float]

    @property
    def worst(self) -> int:
        """The size in bytes that the model describes worst."""
        return max(self.residuals, key=lambda size: abs(self.residuals[size]))

    @property
    def residual(self) -> float:
        """The largest of |predicted / measured - 1|."""
        return abs(self.residuals[self.worst])

    @property
    def usable(self) -> bool:
        """Whether it describes its own sweep: no size is off by more than 15 %."""
        return self.residual <= LARGEST_RESIDUAL and self.beta > 0 and self.alpha > 0


def hops(op: str, world: int) -> int:
    """One-way delays in a row. Raises ``ValueError`` for an op whose steps are not known."""
    name = op.removeprefix("comm.")
    if name not in HOPS:
        raise ValueError(f"the steps of gloo's {op} are not known; a fit is there for {' and '.join(HOPS)}")
    return HOPS[name](world)


def fit(op: str, world: int, seconds: Mapping[int, float], *, steps: int | None = None) -> Fit:
    """From the median seconds by size in bytes, of at least three sizes of one op over 2 or more ranks.

    ``steps``: one-way delays in a row; by default those of `HOPS`.

    Raises ``ValueError`` for fewer, or an op whose steps are not known.

    >>> sizes = (4000, 100_000, 1_000_000, 4_000_000)
    >>> found = fit("all_reduce", 2, {size: predict("all_reduce", 2, size, 0.005, 1e-7) for size in sizes})
    >>> round(found.alpha, 6), round(found.beta, 10), found.usable
    (0.005, 1e-07, True)
    """
    steps = hops(op, world) if steps is None else steps
    if len(seconds) < 3 or world < 2:
        raise ValueError(f"a fit needs three sizes and 2 ranks; there are {len(seconds)} of {op} over {world}")
    crossing = bus_factor(op, world)
    large = [size for size in sorted(seconds) if size >= max(seconds) / LARGEST_SIZES]
    large = large if len(large) > 1 else sorted(seconds)[-2:]
    # The median of all slopes: one size that TCP treated badly would otherwise decide.
    beta = statistics.median(
        (seconds[larger] - seconds[smaller]) / (larger - smaller) / crossing
        for smaller, larger in itertools.combinations(large, 2)
    )
    smallest = min(seconds)
    small = [size for size in seconds if size == smallest or crossing * size * beta <= seconds[size] / 2]
    alpha = statistics.median((seconds[size] - crossing * size * beta) / steps for size in small)
    predicted = {size: steps * alpha + crossing * size * beta for size in sorted(seconds)}
    residuals = {size: predicted[size] / seconds[size] - 1 for size in predicted}
    return Fit(op, world, alpha, beta, residuals)


def predict(op: str, world: int, size: int, alpha: float, beta: float) -> float:
    """Seconds of one collective of ``size`` bytes over ``world`` ranks."""
    return hops(op, world) * alpha + bus_factor(op, world) * size * beta


def errors(model: Fit, world: int, seconds: Mapping[int, float]) -> Sequence[float]:
    """How far the model is off at another number of ranks: predicted / measured - 1, by size."""
    return [
        predict(model.op, world, size, model.alpha, model.beta) / measured - 1 for size, measured in seconds.items()
    ]
