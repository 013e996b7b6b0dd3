"""DiLoCo whose exchange overlaps a whole round (Kale, Douillard and Donchev, arXiv:2502.12996), delayed or eager.

    delayed    at the end of a round the parameters go back to the anchor; what they learned arrives a round later
    eager      they step at once by what arrived, with their own part of it brought up to date:
               outer step along  D(last) - d_i(last) / M + d_i / M

The rows of `local_update` with ``delay="stale"`` and ``delay="eager"``. Eager anchors and momenta are each replica's
own: they differ by what is still under way. With one replica, eager is DiLoCo.
Communication: one round every H steps, behind all of the next round. Bytes: of one parameter exchange per round.
Keeps: the anchor and the outer momentum; eager also the last delta.
"""

from __future__ import annotations

from dtrain.comm.methods.local_update import LocalUpdate, local_update
from dtrain.comm.outer_optimizers import OuterOptimizer, nesterov
from dtrain.comm.plans.plan import Compress
from dtrain.comm.runtime.consistency import Tie
from dtrain.comm.runtime.knobs import Knob
from dtrain.comm.runtime.loop_spec import VERIFY_ROUNDS


def delayed_diloco(
    *,
    every_steps: Knob = 100,
    outer: OuterOptimizer | None = None,
    compress: Compress = None,
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> LocalUpdate:
    """DiLoCo one round late. For short rounds: it degrades as they grow.

    Args:
        every_steps: H, the inner steps in a round, in which an exchange must fit to stay hidden; or "auto".
        outer: the outer optimizer; ``nesterov(lr=0.7, momentum=0.9)`` by default.
        compress: a compressor for the deltas, ``error_feedback(...)`` of one, or None for fp32.
        verify_every, tie: when replicas are compared, and what happens if they differ; see `local_update`.

    >>> delayed_diloco(every_steps=20).overlap_steps
    20

    Raises ``ValueError`` for a period that is no positive integer. Source: arXiv:2502.12996.
    """
    return _late(every_steps, outer, compress, verify_every, tie, eager=False)


def eager_diloco(
    *,
    every_steps: Knob = 100,
    outer: OuterOptimizer | None = None,
    compress: Compress = None,
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> LocalUpdate:
    """DiLoCo that steps with the last round's mean and its own fresh part. Arguments as for `delayed_diloco`.

    >>> eager_diloco(every_steps=20).delay
    'eager'

    Raises ``ValueError`` for a period that is no positive integer. Source: arXiv:2502.12996.
    """
    return _late(every_steps, outer, compress, verify_every, tie, eager=True)


def _late(
    every_steps: Knob, outer: OuterOptimizer | None, compress: Compress, verify_every: int, tie: Tie, *, eager: bool
) -> LocalUpdate:
    return local_update(
        every_steps=every_steps,
        outer=nesterov() if outer is None else outer,
        compress=compress,
        delay="eager" if eager else "stale",
        verify_every=verify_every,
        tie=tie,
    )
