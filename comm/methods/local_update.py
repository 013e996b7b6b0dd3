"""Local updates: replicas train alone for some steps, then combine how far they came. One loop for all methods.

A fragment is a part of the parameters; with P = 1 there is one, the whole. For each of them, every H inner steps:

    capture   d_i = anchor - parameters_i          returned at once, with `overlap_steps` = 0, or later:
    encode    C(d_i), with feedback if asked
    reduce    D = combined C(d_i), decoded by every rank from the same bytes
    apply     anchor, momentum = outer(anchor, D, momentum)           `overlap_steps` inner steps after the capture
    merge     parameters_i = mix parameters_i + (1 - mix) anchor

A delayed method overlaps a whole round: at the end of each one the parameters go back to the anchor, what they had
learned is on its way, and arrives a round later. An eager one does not go without its own part of it meanwhile:

    D_i = D(last round) + (d_i(this round) - d_i(last round)) / M     then anchor and momentum are each replica's own

The anchor is state of its own, fp32; but for eager methods it is bitwise equal on all replicas. It is what is evaluated
and exported. The inner optimizer's state stays where it is: neither averaged nor reset. A replica whose parameters are
not finite is left out of the mean and goes back to the anchor. Before the first round there may be `warmup_steps` of
data parallelism. Methods fill in this loop, each in its own file.
Communication: for each fragment and round `two_phase` flows, or native all-reduces, of some 4 million elements each,
behind the inner steps if there is an overlap. Bytes: `two_phase_bytes` of them, weighted. Keeps: the anchor, the
outer optimizer's state and the feedback's; while a fragment is under way, what feedback will keep, and at a checkpoint
what arrived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from dtrain.comm.aggregators.mean import Aggregator, mean
from dtrain.comm.collectives.exchange import Route, require_mean_for_low_rank, require_summable
from dtrain.comm.outer_optimizers import Looking, OuterOptimizer
from dtrain.comm.pieces import Pieces
from dtrain.comm.plans.plan import Compress, as_plan, warn_of_loss
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.consistency import Tie, require_guard
from dtrain.comm.runtime.fragments import WHOLE, Fragments
from dtrain.comm.runtime.knobs import LEAST_STEPS, Auto, Knob
from dtrain.comm.runtime.local_updates import among_members, at_work
from dtrain.comm.runtime.loop_spec import VERIFY_ROUNDS, Delay, LoopSpec, OuterState
from dtrain.comm.runtime.membership.members import Members
from dtrain.comm.runtime.method import Sync


@dataclass(frozen=True)
class LocalUpdate(LoopSpec, Sync):
    """A method of the family. Made by `local_sgd`, `diloco`, ..., or `local_update` for what has no name."""

    def bind(self, pieces: Pieces, seed: int) -> Attached:
        return at_work(self, pieces, seed)

    def bind_members(self, pieces: Pieces, seed: int, members: Members) -> Attached:
        """Raises ``ValueError`` for what keeps replicas together between their rounds."""
        return among_members(self, pieces, seed, members)


def local_update(
    *,
    every_steps: Knob,
    outer: OuterOptimizer,
    compress: Compress = None,
    combine: Aggregator | None = None,
    fragments: Fragments = WHOLE,
    overlap_steps: Knob = 0,
    mix: float | None = 0.0,
    delay: Delay = "none",
    warmup_steps: int = 0,
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
    outer_state: OuterState = "replicated",
    utilization: float = 0.95,
    route: Route = "two_phase",
) -> LocalUpdate:
    """The general loop, for combinations that have no name of their own.

    Args:
        every_steps: inner steps in a round; "auto": chosen in the first ten, see `knobs`.
        outer: the outer optimizer, for example ``nesterov(lr=0.7, momentum=0.9)``.
        compress: a compressor for the deltas, ``error_feedback(...)`` of one, or None for fp32.
        combine: the rule; the mean by default.
        fragments: what is exchanged at different times; everything at once by default.
        overlap_steps: inner steps that go on while a fragment is under way, or "auto".
        mix: what the parameters of this replica count when they meet the new anchor, in [0, 1]; None: 0 with an overlap
            of up to one step, 0.5 with a longer one.
        delay: "stale" and "eager" overlap a whole round; see the module.
        warmup_steps: steps of data parallelism before the first round.
        verify_every: rounds between two comparisons of what must be equal on all replicas (anchor, outer momentum; in
            the warm-up parameters and optimizer state, after as many times ``every_steps``); 0 for none.
        tie: what happens if they differ and none is in the majority, as with two replicas: "stop" raises, "first" goes
            on with the first replica's.
        outer_state: "sharded" keeps 1 / M of anchor and outer momentum on each of M replicas, "offloaded" keeps them in
            host memory between rounds; see `sharded` and `offloaded`.
        utilization: what "auto" aims at: the part of the time in which nobody waits for the links, in (0, 1).
        route: "two_phase" (deterministic, any compressor) or "all_reduce" (the transport's own, with fewer passes over
            memory, for what is sent in fp32: no compressor, low rank, random-k).

    Raises ``ValueError`` for numbers outside their range, ``TypeError`` for what is no outer optimizer.
    """
    if not 0 < utilization < 1:
        raise ValueError(f"utilization is {utilization!r}; it lies between 0 and 1, for example 0.95")
    auto = Auto(utilization, every_steps == "auto", overlap_steps == "auto", mix is None, fragments.auto)
    if every_steps == "auto":
        every_steps = LEAST_STEPS
    if not isinstance(every_steps, int) or isinstance(every_steps, bool) or every_steps < 1:
        raise ValueError(
            f"every_steps is {every_steps!r}; a round has a positive whole number of inner steps, or 'auto'"
        )
    if overlap_steps == "auto":
        overlap_steps = 1
    if not callable(getattr(outer, "step", None)) or not hasattr(outer, "kinds"):
        raise TypeError(f"outer is {outer!r}; give an outer optimizer such as nesterov(lr=0.7, momentum=0.9)")
    if delay not in ("none", "stale", "eager"):
        raise ValueError(f"delay is {delay!r}; choose 'none', 'stale' or 'eager'")
    if delay != "none":
        if auto.overlap_steps or auto.fragments:
            raise ValueError(f"delay={delay!r} overlaps whole rounds of everything; only every_steps can be 'auto'")
        overlap_steps = every_steps
    elif not isinstance(overlap_steps, int) or isinstance(overlap_steps, bool) or not 0 <= overlap_steps < every_steps:
        raise ValueError(
            f"overlap_steps is {overlap_steps!r} with every_steps={every_steps}: what is under way must arrive before "
            "the next round begins; give less, 0 for none, or co2(...) to overlap a whole round"
        )
    if mix is None:
        mix = 0.5 if overlap_steps > 1 else 0.0
    if not 0 <= mix <= 1:
        raise ValueError(f"mix is {mix!r}; the share of this replica's own parameters lies in [0, 1]")
    if not isinstance(warmup_steps, int) or isinstance(warmup_steps, bool) or warmup_steps < 0:
        raise ValueError(f"warmup_steps is {warmup_steps!r}; give a whole number of steps, 0 for none")
    require_guard(verify_every, tie, "rounds")
    plan, rule = as_plan(compress), mean() if combine is None else combine
    require_mean_for_low_rank(plan, rule)
    warn_of_loss(plan)
    require_summable(plan, rule, route, weighted=True)
    made = LocalUpdate(
        every_steps, outer, plan, rule, fragments, overlap_steps, float(mix), delay, warmup_steps, verify_every,
        outer_state, auto if auto.wanted else None, route, tie,
    )  # fmt: skip
    _require_shardable(made)
    return made


def _require_shardable(spec: LocalUpdate) -> None:
    if spec.outer_state not in get_args(OuterState):
        raise ValueError(f"outer_state is {spec.outer_state!r}; choose 'replicated', 'sharded' or 'offloaded'")
    if spec.outer_state != "sharded":
        return
    if spec.plan != as_plan(None):
        raise ValueError(
            "outer_state='sharded' sends parameters as they are: a delta can only be compressed where the whole anchor "
            "is. Leave compress out, or keep the outer state replicated"
        )
    if spec.route != "two_phase":
        raise ValueError("outer_state='sharded' goes in two phases by itself; leave route out")
    if isinstance(spec.outer, Looking):
        raise ValueError(f"{spec.outer} looks at all of a fragment, of which a replica has a part; use 'replicated'")
    if spec.overlaps:
        raise ValueError(
            "outer_state='sharded' goes with rounds that are waited for; leave overlap_steps and delay out, or keep "
            "the outer state replicated"
        )
