"""Puts a local update together from its parts, and says which parts do not go together, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from dtrain.comm.pieces import Pieces
from dtrain.comm.plans.adaptive import begun
from dtrain.comm.runtime.agreement import agreement_digest
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.context import Context, description
from dtrain.comm.runtime.loop import Deltas, LocalUpdateLoop, Parts
from dtrain.comm.runtime.loop_spec import LoopSpec
from dtrain.comm.runtime.membership.elastic import Elastic
from dtrain.comm.runtime.membership.elastic_rounds import ElasticRounds
from dtrain.comm.runtime.membership.members import Members
from dtrain.comm.runtime.outer_store.offloaded import OffloadedStore
from dtrain.comm.runtime.outer_store.sharded import ShardedStore
from dtrain.comm.runtime.outer_store.store import ReplicatedStore
from dtrain.comm.runtime.step_source import WarmUp

SETTINGS = (
    "every_steps", "outer", "rule", "fragments", "overlap_steps", "mix", "delay", "warmup_steps", "auto",
)  # fmt: skip
"""Fields of a `LoopSpec` that its state belongs to, beside the compressors."""

Change: TypeAlias = Callable[[Context, Parts], None]


def at_work(
    spec: LoopSpec, pieces: Pieces, seed: int, *, name: str = "local_update", settings: tuple[str, ...] = (),
    change: Change | None = None,
) -> Attached:  # fmt: skip
    """``spec`` at work on one rank's pieces. Every rank must call it.

    ``name``, ``settings``: what a state of it says beside what all local updates say. ``change``: puts parts of the
    method's own in the place of some.
    """
    require_one_rate(spec, pieces)
    called = name if spec.outer_state == "replicated" else f"{name}, {spec.outer_state}"
    context = Context(
        pieces, seed, description(called, spec.plan, spec, (*SETTINGS, *settings)), plan=spec.plan, kinds=spec.kinds,
        parameters_kind="per_worker",
    )  # fmt: skip
    context.begin(f"{spec}")
    parts = parts_of(spec, context)
    if change is not None:
        change(context, parts)
    return Attached(context, LocalUpdateLoop(spec, context, parts))


def among_members(spec: LoopSpec, pieces: Pieces, seed: int, members: Members) -> Attached:
    """``spec`` at work on one rank's pieces, among replicas that come and go.

    Raises ``ValueError`` for what keeps replicas together between their rounds, see `REFUSED_AMONG_MEMBERS`.
    """
    require_elastic(spec)
    require_one_rate(spec, pieces)
    membership = Elastic(pieces, members)
    called = (
        "local_update, elastic" if spec.outer_state == "replicated" else f"local_update, elastic, {spec.outer_state}"
    )
    context = Context(
        pieces, seed, description(called, spec.plan, spec, SETTINGS), plan=spec.plan, kinds=spec.kinds,
        parameters_kind="per_worker", membership=membership,
    )  # fmt: skip
    model = agreement_digest(context.description, f"{spec}", pieces).hex()
    context.begin(f"{spec}", f"{context.description}; all of it and the model: {model}")
    parts = parts_of(spec, context)
    rounds = parts.meeting = ElasticRounds(membership, context)
    loop = LocalUpdateLoop(spec, context, parts)
    attached = Attached(context, loop)
    rounds.begin(loop)
    return attached


def parts_of(spec: LoopSpec, context: Context) -> Parts:
    """The parts that ``spec`` names."""
    if spec.outer_state == "sharded":
        sharded = ShardedStore(context, spec)
        parts = Parts(sharded, sharded.reduced)
    else:
        replicated = spec.outer_state == "replicated"
        store = ReplicatedStore(context, spec.outer) if replicated else OffloadedStore(context, spec.outer)
        parts = Parts(store, Deltas(spec, context))
    if spec.warmup_steps:
        parts.source = WarmUp(context, spec.warmup_steps)
    return parts


def require_one_rate(spec: LoopSpec, pieces: Pieces) -> None:
    """Raise ``ValueError`` where the outer step counts in units of the inner learning rate, and there are several."""
    rates = sorted({float(group["lr"]) for group in pieces.optimizer.param_groups})
    if len(rates) > 1 and getattr(spec.outer, "uses_inner_lr", False):
        raise ValueError(
            f"{spec.outer} counts in units of the inner learning rate, and the parameter groups have {rates}; give "
            "them one, or take another outer step: diloco(outer=sgd(momentum=...)), co2(gap='none')"
        )


REFUSED_AMONG_MEMBERS: dict[str, Callable[[LoopSpec], bool]] = {
    # A round of a delayed method is applied a round later: who comes or goes between the two has another part in it.
    "delay": lambda spec: spec.delay != "none",
    # A replica that is lost takes its part of the outer parameters with it.
    "outer_state='sharded'": lambda spec: spec.outer_state == "sharded",
    # Replicas meet at every step of it.
    "warmup_steps": lambda spec: spec.warmup_steps > 0,
    # Chosen once, from what all have measured together.
    "a knob that is 'auto'": lambda spec: spec.auto is not None,
    "a plan that changes by itself": lambda spec: not begun(spec.plan, []).settled,
    # It is a sum over the replicas that there were.
    "feedback that keeps the replicas' mean": lambda spec: not spec.weighs,
}
"""What cannot be among replicas that come and go: the mathematics of it counts on who was there before."""


def require_elastic(spec: LoopSpec) -> None:
    """Raise ``ValueError`` for what keeps replicas together between their rounds."""
    wrong = [what for what, is_so in REFUSED_AMONG_MEMBERS.items() if is_so(spec)]
    if wrong:
        raise ValueError(
            f"replicas cannot come and go with {' and '.join(wrong)}; leave it out, as in diloco(...) and "
            "streaming_diloco(...) with a compressor or error_feedback(...)"
        )
