"""Local SGD (Stich, arXiv:1805.09767), with any inner optimizer: train alone, then average the parameters.

`local_update` with outer SGD(lr=1, momentum=0): the new anchor is the mean of the replicas' parameters.
Communication: one exchange every H steps. Bytes: those of one parameter exchange per round. Keeps: the anchor.
"""

from __future__ import annotations

from dtrain.comm.collectives.routes import Route
from dtrain.comm.methods.local_update import LocalUpdate, local_update
from dtrain.comm.outer_optimizers import sgd
from dtrain.comm.plans.plan import Compress
from dtrain.comm.runtime.consistency import Tie
from dtrain.comm.runtime.loop_spec import VERIFY_ROUNDS, OuterState
from dtrain.comm.runtime.round_lengths import EverySteps


def local_sgd(
    *,
    every_steps: EverySteps,
    compress: Compress = None,
    outer_state: OuterState = "replicated",
    utilization: float = 0.95,
    route: Route = "auto",
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> LocalUpdate:
    """Average the replicas' parameters every ``every_steps`` inner steps. Arguments as for `diloco`.

    >>> local_sgd(every_steps=16).every_steps
    16

    Raises ``ValueError`` for a period that is no positive integer. Source: arXiv:1805.09767.
    """
    return local_update(
        every_steps=every_steps,
        outer=sgd(lr=1.0),
        compress=compress,
        outer_state=outer_state,
        utilization=utilization,
        route=route,
        verify_every=verify_every,
        tie=tie,
    )
