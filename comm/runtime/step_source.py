"""The gradients that the inner steps of a local update take: each replica's own, or changed on the way."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.collectives.exchange import exchange
from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.layout import Named
from dtrain.comm.ops import Flow
from dtrain.comm.pieces import EachPass, Exchange
from dtrain.comm.plans.plan import Plan, kinds_of
from dtrain.comm.runtime.context import Context
from dtrain.comm.runtime.loop_spec import UNSENT
from dtrain.comm.runtime.rounds import Fragment
from dtrain.comm.state import Numbers


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
    """The mean of all replicas' gradients for the first ``steps`` steps; afterwards each replica keeps its own.

    Gradients are compressed as ``plan`` says, with feedback. What a replica has not sent by the end of the warm-up, its
    residual e_i, is a sum of gradients, and no delta: what it would have moved is for the inner optimizer to say, which
    for AdamW or Muon is not the learning rate times e_i. So it takes the way of gradients: it is added to the replica's
    own gradient in the first step of rounds that the replica makes (stored as ``unsent`` until then), and goes to the
    others with what that step has moved:

        warm-up        p_i = g_i + e_i;   send C(p_i);   e_i = p_i - C(p_i)
        then, once     step with g_i + e_i;   e_i = 0

    With SGD of rate lr the mean of the deltas thereby contains lr mean(e_i), exactly what the warm-up had still to
    apply; clipping sees it as part of the gradient, as it has seen before what feedback returned. Estimates (EF21,
    EControl) are of gradients, too, owe nothing, and begin anew with deltas; the factors of low rank are of no unit,
    and are carried over where the rounds have the same compressor.
    """

    def __init__(self, context: Context, steps: int, plan: Plan) -> None:
        self._context, self._steps, self._plan = context, steps, plan
        self._kinds = kinds_of(plan)
        self._finite = True
        self._exchanges: dict[str, int] = {}  # how many of each parameter in this step
        self._taken: dict[str, Tensor] = {}  # what stands in place of an `UNSENT` that this step has used
        context.fed_back |= {*self._kinds, UNSENT}

    @property
    def exchange(self) -> EachPass:
        return EachPass(self.exchanging, adds=bool(self._kinds))

    def exchanged(self) -> bool:
        finite, self._finite, self._exchanges = self._finite, True, {}
        return finite

    def stepped(self) -> None:
        state = self._context.state
        for fqn, used in self._taken.items():
            if state.find(fqn, UNSENT) is used:  # it was committed: the step was made
                state.drop(fqn, UNSENT)
        self._taken = {}
        if self._context.steps == self._steps:
            self._end()

    def exchanging(self, gradients: Named, present: bool | None = None) -> Flow[Combined]:
        """Combine the gradients of one backward pass, or a group of them; after the warm-up they stay as they are."""
        context = self._context
        again = max((self._exchanges.get(fqn, 0) for fqn in gradients), default=0)
        self._exchanges |= dict.fromkeys(gradients, again + 1)
        if context.steps >= self._steps:
            values = dict(gradients) if again else self._with_unsent(gradients)
            return Combined(values, finite=True, present=None)
        if again:
            context.state.proceed(gradients)
        combined = yield from exchange(
            gradients, self._plan, rank_order_mean, context.place, context.key(again), context.state,
            matrices=context.matrices, present=present,
        )  # fmt: skip
        self._finite = self._finite and combined.finite
        return combined

    def _with_unsent(self, gradients: Named) -> dict[str, Tensor]:
        state, values = self._context.state, dict(gradients)
        for fqn, gradient in gradients.items():
            unsent = state.find(fqn, UNSENT)
            if unsent is not None:
                values[fqn] = gradient + unsent
                self._taken[fqn] = unsent.new_zeros(())
                state.stage(fqn, UNSENT, self._taken[fqn])
        return values

    def _end(self) -> None:
        """Keep of the feedback's state what rounds can use."""
        context, state = self._context, self._context.state
        for fqn in state.tensors:
            last, first = self._plan.of(fqn, self._steps - 1), context.plan.of(fqn, self._steps)
            of_no_unit = {*last.kinds} - {*last.feedback.kinds} if last.compressor == first.compressor else set()
            residual = state.find(fqn, "residual")
            for name in self._kinds.keys() - of_no_unit:
                state.drop(fqn, name)
            if residual is not None and "residual" in self._kinds:
                state.put(fqn, UNSENT, residual)
