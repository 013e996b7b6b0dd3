"""The alpha-beta model of a link, from a sweep: alpha from the smallest messages, beta from the slope of the largest.

    seconds = k(n) alpha + v(n) S beta          k: one-way delays in a row, v: times that the buffer crosses a link

One line through the whole sweep is wrong: messages below a shaper's burst travel faster than the line. gloo pays two
one-way delays for each step of a ring, so k is 4 (n - 1) for its all-reduce (measured here with latency on the links;
benchmarks in docs/evidence).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dtrain.bench.ops import bus_factor

__all__ = ["HOPS", "Fit", "fit", "predict"]

HOPS: dict[str, Callable[[int], int]] = {
    "all_reduce": lambda n: 4 * (n - 1),
    "all_gather": lambda n: 2 * (n - 1),
}
"""One-way delays in a row, of gloo's algorithms."""

LARGEST_RESIDUAL = 0.15


@dataclass(frozen=True)
class Fit:
    """``alpha`` in seconds, ``beta`` in seconds per byte. ``residual``: the median of |predicted / measured - 1|."""

    op: str
    world: int
    alpha: float
    beta: float
    residual: float

    @property
    def usable(self) -> bool:
        """Whether it describes its own sweep."""
        return self.residual <= LARGEST_RESIDUAL and self.beta > 0


def fit(op: str, world: int, seconds: Mapping[int, float]) -> Fit:
    """From the median seconds by size in bytes, of at least three sizes of one op.

    Raises ``ValueError`` for fewer, or an op whose steps are not known.

    >>> found = fit("all_reduce", 2, {size: 4 * 0.005 + size * 1e-7 for size in (4000, 10**6, 4 * 10**6)})
    >>> round(found.alpha, 4), round(found.beta, 9), found.usable
    (0.0051, 1e-07, True)
    """
    if op not in HOPS or len(seconds) < 3:
        raise ValueError(f"a fit needs three sizes of {' or '.join(HOPS)}; there are {len(seconds)} of {op}")
    sizes = sorted(seconds)
    (one, other), factor, hops = sizes[-2:], bus_factor(op, world), HOPS[op](world)
    beta = (seconds[other] - seconds[one]) / (other - one) / factor
    alpha = seconds[sizes[0]] / hops
    errors = [abs(predict(op, world, size, alpha, beta) / seconds[size] - 1) for size in sizes]
    return Fit(op, world, alpha, beta, statistics.median(errors))


def predict(op: str, world: int, size: int, alpha: float, beta: float) -> float:
    """Seconds of one collective of ``size`` bytes over ``world`` ranks."""
    return HOPS[op](world) * alpha + bus_factor(op, world) * size * beta


def errors(found: Fit, world: int, seconds: Mapping[int, float]) -> Sequence[float]:
    """How far the model is off at another number of ranks: predicted / measured - 1, by size."""
    return [
        predict(found.op, world, size, found.alpha, found.beta) / measured - 1 for size, measured in seconds.items()
    ]
