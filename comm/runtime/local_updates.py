"""Composes a local update from its parts, and refuses parts that cannot be combined."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from dtrain.comm.pieces import Pieces
from dtrain.comm.plans.adaptive import begun
from dtrain.comm.runtime.agreement import agreement_digest
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.context import Context, description
from dtrain.comm.runtime.loop import Deltas, LocalUpdateLoop, Parts
from dtrain.comm.runtime.loop_spec import PLAIN, LoopSpec
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
"""Fields of a `LoopSpec` that must match to load its state, beside the compressors."""

Change: TypeAlias = Callable[[Context, Parts], None]


def at_work(
    spec: LoopSpec, pieces: Pieces, seed: int, *, name: str = "local_update", settings: tuple[str, ...] = (),
    change: Change | None = None,
) -> Attached:  # fmt: skip
    """``spec`` at work on one rank's pieces. Every rank must call it.

    ``name``, ``settings``: of the method, for the description in its state; ``settings`` beside SETTINGS. ``change``:
    replaces parts by the method's own.
    """
    require_one_rate(spec, pieces)
    called = name if spec.outer_state == "replicated" else f"{name}, {spec.outer_state}"
    context = Context(
        pieces, seed, description(called, spec.plan, spec, (*settings_of(spec), *settings)), plan=spec.plan,
        kinds=spec.kinds, parameters_kind="per_worker",
    )  # fmt: skip
    context.begin(f"{spec}")
    parts = parts_of(spec, context)
    if change is not None:
        change(context, parts)
    return Attached(context, LocalUpdateLoop(spec, context, parts))


def among_members(spec: LoopSpec, pieces: Pieces, seed: int, members: Members) -> Attached:
    """``spec`` at work on one rank's pieces, in an elastic run.

    Raises ``ValueError`` for settings that need the same replicas throughout, see `REFUSED_AMONG_MEMBERS`.
    """
    require_elastic(spec)
    require_one_rate(spec, pieces)
    membership = Elastic(pieces, members)
    called = (
        "local_update, elastic" if spec.outer_state == "replicated" else f"local_update, elastic, {spec.outer_state}"
    )
    context = Context(
        pieces, seed, description(called, spec.plan, spec, settings_of(spec)), plan=spec.plan, kinds=spec.kinds,
        parameters_kind="per_worker", membership=membership,
    )  # fmt: skip
    model = agreement_digest(context.description, f"{spec}; seed={context.seed}", pieces).hex()
    context.begin(f"{spec}", f"{context.description}; all of it and the model: {model}")
    parts = parts_of(spec, context)
    rounds = parts.meeting = ElasticRounds(membership, context)
    loop = LocalUpdateLoop(spec, context, parts)
    attached = Attached(context, loop)
    rounds.begin(loop)
    return attached


def parts_of(spec: LoopSpec, context: Context) -> Parts:
    """The parts that ``spec`` names."""
    context.tell_routes(spec.route)
    if spec.outer_state == "sharded":
        sharded = ShardedStore(context, spec)
        parts = Parts(sharded, sharded.reduced)
    else:
        replicated = spec.outer_state == "replicated"
        store = ReplicatedStore(context, spec.outer) if replicated else OffloadedStore(context, spec.outer)
        parts = Parts(store, Deltas(spec, context))
    if spec.warmup_steps:
        if spec.warmup_plan != spec.plan:
            context.warn_of_rules(spec.warmup_plan)
        parts.source = WarmUp(context, spec.warmup_steps, spec.warmup_plan)
    return parts


def settings_of(spec: LoopSpec) -> tuple[str, ...]:
    """The fields of ``spec`` that must match: `SETTINGS`, and what older states do not name where it is not used."""
    used = {"lengths": spec.lengths is not None, "warmup_plan": spec.warmup_plan != PLAIN}
    return (*SETTINGS, *(name for name, use in used.items() if use))


def require_one_rate(spec: LoopSpec, pieces: Pieces) -> None:
    """Raise ``ValueError`` if the outer step depends on the inner learning rate, and there are several."""
    rates = sorted({float(group["lr"]) for group in pieces.optimizer.param_groups})
    if len(rates) > 1 and getattr(spec.outer, "uses_inner_lr", False):
        raise ValueError(
            f"{spec.outer} counts in units of the inner learning rate, and the parameter groups have {rates}; give "
            "them one, or take another outer step: diloco(outer=sgd(momentum=...)), co2(gap='none')"
        )


REFUSED_AMONG_MEMBERS: dict[str, Callable[[LoopSpec], bool]] = {
    # A round of a delayed method is applied a round later, and replicas may come or go between the two.
    "delay": lambda spec: spec.delay != "none",
    # A lost replica takes its chunks of the outer parameters with it.
    "outer_state='sharded'": lambda spec: spec.outer_state == "sharded",
    # It exchanges gradients in every step.
    "warmup_steps": lambda spec: spec.warmup_steps > 0,
    # Chosen once, from measurements on all replicas.
    "a knob that is 'auto'": lambda spec: spec.auto is not None,
    "a plan that changes by itself": lambda spec: not begun(spec.plan, []).settled,
    # A newcomer's learning rate may be another one, and replicas would wait for each other at different steps.
    "rounds whose length follows from the learning rate": lambda spec: (
        spec.lengths is not None and spec.lengths.follows_rate
    ),
    # It is a sum over the replicas of earlier rounds.
    "feedback that keeps the replicas' mean": lambda spec: not spec.weighs,
}
"""What an elastic run cannot have, since it depends on the replicas of earlier rounds."""


def require_elastic(spec: LoopSpec) -> None:
    """Raise ``ValueError`` for settings that an elastic run cannot have."""
    wrong = [setting for setting, applies in REFUSED_AMONG_MEMBERS.items() if applies(spec)]
    if wrong:
        raise ValueError(
            f"replicas cannot come and go with {' and '.join(wrong)}; leave it out, as in diloco(...) and "
            "streaming_diloco(...) with a compressor or error_feedback(...)"
        )
