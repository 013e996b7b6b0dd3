"""DiLoCo (Douillard et al., arXiv:2311.08105): local AdamW, then an outer Nesterov step on the mean pseudo-gradient.

    for H steps:  parameters_i <- inner optimizer
    anchor <- outer(anchor, mean_i(anchor - parameters_i));   parameters_i <- anchor

`local_update` with outer Nesterov SGD. With one replica it is a lookahead optimizer, not the identity.
Communication: one exchange every H steps. Bytes: those of one (compressed) parameter exchange per round.
Keeps: the anchor and the outer momentum.
"""

from __future__ import annotations

from typing import Literal

from dtrain.comm.collectives.routes import Route
from dtrain.comm.methods.local_update import LocalUpdate, local_update
from dtrain.comm.outer_optimizers import OuterOptimizer, nesterov
from dtrain.comm.plans.plan import Compress
from dtrain.comm.runtime.consistency import Tie
from dtrain.comm.runtime.loop_spec import VERIFY_ROUNDS, OuterState
from dtrain.comm.runtime.round_lengths import EverySteps


def diloco(
    *,
    every_steps: EverySteps = 100,
    outer: OuterOptimizer | None = None,
    compress: Compress = None,
    warmup_steps: int = 0,
    warmup_compress: Compress | Literal["same"] = None,
    outer_state: OuterState = "replicated",
    utilization: float = 0.95,
    route: Route = "auto",
    lossless: int | None = None,
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> LocalUpdate:
    """DiLoCo.

    Args:
        every_steps: H, inner steps in a round; or "auto", see `knobs`; or rounds of changing length, see
            `dtrain.rounds`.
        outer: the outer optimizer; ``nesterov(lr=0.7, momentum=0.9)`` by default, the paper's choice.
        compress: a compressor for the pseudo-gradients, ``error_feedback(...)`` of one, or None for fp32.
        warmup_steps: steps of data parallelism before the first round; the paper takes 24,000 of 88,000.
        warmup_compress: a compressor for their gradients, None for fp32, or "same"; see `local_update`.
        outer_state: "sharded" (1 / M of anchor and outer momentum on each of M replicas; fp32 only) or "offloaded" (in
            host memory between rounds); "replicated" by default.
        utilization: the target compute utilization of "auto", in (0, 1).
        route: "auto", or another way to all peers, as "all_reduce" in fp32; see `local_update`.
        lossless: zstandard's level for what a round sends, or None; see `local_update`.
        verify_every, tie: when replicas are compared, and what happens if they differ; see `local_update`.

    >>> diloco().outer == nesterov(lr=0.7, momentum=0.9)
    True

    Raises ``ValueError`` for a period that is no positive integer. Source: arXiv:2311.08105, algorithm 1.
    """
    return local_update(
        every_steps=every_steps,
        outer=nesterov() if outer is None else outer,
        compress=compress,
        warmup_steps=warmup_steps,
        warmup_compress=warmup_compress,
        outer_state=outer_state,
        utilization=utilization,
        route=route,
        lossless=lossless,
        verify_every=verify_every,
        tie=tie,
    )
