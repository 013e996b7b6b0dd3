"""The knobs of a local update, chosen from what was measured: how long rounds are, what is cut, and what overlaps.

With c the seconds of an inner step on the slowest rank, and x(n) = a + b n those of an exchange of n elements in the
codec chosen, from two trials; fragment p of the elements' share f_p, rounds of H steps, and `overlap_steps` = t:

    exposed in a round   E = sum_p max(0, x(f_p n) - t c)               compute utilization   U = H c / (H c + E)
    on the links         sum_p x(f_p n)  <=  0.8 H c                    where anything overlaps

Fragments are as large as 5 steps hide, t is as long as the largest one needs, up to 5 steps, since more costs loss, and
H is the shortest round that gives the utilization asked for: short rounds lose least. Never below 10 steps, which are
also those that are measured, nor above 1000.
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
"""The part of a round in which an exchange that shall stay hidden may use the links."""


@dataclass(frozen=True)
class Knobs:
    """What can be chosen. ``overlap_steps``: as `LocalUpdate` has it; ``mix`` goes with it."""

    every_steps: int
    overlap_steps: int
    mix: float
    fragments: Fragments


@dataclass(frozen=True)
class Auto:
    """Which of them are to be chosen, and the compute utilization to aim at."""

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
    """Seconds, of the slowest rank: of a step; of an exchange, whatever its size, and for each of ``elements`` more."""

    step: float
    latency: float
    per_element: float
    elements: int

    def exchange(self, share: float) -> float:
        """Seconds of an exchange of a share of all elements."""
        return self.latency + self.per_element * share * self.elements


def fitted(step: float, trials: Sequence[tuple[int, float]], elements: int) -> Measured:
    """`Measured` from two trials, each of some elements and the seconds that they took.

    >>> round(fitted(1.0, [(100, 0.2), (200, 0.3)], 1000).exchange(1.0), 6)
    1.1
    """
    (few, short), (many, long) = trials
    if many == few or long <= short:
        return Measured(step, 0.0, long / max(1, many), elements)
    slope = (long - short) / (many - few)
    return Measured(step, max(0.0, short - slope * few), slope, elements)


def median_step(ended: Sequence[float]) -> float:
    """The usual seconds between two of the times at which steps ended."""
    return statistics.median(after - before for before, after in itertools.pairwise(ended))


def choose(auto: Auto, asked: Knobs, found: Measured, shapes: Shapes, *, whole_round: bool) -> tuple[Knobs, str]:
    """What ``auto`` wants chosen of the knobs, the others as ``asked``; and the reasons, for people.

    ``whole_round``: an exchange overlaps all of the next round, however long that is.
    """
    if whole_round:
        return _hidden(auto, asked, found)
    step = max(found.step, 1e-9)
    cut, overlap, every = asked.fragments, asked.overlap_steps, asked.every_steps
    if auto.fragments:
        window = (MOST_OVERLAP if auto.overlap_steps else overlap) * step or math.inf  # without overlap nothing hides
        cut = _largest(cut, shapes, lambda share: found.exchange(share) <= window)
    taken = [found.exchange(share) for share in _shares(cut, shapes)]
    if auto.overlap_steps:
        overlap = min(MOST_OVERLAP, max(1, _up(max(taken) / step)))
        if not auto.every_steps:
            overlap = min(overlap, every - 1)
    exposed = sum(max(0.0, each - overlap * step) for each in taken)
    if auto.every_steps:
        enough = exposed * auto.utilization / (1 - auto.utilization) / step
        fits = sum(taken) / LINK_SHARE / step if overlap else 0.0
        every = min(MOST_STEPS, max(LEAST_STEPS, overlap + 1, _up(enough), _up(fits)))
    mix = (0.5 if overlap > 1 else 0.0) if auto.mix else asked.mix
    expected = every * step / (every * step + exposed)
    parts = f"{len(taken)} fragments of up to {max(taken):.3g} s" if len(taken) > 1 else "all of it at once"
    least = ", the least that is chosen" if auto.every_steps and every == LEAST_STEPS else ""
    blocks = f", layers_per_fragment={cut.layers}" if cut.layers else ""
    text = (
        f"a step takes {found.step:.3g} s and the exchanges of a round {sum(taken):.3g} s, {parts}: every_steps={every}"
        f"{least}, overlap_steps={overlap}{blocks} leave {exposed:.3g} s of a round exposed, a compute utilization of "
        f"{expected:.1%} (asked for: {auto.utilization:.1%})"
    )
    return replace(asked, every_steps=every, overlap_steps=overlap, mix=mix, fragments=cut), text


def _hidden(auto: Auto, asked: Knobs, found: Measured) -> tuple[Knobs, str]:
    """Rounds that are as long as an exchange needs."""
    whole, step = found.exchange(1.0), max(found.step, 1e-9)
    every = min(MOST_STEPS, max(LEAST_STEPS, _up(whole / LINK_SHARE / step)))
    text = (
        f"a step takes {found.step:.3g} s and the exchange of a round {whole:.3g} s: every_steps={every} hides it "
        f"behind {every * step:.3g} s"
    )
    return replace(asked, every_steps=every, overlap_steps=every), text


def _shares(cut: Fragments, shapes: Shapes) -> list[float]:
    """The part of all elements that is in each fragment."""
    sizes = [sum(math.prod(shapes[fqn]) for fqn in names) for names in cut.cut(shapes)]
    return [size / max(1, sum(sizes)) for size in sizes]


def _largest(cut: Fragments, shapes: Shapes, fits: Callable[[float], bool]) -> Fragments:
    """With as many blocks in a fragment as still fit; one block where nothing does."""
    blocks = len(replace(cut, layers=1).cut(shapes))
    tried = (replace(cut, layers=layers) for layers in range(blocks, 0, -1))
    return next((each for each in tried if all(map(fits, _shares(each, shapes)))), replace(cut, layers=1))


def _up(steps: float) -> int:
    """To the next whole number; a rounding error is none."""
    return math.ceil(steps - 1e-9)
