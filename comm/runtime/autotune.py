"""Steps and exchanges of the run under way, measured for `knobs`: the first steps, then two trial exchanges.

Communication: three exchanges of up to some million elements in the codec chosen, whose results nobody uses, and three
numbers from each rank. No rank decides alone: all take the slowest rank's figures.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from dtrain.comm.collectives.exchange import exchange
from dtrain.comm.layout import Matrix, Named
from dtrain.comm.ops import AllGather, Flow
from dtrain.comm.pieces import Pieces
from dtrain.comm.plans.plan import Plan
from dtrain.comm.runtime.knobs import LEAST_STEPS, Knobs, Measured, choose, fitted, median_step
from dtrain.comm.runtime.loop_spec import LoopSpec
from dtrain.comm.seeds import Key
from dtrain.comm.state import State

TRIAL = 1 << 20
"""Elements in a trial exchange; a parameter is not cut for it."""


class Choosing:
    """What has to be chosen on one rank, until it is."""

    def __init__(self, spec: LoopSpec, pieces: Pieces) -> None:
        assert spec.auto is not None
        self.spec, self.auto, self.pieces = spec, spec.auto, pieces
        self._ended: list[float] = []
        if spec.fragments.auto:
            spec.fragments.cut(pieces.shapes)  # a model without blocks is refused now, not after ten steps

    def step_ended(self) -> bool:
        """Note that an inner step has ended; returns whether enough of them have."""
        self._ended.append(time.perf_counter())
        return len(self._ended) >= LEAST_STEPS - 1

    def choose(self, plan: Plan, matrices: Mapping[str, Matrix], key: Key) -> tuple[Knobs, str]:
        """The knobs, the same on all ranks, and the reasons. Every rank must call it."""
        found = self._measured(plan, matrices, key)
        spec = self.spec
        return choose(self.auto, spec.knobs, found, self.pieces.shapes, whole_round=spec.delay != "none")

    def _measured(self, plan: Plan, matrices: Mapping[str, Matrix], key: Key) -> Measured:
        elements = sum(segment.numel for segment in self.pieces.segments.values())

        def seconds(values: Named) -> float:
            started = time.perf_counter()
            flow = exchange(
                values, plan, self.spec.rule, self.pieces.place, key, State(self.spec.kinds), matrices=matrices,
                route=self.spec.route,
            )  # fmt: skip
            self.pieces.channel.run(flow, "trial")
            return time.perf_counter() - started

        few, many = self._first(TRIAL // 8), self._first(TRIAL)
        seconds(few)  # nobody waits for a rank that comes late in what is measured
        trials = [(sum(value.numel() for value in values.values()), seconds(values)) for values in (few, many)]
        own = fitted(median_step(self._ended), trials, elements)
        mine = torch.tensor([own.step, own.latency, own.per_element * elements], dtype=torch.float64)
        step, latency, whole = self.pieces.channel.run(_largest(mine), "trial").tolist()
        return Measured(step, latency, whole, 1)

    def _first(self, elements: int) -> dict[str, Tensor]:
        """Whole parameters, as many as it takes to have so many elements."""
        found, held = [], 0
        for fqn, segment in self.pieces.segments.items():
            if held >= elements:
                break
            found.append(fqn)
            held += segment.numel
        return self.pieces.read(found)


def _largest(own: Tensor) -> Flow[Tensor]:
    """Of each number the largest of all ranks, [k]."""
    (here,) = yield AllGather((own,), axis="shard")
    (everywhere,) = yield AllGather((here.amax(0),))
    return everywhere.amax(0)
