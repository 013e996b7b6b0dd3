"""Moments of simulated time, in seconds: one number where all ranks do the same, else one for each of them."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

Times: TypeAlias = float | Tensor
"""A moment or a duration: of all ranks, or fp64 [ranks]."""

NEVER_LATE = -math.inf
"""When something is ready that nothing was needed for."""


def latest(*moments: Times) -> Times:
    """The latest of ``moments``, rank by rank.

    >>> latest(1.0, torch.tensor([0.5, 2.0], dtype=torch.float64)).tolist()
    [1.0, 2.0]
    """
    last: Times = NEVER_LATE
    for moment in moments:
        if isinstance(moment, float) and isinstance(last, float):
            last = moment if moment > last else last
        else:
            last = torch.maximum(_tensor(last), _tensor(moment))
    return last


def of_all(moment: Times) -> float:
    """The moment of the last rank."""
    return moment if isinstance(moment, float) else float(moment.max())


def of_first(moment: Times) -> float:
    """The moment of the first rank."""
    return moment if isinstance(moment, float) else float(moment.min())


def mean_of(duration: Times) -> float:
    """The mean over the ranks."""
    return duration if isinstance(duration, float) else float(duration.mean())


def _tensor(moment: Times) -> Tensor:
    return torch.tensor(moment, dtype=torch.float64) if isinstance(moment, float) else moment
