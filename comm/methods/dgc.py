"""Deep Gradient Compression (Lin et al., arXiv:1712.01887): top-k with momentum correction.

    u = m u + g;   v = v + u;   send the largest of v;   where it was sent: v = 0, u = 0

It has its own momentum, so the inner optimizer is plain SGD. The warm-up has the paper's four stages, here of equal
length instead of an epoch each: 25, 6.25, 1.5625 and 0.390625 % of the elements, or the final density where that is
more; then 0.1 %. The paper clips each replica's gradient before it accumulates; here the combined gradient is clipped.
As in the paper every element that any replica has sent is stepped, at most `UNION` times as many as one replica sends
where there are many replicas.
Communication: that of `every_step` for top-k. Keeps: two fp32 numbers for each element, per replica.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.comm.collectives.routes import Route
from dtrain.comm.compressors.sparse import topk
from dtrain.comm.feedback import Compression, Feedback
from dtrain.comm.methods.every_step import VERIFY_STEPS, EveryStep, every_step
from dtrain.comm.pieces import Pieces
from dtrain.comm.plans.plan import Plan, after
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.consistency import Tie
from dtrain.comm.runtime.method import Sync
from dtrain.comm.state import Kind, State

STAGES = 4
RATIO = 0.25
"""Of the density in a stage of the warm-up to that in the stage before, which begins with all elements."""


@dataclass(frozen=True)
class MomentumCorrection(Feedback):
    """The feedback of `dgc`: the residual is a sum of momenta, and an element that was sent leaves both."""

    momentum: float

    @property
    def kinds(self) -> dict[str, Kind]:
        return {"velocity": "per_worker", "residual": "per_worker"}

    def correct(self, fqn: str, value: Tensor, state: State) -> Tensor:
        again, last = state.begun(fqn, "velocity"), state.get(fqn, "velocity", value)
        velocity = (last if again else self.momentum * last) + value  # momentum decays once a step
        state.stage(fqn, "velocity", velocity)
        return state.get(fqn, "residual", value) + (value if again else velocity)

    def retain(self, fqn: str, value: Tensor, corrected: Tensor, sent: Tensor, state: State) -> None:
        state.stage(fqn, "residual", corrected - sent)
        state.stage(fqn, "velocity", torch.where(sent != 0, 0.0, state.staged(fqn, "velocity")))

    def retain_owned(self, fqn: str, error: Tensor, start: int, world: float, state: State) -> None:
        state.staged(fqn, "residual")[start : start + error.numel()] += world * error


@dataclass(frozen=True)
class Dgc(Sync):
    """See `dgc`."""

    exchange: EveryStep

    def bind(self, pieces: Pieces, seed: int) -> Attached:
        self.require_inner(pieces.optimizer)
        return self.exchange.bind(pieces, seed)

    def require_inner(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ``ValueError`` for another inner optimizer than plain SGD."""
        if not isinstance(optimizer, torch.optim.SGD) or any(group["momentum"] for group in optimizer.param_groups):
            raise ValueError(
                "dgc has momentum of its own, so the inner optimizer must be SGD(momentum=0); "
                f"it is {_summary(optimizer)}"
            )


def dgc(
    density: float = 0.001,
    *,
    momentum: float = 0.9,
    warmup_steps: int = 0,
    route: Route = "auto",
    verify_every: int = VERIFY_STEPS,
    tie: Tie = "stop",
) -> Dgc:
    """Deep Gradient Compression.

    Args:
        density: the fraction of the elements that is sent after the warm-up.
        momentum: of each replica, applied before top-k.
        warmup_steps: steps in four equal stages, in which a quarter of the elements, 1/16, 1/64 and 1/256 are sent,
            but never less than ``density``.
        route: see `every_step`.
        verify_every, tie: when replicas are compared, and what happens if they differ; see `every_step`.

    Raises ``ValueError`` for values outside their range, and when attached to another optimizer than plain SGD.
    Source: arXiv:1712.01887, section 3.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum!r}; give a number in [0, 1)")
    if not isinstance(warmup_steps, int) or warmup_steps < 0 or 0 < warmup_steps < STAGES:
        raise ValueError(f"warmup_steps is {warmup_steps!r}; give 0, or at least {STAGES}: one for each stage")
    feedback = MomentumCorrection(float(momentum))
    plan: Plan = Compression(topk(density), feedback)
    if warmup_steps:
        stages = [Compression(topk(max(RATIO**stage, density)), feedback) for stage in range(1, STAGES + 1)]
        plan = stages[0]
        for number, then in enumerate([*stages[1:], Compression(topk(density), feedback)], 1):
            plan = after(number * warmup_steps // STAGES, then, before=plan)
    return Dgc(every_step(compress=plan, route=route, verify_every=verify_every, tie=tie))


def _summary(optimizer: torch.optim.Optimizer) -> str:
    momenta = sorted({group.get("momentum", 0) for group in optimizer.param_groups})
    return f"{type(optimizer).__name__}, momentum {momenta}" if any(momenta) else type(optimizer).__name__
