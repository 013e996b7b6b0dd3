"""Every step: the gradients of all replicas are combined before each optimizer step, as in data parallelism.

    g_i  ->  (compress)  ->  peers  ->  combine  ->  the gradient that every replica steps with

Communication: for each group of gradients that the backward pass finishes, one `two_phase` flow, or one native
all-reduce; overlapped with the rest of the backward pass where the engine hands gradients over piece by piece.
Bytes: `routes.two_phase_bytes` of each group; every ``verify_every`` steps 16 more, see `guard`. Keeps: what the
feedback keeps.

A step of several backward passes has an exchange for each that is not in ``no_sync()``: feedback holds over all of them
together. With `DistributedDataParallel.join`, a rank that has ended gives zeros and what its feedback still keeps; it
takes the others' steps to have as many backward passes as its own last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dtrain.comm.aggregators.mean import Aggregator, mean
from dtrain.comm.collectives.exchange import Route, exchange, require_mean_for_low_rank, require_summable
from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.compressors.lossless import require_zstandard
from dtrain.comm.layout import Named
from dtrain.comm.ops import Flow
from dtrain.comm.pieces import Pieces
from dtrain.comm.plans.plan import Compress, Plan, as_plan, kinds_of, warn_of_loss
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.consistency import ABSENT, Held, Tie, kept_by, numbers_of, require_guard
from dtrain.comm.seeds import Key
from dtrain.comm.state import Kind, State

VERIFY_STEPS = 100


@dataclass(frozen=True)
class EveryStep:
    """See `every_step`."""

    plan: Plan
    rule: Aggregator
    route: Route
    lossless: int | None = None
    verify_every: int = VERIFY_STEPS
    tie: Tie = "stop"

    def bind(self, pieces: Pieces, seed: int) -> Attached:
        return AttachedEveryStep(self, pieces, seed)


class AttachedEveryStep(Attached):
    """An `EveryStep` at work. ``more``: what a method built on it keeps besides."""

    parameters_kind: Kind = "replicated"

    def __init__(
        self, spec: EveryStep, pieces: Pieces, seed: int, more: Mapping[str, Kind] = MappingProxyType({})
    ) -> None:
        super().__init__(pieces, State({**kinds_of(spec.plan), **more}), spec.plan, seed, spec)
        self.spec = spec
        self._all_finite = True
        self._handed = self._standing_in = False
        self._exchanges: dict[str, int] = {}  # of each parameter in this step
        self._passes = 1  # backward passes of the last step that were exchanged
        pieces.set_gradient_exchange(_Handed(self, adds=bool(self.state.kinds)))

    def step(self) -> bool:
        self._require_live("step()")
        self.finish()
        if not self._handed and self.pieces.segments:
            raise RuntimeError(
                "no gradient was exchanged since the last sync.step(): call backward() before it, the last one of a "
                "step outside of no_sync() (FSDP2: with set_requires_gradient_sync(True))"
            )
        self._passes = max(self._exchanges.values(), default=1)
        self._begin_step()
        return super().step()

    def weigh(self, tokens: int) -> None:
        """Raises ``RuntimeError``: gradients are combined while backward goes on, before anybody knows the tokens."""
        raise RuntimeError(
            f"{type(self).__name__} counts all replicas alike; multiply each replica's loss by its tokens over the "
            "replicas' mean, or take a local update such as diloco(...), which has weigh(tokens)"
        )

    def stood_in(self) -> None:
        """End the others' step here, too, when they have made as many backward passes as this rank in its last."""
        if max(self._exchanges.values(), default=0) < self._passes:
            return
        self._begin_step()
        if self._agree(self._gradients_ok()):
            self.state.commit()
        else:
            self.state.rollback()
            self.skipped += 1
        self.steps += 1
        self._standing_in = True
        try:
            self._after_step()
        finally:
            self._standing_in = False

    def _saves_alike(self) -> int:
        return ABSENT if self._standing_in else super()._saves_alike()

    def _begin_step(self) -> None:
        self._handed, self._exchanges = False, {}

    def _exchange(self, gradients: Named, present: bool | None = None) -> Flow[Combined]:
        again = max((self._exchanges.get(fqn, 0) for fqn in gradients), default=0)
        self._exchanges |= dict.fromkeys(gradients, again + 1)
        if again:
            self.state.proceed(gradients)
        key = Key(self.seed, self.steps, self.pieces.place.rank, again=again)
        combined = yield from self._combine(gradients, key, present)
        self._handed = self._handed or combined.present is True
        self._all_finite = self._all_finite and combined.finite
        return combined

    def _combine(self, gradients: Named, key: Key, present: bool | None) -> Flow[Combined]:
        spec, place = self.spec, self.pieces.place
        self._measure(gradients, key)
        return (
            yield from exchange(
                gradients,
                self.plan,
                spec.rule,
                place,
                key,
                self.state,
                matrices=self.matrices,
                route=spec.route,
                lossless=spec.lossless,
                present=present,
            )
        )

    def _gradients_ok(self) -> bool:
        ok, self._all_finite = self._all_finite, True
        return ok

    def _after_step(self) -> None:
        self._review()
        if self.spec.verify_every and self.steps % self.spec.verify_every == 0:
            self.verify()

    def _held_alike(self) -> Held:
        yield from self._parameters_alike()
        yield from kept_by(self.pieces.optimizer)
        yield from super()._held_alike()

    def _alike_in_words(self) -> str:
        return numbers_of(self.pieces.optimizer)


@dataclass(frozen=True)
class _Handed:
    """What the pieces are handed of a sync; see `Repeated`."""

    sync: AttachedEveryStep
    adds: bool

    def __call__(self, gradients: Named, present: bool | None = None) -> Flow[Combined]:
        return self.sync._exchange(gradients, present)

    def stood_in(self) -> None:
        self.sync.stood_in()


def every_step(
    *,
    compress: Compress = None,
    combine: Aggregator | None = None,
    route: Route = "two_phase",
    lossless: int | None = None,
    verify_every: int = VERIFY_STEPS,
    tie: Tie = "stop",
) -> EveryStep:
    """Combine the gradients of all replicas before every optimizer step.

    Args:
        compress: a compressor, ``error_feedback(...)`` of one, a plan, or None for full fp32.
        combine: the rule, rows [world, n] -> [n]; `mean` by default.
        route: "two_phase" (deterministic, any compressor) or "all_reduce" (the transport's own; linear ones only).
        lossless: zstandard's level for all that is sent, for slow links between CPUs; None sends it as it is.
        verify_every: steps between two comparisons of all replicas' parameters and optimizer state; 0 for none.
        tie: what happens if they differ and none is in the majority, as with two replicas: "stop" raises, "first" goes
            on with the first replica's.

    >>> from dtrain import every_step
    >>> from dtrain.compress import error_feedback, quantize
    >>> every_step(compress=error_feedback(quantize(bits=8))).route
    'two_phase'

    Raises ``ValueError`` for choices that exclude each other, ``TypeError`` for something that is no compressor.
    """
    plan, rule = as_plan(compress), mean() if combine is None else combine
    require_mean_for_low_rank(plan, rule)
    if lossless is not None:
        require_zstandard(lossless)
    require_summable(plan, rule, route)
    if route == "all_reduce" and lossless is not None:
        raise ValueError("lossless codes parts, which an all-reduce does not have; use route='two_phase'")
    require_guard(verify_every, tie, "steps")
    warn_of_loss(plan)
    return EveryStep(plan, rule, route, lossless, verify_every, tie)
