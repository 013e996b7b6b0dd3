"""Lengths of the rounds of a local update, where they change: one by one, by a power law, by the learning rate.

    lengths    h_1, h_2, ..., h_N
    power      round i of N ends after step ceil(T (i / N)^p) of T: rounds grow where p > 1, and shrink where p < 1
    qsr        H = max(base, floor((alpha / lr)^2)), lr at the round's start

`qsr` is the quadratic synchronization rule (Gu et al., ICLR 2024, arXiv:2310.14423): the lower the learning rate, the
less replicas drift apart in a step, and the longer they may train alone. Its authors' code keeps rounds short in the
warm-up of the learning rate, and ends the last one with the run.

Steps are counted from the first step of rounds, after the warm-up. Communication: none where lengths follow from the
step; where they follow from the learning rate, 8 bytes to each peer at the beginning of a round: all take the longest
that any of them asks for, since rates that were computed on different machines may differ by round-off.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from dtrain.comm.runtime.knobs import MOST_STEPS


@runtime_checkable
class RoundLengths(Protocol):
    """How long each round is. Derive one of your own from it: a frozen dataclass with `length`."""

    @property
    def shortest(self) -> int:
        """No round is shorter, unless training ends in it."""
        return 1

    @property
    def steps(self) -> int | None:
        """The steps of all rounds together; None: there are as many as training needs."""
        return None

    @property
    def follows_rate(self) -> bool:
        """Whether lengths depend on the learning rate; if so, replicas agree on each."""
        return True

    def length(self, step: int, lr: float) -> int:
        """The steps of the round that begins after ``step`` steps, the first of which is made with ``lr``.

        A function of its arguments alone. ``step`` is at first 0, and then the last one plus the length that was given.
        """


EverySteps: TypeAlias = int | Literal["auto"] | RoundLengths
"""What users may pass as ``every_steps``."""


@dataclass(frozen=True)
class Lengths(RoundLengths):
    """See `lengths`."""

    each: tuple[int, ...]

    @property
    def shortest(self) -> int:
        return min(self.each)

    @property
    def steps(self) -> int:
        return sum(self.each)

    @property
    def follows_rate(self) -> bool:
        return False

    def length(self, step: int, lr: float) -> int:
        return self.each[min(bisect.bisect_right(self._ends, step), len(self.each) - 1)]

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(self.each))


@dataclass(frozen=True)
class Power(RoundLengths):
    """See `power`."""

    total: int
    rounds: int
    exponent: float
    at_least: int

    @property
    def shortest(self) -> int:
        return self._rounds.shortest

    @property
    def steps(self) -> int:
        return self.total

    @property
    def follows_rate(self) -> bool:
        return False

    def length(self, step: int, lr: float) -> int:
        return self._rounds.length(step, lr)

    @cached_property
    def _rounds(self) -> Lengths:
        ends = [0]
        for number in range(1, self.rounds + 1):
            exact = self.total * (number / self.rounds) ** self.exponent
            end = math.ceil(exact * (1 - 1e-12))  # a whole number stays one whatever the last bits of the power are
            left = self.total - end
            if end - ends[-1] >= self.at_least and (left == 0 or left >= self.at_least):
                ends.append(end)
        return Lengths(tuple(after - before for before, after in itertools.pairwise(ends)))


@dataclass(frozen=True)
class QSR(RoundLengths):
    """See `qsr`."""

    alpha: float
    base: int
    warmup_steps: int
    longest: int

    @property
    def shortest(self) -> int:
        return self.base

    def length(self, step: int, lr: float) -> int:
        if step < self.warmup_steps:
            return self.base
        if not lr > 0 or self.alpha / lr >= math.sqrt(self.longest):
            return self.longest
        ratio = self.alpha / lr
        return max(self.base, math.floor(ratio * ratio * (1 + 1e-12)))  # 0.03 / 0.003 is 10, whatever its last bit says


def lengths(each: Sequence[int]) -> Lengths:
    """Rounds of given lengths.

    Args:
        each: the steps of each round, in order. Where training is longer than all of them, the last length repeats;
            `dtrain train` refuses a list that is shorter than the run. A round in which training ends is closed early
            by ``sync.close_round()``.

    >>> rounds = lengths([2, 3, 5])
    >>> rounds.length(0, 0.1), rounds.length(2, 0.1), rounds.length(5, 0.1), rounds.length(10, 0.1)
    (2, 3, 5, 5)

    Raises ``ValueError`` for an empty list and for lengths that are not positive whole numbers.
    """
    if isinstance(each, str) or not isinstance(each, Sequence) or not each:
        raise ValueError(f"each is {each!r}; give the steps of every round, for example [10, 20, 40]")
    for number, length in enumerate(each):
        if not _whole(length):
            raise ValueError(f"each[{number}] is {length!r}; every round has a positive whole number of inner steps")
    return Lengths(tuple(each))


def power(*, steps: int, rounds: int, power: float, at_least: int = 1) -> Power:
    """Rounds whose ends follow a power law: round i of N ends after step ceil(T (i / N)^power).

    Args:
        steps: T, the steps of all rounds together: those of the run less its warm-up, so that the last round ends with
            the run. Should training be longer, the last length repeats; `dtrain train` refuses that.
        rounds: N, at most ``steps``. Rounds that would end less than ``at_least`` steps after each other are one.
        power: 1 for rounds of one length, more for rounds that grow: short where the model learns most.
        at_least: no round is shorter; with an overlap, more than ``overlap_steps``, and for fragments in turns at least
            as many as there are fragments.

    >>> law, ends = power(steps=100, rounds=4, power=2.0), [0]
    >>> while ends[-1] < 100:
    ...     ends.append(ends[-1] + law.length(ends[-1], lr=0.1))
    >>> ends
    [0, 7, 25, 57, 100]

    Raises ``ValueError`` for numbers outside their range.
    """
    for name, number in (("steps", steps), ("rounds", rounds), ("at_least", at_least)):
        if not _whole(number):
            raise ValueError(f"{name} is {number!r}; give a positive whole number")
    if rounds > steps or at_least > steps:
        raise ValueError(
            f"{steps} steps cannot be cut into {rounds} rounds of at least {at_least} steps; give fewer rounds, or "
            "the steps of the whole run"
        )
    if isinstance(power, bool) or not isinstance(power, int | float) or not 0 < power < math.inf:
        raise ValueError(f"power is {power!r}; give a positive number: 1 for equal rounds, 1.5 for rounds that grow")
    return Power(steps, rounds, float(power), at_least)


def qsr(*, alpha: float, base: int, warmup_steps: int = 0, longest: int = MOST_STEPS) -> QSR:
    """The quadratic synchronization rule: rounds of max(base, floor((alpha / lr)^2)) steps.

    Args:
        alpha: in units of the inner learning rate; at rates above alpha / sqrt(base) rounds have ``base`` steps. To be
            tuned: the paper takes 0.0175 for AdamW with a peak of 0.008 and base 4.
        base: H_base, the least steps in a round.
        warmup_steps: rounds that begin in the first ``warmup_steps`` steps have ``base`` steps: those in which the
            learning rate still rises, whose low rates say nothing of how far replicas drift.
        longest: the most steps in a round, where the rate comes close to 0.

    >>> rule = qsr(alpha=0.03, base=4)
    >>> rule.length(0, lr=0.02), rule.length(40, lr=0.003), rule.length(900, lr=0.0)
    (4, 100, 1000)

    Not for elastic runs. Raises ``ValueError`` for numbers outside their range. Source: arXiv:2310.14423.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha!r}; give a positive number, about sqrt(base) times a late learning rate")
    if not _whole(base):
        raise ValueError(f"base is {base!r}; a round has a positive whole number of inner steps")
    if not _whole(longest) or longest < base:
        raise ValueError(f"longest is {longest!r}; give a whole number of steps, at least base, which is {base}")
    if warmup_steps != 0 and not _whole(warmup_steps):
        raise ValueError(f"warmup_steps is {warmup_steps!r}; give a whole number of steps, 0 for none")
    return QSR(float(alpha), base, warmup_steps, longest)


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1
