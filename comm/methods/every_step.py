"""Every step: the gradients of all replicas are combined before each optimizer step, as in data parallelism.

    g_i  ->  (compress)  ->  peers  ->  combine  ->  the gradient that every replica steps with

Communication: one flow on one of the `routes` for each group of gradients that the backward pass finishes, overlapped
with the rest of it where the engine has gradients piece by piece.
Bytes: `route_bytes` of each group; every ``verify_every`` steps 16 more, see `guard`. Keeps: the feedback's state.

Of several backward passes in a step, each outside of ``no_sync()`` is exchanged; feedback covers their sum. With
`DistributedDataParallel.join`, a rank that has run out of data sends zeros and its residual; it assumes that the peers'
steps have as many backward passes as its own last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from dtrain.comm.aggregators.mean import Aggregator, mean
from dtrain.comm.collectives.exchange import exchange, require_codable, require_mean_for_low_rank, require_route
from dtrain.comm.collectives.routes import Route
from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.layout import Named
from dtrain.comm.pieces import EachPass
from dtrain.comm.plans.plan import Compress, Plan, as_plan, kinds_of, warn_of_loss
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.consistency import Held, Tie, kept_by, numbers_of, require_guard
from dtrain.comm.runtime.context import Context, description
from dtrain.comm.runtime.gradient_steps import GradientSteps
from dtrain.comm.runtime.guard import Guard, parameters_held, state_held
from dtrain.comm.runtime.method import Sync
from dtrain.comm.seeds import Key
from dtrain.comm.state import Kind

if TYPE_CHECKING:
    from dtrain.comm.ops import Flow
    from dtrain.comm.pieces import Pieces

VERIFY_STEPS = 100


@dataclass(frozen=True)
class EveryStep(Sync):
    """See `every_step`."""

    plan: Plan
    rule: Aggregator
    route: Route
    lossless: int | None = None
    verify_every: int = VERIFY_STEPS
    tie: Tie = "stop"

    def bind(self, pieces: Pieces, seed: int) -> Attached:
        context = context_of("every_step", self, pieces, seed)
        return Attached(context, ExchangedGradients(self, context))


def context_of(
    name: str, spec: EveryStep, pieces: Pieces, seed: int, more_kinds: Mapping[str, Kind] = MappingProxyType({})
) -> Context:
    """A begun context of a method called ``name`` that exchanges as ``spec`` says and also keeps ``more_kinds``."""
    context = Context(
        pieces, seed, description(name, spec.plan, spec), plan=spec.plan, kinds={**kinds_of(spec.plan), **more_kinds},
        parameters_kind="replicated",
    )  # fmt: skip
    context.begin(f"{spec}")
    context.tell_routes(spec.route)
    return context


class ExchangedGradients(GradientSteps):
    """An `EveryStep` at work.

    ``around``: the flow to run in place of `combining`, see `Around`.
    """

    def __init__(self, spec: EveryStep, context: Context, around: Around | None = None) -> None:
        super().__init__(context)
        self.spec, self._around = spec, around
        self._all_finite = True
        self._has_gradients = False
        self._exchanges: dict[str, int] = {}  # how many of each parameter in this step
        self._passes = 1  # backward passes of the last step that were exchanged
        means = "parameters, optimizer state"
        self._guard = Guard(context, spec.tie, means, self._held, words=lambda: numbers_of(context.pieces.optimizer))

    @property
    def exchange(self) -> EachPass:
        return EachPass(self.exchanging, adds=bool(self.context.state.kinds), stood_in=self.stood_in)

    def prepare(self) -> bool:
        if not self._has_gradients and self.context.pieces.segments:
            raise RuntimeError(
                "no gradient was exchanged since the last sync.step(): call backward() before it, the last one of a "
                "step outside of no_sync() (FSDP2: with set_requires_gradient_sync(True))"
            )
        self._passes = max(self._exchanges.values(), default=1)
        self._begin_step()
        return super().prepare()

    def exchanged(self) -> bool:
        ok, self._all_finite = self._all_finite, True
        return ok

    def weigh(self, tokens: int) -> None:
        """Raises ``RuntimeError``: gradients are combined during backward, before the tokens are counted."""
        raise RuntimeError(
            f"{self.context.description.partition(':')[0]} counts all replicas alike; multiply each replica's loss by "
            "its tokens over the replicas' mean, or take a local update such as diloco(...), which has weigh(tokens)"
        )

    def stood_in(self) -> None:
        """End the peers' step here, too, after as many backward passes as this rank's last step had."""
        if max(self._exchanges.values(), default=0) < self._passes:
            return
        self._begin_step()
        context = self.context
        if context.agree_in_replica(self.exchanged()):
            context.state.commit()
        else:
            context.state.rollback()
            context.skipped += 1
        context.steps += 1
        self._end_step(absent=True)

    def after_step(self) -> None:
        self._end_step(absent=False)

    def verify(self) -> bool:
        return self._guard.verify()

    def _begin_step(self) -> None:
        self._has_gradients, self._exchanges = False, {}

    def _end_step(self, *, absent: bool) -> None:
        self.context.review()
        if self.spec.verify_every and self.context.steps % self.spec.verify_every == 0:
            self._guard.verify(absent=absent)

    def exchanging(self, gradients: Named, present: bool | None = None) -> Flow[Combined]:
        """Combine the gradients of one backward pass, or a group of them, over the replicas; see `Exchange`."""
        again = max((self._exchanges.get(fqn, 0) for fqn in gradients), default=0)
        self._exchanges |= dict.fromkeys(gradients, again + 1)
        if again:
            self.context.state.proceed(gradients)
        key = self.context.key(again)
        around = self._around
        flow = self.combining if around is None else around
        combined = yield from flow(gradients, key, present)
        self._has_gradients = self._has_gradients or combined.present is True
        self._all_finite = self._all_finite and combined.finite
        return combined

    def combining(self, values: Named, key: Key, present: bool | None) -> Flow[Combined]:
        """The mean of all replicas' ``values``, compressed and fed back as the spec says."""
        spec, context = self.spec, self.context
        context.measure(values, key)
        return (
            yield from exchange(
                values,
                context.plan,
                spec.rule,
                context.place,
                key,
                context.state,
                matrices=context.matrices,
                route=spec.route,
                lossless=spec.lossless,
                present=present,
            )
        )

    def _held(self) -> Held:
        yield from parameters_held(self.context)
        yield from kept_by(self.context.pieces.optimizer)
        yield from state_held(self.context)


class Around(Protocol):
    """The flow by which a method built on `EveryStep` gets from a replica's gradients to the combined ones."""

    def __call__(self, gradients: Named, key: Key, present: bool | None) -> Flow[Combined]: ...


def every_step(
    *,
    compress: Compress = None,
    combine: Aggregator | None = None,
    route: Route = "auto",
    lossless: int | None = None,
    verify_every: int = VERIFY_STEPS,
    tie: Tie = "stop",
) -> EveryStep:
    """Combine the gradients of all replicas before every optimizer step.

    Args:
        compress: a compressor, ``error_feedback(...)`` of one, a plan, or None for full fp32.
        combine: the rule, rows [world, n] -> [n]; `mean` by default.
        route: "auto": "two_phase", for sparse compressors such as top-k "all_gather", or "sparse_all_reduce" where that
            sends clearly fewer bytes between that many replicas; all are deterministic, see `routes`. One of these; or
            "all_reduce" (the transport's own; linear compressors only).
        lossless: zstandard's level for what is sent, where that makes it shorter, for slow links between CPUs; None
            for no lossless coding.
        verify_every: steps between two comparisons of all replicas' parameters and optimizer state; 0 for none.
        tie: what happens if they differ without a majority, as with two replicas: "stop" raises, "first" takes the
            first replica's.

    >>> from dtrain import every_step
    >>> from dtrain.compress import error_feedback, quantize
    >>> every_step(compress=error_feedback(quantize(bits=8))).route
    'auto'

    Raises ``ValueError`` for settings that exclude each other, ``TypeError`` for what is not a compressor.
    """
    plan, rule = as_plan(compress), mean() if combine is None else combine
    require_mean_for_low_rank(plan, rule)
    require_route(plan, rule, route)
    require_codable(lossless, route)
    require_guard(verify_every, tie, "steps")
    warn_of_loss(plan)
    return EveryStep(plan, rule, route, lossless, verify_every, tie)
