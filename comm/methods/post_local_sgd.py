"""Post-local SGD (Lin et al., arXiv:1808.07217): data parallelism first, Local SGD afterwards.

`local_update` with a warm-up: replicas are kept equal while their gradients, and so the inner optimizer's state, still
differ much.
Communication: in the warm-up all gradients in fp32 at every step, then one exchange every H steps. Keeps: the anchor.
"""

from __future__ import annotations

from dtrain.comm.methods.local_update import LocalUpdate, local_update
from dtrain.comm.outer_optimizers import sgd
from dtrain.comm.plans.plan import Compress
from dtrain.comm.runtime.consistency import Tie
from dtrain.comm.runtime.knobs import Knob
from dtrain.comm.runtime.loop_spec import VERIFY_ROUNDS


def post_local_sgd(
    *,
    every_steps: Knob,
    warmup_steps: int,
    compress: Compress = None,
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> LocalUpdate:
    """Average gradients for ``warmup_steps`` steps, then parameters every ``every_steps`` steps.

    ``compress`` is for the pseudo-gradients; the warm-up sends fp32. ``verify_every``, ``tie``: see `local_update`.

    >>> post_local_sgd(every_steps=16, warmup_steps=1000).warmup_steps
    1000

    Raises ``ValueError`` for numbers that are negative or not whole. Source: arXiv:1808.07217.
    """
    return local_update(
        every_steps=every_steps,
        outer=sgd(lr=1.0),
        compress=compress,
        warmup_steps=warmup_steps,
        verify_every=verify_every,
        tie=tie,
    )
