"""Every step: the gradients of all replicas are combined before each optimizer step, as in data parallelism.

    g_i  ->  (compress)  ->  peers  ->  combine  ->  the gradient that every replica steps with

Communication: for each group of gradients that the backward pass finishes, one `two_phase` flow, or one native
all-reduce; overlapped with the rest of the backward pass where the engine hands gradients over piece by piece.
Bytes: `routes.two_phase_bytes` of each group. Keeps: what the feedback keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dtrain.comm.aggregators.mean import Aggregator, mean
from dtrain.comm.combine import Route, combine, require_mean_for_low_rank, require_summable
from dtrain.comm.drivers.packing import require_zstandard
from dtrain.comm.layout import Named
from dtrain.comm.ops import Flow
from dtrain.comm.pieces import Pieces
from dtrain.comm.plans.base import Compress, Plan, as_plan, kinds_of, warn_of_loss
from dtrain.comm.routes import Combined
from dtrain.comm.schedules.sync import Attached
from dtrain.comm.seeds import Key
from dtrain.comm.state import Kind, State


@dataclass(frozen=True)
class EveryStep:
    """See `every_step`."""

    plan: Plan
    rule: Aggregator
    route: Route
    lossless: int | None = None

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
        self._handed = False
        pieces.hand_over(self._exchange)

    def step(self) -> bool:
        self.finish()
        if not self._handed and self.pieces.segments:
            raise RuntimeError(
                "no gradient was exchanged since the last sync.step(): call backward() before it, the last one of a "
                "step outside of no_sync() (FSDP2: with set_requires_gradient_sync(True))"
            )
        self._handed = False
        return super().step()

    def _exchange(self, gradients: Named, present: bool | None = None) -> Flow[Combined]:
        combined = yield from self._combine(gradients, present)
        self._handed = self._handed or combined.present is True
        self._all_finite = self._all_finite and combined.finite
        return combined

    def _combine(self, gradients: Named, present: bool | None) -> Flow[Combined]:
        key = Key(self.seed, self.steps, self.pieces.place.rank)
        spec, place = self.spec, self.pieces.place
        self._measure(gradients, key)
        return (
            yield from combine(
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


def every_step(
    *,
    compress: Compress = None,
    combine: Aggregator | None = None,
    route: Route = "two_phase",
    lossless: int | None = None,
) -> EveryStep:
    """Combine the gradients of all replicas before every optimizer step.

    Args:
        compress: a compressor, ``error_feedback(...)`` of one, a plan, or None for full fp32.
        combine: the rule, rows [world, n] -> [n]; `mean` by default.
        route: "two_phase" (deterministic, any compressor) or "all_reduce" (the transport's own; linear ones only).
        lossless: zstandard's level for all that is sent, for slow links between CPUs; None sends it as it is.

    >>> from dtrain import error_feedback, every_step, quantize
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
    warn_of_loss(plan)
    return EveryStep(plan, rule, route, lossless)
