"""Post-local SGD (Lin et al., arXiv:1808.07217): data parallelism first, Local SGD afterwards.

`local_update` with a warm-up: replicas are kept equal while their gradients, and so the inner optimizer's state, still
differ much.
Communication: in the warm-up all gradients at every step, then one exchange every H steps. Keeps: the anchor.
"""

from __future__ import annotations

from typing import Literal

from dtrain.comm.methods.local_update import LocalUpdate, local_update
from dtrain.comm.outer_optimizers import sgd
from dtrain.comm.plans.plan import Compress
from dtrain.comm.runtime.consistency import Tie
from dtrain.comm.runtime.loop_spec import VERIFY_ROUNDS
from dtrain.comm.runtime.round_lengths import EverySteps


def post_local_sgd(
    *,
    every_steps: EverySteps,
    warmup_steps: int,
    warmup_compress: Compress | Literal["same"] = None,
    compress: Compress = None,
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> LocalUpdate:
    """Average gradients for ``warmup_steps`` steps, then parameters every ``every_steps`` steps.

    ``compress`` is for the pseudo-gradients; the warm-up sends fp32, or what ``warmup_compress`` says.
    ``warmup_compress``, ``verify_every``, ``tie``: see `local_update`.

    >>> post_local_sgd(every_steps=16, warmup_steps=1000).warmup_steps
    1000

    Raises ``ValueError`` for numbers that are negative or not whole. Source: arXiv:1808.07217.
    """
    return local_update(
        every_steps=every_steps,
        outer=sgd(lr=1.0),
        compress=compress,
        warmup_steps=warmup_steps,
        warmup_compress=warmup_compress,
        verify_every=verify_every,
        tie=tie,
    )
