"""`Method.prepare`, `advance` and `skip` of methods that step from gradients."""

from __future__ import annotations

from dtrain.comm.runtime.context import Context
from dtrain.comm.runtime.method import Method


class GradientSteps(Method):
    """The base of methods whose steps are those of the inner optimizer."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def exchanged(self) -> bool:
        """Whether the exchange of this step's gradients succeeded; the same on all peers. Called once a step."""
        return True

    def prepare(self) -> bool:
        context = self.context
        ok = context.agree_in_replica(self.exchanged() and context.pieces.gradients_finite())
        if ok:
            for fqn in context.pieces.unused():
                context.state.unstage(fqn)  # what feedback sent for it was not applied
        return ok

    def advance(self) -> None:
        self.context.pieces.step()

    def skip(self) -> None:
        self.context.pieces.skip()
