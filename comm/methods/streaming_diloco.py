"""Streaming DiLoCo (Douillard et al., arXiv:2501.18512): DiLoCo fragment by fragment, overlapped with inner steps.

    every H steps, each fragment p at a time of its own:      d = anchor_p - parameters_p, sent in few bits
    `overlap_steps` later:    anchor_p = outer(anchor_p, D);   parameters_p = mix parameters_p + (1 - mix) anchor_p

`local_update` with fragments, an overlap and a mix. Peak traffic is that of one fragment.
Communication: one exchange for each fragment every H steps. Bytes: those of one parameter exchange every H steps.
Keeps: the anchor and the outer momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from dtrain.comm.methods.local_update import LocalUpdate, local_update
from dtrain.comm.outer_optimizers import OuterOptimizer, nesterov
from dtrain.comm.plans.plan import Compress
from dtrain.comm.runtime.consistency import Tie
from dtrain.comm.runtime.fragments import FirstRound, Pattern, fragments
from dtrain.comm.runtime.knobs import Knob
from dtrain.comm.runtime.loop_spec import VERIFY_ROUNDS, OuterState
from dtrain.comm.runtime.round_lengths import EverySteps


def streaming_diloco(
    *,
    every_steps: EverySteps = 100,
    layers_per_fragment: Knob = 3,
    overlap_steps: Knob = 1,
    mix: float | None = None,
    outer: OuterOptimizer | None = None,
    compress: Compress = None,
    warmup_steps: int = 0,
    warmup_compress: Compress | Literal["same"] = None,
    outer_state: OuterState = "replicated",
    pattern: Pattern = "strided",
    fragments_by_name: Sequence[Sequence[str]] = (),
    staggered: bool = True,
    first_round: FirstRound = "full",
    utilization: float = 0.95,
    lossless: int | None = None,
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> LocalUpdate:
    """Streaming DiLoCo.

    Args:
        every_steps: H, the inner steps between two exchanges of a fragment; or "auto", see `knobs`; or rounds of
            changing length, see `dtrain.rounds`: fragments take turns within each, the shortest of which must be longer
            than the overlap and have a step for each fragment.
        layers_per_fragment: blocks in a fragment; 0 is one fragment with everything; or "auto".
        overlap_steps: inner steps made while a fragment is under way; up to 5 cost next to nothing; or "auto".
        mix: the weight of a replica's own parameters when the new anchor is merged; 0 with an overlap of up to one step
            and 0.5 with a longer one, by default.
        outer: the outer optimizer; ``nesterov(lr=0.4, momentum=0.9)`` by default, the paper's choice.
        compress: a compressor for the pseudo-gradients, for example ``quantize(grid="e3m0")``, the paper's 4 bits.
        warmup_steps: steps of data parallelism before the first round.
        warmup_compress: a compressor for their gradients, None for fp32, or "same"; see `local_update`.
        outer_state: "offloaded": in host memory, except for the fragment whose round begins or ends.
        pattern: "strided" (every P-th block) or "sequential" (neighbours).
        fragments_by_name: instead of blocks, shell patterns over parameter names, a list for each fragment.
        staggered: fragments take turns within the period; otherwise all are exchanged at once.
        first_round: "full": each fragment's first exchange comes after a whole period; "early": after its turn in the
            first period, as in torchft.
        utilization: the target compute utilization of "auto", in (0, 1).
        lossless: zstandard's level for what a round sends, or None; see `local_update`.
        verify_every, tie: when replicas are compared, and what happens if they differ; see `local_update`.

    >>> streaming_diloco(every_steps=30).overlap_steps
    1

    Raises ``ValueError`` for an overlap as long as the period and other numbers outside their range; and, when
    attached, for fragments that do not hold every parameter once. Source: arXiv:2501.18512, algorithm 2.
    """
    cut = fragments(
        layers_per_fragment,
        pattern=pattern,
        patterns=fragments_by_name,
        staggered=staggered,
        first_round=first_round,
    )
    return local_update(
        every_steps=every_steps,
        outer=nesterov(lr=0.4, momentum=0.9) if outer is None else outer,
        compress=compress,
        fragments=cut,
        overlap_steps=overlap_steps,
        mix=mix,
        warmup_steps=warmup_steps,
        warmup_compress=warmup_compress,
        outer_state=outer_state,
        utilization=utilization,
        lossless=lossless,
        verify_every=verify_every,
        tie=tie,
    )
