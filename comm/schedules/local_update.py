"""Local updates: replicas train alone for some steps, then combine how far they came. One loop for all methods.

    capture   d_i = anchor - parameters_i                    every `every_steps` inner steps
    encode    C(d_i), with feedback if asked
    reduce    D = combined C(d_i), decoded by every rank from the same bytes
    apply     anchor, momentum = outer(anchor, D, momentum)
    merge     parameters_i = anchor

The anchor is state of its own, fp32, bitwise equal on all replicas; it is what is evaluated and exported. The inner
optimizer's state stays where it is: neither averaged nor reset. Methods fill in this loop: `local_sgd`, `diloco`.
Communication: one `two_phase` flow in each round. Bytes: `routes.two_phase_bytes` in each round.
Keeps: the anchor, the outer optimizer's state, the feedback's; twice the latter two while a round is under way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.comm.aggregators.mean import Aggregator, mean
from dtrain.comm.combine import NO_MATRICES, combine, require_mean_for_low_rank
from dtrain.comm.compressors.lowrank import Matrix
from dtrain.comm.ops import Flow, Place
from dtrain.comm.pieces import Pieces
from dtrain.comm.plans.base import Compress, Plan, as_plan, kinds_of
from dtrain.comm.routes import Combined
from dtrain.comm.schedules.outer import OuterOptimizer
from dtrain.comm.schedules.sync import Attached
from dtrain.comm.seeds import Key
from dtrain.comm.state import Kind, State


@dataclass(frozen=True)
class LocalUpdate:
    """A method of the family. Made by `local_sgd`, `diloco`, or `local_update` for what has no name."""

    every_steps: int
    outer: OuterOptimizer
    plan: Plan
    rule: Aggregator

    def bind(self, pieces: Pieces, seed: int) -> Attached:
        return _AttachedLocalUpdate(self, pieces, seed)

    @property
    def kinds(self) -> dict[str, Kind]:
        return {"anchor": "replicated", **self.outer.kinds, **kinds_of(self.plan)}


def deltas_of(parameters: Mapping[str, Tensor], state: State) -> dict[str, Tensor]:
    """How far this rank has come from the anchor, in the direction of a gradient."""
    return {fqn: state.get(fqn, "anchor", now) - now for fqn, now in parameters.items()}


def local_update_round(
    spec: LocalUpdate,
    parameters: dict[str, Tensor],
    place: Place,
    key: Key,
    state: State,
    *,
    matrices: Mapping[str, Matrix] = NO_MATRICES,
    plan: Plan | None = None,
) -> Flow[Combined]:
    """One round on this rank's flat fp32 ``parameters``; stages the next anchor and the rest. Returns the deltas.

    ``plan``: the spec's at work; without it, the spec's own.
    """
    deltas = deltas_of(parameters, state)
    combined = yield from combine(deltas, plan or spec.plan, spec.rule, place, key, state, matrices=matrices)
    for fqn, delta in combined.values.items():
        state.stage(fqn, "anchor", spec.outer.step(fqn, state.get(fqn, "anchor", delta), delta, state))
    return combined


class _AttachedLocalUpdate(Attached):
    parameters_kind: Kind = "per_worker"

    def __init__(self, spec: LocalUpdate, pieces: Pieces, seed: int) -> None:
        super().__init__(pieces, State(spec.kinds), spec.plan, seed)
        self.spec = spec
        self.rounds = 0
        self.failed_rounds = 0
        self.last_round = 0  # the step after which it was made
        for fqn, value in pieces.read().items():
            self.state.stage(fqn, "anchor", value)
        self.state.commit()
        pieces.hand_over(None)

    def _gradients_ok(self) -> bool:
        if self.steps == 0:
            self._require_anchor()
        return True

    def _require_anchor(self) -> None:
        """Raise ``RuntimeError`` if somebody has loaded other weights since the anchor was taken."""
        anchor = self._anchor()
        if any(not torch.equal(value, anchor[fqn]) for fqn, value in self.pieces.read().items()):
            raise RuntimeError(
                "the model was changed after attach, whose anchor is what it held then: load weights to start from "
                "before attach; when resuming, load the sync's state too, last"
            )

    def _after_step(self) -> None:
        if self.steps % self.spec.every_steps == 0:
            self._round()

    def close_round(self) -> bool:
        if self.last_round == self.steps:
            return False
        self._round()
        return True

    def _round(self) -> None:
        key = Key(self.seed, self.steps, self.pieces.place.rank)
        parameters, place = self.pieces.read(), self.pieces.place
        if self.plan.due():
            self._measure(deltas_of(parameters, self.state), key)
        lies, plan = self.matrices, self.plan
        flow = local_update_round(self.spec, parameters, place, key, self.state, matrices=lies, plan=plan)
        combined = self.pieces.channel.run(flow, "round")
        self.rounds += 1
        self.last_round = self.steps
        if self._agree(combined.finite):
            self.state.commit()
        else:  # some replica has diverged: nobody moves the anchor, and everybody, that replica too, goes on from it
            self.state.rollback()
            self.failed_rounds += 1
        self.pieces.write(self._anchor())
        self._review()

    def _anchor(self) -> dict[str, Tensor]:
        return {fqn: named["anchor"] for fqn, named in self.state.tensors.items()}

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        live = self.pieces.read()
        self.pieces.write(self._anchor())
        try:
            yield
        finally:
            self.pieces.write(live)

    def report(self) -> str:
        open_steps = self.steps - self.last_round
        line = super().report()
        return f"{line}, {open_steps} steps since the last round" if open_steps else line

    def integers(self) -> dict[str, int]:
        own = {"rounds": self.rounds, "failed_rounds": self.failed_rounds, "last_round": self.last_round}
        return {**super().integers(), **own}


def local_update(
    *,
    every_steps: int,
    outer: OuterOptimizer,
    compress: Compress = None,
    combine: Aggregator | None = None,
) -> LocalUpdate:
    """The general loop, for combinations that have no name of their own.

    Args:
        every_steps: inner steps in a round.
        outer: the outer optimizer, for example ``nesterov(lr=0.7, momentum=0.9)``.
        compress: a compressor for the deltas, ``error_feedback(...)`` of one, or None for fp32.
        combine: the rule; the mean by default.

    Raises ``ValueError`` for a period that is no positive integer, ``TypeError`` for what is no outer optimizer.
    """
    if not isinstance(every_steps, int) or isinstance(every_steps, bool) or every_steps < 1:
        raise ValueError(f"every_steps is {every_steps!r}; a round has a positive whole number of inner steps")
    if not callable(getattr(outer, "step", None)) or not hasattr(outer, "kinds"):
        raise TypeError(f"outer is {outer!r}; give an outer optimizer such as nesterov(lr=0.7, momentum=0.9)")
    plan, rule = as_plan(compress), mean() if combine is None else combine
    require_mean_for_low_rank(plan, rule)
    return LocalUpdate(every_steps, outer, plan, rule)
