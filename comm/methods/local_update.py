"""Local updates: replicas train alone for some steps, then combine their pseudo-gradients. One loop for all methods.

A fragment is a subset of the parameters; by default there is one, of all. For each of them, every H inner steps:

    capture   d_i = anchor - parameters_i
    encode    C(d_i), with feedback if set
    reduce    D = combined C(d_i), decoded by every rank from the same bytes
    apply     anchor, momentum = outer(anchor, D, momentum)           `overlap_steps` inner steps after the capture
    merge     parameters_i = mix parameters_i + (1 - mix) anchor

A delayed method overlaps a whole round: at its end the parameters are reset to the anchor, and the pseudo-gradient is
applied a round later. An eager one applies its own share of it at once:

    D_i = D(last round) + (d_i(this round) - d_i(last round)) / M     anchors and momenta then differ by replica

The anchor is fp32 state, bitwise equal on all replicas except for eager methods. It is what is evaluated and exported.
The inner optimizer's state is neither averaged nor reset. A replica whose parameters are not finite is left out of the
mean and reset to the anchor. Before the first round there may be `warmup_steps` of data parallelism, in fp32 or
compressed. H may change from round to round (`round_lengths`). The methods are settings of this loop, each in its own
file.
Communication: for each fragment and round flows of some 4 million elements each on one of the `routes`, hidden behind
the inner steps of an overlap. Bytes: `route_bytes` of them, weighted. Keeps: the anchor, the outer
optimizer's state and the feedback's; while a fragment is under way, the feedback's next state, and in a checkpoint the
combined values that have arrived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from dtrain.comm.aggregators.mean import Aggregator, mean
from dtrain.comm.collectives.exchange import require_codable, require_mean_for_low_rank, require_route
from dtrain.comm.collectives.routes import Route
from dtrain.comm.inner_optimizers.chained import muons
from dtrain.comm.outer_optimizers import Looking, OuterOptimizer
from dtrain.comm.plans.adaptive import Adaptive
from dtrain.comm.plans.plan import Compress, Plan, as_plan, warn_of_loss
from dtrain.comm.runtime.consistency import Tie, require_guard
from dtrain.comm.runtime.fragments import WHOLE, Fragments
from dtrain.comm.runtime.knobs import LEAST_STEPS, Auto, Knob
from dtrain.comm.runtime.local_updates import among_members, at_work
from dtrain.comm.runtime.loop_spec import PLAIN, VERIFY_ROUNDS, Delay, Inner, LoopSpec, OuterState
from dtrain.comm.runtime.method import Sync
from dtrain.comm.runtime.round_lengths import EverySteps, RoundLengths

if TYPE_CHECKING:
    from dtrain.comm.pieces import Pieces
    from dtrain.comm.runtime.attached import Attached
    from dtrain.comm.runtime.membership.members import Members


@dataclass(frozen=True)
class LocalUpdate(LoopSpec, Sync):
    """A local update method, made by `local_sgd`, `diloco`, ... or `local_update`."""

    def bind(self, pieces: Pieces, seed: int) -> Attached:
        self.require_inner(pieces.optimizer)
        return at_work(self, pieces, seed)

    def bind_members(self, pieces: Pieces, seed: int, members: Members) -> Attached:
        """Raises ``ValueError`` for settings that need fixed replicas."""
        self.require_inner(pieces.optimizer)
        return among_members(self, pieces, seed, members)

    def require_inner(self, optimizer: torch.optim.Optimizer) -> None:
        if self.inner == "muon" and not muons(optimizer):
            raise ValueError(
                f"muloco is DiLoCo with Muon inside, and the inner optimizer is {type(optimizer).__name__}; give it "
                "dtrain.inner.muon(model), in dtrain train optim=muon, or take diloco"
            )


def local_update(
    *,
    every_steps: EverySteps,
    outer: OuterOptimizer,
    compress: Compress = None,
    combine: Aggregator | None = None,
    fragments: Fragments = WHOLE,
    overlap_steps: Knob = 0,
    mix: float | None = 0.0,
    delay: Delay = "none",
    warmup_steps: int = 0,
    warmup_compress: Compress | Literal["same"] = None,
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
    outer_state: OuterState = "replicated",
    utilization: float = 0.95,
    route: Route = "auto",
    lossless: int | None = None,
    inner: Inner = "any",
) -> LocalUpdate:
    """The general loop, for combinations without a name of their own.

    Args:
        every_steps: inner steps in a round; "auto": chosen in the first ten, see `knobs`; or rounds of changing length:
            `dtrain.rounds`. These count from the end of the warm-up.
        outer: the outer optimizer, for example ``nesterov(lr=0.7, momentum=0.9)``.
        compress: a compressor for the pseudo-gradients, ``error_feedback(...)`` of one, or None for fp32.
        combine: the rule; the mean by default.
        fragments: the subsets of parameters that are exchanged at different times; all at once by default.
        overlap_steps: inner steps made while a fragment is under way, or "auto".
        mix: the weight of this replica's own parameters when the new anchor is merged, in [0, 1]; None: 0 with an
            overlap of up to one step, 0.5 with a longer one.
        delay: "stale" and "eager" overlap a whole round; see the module.
        warmup_steps: steps of data parallelism before the first round. The inner optimizer's state is kept.
        warmup_compress: a compressor for their gradients, ``error_feedback(...)`` of one, None for fp32, or "same" for
            what ``compress`` is. What feedback has not sent by the end of the warm-up is not lost, and is no delta:
            each replica adds it to its own gradient in the first step of rounds; see `step_source.WarmUp`.
        verify_every: rounds between two comparisons of what must be equal on all replicas (anchor, outer momentum; in
            the warm-up parameters and optimizer state, after as many times the steps of the shortest round); 0 for
            none.
        tie: what happens if they differ without a majority, as with two replicas: "stop" raises, "first" takes the
            first replica's.
        outer_state: "sharded" keeps 1 / M of anchor and outer momentum on each of M replicas, "offloaded" keeps them in
            host memory between rounds; see `sharded` and `offloaded`.
        utilization: the target compute utilization of "auto", in (0, 1).
        route: "auto", see `every_step`; "two_phase", "all_gather", "sparse_all_reduce" (all deterministic); or
            "all_reduce" (the transport's own, with fewer passes over memory, for what is sent in fp32: no compressor,
            low rank, random-k).
        lossless: zstandard's level for what a round sends, where that makes it shorter, for slow links between CPUs;
            None for no lossless coding.
        inner: "muon" refuses inner optimizers without Muon.

    Raises ``ValueError`` for numbers outside their range, for rounds that are shorter than an overlap, and, when
    attached, for rounds that are too short for the fragments to take turns; ``TypeError`` for what is not an outer
    optimizer.
    """
    if not 0 < utilization < 1:
        raise ValueError(f"utilization is {utilization!r}; it lies between 0 and 1, for example 0.95")
    auto = Auto(utilization, every_steps == "auto", overlap_steps == "auto", mix is None, fragments.auto)
    steps, lengths = _period(every_steps, auto)
    if overlap_steps == "auto":
        overlap_steps = 1
    if not callable(getattr(outer, "step", None)) or not hasattr(outer, "kinds"):
        raise TypeError(f"outer is {outer!r}; give an outer optimizer such as nesterov(lr=0.7, momentum=0.9)")
    if delay not in ("none", "stale", "eager"):
        raise ValueError(f"delay is {delay!r}; choose 'none', 'stale' or 'eager'")
    if delay != "none":
        if auto.overlap_steps or auto.fragments:
            raise ValueError(f"delay={delay!r} overlaps whole rounds of everything; only every_steps can be 'auto'")
        overlap_steps = steps
    elif not isinstance(overlap_steps, int) or isinstance(overlap_steps, bool) or not 0 <= overlap_steps < steps:
        shortest = f"every_steps={steps}" if lengths is None else f"rounds of at least {steps} steps"
        raise ValueError(
            f"overlap_steps is {overlap_steps!r} with {shortest}: what is under way must arrive before "
            "the next round begins; give less, 0 for none, or co2(...) to overlap a whole round"
        )
    if mix is None:
        mix = 0.5 if overlap_steps > 1 else 0.0
    if not 0 <= mix <= 1:
        raise ValueError(f"mix is {mix!r}; the share of this replica's own parameters lies in [0, 1]")
    require_guard(verify_every, tie, "rounds")
    plan, rule = as_plan(compress), mean() if combine is None else combine
    require_mean_for_low_rank(plan, rule)
    warn_of_loss(plan)
    require_route(plan, rule, route, weighted=True)
    require_codable(lossless, route)
    spec = LocalUpdate(
        steps, outer, plan, rule, fragments, overlap_steps, float(mix), delay, warmup_steps, verify_every,
        outer_state, auto if auto.wanted else None, route, tie, lossless,
        inner=inner, lengths=lengths, warmup_plan=_warmup_plan(warmup_steps, warmup_compress, plan),
    )  # fmt: skip
    _require_shardable(spec)
    return spec


def _period(every_steps: EverySteps, auto: Auto) -> tuple[int, RoundLengths | None]:
    """The inner steps in a round, of the shortest one where they differ in length; and their lengths."""
    if every_steps == "auto":
        return LEAST_STEPS, None
    lengths = every_steps if isinstance(every_steps, RoundLengths) else None
    steps: object = every_steps if lengths is None else lengths.shortest
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(
            f"every_steps is {every_steps!r}; a round has a positive whole number of inner steps, or 'auto'; rounds of "
            "changing length are in dtrain.rounds"
        )
    if lengths is not None and auto.wanted:
        raise ValueError(
            f"'auto' chooses an overlap and fragments for rounds of one length, and these are {lengths}; give "
            "overlap_steps and layers_per_fragment as numbers"
        )
    return steps, lengths


def _warmup_plan(warmup_steps: object, compress: Compress | Literal["same"], of_rounds: Plan) -> Plan:
    """The compression of gradients in the warm-up."""
    if not isinstance(warmup_steps, int) or isinstance(warmup_steps, bool) or warmup_steps < 0:
        raise ValueError(f"warmup_steps is {warmup_steps!r}; give a whole number of steps, 0 for none")
    if compress is None:
        return PLAIN
    if not warmup_steps:
        raise ValueError(f"warmup_compress is {compress}, and there is no warm-up; give warmup_steps, or leave it out")
    plan = of_rounds if compress == "same" else as_plan(compress)
    if isinstance(plan, Adaptive):
        raise ValueError(
            f"warmup_compress is {plan}, which learns from what it compresses, and gradients are not the deltas of the "
            "rounds; give the warm-up a fixed compression, for example error_feedback(quantize(bits=8))"
        )
    if plan is not of_rounds:
        warn_of_loss(plan)
    return plan


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
    if spec.route not in ("auto", "two_phase"):
        raise ValueError("outer_state='sharded' has a two-phase route of its own; leave route out")
    if isinstance(spec.outer, Looking):
        raise ValueError(
            f"{spec.outer} needs a whole fragment, of which a replica keeps 1 / M; use outer_state='replicated'"
        )
    if spec.overlaps:
        raise ValueError(
            "outer_state='sharded' does not overlap rounds; leave overlap_steps and delay out, or keep "
            "the outer state replicated"
        )
