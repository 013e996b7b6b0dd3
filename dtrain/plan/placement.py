"""How a model is placed on one rank, and what each engine tells of its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dtrain.plan.describe import Event
from dtrain.plan.ledger import Ledger

FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How a model is placed. ``exchanged``: whether gradients leave the replica, as they do under every-step syncs."""

    shards: int
    bf16: bool
    bucket_mib: float
    microbatches: int
    exchanged: bool


class EngineMemory(Protocol):
    """One engine's part of a step."""

    def built(self, ledger: Ledger) -> None:
        """The model was built in fp32, and the engine around it; what is there from step to step is added."""

    def on(self, event: Event, ledger: Ledger, *, first: bool, last: bool) -> None:
        """``first``, ``last``: whether this is the first and the last microbatch of the step."""

    def before_optimizer(self, ledger: Ledger) -> None:
        """Backward is over."""

    def stepped_shapes(self) -> list[tuple[int, ...]]:
        """What the inner optimizer steps, all fp32."""

    def after_optimizer(self, ledger: Ledger) -> None:
        """Gradients are cleared."""
