"""Where the outer parameters of a local update (the anchor) and the outer optimizer's state are kept.

`ReplicatedStore` keeps all of it on every replica. A loop does not depend on which store it has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.layout import Named
from dtrain.comm.ops import Flow
from dtrain.comm.outer_optimizers import InPlace, Looking, OuterOptimizer, Round
from dtrain.comm.runtime.consistency import Held
from dtrain.comm.runtime.context import Context
from dtrain.comm.runtime.gauges import differences
from dtrain.comm.runtime.guard import state_held
from dtrain.comm.runtime.rounds import Fragment, Reduction
from dtrain.comm.state import State


@dataclass(frozen=True)
class PseudoGradients:
    """What a replica sends in a round. ``values``: flat fp32 by FQN. ``square``: the sum of their squares, if known."""

    values: dict[str, Tensor]
    square: Tensor | None = None


class Reducer(Protocol):
    """Reduces a fragment over the replicas."""

    def __call__(self, reduction: Reduction, fragment: Fragment, now: Round) -> list[Flow[Combined]]:
        """The flows that carry ``reduction.sent``, one for each message."""


class OuterStore(Protocol):
    """Where outer state is kept. ``whole``: whether a rank has the anchor of its pieces without communication."""

    whole: bool

    def anchor(self, fqns: Iterable[str]) -> dict[str, Tensor]:
        """The outer parameters, flat fp32. All replicas must call it, unless the store is ``whole``."""

    def set_anchor(self, values: Named) -> None:
        """Set the anchor to ``values``."""

    def pseudo_gradients(self, fqns: Collection[str]) -> PseudoGradients:
        """What this replica contributes to the round that ends: its pseudo-gradient, or its parameters."""

    def branch(self) -> State:
        """The state in which a round stages its values."""

    def apply(self, fragment: Fragment, values: Named, now: Round) -> dict[str, Tensor] | None:
        """The outer step along the reduced ``values``; returns the new anchor if that is at hand."""

    def held(self, fresh: Collection[str], *, together: bool) -> Held:
        """What must be equal on all replicas now. ``fresh``: parameters that have just been set to the anchor."""

    def ahead(self, fqns: Iterable[str]) -> None:
        """Prefetch: these are needed after the next step."""

    def rest(self) -> None:
        """Called when nothing more is needed before the next step."""

    def settle(self) -> None:
        """Complete the context's state for a checkpoint. All replicas must call it."""

    def loaded(self) -> None:
        """Called after the context's state was loaded."""


class ReplicatedStore:
    """All of it on every replica, in the context's state."""

    whole = True

    def __init__(self, context: Context, outer: OuterOptimizer) -> None:
        self._context, self._outer = context, outer

    def anchor(self, fqns: Iterable[str]) -> dict[str, Tensor]:
        tensors = self._context.state.tensors
        return {fqn: tensors[fqn]["anchor"] for fqn in fqns if fqn in tensors}

    def set_anchor(self, values: Named) -> None:
        state = self._context.state
        for fqn, value in values.items():
            state.stage(fqn, "anchor", value)
        state.commit()

    def pseudo_gradients(self, fqns: Collection[str]) -> PseudoGradients:
        now, state = self._context.pieces.read(fqns, copy=False), self._context.state
        deltas, square = differences({fqn: state.get(fqn, "anchor", value) for fqn, value in now.items()}, now)
        return PseudoGradients(deltas, square)

    def branch(self) -> State:
        return self._context.state.branch()

    def apply(self, fragment: Fragment, values: Named, now: Round) -> dict[str, Tensor] | None:
        outer, state = self._outer, self._context.state
        if isinstance(outer, Looking):
            seen = [outer.look(fqn, delta, state) for fqn, delta in values.items()]
            local = torch.stack(seen).sum(0) if seen else outer.look("", torch.zeros(0), State(outer.kinds))
            fragment.scalar = outer.choose(self._context.over_shards(local, "outer"), fragment.scalar)
            now = Round(now.inner_lr, now.every_steps, fragment.scalar, now.last_lr)
        step = outer.step_ if isinstance(outer, InPlace) else outer.step
        for fqn, delta in values.items():
            state.stage(fqn, "anchor", step(fqn, state.get(fqn, "anchor", delta), delta, state, now))
            state.commit()  # one by one, so that memory is reused
        return None

    def held(self, fresh: Collection[str], *, together: bool) -> Held:
        return state_held(self._context)

    def ahead(self, fqns: Iterable[str]) -> None:
        """Nothing to do."""

    def rest(self) -> None:
        """Nothing to do."""

    def settle(self) -> None:
        """Nothing to do: it is in the context's state."""

    def loaded(self) -> None:
        """Nothing to do: it is in the context's state."""
