"""How the learning rate changes over a run: linear warm-up, then a constant, a line or half a cosine."""

from __future__ import annotations

import difflib
import math

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate_factor(
    step: int, *, schedule: str, warmup_steps: int, total_steps: int, final_fraction: float
) -> float:
    """What the base learning rate is multiplied by in ``step`` (from 0); in [0, 1].

    Warm-up is linear and never 0: ``1 / warmup_steps`` in step 0, 1 in step ``warmup_steps - 1``. "cosine" and
    "linear" then fall from 1 to ``final_fraction``, reached in the last step, ``total_steps - 1``, and kept beyond it;
    "constant" stays 1 and ignores ``final_fraction``. Raises ``ValueError`` for an unknown schedule or values out of
    range.

    >>> settings = {"schedule": "linear", "warmup_steps": 2, "total_steps": 6, "final_fraction": 0.2}
    >>> [learning_rate_factor(step, **settings) for step in (0, 1, 5)]
    [0.5, 1.0, 0.2]
    """
    if schedule not in SCHEDULES:
        nearest = difflib.get_close_matches(schedule, SCHEDULES, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown schedule {schedule!r}; did you mean {nearest!r}? There are {', '.join(SCHEDULES)}")
    if step < 0 or warmup_steps < 0 or total_steps < 1:
        raise ValueError(
            f"step is {step}, warmup_steps is {warmup_steps}, total_steps is {total_steps}; "
            "the first two start at 0, the last at 1"
        )
    if not 0.0 <= final_fraction <= 1.0:
        raise ValueError(f"final_fraction is {final_fraction}; it is a share of the learning rate, from 0 to 1")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    # The step that ends the warm-up already runs at 1, so the fall starts there; without warm-up, in step 0.
    start, end = max(warmup_steps - 1, 0), total_steps - 1
    progress = min(1.0, (step - start) / (end - start)) if end > start else 1.0
    remaining = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return final_fraction + (1.0 - final_fraction) * remaining
