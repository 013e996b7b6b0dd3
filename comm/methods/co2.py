"""CO2 (Sun et al., ICLR 2024, arXiv:2401.16265): local steps with an average that is one round old, hidden whole.

    m <- clip(momentum m + D / gap, -limit, limit);   anchor <- anchor - lr m        D: the mean delta of the last round

The row of `local_update` with ``delay="stale"``, outer heavy ball, a penalty for the gap between the anchor that D was
measured from and the one that it is applied to, and a momentum that is clipped. Without penalty and clip it is delayed
DiLoCo with heavy ball; without the delay, too, it is SlowMo at a constant learning rate.

The paper's formula for the gap could not be checked. Ours follows its idea, gap-aware staleness (Barkai et al.): how
far the anchor has moved meanwhile, in units of what the inner optimizer may move an element in a round,

    gap = 1 + |anchor now - anchor then| / (inner lr x H)           elementwise, for inner optimizers such as Adam

or a number, or a rule of one's own.
Communication: one round every H steps, behind all of the next round. Bytes: of one parameter exchange per round.
Keeps: the anchor and the momentum; with another penalty than this gap, or without momentum, the last anchor, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from dtrain.comm.kernels import kernel
from dtrain.comm.methods.local_update import LocalUpdate, local_update
from dtrain.comm.outer_optimizers import (
    PLAIN,
    Momentum,
    OuterOptimizer,
    Round,
    in_one_pass,
    momentum_step,
    sgd,
    writable,
)
from dtrain.comm.plans.plan import Compress
from dtrain.comm.runtime.consistency import Tie
from dtrain.comm.runtime.knobs import Knob
from dtrain.comm.runtime.loop_spec import VERIFY_ROUNDS
from dtrain.comm.state import Kind, State

Gap: TypeAlias = Callable[[Tensor, Tensor, Round], Tensor]
"""(anchor now [n], anchor then [n], the round) -> what to divide by, [n] or 0-dim, at least 1. Equal on all ranks."""


def gap_aware(now: Tensor, then: Tensor, this: Round) -> Tensor:
    """See the module. 1 where the inner learning rate is 0."""
    reach = this.inner_lr * this.every_steps
    return (now - then).abs_().div_(reach).add_(1) if reach > 0 else now.new_ones(())


@dataclass(frozen=True)
class Constant:
    """The same penalty everywhere and always."""

    value: float

    def __call__(self, now: Tensor, then: Tensor, this: Round) -> Tensor:
        return now.new_full((), self.value)


@dataclass(frozen=True)
class Penalized:
    """``outer`` along deltas that are divided by their gap."""

    outer: OuterOptimizer
    gap: Gap

    @property
    def kinds(self) -> dict[str, Kind]:
        return {**self.outer.kinds, "then": "replicated"}

    @property
    def uses_inner_lr(self) -> bool:
        return self.gap is gap_aware

    def step(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, now: Round = PLAIN) -> Tensor:
        then = state.find(fqn, "then")
        then = anchor if then is None else then
        state.stage(fqn, "then", anchor)
        return self.outer.step(fqn, anchor, delta / self.gap(anchor, then, now), state, now)


@kernel
def gap_aware_step(
    delta: Tensor, reach: Tensor, anchor: Tensor, momentum: Tensor,
    *, lr: float, factor: float, nesterov: bool, clip: float | None,
) -> None:  # fmt: skip
    """`momentum_step` by the delta over its gap, as `gap_aware` has it; ``reach`` [1, 1, 1]."""
    gap = (lr * momentum).abs_().div_(reach).add_(1)
    momentum_step.function(delta / gap, anchor, momentum, lr=lr, factor=factor, nesterov=nesterov, clip=clip)


@dataclass(frozen=True)
class GapAware:
    """`Penalized` by `gap_aware`, of a heavy ball, which knows how far the anchor has moved: lr times its momentum.

    So nothing more is kept, and it is one pass over memory.
    """

    outer: Momentum

    @property
    def kinds(self) -> dict[str, Kind]:
        return self.outer.kinds

    @property
    def uses_inner_lr(self) -> bool:
        return True

    def step(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, now: Round = PLAIN) -> Tensor:
        return self._moved(fqn, anchor.clone(), delta, state, now, copy=True)

    def step_(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, now: Round = PLAIN) -> Tensor:
        return self._moved(fqn, anchor, delta, state, now, copy=False)

    def _moved(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, now: Round, *, copy: bool) -> Tensor:
        momentum, reach = writable(state, fqn, "momentum", anchor, copy=copy), now.inner_lr * now.every_steps
        flat, constants = (delta, anchor, momentum), self.outer.constants
        if reach > 0:
            in_one_pass(gap_aware_step, flat, anchor.new_full((1, 1, 1), reach), constants=constants)
        else:
            in_one_pass(momentum_step, flat, constants=constants)
        return anchor


def co2(
    *,
    every_steps: Knob = 12,
    lr: float = 1.0,
    momentum: float = 0.2,
    gap: Literal["gap_aware", "none"] | float | Gap = "gap_aware",
    clip: float | None = 1.0,
    compress: Compress = None,
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> LocalUpdate:
    """CO2.

    Args:
        every_steps: tau, the inner steps in a round, in which an exchange must fit to stay hidden; "auto": as many as
            it takes, see `knobs`.
        lr: the outer learning rate.
        momentum: of the outer heavy ball, in [0, 1).
        gap: the penalty for staleness: "gap_aware", "none", a number of at least 1, or a rule.
        clip: the largest element of the outer momentum by amount; None leaves it as it is.
        compress: a compressor for the deltas, ``error_feedback(...)`` of one, or None for fp32.
        verify_every, tie: when replicas are compared, and what happens if they differ; see `local_update`.

    >>> co2().delay
    'stale'

    Raises ``ValueError`` for numbers outside their range or another word for the gap. Source: arXiv:2401.16265.
    """
    heavy_ball = sgd(lr=lr, momentum=momentum, clip=clip)
    rule = _rule(gap)
    outer: OuterOptimizer = heavy_ball if rule is None else Penalized(heavy_ball, rule)
    if rule is gap_aware and momentum:
        outer = GapAware(heavy_ball)
    return local_update(
        every_steps=every_steps, outer=outer, compress=compress, delay="stale", verify_every=verify_every, tie=tie
    )


def _rule(gap: object) -> Gap | None:
    if gap == "none":
        return None
    if gap == "gap_aware":
        return gap_aware
    if isinstance(gap, int | float) and not isinstance(gap, bool) and gap >= 1:
        return Constant(float(gap))
    if callable(gap):
        rule: Gap = gap
        return rule
    raise ValueError(f"gap is {gap!r}; choose 'gap_aware', 'none', a number of at least 1, or give a function")
