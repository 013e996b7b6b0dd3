"""Where the outer parameters of a local update (the anchor) and the outer optimizer's state are kept.

`ReplicatedStore` keeps all of it on every replica; a loop does not know whether it has that, a sharded or an offloaded
one.
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
class Learned:
    """What a replica gives to a round: ``values``, flat fp32 by FQN; ``square``: the sum of theirs, 0-dim, if known."""

    values: dict[str, Tensor]
    square: Tensor | None = None


class Reducer(Protocol):
    """How what all replicas have learned of a fragment becomes one value."""

    def __call__(self, reduction: Reduction, fragment: Fragment, now: Round) -> list[Flow[Combined]]:
        """The flows that carry ``reduction.sent``, one for each message."""


class OuterStore(Protocol):
    """What a loop asks of it. ``whole``: whether a rank has the anchor of its pieces without asking other replicas."""

    whole: bool

    def anchor(self, fqns: Iterable[str]) -> dict[str, Tensor]:
        """The outer parameters, flat fp32. All replicas must call it, unless the store is ``whole``."""

    def set_anchor(self, values: Named) -> None:
        """Begin, or go on, from ``values``."""

    def learned(self, fqns: Collection[str]) -> Learned:
        """What this replica's parameters have to tell of the steps since the anchor."""

    def branch(self) -> State:
        """The state in which a round stages what is kept of it."""

    def apply(self, fragment: Fragment, values: Named, now: Round) -> dict[str, Tensor] | None:
        """The outer step along what was reduced; the new anchor where it need not be asked for."""

    def held(self, fresh: Collection[str], *, together: bool) -> Held:
        """What is equal on all replicas now. ``fresh``: parameters that are the anchor's, just so."""

    def ahead(self, fqns: Iterable[str]) -> None:
        """These will be needed behind the next step."""

    def rest(self) -> None:
        """Nothing more will be asked before the next step."""

    def settle(self) -> None:
        """See that the context's state holds all that a checkpoint needs. All replicas must call it."""

    def loaded(self) -> None:
        """Go on from the context's state, which was loaded."""


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

    def learned(self, fqns: Collection[str]) -> Learned:
        now, state = self._context.pieces.read(fqns, copy=False), self._context.state
        deltas, square = differences({fqn: state.get(fqn, "anchor", value) for fqn, value in now.items()}, now)
        return Learned(deltas, square)

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
            state.commit()  # one by one, so that the next one takes the memory of the last
        return None

    def held(self, fresh: Collection[str], *, together: bool) -> Held:
        return state_held(self._context)

    def ahead(self, fqns: Iterable[str]) -> None:
        """It is there already."""

    def rest(self) -> None:
        """It stays where it is."""

    def settle(self) -> None:
        """It is in the context's state."""

    def loaded(self) -> None:
        """It is in the context's state."""
