"""SlowMo (Wang et al., arXiv:1910.00643): local steps, an average, and a slow momentum over the averages.

    u <- momentum u + (anchor - mean_i parameters_i) / g;      anchor <- anchor - lr g u        g: the round's inner lr

In the paper g is constant within a round. Here it is the mean over the round's steps: with the last
step's, a round whose rate decays to 0 would count as a huge one. Where g rises from one round to the next, as at a warm
restart, u is first multiplied by old g / new g, so that the old momentum moves no further than it would have.
`local_update` with outer momentum in units of the inner learning rate, so that updates made at another rate count as
they would now. With a constant rate it is outer heavy ball, and without momentum Local SGD.
Communication: one exchange every H steps. Bytes: those of one parameter exchange per round. Keeps: anchor and momentum.
"""

from __future__ import annotations

from dtrain.comm.methods.local_update import LocalUpdate, local_update
from dtrain.comm.outer_optimizers import SlowMomentum, checked
from dtrain.comm.plans.plan import Compress
from dtrain.comm.runtime.consistency import Tie
from dtrain.comm.runtime.loop_spec import VERIFY_ROUNDS, OuterState
from dtrain.comm.runtime.round_lengths import EverySteps


def slowmo(
    *,
    every_steps: EverySteps = 48,
    lr: float = 1.0,
    momentum: float = 0.5,
    compress: Compress = None,
    outer_state: OuterState = "replicated",
    utilization: float = 0.95,
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> LocalUpdate:
    """SlowMo. The inner learning rate must be the same for all parameters.

    Args:
        every_steps: inner steps in a round, 12 to 48 as a rule; or "auto", see `knobs`; or rounds of changing length,
            see `dtrain.rounds`.
        lr: alpha, the slow learning rate.
        momentum: beta, the slow momentum, in [0, 1).
        compress: a compressor for the pseudo-gradients, ``error_feedback(...)`` of one, or None for fp32.
        outer_state: "sharded" (1 / M of anchor and outer momentum on each of M replicas; fp32 only) or "offloaded" (in
            host memory between rounds); "replicated" by default.
        utilization: the target compute utilization of "auto", in (0, 1).
        verify_every, tie: when replicas are compared, and what happens if they differ; see `local_update`.

    >>> slowmo().outer
    SlowMomentum(lr=1.0, momentum=0.5)

    Raises ``ValueError`` for numbers outside their range. Source: arXiv:1910.00643, algorithm 1.
    """
    checked(lr, momentum)
    return local_update(
        every_steps=every_steps,
        outer=SlowMomentum(lr, momentum),
        compress=compress,
        outer_state=outer_state,
        utilization=utilization,
        verify_every=verify_every,
        tie=tie,
    )
