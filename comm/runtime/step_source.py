"""Where the inner steps of a local update come from: each replica's own gradients, and what they are on the way."""

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


class OwnGradients:
    """Each replica steps along its own gradients. What is built on it sees the loop go by."""

    @property
    def exchange(self) -> Exchange | None:
        """What gradients go through on their way to the optimizer; None: nothing."""
        return None

    def exchanged(self) -> bool:
        """Whether the exchange of this step's gradients succeeded; the same on all peers. Called once a step."""
        return True

    def stepped(self) -> None:
        """A step has ended, made or skipped."""

    def captured(self, values: Named) -> None:
        """A round ends with ``values``, what this replica has learned in it."""

    def applying(self, fragment: Fragment, mean: Named | None) -> None:
        """``mean`` is about to be applied; None: the round has failed."""

    def numbers(self) -> Numbers:
        return {}

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        """Nothing to load."""


class WarmUp(OwnGradients):
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
