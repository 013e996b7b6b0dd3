"""The knobs of a local update, chosen from measurements: the length of rounds, the fragments, and the overlap.

With c the seconds of an inner step on the slowest rank, and x(n) = a + b n those of an exchange of n elements with the
compressor in use, from two trials; f_p the share of the elements in fragment p, H the steps of a round, and
`overlap_steps` = t:

    exposed in a round   E = sum_p max(0, x(f_p n) - t c)               compute utilization   U = H c / (H c + E)
    on the links         sum_p x(f_p n)  <=  0.8 H c                    where anything overlaps

Fragments are as large as 5 steps hide, t is as long as the largest one needs, up to 5 steps, since more costs loss, and
H is the shortest round that reaches the target utilization: short rounds lose least. H is at least 10, the steps that
are measured, and at most 1000.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from dtrain.comm.runtime.fragments import Fragments, Shapes

Knob: TypeAlias = int | Literal["auto"]

LEAST_STEPS, MOST_STEPS = 10, 1000
MOST_OVERLAP = 5
LINK_SHARE = 0.8
"""The fraction of a round in which a hidden exchange may use the links."""


@dataclass(frozen=True)
class Knobs:
    """What can be chosen. ``overlap_steps``, ``mix``: see `local_update`."""

    every_steps: int
    overlap_steps: int
    mix: float
    fragments: Fragments


@dataclass(frozen=True)
class Auto:
    """Which knobs are to be chosen, and the target compute utilization."""

    utilization: float
    every_steps: bool = False
    overlap_steps: bool = False
    mix: bool = False
    fragments: bool = False

    @property
    def wanted(self) -> bool:
        return self.every_steps or self.overlap_steps or self.fragments


@dataclass(frozen=True)
class Measured:
    """Seconds on the slowest rank: of a step; of an exchange, its latency and the time for each of ``elements``."""

    step: float
    latency: float
    per_element: float
    elements: int

    def exchange(self, share: float) -> float:
        """Seconds of an exchange of ``share`` of all elements."""
        return self.latency + self.per_element * share * self.elements


def fitted(step: float, trials: Sequence[tuple[int, float]], elements: int) -> Measured:
    """`Measured` from two trials, each (elements, seconds).

    >>> round(fitted(1.0, [(100, 0.2), (200, 0.3)], 1000).exchange(1.0), 6)
    1.1
    """
    (few, short), (many, long) = trials
    if many == few or long <= short:
        return Measured(step, 0.0, long / max(1, many), elements)
    slope = (long - short) / (many - few)
    return Measured(step, max(0.0, short - slope * few), slope, elements)


def median_step(ended: Sequence[float]) -> float:
    """The median seconds of a step. ``ended``: times at which steps ended."""
    return statistics.median(after - before for before, after in itertools.pairwise(ended))


def choose(
    auto: Auto, configured: Knobs, measured: Measured, shapes: Shapes, *, whole_round: bool
) -> tuple[Knobs, str]:
    """The knobs, chosen where ``auto`` says so and otherwise as ``configured``; and the reasons, as text.

    ``whole_round``: an exchange overlaps all of the next round, however long that is.
    """
    if whole_round:
        return _hidden(auto, configured, measured)
    step = max(measured.step, 1e-9)
    cut, overlap, every = configured.fragments, configured.overlap_steps, configured.every_steps
    if auto.fragments:
        window = (MOST_OVERLAP if auto.overlap_steps else overlap) * step or math.inf  # without overlap nothing hides
        cut = _largest(cut, shapes, lambda share: measured.exchange(share) <= window)
    exchanges = [measured.exchange(share) for share in _shares(cut, shapes)]
    if auto.overlap_steps:
        overlap = min(MOST_OVERLAP, max(1, _up(max(exchanges) / step)))
        if not auto.every_steps:
            overlap = min(overlap, every - 1)
    exposed = sum(max(0.0, seconds - overlap * step) for seconds in exchanges)
    if auto.every_steps:
        enough = exposed * auto.utilization / (1 - auto.utilization) / step
        fits = sum(exchanges) / LINK_SHARE / step if overlap else 0.0
        every = min(MOST_STEPS, max(LEAST_STEPS, overlap + 1, _up(enough), _up(fits)))
    mix = (0.5 if overlap > 1 else 0.0) if auto.mix else configured.mix
    expected = every * step / (every * step + exposed)
    largest, count = max(exchanges), len(exchanges)
    pieces = f"{count} fragments of up to {largest:.3g} s" if count > 1 else "all of it at once"
    least = ", the least that is chosen" if auto.every_steps and every == LEAST_STEPS else ""
    blocks = f", layers_per_fragment={cut.layers}" if cut.layers else ""
    text = (
        f"a step takes {measured.step:.3g} s and the exchanges of a round {sum(exchanges):.3g} s, {pieces}: "
        f"every_steps={every}{least}, overlap_steps={overlap}{blocks} leave {exposed:.3g} s of a round exposed, a "
        f"compute utilization of {expected:.1%} (asked for: {auto.utilization:.1%})"
    )
    return replace(configured, every_steps=every, overlap_steps=overlap, mix=mix, fragments=cut), text


def _hidden(auto: Auto, configured: Knobs, measured: Measured) -> tuple[Knobs, str]:
    """Rounds as long as an exchange needs."""
    seconds, step = measured.exchange(1.0), max(measured.step, 1e-9)
    every = min(MOST_STEPS, max(LEAST_STEPS, _up(seconds / LINK_SHARE / step)))
    text = (
        f"a step takes {measured.step:.3g} s and the exchange of a round {seconds:.3g} s: every_steps={every} hides it "
        f"behind {every * step:.3g} s"
    )
    return replace(configured, every_steps=every, overlap_steps=every), text


def _shares(cut: Fragments, shapes: Shapes) -> list[float]:
    """The share of all elements in each fragment."""
    sizes = [sum(math.prod(shapes[fqn]) for fqn in names) for names in cut.cut(shapes)]
    return [size / max(1, sum(sizes)) for size in sizes]


def _largest(cut: Fragments, shapes: Shapes, fits: Callable[[float], bool]) -> Fragments:
    """``cut`` with the most blocks in a fragment that fit; one block if none do."""
    blocks = len(replace(cut, layers=1).cut(shapes))
    candidates = (replace(cut, layers=layers) for layers in range(blocks, 0, -1))
    return next((cuts for cuts in candidates if all(map(fits, _shares(cuts, shapes)))), replace(cut, layers=1))


def _up(steps: float) -> int:
    """Round up, but for a rounding error."""
    return math.ceil(steps - 1e-9)
