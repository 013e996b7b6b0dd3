"""DiLoCo whose exchange overlaps a whole round (Kale, Douillard and Donchev, arXiv:2502.12996), delayed or eager.

    delayed    at a round's end the parameters are reset to the anchor; the pseudo-gradient is applied a round later
    eager      the outer step is taken at once along the last mean, in which this replica's share is brought up to date:
               outer step along  D(last) - d_i(last) / M + d_i / M

`local_update` with ``delay="stale"`` and ``delay="eager"``. Eager anchors and momenta differ between replicas by what
is still under way. With one replica, eager is DiLoCo.
Communication and bytes: one parameter exchange every H steps, overlapped with the whole next round.
Keeps: the anchor and the outer momentum; eager also the last pseudo-gradient.
"""

from __future__ import annotations

from dtrain.comm.methods.local_update import LocalUpdate, local_update
from dtrain.comm.outer_optimizers import OuterOptimizer, nesterov
from dtrain.comm.plans.plan import Compress
from dtrain.comm.runtime.consistency import Tie
from dtrain.comm.runtime.loop_spec import VERIFY_ROUNDS
from dtrain.comm.runtime.round_lengths import EverySteps


def delayed_diloco(
    *,
    every_steps: EverySteps = 100,
    outer: OuterOptimizer | None = None,
    compress: Compress = None,
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> LocalUpdate:
    """DiLoCo with each outer step one round late. For short rounds: it degrades as they grow.

    Args:
        every_steps: H, inner steps in a round, which hide an exchange that takes no longer; or "auto", see `knobs`;
            or rounds of changing length, see `dtrain.rounds`.
        outer: the outer optimizer; ``nesterov(lr=0.7, momentum=0.9)`` by default.
        compress: a compressor for the pseudo-gradients, ``error_feedback(...)`` of one, or None for fp32.
        verify_every, tie: when replicas are compared, and what happens if they differ; see `local_update`.

    >>> delayed_diloco(every_steps=20).overlap_steps
    20

    Raises ``ValueError`` for a period that is no positive integer. Source: arXiv:2502.12996.
    """
    return _late(every_steps, outer, compress, verify_every, tie, eager=False)


def eager_diloco(
    *,
    every_steps: EverySteps = 100,
    outer: OuterOptimizer | None = None,
    compress: Compress = None,
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> LocalUpdate:
    """DiLoCo that steps along the last mean, with its own share up to date. Arguments as for `delayed_diloco`.

    >>> eager_diloco(every_steps=20).delay
    'eager'

    Raises ``ValueError`` for a period that is no positive integer. Source: arXiv:2502.12996.
    """
    return _late(every_steps, outer, compress, verify_every, tie, eager=True)


def _late(
    every_steps: EverySteps,
    outer: OuterOptimizer | None,
    compress: Compress,
    verify_every: int,
    tie: Tie,
    *,
    eager: bool,
) -> LocalUpdate:
    return local_update(
        every_steps=every_steps,
        outer=nesterov() if outer is None else outer,
        compress=compress,
        delay="eager" if eager else "stale",
        verify_every=verify_every,
        tie=tie,
    )
