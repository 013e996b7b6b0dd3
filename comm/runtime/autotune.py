"""Measures the first steps of the run, then two trial exchanges, for `knobs`.

Communication: three exchanges of up to some million elements with the compressor in use, whose results are discarded,
and three numbers from each rank. All ranks use the figures of the slowest, so all choose the same.
"""

from __future__ import annotations

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
"""The least elements of a trial exchange, which takes parameters as a whole."""


class Choosing:
    """Measures and chooses, on one rank."""

    def __init__(self, spec: LoopSpec, pieces: Pieces) -> None:
        assert spec.auto is not None
        self.spec, self.auto, self.pieces = spec, spec.auto, pieces
        self._ended: list[float] = []
        if spec.fragments.auto:
            spec.fragments.cut(pieces.shapes)  # a model without blocks is refused now, not after ten steps

    def step_ended(self) -> bool:
        """Record that an inner step has ended; returns whether enough have."""
        self._ended.append(self.pieces.channel.seconds())
        return len(self._ended) >= LEAST_STEPS - 1

    def choose(self, plan: Plan, matrices: Mapping[str, Matrix], key: Key) -> tuple[Knobs, str]:
        """The knobs, the same on all ranks, and the reasons. Every rank must call it."""
        measured = self._measured(plan, matrices, key)
        spec = self.spec
        return choose(self.auto, spec.knobs, measured, self.pieces.shapes, whole_round=spec.delay != "none")

    def _measured(self, plan: Plan, matrices: Mapping[str, Matrix], key: Key) -> Measured:
        elements = sum(segment.numel for segment in self.pieces.segments.values())

        def seconds(values: Named) -> float:
            started = self.pieces.channel.seconds()
            flow = exchange(
                values, plan, self.spec.rule, self.pieces.place, key, State(self.spec.kinds), matrices=matrices,
                route=self.spec.route, lossless=self.spec.lossless,
            )  # fmt: skip
            self.pieces.channel.run(flow, "trial")
            return self.pieces.channel.seconds() - started

        few, many = self._first(TRIAL // 8), self._first(TRIAL)
        seconds(few)  # ranks that come late are waited for here, not in what is measured
        trials = [(sum(value.numel() for value in values.values()), seconds(values)) for values in (few, many)]
        local = fitted(median_step(self._ended), trials, elements)
        seconds_here = torch.tensor([local.step, local.latency, local.per_element * elements], dtype=torch.float64)
        step, latency, transfer = self.pieces.channel.run(_largest(seconds_here), "trial").tolist()
        return Measured(step, latency, transfer, 1)

    def _first(self, elements: int) -> dict[str, Tensor]:
        """The first parameters that together have ``elements`` or more."""
        fqns, held = [], 0
        for fqn, segment in self.pieces.segments.items():
            if held >= elements:
                break
            fqns.append(fqn)
            held += segment.numel
        return self.pieces.read(fqns)


def _largest(numbers: Tensor) -> Flow[Tensor]:
    """The elementwise maximum of ``numbers`` [k] over all ranks."""
    (by_shard,) = yield AllGather((numbers,), axis="shard")
    (by_replica,) = yield AllGather((by_shard.amax(0),))
    return by_replica.amax(0)
