"""MuLoCo (Therien et al., arXiv:2505.23725): DiLoCo with Muon inside, its pseudo-gradients in few bits with feedback.

    every H steps   e = e + anchor - parameters;  send C(e);  e = e - C(e)           C: 2 bits, EF14 at both ends
                    anchor, momentum = nesterov(anchor, mean C(e), momentum)

`local_update` whose inner optimizer has to be Muon; fragments and an overlap make it Streaming MuLoCo.
Communication: one exchange every H steps. Bytes: 2 (M - 1) / M of 2.0625 bits for each element and round. Keeps: the
anchor, the outer momentum, the residual; one number for each element of a matrix less than AdamW inside.
"""

from __future__ import annotations

from typing import Literal

from dtrain.comm.compressors.quantize import quantize
from dtrain.comm.feedback import error_feedback
from dtrain.comm.methods.local_update import LocalUpdate, local_update
from dtrain.comm.outer_optimizers import OuterOptimizer, nesterov
from dtrain.comm.plans.plan import Compress
from dtrain.comm.runtime.consistency import Tie
from dtrain.comm.runtime.fragments import fragments
from dtrain.comm.runtime.knobs import Knob
from dtrain.comm.runtime.loop_spec import VERIFY_ROUNDS, OuterState
from dtrain.comm.runtime.round_lengths import EverySteps

TWO_BITS = error_feedback(quantize("least_squares", bits=2, block=256))


def muloco(
    *,
    every_steps: EverySteps = 30,
    outer: OuterOptimizer | None = None,
    compress: Compress = TWO_BITS,
    layers_per_fragment: Knob = 0,
    overlap_steps: Knob = 0,
    mix: float | None = None,
    warmup_steps: int = 0,
    warmup_compress: Compress | Literal["same"] = None,
    outer_state: OuterState = "replicated",
    utilization: float = 0.95,
    lossless: int | None = None,
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> LocalUpdate:
    """MuLoCo. The inner optimizer is `dtrain.inner.muon`, or torch's ``Muon`` beside another.

    Args:
        every_steps: H, inner steps in a round, 30 in the authors' code; or "auto", see `knobs`; or rounds of changing
            length, see `dtrain.rounds`.
        outer: the outer optimizer; ``nesterov(lr=0.8, momentum=0.6)`` by default. The authors' code has 0.8 to 1 and
            0.9, for hundreds of rounds.
        compress: of the pseudo-gradients; 2 bits with error feedback by default, None for fp32.
        layers_per_fragment, overlap_steps, mix: of Streaming DiLoCo, see there; by default everything is exchanged at
            once, and waited for.
        warmup_steps, warmup_compress: steps of data parallelism before the first round, and their compressor; see
            `local_update`.
        outer_state: "sharded" (without ``compress``) or "offloaded", see `diloco`.
        utilization: the target compute utilization of "auto", in (0, 1).
        lossless: zstandard's level for what a round sends, or None; see `local_update`.
        verify_every, tie: when replicas are compared, and what happens if they differ; see `local_update`.

    >>> muloco().outer == nesterov(lr=0.8, momentum=0.6)
    True

    Raises ``ValueError`` for a period that is no positive integer, and, when attached, for an inner optimizer without
    Muon. Source: arXiv:2505.23725, and https://github.com/facebookresearch/MuLoCo.
    """
    return local_update(
        every_steps=every_steps,
        outer=nesterov(lr=0.8, momentum=0.6) if outer is None else outer,
        compress=compress,
        fragments=fragments(layers_per_fragment, staggered=layers_per_fragment != 0),
        overlap_steps=overlap_steps,
        mix=mix,
        warmup_steps=warmup_steps,
        warmup_compress=warmup_compress,
        outer_state=outer_state,
        utilization=utilization,
        lossless=lossless,
        verify_every=verify_every,
        tie=tie,
        inner="muon",
    )
