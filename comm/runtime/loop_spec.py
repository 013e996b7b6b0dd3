"""The settings of a loop of local updates, which each method fills in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from dtrain.comm.aggregators.mean import Aggregator
from dtrain.comm.collectives.routes import Route
from dtrain.comm.outer_optimizers import OuterOptimizer
from dtrain.comm.plans.plan import Plan, as_plan, kinds_of
from dtrain.comm.runtime.consistency import Tie
from dtrain.comm.runtime.fragments import WHOLE, Fragments
from dtrain.comm.runtime.knobs import Auto, Knobs
from dtrain.comm.runtime.round_lengths import RoundLengths
from dtrain.comm.state import Kind

VERIFY_ROUNDS = 10
PLAIN: Plan = as_plan(None)
UNSENT = "unsent"
"""What a replica's gradients in the warm-up still had to send at its end; see `step_source.WarmUp`."""

Delay: TypeAlias = Literal["none", "stale", "eager"]
Inner: TypeAlias = Literal["any", "muon"]
OuterState: TypeAlias = Literal["replicated", "sharded", "offloaded"]


@dataclass(frozen=True)
class LoopSpec:
    """The settings of a loop of local updates; see `dtrain.comm.methods.local_update.local_update`.

    ``every_steps``: where rounds differ in length, as ``lengths`` says, that of the shortest. ``warmup_plan``: the
    compression of gradients in the warm-up.
    """

    every_steps: int
    outer: OuterOptimizer
    plan: Plan
    rule: Aggregator
    fragments: Fragments = WHOLE
    overlap_steps: int = 0
    mix: float = 0.0
    delay: Delay = "none"
    warmup_steps: int = 0
    verify_every: int = VERIFY_ROUNDS
    outer_state: OuterState = "replicated"
    auto: Auto | None = None
    route: Route = "auto"
    tie: Tie = "stop"
    lossless: int | None = None
    inner: Inner = "any"
    lengths: RoundLengths | None = None
    warmup_plan: Plan = PLAIN

    @property
    def kinds(self) -> dict[str, Kind]:
        outer: dict[str, Kind] = {"anchor": "replicated", **self.outer.kinds}
        if self.delay == "eager":
            outer = {**dict.fromkeys(outer, "per_worker"), "own_delta": "per_worker"}
        if self.overlaps:
            outer["arrived"] = "replicated"
        warmup: dict[str, Kind] = kinds_of(self.warmup_plan)
        if "residual" in warmup:
            warmup[UNSENT] = "per_worker"
        return {**outer, **warmup, **kinds_of(self.plan)}

    @property
    def overlaps(self) -> bool:
        """Whether exchanges overlap inner steps, or may."""
        return self.overlap_steps > 0 or (self.auto is not None and self.auto.overlap_steps)

    @property
    def knobs(self) -> Knobs:
        return Knobs(self.every_steps, self.overlap_steps, self.mix, self.fragments)

    @property
    def weighs(self) -> bool:
        """Whether replicas weigh by their tokens; not where every replica must know all weights."""
        return self.delay != "eager" and "replicated" not in kinds_of(self.plan).values()
