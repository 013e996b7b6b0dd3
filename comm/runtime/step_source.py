"""The gradients that the inner steps of a local update take: each replica's own, or changed on the way."""

from __future__ import annotations

from collections.abc import Mapping

from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.collectives.two_phase import Combined, two_phase
from dtrain.comm.feedback import as_compression
from dtrain.comm.layout import Named
from dtrain.comm.ops import Flow
from dtrain.comm.pieces import Exchange
from dtrain.comm.runtime.context import Context
from dtrain.comm.runtime.rounds import Fragment
from dtrain.comm.state import Numbers, State


class StepSource:
    """Each replica steps along its own gradients. Subclasses are called at each event of the loop."""

    @property
    def exchange(self) -> Exchange | None:
        """What combines gradients before the optimizer uses them; None: nothing."""
        return None

    def exchanged(self) -> bool:
        """Whether the exchange of this step's gradients succeeded; the same on all peers. Called once a step."""
        return True

    def stepped(self) -> None:
        """Called after a step, made or skipped."""

    def captured(self, values: Named) -> None:
        """Called at a capture. ``values``: what this replica contributes to the round."""

    def applying(self, fragment: Fragment, mean: Named | None) -> None:
        """Called before ``mean`` is applied; None: the round has failed."""

    def numbers(self) -> Numbers:
        return {}

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        """Nothing to load."""


class WarmUp(StepSource):
    """The mean of all replicas' gradients for the first ``steps`` steps; afterwards each replica keeps its own."""

    def __init__(self, context: Context, steps: int) -> None:
        self._context, self._steps = context, steps
        self._finite = True

    @property
    def exchange(self) -> Exchange:
        return self._exchanging

    def exchanged(self) -> bool:
        finite, self._finite = self._finite, True
        return finite

    def _exchanging(self, gradients: Named, present: bool | None = None) -> Flow[Combined]:
        context = self._context
        if context.steps >= self._steps:
            return Combined(dict(gradients), finite=True, present=None)
        plain, key = as_compression(None), context.key()
        flow = two_phase(gradients, plain, rank_order_mean, context.place, key, State({}), present=present)
        combined = yield from flow
        self._finite = self._finite and combined.finite
        return combined
