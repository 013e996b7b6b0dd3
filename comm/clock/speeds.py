"""How fast ranks are: classes of ranks, and noise from step to step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dtrain.comm.clock.times import Times


@dataclass(frozen=True)
class Speeds:
    """``slow``: (ranks, factor) of those that take ``factor`` times as long as the rest. ``jitter``: the standard
    deviation of the logarithm of each rank's step, drawn anew in each, from ``seed``; its mean is 1.

    >>> Speeds(slow=((1, 2.0),)).of_step(0, world=3).tolist()
    [2.0, 1.0, 1.0]

    Raises ``ValueError`` for a factor that is not positive and for a negative jitter.
    """

    slow: Sequence[tuple[int, float]] = ()
    jitter: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for ranks, factor in self.slow:
            if ranks < 1 or not 0 < factor < math.inf:
                raise ValueError(f"{ranks} ranks take {factor!r} times as long as others; give a rank or more, and a "
                                 "factor above 0, such as 1x1.5")  # fmt: skip
        if not 0 <= self.jitter < 3:
            raise ValueError(f"jitter={self.jitter!r}; give a standard deviation from 0 on, such as 0.1 for 10 %")

    def of_step(self, number: int, world: int) -> Times:
        """Each rank's factor in step ``number``. Raises ``ValueError`` where more ranks are slow than there are."""
        if not self.slow and not self.jitter:
            return 1.0
        slow = sum(ranks for ranks, _ in self.slow)
        if slow > world:
            raise ValueError(f"{slow} ranks are slow, and there are {world}")
        factors = torch.ones(world, dtype=torch.float64)
        begin = 0
        for ranks, factor in self.slow:
            factors[begin : begin + ranks] = factor
            begin += ranks
        if self.jitter:
            draw = torch.Generator().manual_seed(hash((self.seed, number)) % 2**63)
            noise = torch.randn(world, generator=draw, dtype=torch.float64) * self.jitter
            factors *= (noise - self.jitter**2 / 2).exp()
        return factors
